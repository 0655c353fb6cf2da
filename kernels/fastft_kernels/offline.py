"""Compiles launches for a GPU that is not there, and reads from the machine code what it will need.

Triton compiles for any target from any machine, and its wheel brings NVIDIA's assembler and disassembler. So registers,
spills, shared memory and tensor-core instructions are known before a GPU has ever been seen.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastft_kernels import support
from fastft_kernels.support import triton

CUDA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
HIP_ARCHS = ("gfx942",)
ARCHS = CUDA_ARCHS + HIP_ARCHS

TENSOR_CORE = ("HMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "IMMA", "MFMA")
"""Opcodes of the tensor cores, by generation."""


@dataclass(frozen=True, slots=True)
class Card:
    """What a multiprocessor has (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").

    Attributes:
        block_smem: shared memory that one block may have, bytes; Triton needs 1 KiB of it for the system.
        smem: shared memory of the multiprocessor, bytes.
        threads, blocks: the most at a time.
    """

    block_smem: int
    smem: int
    threads: int
    blocks: int


CARDS = {
    "sm_80": Card(166912, 167936, 2048, 32),
    "sm_86": Card(101376, 102400, 1536, 16),
    "sm_89": Card(101376, 102400, 1536, 24),
    "sm_90": Card(232448, 233472, 2048, 32),
    "sm_100": Card(232448, 233472, 2048, 32),
    "sm_120": Card(101376, 102400, 1536, 24),
}
REGISTERS = 65536
"""32-bit registers of a multiprocessor, of every architecture above."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as it would be launched.

    Attributes:
        kernel: its name.
        arch: what it was compiled for.
        dtypes: of its tensor arguments, in their order.
        warps, stages: as launched.
        registers: of a thread (vector registers on gfx942).
        stack: bytes of a thread's stack; more than 0 is a spill, or an array with a computed index.
        spills: loads and stores of a thread's local memory (spilled registers on gfx942).
        smem: shared memory of a block, bytes.
        blocks: blocks of a multiprocessor at a time; 0 where they do not fit, None on gfx942.
        products: dot products of 16-bit operands that its source asks for.
        tensor: tensor-core instructions.
        atomics: atomic additions, of whatever type.
        narrow: 16-bit loads and stores of single elements.
        instructions: all of them.
    """

    kernel: str
    arch: str
    dtypes: tuple[str, ...]
    warps: int
    stages: int
    registers: int
    stack: int
    spills: int
    smem: int
    blocks: int | None
    products: int
    tensor: int
    atomics: int
    narrow: int
    instructions: int


def target_of(arch: str) -> Any:
    """Triton's `GPUTarget` of an architecture's name."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


class _Driver:
    """Stands in for Triton's driver, which wants a GPU, while launches are compiled for `target`."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> Hashable:
        return str(self._target)  # compiled kernels are kept by device: one for each target

    def get_current_stream(self, _device: Hashable) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


@dataclass(slots=True)
class Capture:
    """The launches of a `capture` block: what was compiled, each kind once, and how often it was launched."""

    arch: str
    compiled: dict[Hashable, Compiled] = field(default_factory=dict)
    launches: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def capture(arch: str) -> Iterator[Capture]:
    """Within it, `kernel[grid](...)` on CPU tensors compiles the kernel for `arch`, as it would be launched there
    (specialised on the same divisibility of its arguments), and launches nothing."""
    from triton.runtime import driver

    found = Capture(arch)
    launch, active = triton.KernelInterface.__getitem__, driver._active

    def compile_instead(kernel: Any, grid: Any) -> Any:
        def compile_it(*arguments: Any, **named: Any) -> None:
            made = kernel.warmup(*arguments, grid=(1,), **named)
            name = kernel.fn.__name__
            found.launches[name] += 1
            if made.hash not in found.compiled:
                dtypes = (str(x.dtype).removeprefix("torch.") for x in arguments if hasattr(x, "data_ptr"))
                found.compiled[made.hash] = _analysed(made, name, arch, tuple(dtypes))

        return compile_it

    driver.set_active(_Driver(target_of(arch)))
    triton.KernelInterface.__getitem__ = compile_instead
    try:
        with support.offline(arch):
            yield found
    finally:
        triton.KernelInterface.__getitem__ = launch
        driver._active = active


def _analysed(made: Any, name: str, arch: str, dtypes: tuple[str, ...]) -> Compiled:
    figures = _amd_figures(made.asm["amdgcn"]) if arch in HIP_ARCHS else _nvidia_figures(made.asm["cubin"], made.name)
    about = made.metadata
    blocks = None if arch in HIP_ARCHS else blocks_at_a_time(arch, figures["registers"], about.shared, about.num_warps)
    return Compiled(
        kernel=name,
        arch=arch,
        dtypes=dtypes,
        warps=about.num_warps,
        stages=about.num_stages,
        smem=about.shared,
        blocks=blocks,
        products=len(_NARROW_PRODUCT.findall(made.asm["ttir"])),
        **figures,
    )


def blocks_at_a_time(arch: str, registers: int, smem: int, warps: int) -> int:
    """How many blocks a multiprocessor holds; 0 where even one does not fit."""
    card = CARDS[arch]
    if smem > card.block_smem:
        return 0
    of_a_warp = -(-registers * 32 // 256) * 256  # registers are given to a warp in units of 256
    by_registers = REGISTERS // (of_a_warp * warps) if registers else card.blocks
    return min(by_registers, card.smem // (smem + 1024), card.threads // (32 * warps), card.blocks)


_NARROW_PRODUCT = re.compile(r"tt\.dot .*: tensor<[0-9x]*x(?:bf16|f16)")
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)", re.MULTILINE)


def _nvidia_figures(cubin: bytes, name: str) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        code = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    uses = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.split(f"Function {name}")[1])}
    opcodes = _OPCODE.findall(code)
    counts = Counter(opcode for opcode, _ in opcodes)
    narrow = sum(op in ("LDG", "STG") and bool({"U16", "S16"} & set(rest.split("."))) for op, rest in opcodes)
    return {
        "registers": uses["REG"],
        "stack": uses["STACK"],
        "spills": counts["LDL"] + counts["STL"],
        "tensor": sum(counts[op] for op in TENSOR_CORE),
        "atomics": counts["ATOMG"] + counts["ATOM"] + counts["RED"] + counts["REDG"],
        "narrow": narrow,
        "instructions": len(opcodes),
    }


def _amd_figures(code: str) -> dict[str, int]:
    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", code)
        return int(found.group(1)) if found else 0

    return {
        "registers": value("vgpr_count"),
        "stack": value("private_segment_fixed_size"),
        "spills": value("vgpr_spill_count") + value("sgpr_spill_count"),
        "tensor": len(re.findall(r"\bv_s?mfma_", code)),
        "atomics": len(re.findall(r"\b(?:global|flat|buffer)_atomic_", code)),
        "narrow": len(re.findall(r"\b(?:global|buffer)_(?:load|store)_(?:ushort|sshort|short)\b", code)),
        "instructions": len(re.findall(r"^\s+[sv]_\w+|^\s+(?:global|buffer|ds)_\w+", code, re.MULTILINE)),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
