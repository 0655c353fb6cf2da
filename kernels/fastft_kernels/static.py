"""The static gate: every kernel at every shipped configuration, compiled for GPUs that are not there.

    python -m fastft_kernels.static [--arch sm_80 sm_90] [--update] [--markdown] [--liger]

The public functions run forward and backward on CPU tensors of real widths, and each launch is compiled instead. A
kernel fails that spills registers, does not fit into shared memory, multiplies without tensor cores, adds atomically,
or reads and writes single 16-bit elements; and one that needs more registers, or of which fewer blocks fit at a time,
than the golden figures say. No GPU is asked for or touched.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastft_kernels import offline, support
from fastft_kernels.offline import CARDS, Compiled
from fastft_kernels.support import triton

GATED = ("sm_80", "sm_86", "sm_90", "sm_100")
REPORTED = ("gfx942",)
"""Architectures that kernels must compile for, and whose figures decide nothing."""
GOLDEN = Path(__file__).with_name("static_golden.json")
MORE_REGISTERS = 8
"""Registers that a kernel may need beyond its golden figure: one step of the hardware's allocation."""

WIDTHS = (768, 1024, 1280, 1600)
HEADS = {32: 12, 64: 16, 128: 8}
"""Head dimensions, with a number of heads that they occur with."""
VOCAB = 50257
V = 1105
"""Stands for GPT-2's vocabulary. Compiled code depends on a size by whether it is a multiple of 16; 50257 is one more
than such a multiple, as this is, and torch's products between the launches take no time."""
ODD_ROWS = 17
"""Rows of a loss: their number is a multiple of nothing in most batches, and it is a stride."""
TOKENS, PREFIX = 201, 40
"""Of a pack whose examples share a prefix, cut into parts in dK and dV; as odd a number as most are."""

NARROW = {
    "cross_entropy_forward": "the caller's logits: rows of 50257 elements begin anywhere",
    "cross_entropy_backward": "the same logits; the gradient is stored in whole lines",
    "attention_decode_forward": "one query and one output a program: D elements for 128 threads",
}
"""Kernels that may read single 16-bit elements, and why."""


