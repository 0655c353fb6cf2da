"""The figures of compiled kernels as text: in columns, or as the table of kernels/README.md."""

from __future__ import annotations

from collections.abc import Sequence

from fastft_kernels.static.gate import Row
from fastft_kernels.static.offline import Compiled

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
