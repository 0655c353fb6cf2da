"""Compiles launches for a GPU that is not there, and reads from the machine code what it will need.

Triton compiles for any target from any machine, and its wheel brings NVIDIA's assembler and disassembler. So registers,
spills, shared memory and tensor-core instructions are known before a GPU has ever been seen.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import re
import struct
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
    """The launches of a `capture` block.

    Attributes:
        arch: what they were compiled for.
        made: what was compiled, each form once, as it came from Triton; with the kernel's name and its dtypes.
        launches: how often each kernel was launched.
        compiled: the figures of `made`, from the end of the block on.
    """

    arch: str
    made: dict[Hashable, tuple[Any, str, tuple[str, ...]]] = field(default_factory=dict)
    launches: Counter[str] = field(default_factory=Counter)
    compiled: dict[Hashable, Compiled] = field(default_factory=dict)


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
            if made.hash not in found.made:
                dtypes = (str(x.dtype).removeprefix("torch.") for x in arguments if hasattr(x, "data_ptr"))
                found.made[made.hash] = made, name, tuple(dtypes)

        return compile_it

    driver.set_active(_Driver(target_of(arch)))
    triton.KernelInterface.__getitem__ = compile_instead
    try:
        with support.offline(arch):
            yield found
    finally:
        triton.KernelInterface.__getitem__ = launch
        driver._active = active
    figures = _figures(arch, [made for made, _, _ in found.made.values()])
    for (key, (made, name, dtypes)), numbers in zip(found.made.items(), figures, strict=True):
        found.compiled[key] = _compiled(made, name, arch, dtypes, numbers)


def _compiled(made: Any, name: str, arch: str, dtypes: tuple[str, ...], figures: dict[str, int]) -> Compiled:
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


def _figures(arch: str, kernels: list[Any]) -> list[dict[str, int]]:
    if arch in HIP_ARCHS:
        return [_amd_figures(made.asm["amdgcn"]) for made in kernels]
    cubins = [made.asm["cubin"] for made in kernels]
    codes = _disassembled(arch, [_machine_code(cubin) for cubin in cubins])
    return [
        {**_resources(cubin, made.name), **_counts(code)}
        for made, cubin, code in zip(kernels, cubins, codes, strict=True)
    ]


def _resources(cubin: bytes, name: str) -> dict[str, int]:
    from triton import knobs

    usage = _output(cubin, knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    uses = {key: int(n) for key, n in re.findall(r"(REG|STACK):(\d+)", usage.split(f"Function {name}:")[1])}
    return {"registers": uses["REG"], "stack": uses["STACK"]}


def _counts(code: list[tuple[str, str]]) -> dict[str, int]:
    """Of a kernel's opcodes, each with its modifiers (`.E.128`)."""
    counts = Counter(opcode for opcode, _ in code)
    narrow = sum(op in ("LDG", "STG") and bool({"U16", "S16"} & set(rest.split("."))) for op, rest in code)
    return {
        "spills": counts["LDL"] + counts["STL"],
        "tensor": sum(counts[op] for op in TENSOR_CORE),
        "atomics": counts["ATOMG"] + counts["ATOM"] + counts["RED"] + counts["REDG"],
        "narrow": narrow,
        "instructions": len(code),
    }


def _machine_code(cubin: bytes) -> bytes:
    """The section of a cubin, an ELF file, that holds its kernel's instructions."""
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * size) for i in range(count)]
    for name, _, _, _, offset, length in headers:
        if cubin.startswith(b".text.", headers[names][4] + name):
            return cubin[offset : offset + length]
    raise ValueError("got a cubin without instructions")


_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)", re.MULTILINE)


def _disassembled(arch: str, codes: list[bytes]) -> list[list[tuple[str, str]]]:
    """The opcodes of kernels with their modifiers, all in one call: the disassembler takes half a second to start."""
    from triton import knobs

    if not codes:
        return []
    ends = list(itertools.accumulate(map(len, codes)))
    found: list[list[tuple[str, str]]] = [[] for _ in codes]
    text = _output(b"".join(codes), knobs.nvidia.nvdisasm.path, "--binary", arch.replace("sm_", "SM"))
    for address, opcode, modifiers in _INSTRUCTION.findall(text):
        found[bisect.bisect_right(ends, int(address, 16))].append((opcode, modifiers))
    return found


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


def _output(content: bytes, *command: str) -> str:
    """What a tool says of a file with this content, its last argument."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout
