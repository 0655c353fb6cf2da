"""What a run's ledger says: which examples stay hard, and which never improve."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Entry:
    """An example's mean losses, from its first visit to its last; `row` counts from 1 in the data file, and is
    `FILE:ROW` where the run has several."""

    row: int | str
    first: float
    last: float
    visits: int

    @property
    def improved(self) -> bool:
        """Whether the last loss is below the first."""
        return self.last < self.first


@dataclass(frozen=True, slots=True)
class Ledger:
    """The examples of a run: how many, the worst at their last visit, and those that never improved."""

    examples: int
    worst: list[Entry]
    never_improved: list[Entry]
    n_never_improved: int


def read_ledger(lines: Iterable[Mapping[str, Any]]) -> Ledger | None:
    """Sums up the lines of `ledger.jsonl`, each with `rows` and `losses`; None where there is no
    loss that is a number.

    An example that was visited once cannot have improved, and is not counted among those that have not.
    """
    losses: dict[int | str, list[float]] = defaultdict(list)
    for line in lines:
        for row, loss in zip(line.get("rows", []), line.get("losses", []), strict=False):
            if isinstance(loss, int | float) and math.isfinite(loss):  # a step that was left out may have others
                losses[row].append(loss)
    if not losses:
        return None
    entries = [Entry(row, seen[0], seen[-1], len(seen)) for row, seen in losses.items()]
    entries.sort(key=lambda entry: -entry.last)  # of equal ones the first that was visited
    stuck = [entry for entry in entries if entry.visits > 1 and not entry.improved]
    return Ledger(len(entries), entries[:MOST_SHOWN], stuck[:MOST_SHOWN], len(stuck))
