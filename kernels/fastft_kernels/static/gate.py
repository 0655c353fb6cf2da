"""What is wrong with compiled kernels: by themselves, and beside the golden figures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from fastft_kernels.static import offline
from fastft_kernels.static.cases import CASES
from fastft_kernels.static.offline import CARDS, Compiled
from fastft_kernels.support import triton

MORE_REGISTERS = 8
"""Registers that a kernel may need beyond its golden figure: one step of the hardware's allocation."""

NARROW = {
    "cross_entropy_forward": "the caller's logits: rows of 50257 elements begin anywhere",
    "cross_entropy_backward": "the same logits; the gradient is stored in whole lines",
    "attention_decode_forward": "one query and one output a program: D elements for 128 threads",
}
"""Kernels that may read single 16-bit elements, and why."""


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