def _attention(D: int, dtype: torch.dtype, *, rows: bool) -> None:
    from fastft_kernels import attention, plan_attention
    from fastft_kernels.attention import SMALL_TILES

    T, H = TOKENS, HEADS[D]
    until = torch.full((T,), T, dtype=torch.int32)
    until[PREFIX : T // 2] = T // 2
    asked = torch.arange(T // 3, T - 1) if rows else None
    q, k, v = (x.view(T, H, D) for x in _learnt(T, 3 * H * D, dtype=dtype).split(H * D, dim=1))
    q = q if asked is None else q.index_select(0, asked)
    tiles: dict[str, Any] = SMALL_TILES if (D, dtype) == (128, torch.float32) else {}
    plan = plan_attention(until, asked, chunk=64, **tiles)
    _backward(attention(q, k, v, until, q_rows=asked, plan=plan, impl="triton"))


def _attention_decode(D: int, dtype: torch.dtype) -> None:
    from fastft_kernels import attention_decode

    H = HEADS[D]
    cache, prefix = torch.empty(2, 4, 256, H, D, dtype=dtype), torch.empty(2, PREFIX, H, D, dtype=dtype)
    q, lengths = torch.empty(4, H, D, dtype=dtype), torch.full((4,), 100, dtype=torch.int32)
    attention_decode(q, cache[0], cache[1], lengths, prefix_k=prefix[0], prefix_v=prefix[1], impl="triton")


def _layer_norm(width: int, branch: torch.dtype | None, stream: torch.dtype, out: torch.dtype) -> None:
    from fastft_kernels import layer_norm

    x = _learnt(64, width, dtype=stream)
    weight, bias = (_learnt(width, dtype=torch.float32) for _ in range(2))
    if branch is None:
        _backward(layer_norm(x, weight, bias, out_dtype=out, impl="triton"))
    else:
        added = _learnt(64, width, dtype=branch)
        _backward(layer_norm(added, weight, bias, residual=x, out_dtype=out, impl="triton"))


def _gelu(width: int, dtype: torch.dtype) -> None:
    from fastft_kernels import gelu

    _backward(gelu(_learnt(64, 4 * width, dtype=dtype), _learnt(4 * width, dtype=torch.float32), impl="triton"))


def _cross_entropy(dtype: torch.dtype) -> None:
    from fastft_kernels import cross_entropy

    _backward(cross_entropy(_learnt(ODD_ROWS, V, dtype=dtype), _targets(), impl="triton"))


def _linear_cross_entropy(width: int, dtype: torch.dtype, *, rows: bool) -> None:
    from fastft_kernels import linear_cross_entropy

    hidden, weight = _learnt(ODD_ROWS, width, dtype=dtype), _learnt(V, width, dtype=dtype)
    picked = torch.arange(ODD_ROWS) if rows else None
    _backward(linear_cross_entropy(hidden, weight, _targets(), rows=picked, impl="triton"))


def _rows(width: int, dtype: torch.dtype, of_gradient: torch.dtype) -> None:
    from fastft_kernels import add_rows_, plan_rows, take_rows

    each_once = torch.arange(TOKENS)
    for rows in (each_once, each_once.clamp_min(TOKENS - PREFIX)):  # the second ones with a whole chunk of one row
        plan = plan_rows(rows)
        _backward(take_rows(_learnt(V, width, dtype=dtype), rows, plan=plan, out_dtype=of_gradient, impl="triton"))
        add_rows_(torch.empty(V, width, dtype=dtype), torch.empty(TOKENS, width, dtype=of_gradient), plan, "triton")


def _targets() -> Tensor:
    return torch.arange(ODD_ROWS)


def _learnt(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, requires_grad=True)


def _backward(outputs: Tensor | tuple[Tensor, ...]) -> None:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def _cases() -> Iterator[tuple[str, Callable[[], None]]]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for D in HEADS:
        yield f"attention D={D} bf16", partial(_attention, D, bf16, rows=False)
        yield f"attention D={D} fp32", partial(_attention, D, fp32, rows=False)
        yield f"attention_decode D={D} bf16", partial(_attention_decode, D, bf16)
    yield "attention D=64 fp16", partial(_attention, 64, fp16, rows=False)
    yield "attention D=64 bf16, of some rows", partial(_attention, 64, bf16, rows=True)
    for C in WIDTHS:
        yield f"layer_norm C={C} bf16", partial(_layer_norm, C, None, fp32, bf16)
        yield f"layer_norm C={C} bf16, added", partial(_layer_norm, C, bf16, fp32, bf16)
    yield "layer_norm C=4096 bf16, added", partial(_layer_norm, 4096, bf16, fp32, bf16)
    yield "layer_norm C=1024 fp16, added", partial(_layer_norm, 1024, fp16, fp32, fp16)
    yield "layer_norm C=1024 fp32, added", partial(_layer_norm, 1024, fp32, fp32, fp32)
    for name, dtype in (("bf16", bf16), ("fp16", fp16), ("fp32", fp32)):
        yield f"gelu F=4096 {name}", partial(_gelu, 1024, dtype)
        yield f"cross_entropy {name}", partial(_cross_entropy, dtype)
        yield f"linear_cross_entropy C=1024 {name}", partial(_linear_cross_entropy, 1024, dtype, rows=True)
    for C in WIDTHS:
        yield f"rows C={C} bf16", partial(_rows, C, bf16, bf16)
    yield "rows C=1024 fp32", partial(_rows, 1024, fp32, fp32)
    yield "rows C=1024 bf16, gradient fp32", partial(_rows, 1024, bf16, fp32)
    yield "rows C=1024 fp16", partial(_rows, 1024, fp16, fp16)
    for C in (768, 1280, 1600):
        yield f"linear_cross_entropy C={C} bf16", partial(_linear_cross_entropy, C, bf16, rows=True)
    yield "linear_cross_entropy C=1024 bf16, no rows", partial(_linear_cross_entropy, 1024, bf16, rows=False)


CASES: dict[str, Callable[[], None]] = dict(_cases())
"""What is compiled: name -> function that calls a public function, forward and backward."""


@dataclass(frozen=True, slots=True)
class Row:
    """A kernel as a case launches it.

    Attributes:
        case: the first one that launches it in this form.
        name: the kernel's, numbered from the case's second form on.
        figures: what it needs.
    """

    case: str
    name: str
    figures: Compiled

    @property
    def label(self) -> str:
        """Where it is, for messages."""
        return f"{self.figures.arch}, {self.case}, {self.name}"


def compiled(arch: str, cases: dict[str, Callable[[], None]] | None = None) -> tuple[list[Row], list[str]]:
    """Runs cases for an architecture: the kernels that they launch, each form once, and what did not compile."""
    failures: list[str] = []
    where: dict[Hashable, tuple[str, str]] = {}
    with offline.capture(arch) as found:
        for case, run in (CASES if cases is None else cases).items():
            try:
                run()
            except Exception as error:
                failures.append(f"{arch}, {case}: does not compile: {_last_line(error)}")
            times: Counter[str] = Counter()
            for key in [key for key in found.made if key not in where]:
                kernel = found.made[key][1]
                times[kernel] += 1
                where[key] = case, kernel if times[kernel] == 1 else f"{kernel} {times[kernel]}"
    return [Row(*where[key], figures) for key, figures in found.compiled.items()], failures


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip() if lines else error!r}"


def faults(figures: Compiled) -> list[str]:
    """What is wrong with a kernel, whatever it was before."""
    card, found = CARDS[figures.arch], []
    if figures.stack or figures.spills:
        found.append(f"{figures.stack} bytes of stack and {figures.spills} spill instructions, expected none")
    if figures.smem > card.block_smem:
        found.append(f"{figures.smem} bytes of shared memory, expected at most {card.block_smem}")
    elif figures.blocks == 0:
        found.append("not one block fits into a multiprocessor")
    if figures.products and not figures.tensor:
        found.append("no tensor-core instruction, expected some: it multiplies 16-bit matrices")
    if figures.atomics:
        found.append(f"{figures.atomics} atomic additions, expected none: their order changes the result")
    if figures.narrow and figures.kernel not in NARROW:
        found.append(f"{figures.narrow} loads and stores of single 16-bit elements, expected none")
    return found


def regressions(figures: Compiled, golden: dict[str, int]) -> list[str]:
    """What is worse than the golden figures."""
    found = []
    if figures.registers > golden["registers"] + MORE_REGISTERS:
        found.append(f"{figures.registers} registers, expected at most {golden['registers']} + {MORE_REGISTERS}")
    if (figures.blocks or 0) < golden["blocks"]:
        found.append(f"{figures.blocks} blocks of a multiprocessor at a time, expected {golden['blocks']}")
    if golden["tensor"] and not figures.tensor:
        found.append(f"no tensor-core instruction, expected {golden['tensor']}")
    return found


def golden_of(row: Row) -> dict[str, int]:
    """The figures of a kernel that later ones are held against."""
    figures = row.figures
    return {"registers": figures.registers, "blocks": figures.blocks or 0, "tensor": figures.tensor}


Golden = dict[str, dict[str, dict[str, dict[str, dict[str, int]]]]]
"""Triton's version -> architecture -> case -> kernel -> figures."""


def judged(rows: Sequence[Row], golden: Golden) -> tuple[list[str], list[str]]:
    """Faults and regressions of gated kernels, a line each; and, a line each, what was compared with nothing."""
    failures, notes = [], []
    of_version = golden.get(triton.__version__, {})
    new: Counter[str] = Counter()
    for row in rows:
        arch = row.figures.arch
        if arch not in CARDS:
            continue
        failures += [f"{row.label}: {fault}" for fault in faults(row.figures)]
        before = of_version.get(arch, {}).get(row.case, {}).get(row.name)
        if before is None:
            new[arch] += 1
        else:
            failures += [f"{row.label}: {worse}" for worse in regressions(row.figures, before)]
    for arch, n in new.items():
        notes.append(
            f"{arch}: {n} kernels have no golden figures for Triton {triton.__version__}; --update writes them"
        )
    return failures, notes


def updated(golden: Golden, rows: Sequence[Row]) -> Golden:
    """The golden figures with those of these rows' architectures in place of what they had."""
    by_arch: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for row in rows:
        if row.figures.arch in CARDS:
            by_arch.setdefault(row.figures.arch, {}).setdefault(row.case, {})[row.name] = golden_of(row)
    version = triton.__version__
    return {**golden, version: {**golden.get(version, {}), **by_arch}}


def written(golden: Golden) -> str:
    """JSON with a line for each kernel."""

    def lines(value: Any, depth: int) -> str:
        if not any(isinstance(inner, dict) for inner in value.values()):
            return json.dumps(value)
        pad = " " * (depth + 1)
        inner = (f"{pad}{json.dumps(key)}: {lines(value[key], depth + 1)}" for key in sorted(value))
        return "{\n" + ",\n".join(inner) + "\n" + " " * depth + "}"

    return lines(golden, 0) + "\n"


def peers(arch: str) -> list[Row]:
    """Liger-Kernel's cross-entropy and layer norm, compiled the same way; `ImportError` where it is not installed."""
    from importlib import import_module

    cross_entropy, layer_norm = (import_module(f"liger_kernel.ops.{name}") for name in ("cross_entropy", "layer_norm"))

    # It asks the GPU that is there for the number of warps.
    vars(cross_entropy)["infer_device_arch"] = lambda: "blackwell" if arch == "sm_100" else "ampere_ada"

    def loss() -> None:
        logits = _learnt(64, VOCAB, dtype=torch.bfloat16)
        cross_entropy.cross_entropy_forward(logits, torch.arange(64), None, -100, 0.0, 0.0, "mean", None, False)

    def norm() -> None:
        x, dy = (torch.empty(64, 1024, dtype=torch.bfloat16) for _ in range(2))
        weight, bias = torch.empty(1024), torch.empty(1024)
        _, x, mean, rstd, _, _ = layer_norm.layer_norm_forward(x, weight, bias, 1e-5)
        layer_norm.layer_norm_backward(dy, x, weight, bias, mean, rstd)

    rows, failures = compiled(arch, {f"Liger V={VOCAB} bf16": loss, "Liger C=1024 bf16": norm})
    for failure in failures:
        print(failure)
    return rows


HEADER = ("case", "kernel", "warps", "regs", "stack", "spills", "smem", "blocks", "tensor", "narrow", "instr")


def table(rows: Sequence[Row]) -> str:
    """The figures as text, in columns."""
    lines: list[tuple[str, ...]] = [("arch", *HEADER)]
    for row in rows:
        f = row.figures
        numbers = (f.warps, f.registers, f.stack, f.spills, f.smem, "-" if f.blocks is None else f.blocks, f.tensor)
        lines.append((f.arch, row.case, row.name, *map(str, (*numbers, f.narrow, f.instructions))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(n) if i < 3 else cell.rjust(n) for i, (cell, n) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def markdown(rows: Sequence[Row]) -> str:
    """The figures as the table of kernels/README.md: a row for each kernel, a column for each architecture."""
    archs = list(dict.fromkeys(row.figures.arch for row in rows))
    by_kernel: dict[tuple[str, str], dict[str, Compiled]] = {}
    for row in rows:
        by_kernel.setdefault((row.case, row.name), {})[row.figures.arch] = row.figures
    lines = [f"| case | kernel | {' | '.join(archs)} |", "|---|---|" + "---|" * len(archs)]
    for (case, name), cells in by_kernel.items():
        figures = (_cell(cells[arch]) if arch in cells else "" for arch in archs)
        lines.append(f"| {case} | `{name}` | {' | '.join(figures)} |")
    return "\n".join(lines)


def _cell(f: Compiled) -> str:
    """Registers / shared memory / blocks / tensor-core instructions / all instructions, and what is amiss."""
    numbers = (f.registers, f"{f.smem / 1024:.1f}K", "-" if f.blocks is None else f.blocks, f.tensor, f.instructions)
    amiss = [f"{f.spills} spills"] * (f.spills > 0) + [f"{f.narrow} of 16 bits"] * (f.narrow > 0)
    return ", ".join([" / ".join(map(str, numbers)), *amiss])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints the table and the findings; 0 where there is none, 1 else, 2 where it cannot run."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.update and options.case:
        parser.error("--update writes an architecture's figures as a whole: leave --case out")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("TRITON_INTERPRET is set: kernels then go to the interpreter and are not compiled; unset it")
        return 2
    if not support.HAS_TRITON:
        print("Triton is not installed: there is nothing to compile")
        return 2
    began = time.perf_counter()
    cases = {name: run for name, run in CASES.items() if fnmatch.fnmatch(name, f"*{options.case}*")}
    if not cases:
        parser.error(f"--case {options.case}: no case has such a name, expected one of {', '.join(CASES)}")
    golden: Golden = json.loads(options.golden.read_text(encoding="utf-8")) if options.golden.exists() else {}
    rows: list[Row] = []
    failures: list[str] = []
    for arch in options.arch:
        of_arch, broken = compiled(arch, cases)
        rows += of_arch
        failures += broken
    worse, notes = judged(rows, {} if options.update else golden)
    failures += worse
    if options.update and not failures:
        options.golden.write_text(written(updated(golden, rows)), encoding="utf-8")
        notes = [f"wrote {options.golden}"]
    print((markdown if options.markdown else table)([*rows, *(_liger(options.arch) if options.liger else [])]))
    print("\n".join(["", *notes, *failures]).rstrip())
    outcome = f"{len(failures)} findings" if failures else "nothing spills, and nothing is worse than it was"
    print(f"{len(rows)} kernels for {', '.join(options.arch)} in {time.perf_counter() - began:.0f} s: {outcome}")
    return 1 if failures else 0


def _liger(archs: Sequence[str]) -> list[Row]:
    try:
        return [row for arch in archs if arch in CARDS for row in peers(arch)]
    except ImportError as error:
        print(f"Liger-Kernel is left out: {error}")
        return []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastft_kernels.static", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=offline.ARCHS, default=[*GATED, *REPORTED], metavar="ARCH")
    parser.add_argument("--case", default="", help="only cases whose name has this text, or fits this pattern")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="file of golden figures")
    parser.add_argument("--update", action="store_true", help="write the golden figures of these architectures")
    parser.add_argument("--markdown", action="store_true", help="print the table of kernels/README.md")
    parser.add_argument("--liger", action="store_true", help="add Liger-Kernel's kernels to the table, where installed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
