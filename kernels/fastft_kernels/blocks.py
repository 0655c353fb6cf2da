"""Which rectangles of the score matrix an interval mask needs: the plan of blockwise attention.

In depth-first order a prefix tree's segments have their descendants behind them without a gap. So the visible part of
the T x T score matrix is a few full rectangles (a shared segment's keys against everything behind it in its group)
and masked squares on the diagonal (small subtrees, side by side). Their area is close to the number of pairs that see
each other, where a dense mask computes all T^2.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_SQUARE = 512
LARGEST_RECTANGLE = (1024, 1024)
"""Queries and keys of a rectangle: what bounds the memory of its scores."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the score matrix: queries `q0:q1` against keys `k0:k1`.

    Attributes:
        q0, q1: range of the queries (indices into `q_rows` where there is a query subset).
        k0, k1: range of the keys.
        mask: `[q1 - q0, k1 - k0]` boolean, True where visible; None where everything is.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    mask: Tensor | None

    def to(self, device: torch.device | str) -> Block:
        """The block with its mask on `device`."""
        mask = None if self.mask is None else self.mask.to(device)
        return Block(self.q0, self.q1, self.k0, self.k1, mask)


def plan_blocks(visible_until: Tensor, q_rows: Tensor | None = None) -> list[Block]:
    """The blocks of an interval mask, on the CPU; together they cover each visible pair exactly once.

    Args:
        visible_until: `[T]` integers on the CPU; key k is visible to query q exactly when `k <= q < visible_until[k]`.
            The intervals must nest, as those of a tree in depth-first order do.
        q_rows: `[R]` sorted tokens that ask; all T where it is not given.
    """
    until = visible_until.tolist()
    rows = torch.arange(len(until)) if q_rows is None else q_rows
    asked = rows.tolist()
    blocks = []
    for q0, q1, k0, k1, masked in _forest(until, 0, len(until)):
        r0, r1 = bisect_left(asked, q0), bisect_left(asked, q1)
        if r0 == r1:
            continue
        mask = None
        if masked:
            q, k = rows[r0:r1, None], torch.arange(k0, k1)[None, :]
            mask = (k <= q) & (q < visible_until[None, k0:k1])
        blocks.append(Block(r0, r1, k0, k1, mask))
    return blocks


_Range = tuple[int, int, int, int, bool]
"""q0, q1, k0, k1, and whether a mask is needed."""


def _forest(until: list[int], begin: int, end: int) -> Iterator[_Range]:
    """The blocks of the sibling subtrees that fill `begin:end`."""
    while begin < end:
        stop = until[begin]
        while stop < end and until[stop] - begin <= LARGEST_SQUARE:
            stop = until[stop]  # small neighbours share one masked square
        if stop - begin <= LARGEST_SQUARE:
            yield begin, stop, begin, stop, True
        else:
            stop = until[begin]
            head = next((at for at in range(begin, stop) if until[at] != stop), stop)
            yield from _causal(begin, head)
            yield from _rectangle(head, stop, begin, head)
            yield from _forest(until, head, stop)
        begin = stop


def _causal(begin: int, end: int) -> Iterator[_Range]:
    """The blocks of a segment with itself."""
    if end - begin <= LARGEST_SQUARE:
        yield begin, end, begin, end, True
        return
    middle = (begin + end) // 2
    yield from _causal(begin, middle)
    yield from _rectangle(middle, end, begin, middle)
    yield from _causal(middle, end)


def _rectangle(q0: int, q1: int, k0: int, k1: int) -> Iterator[_Range]:
    most_queries, most_keys = LARGEST_RECTANGLE
    for q in range(q0, q1, most_queries):
        for k in range(k0, k1, most_keys):
            yield q, min(q + most_queries, q1), k, min(k + most_keys, k1), False
