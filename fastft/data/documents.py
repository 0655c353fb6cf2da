"""Documents cut into contexts: one after another, an end-of-text behind each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Context(NamedTuple):
    """An example of documents' ids."""

    row: int
    """Of the document that its first learned id, the second one, belongs to."""
    ids: list[int]
    """All learned but the first, which the example before has learned."""


def contexts(documents: Iterable[tuple[int, Sequence[int]]], *, end_of_text: int, max_length: int) -> Iterator[Context]:
    """Cuts documents into examples of `max_length` inputs; of the last one there may be fewer.

    Neighbours share one id, the last of one and the first of the other: so every id but the very first is learned once,
    and none is predicted from what is not there. Memory holds one document and one example.

    Args:
        documents: (row, ids without an end-of-text), in the order in which they are learned.
        end_of_text: the id behind each document.
        max_length: the most inputs of an example, which has one id more.
    """
    held: list[int] = []
    passed = 0
    """Ids that were cut off in front of `held`."""
    ends: deque[tuple[int, int]] = deque()
    """(id behind the document, counted from the very first one; its row) of those that reach into `held`."""
    for row, ids in documents:
        held += [*ids, end_of_text]
        ends.append((passed + len(held), row))
        begin = 0
        while len(held) - begin > max_length + 1:  # one id more than an example: it is not the last one yet
            yield Context(_row_of(passed + begin + 1, ends), held[begin : begin + max_length + 1])
            begin += max_length
        del held[:begin]
        passed += begin
    if len(held) > 1:
        yield Context(_row_of(passed + 1, ends), held)


def _row_of(position: int, ends: deque[tuple[int, int]]) -> int:
    """The row of the document that an id belongs to; positions rise from call to call."""
    while ends[0][0] <= position:
        ends.popleft()
    return ends[0][1]
