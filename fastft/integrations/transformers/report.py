"""What of a model was accelerated, what was left alone, and why: printed, a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """One kind of operation.

    Attributes:
        op: as `counted` calls it.
        of: what it is in the model, and how many there are.
        by: what computes it now; empty where it was left alone.
        why: what is to be known of it, or why it was left alone.
    """

    op: str
    of: str
    by: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All lines, of a model of class `model`, and whether the process keeps the memory that it frees."""

    model: str
    lines: tuple[Line, ...]
    keeps_memory: bool = False

    @property
    def accelerated(self) -> tuple[str, ...]:
        """The operations that fastft computes now, each once; what it computes on a GPU alone is among them."""
        return tuple(dict.fromkeys(line.op for line in self.lines if line.by))

    def __str__(self) -> str:
        head = ("", "in the model", "computed by", "")
        rows = [head, *((line.op, line.of, line.by or "left alone", line.why) for line in self.lines)]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        table = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        memory = ["memory that is freed stays with the process: keep_memory=False"] if self.keeps_memory else []
        return "\n".join([self.model, *table, *memory])
