"""Documents cut into contexts: every id but the very first is learned once, from what is in front of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.data.documents import contexts

END = 99


@given(documents=st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=8), max_length=st.integers(1, 7))
def test_every_id_but_the_first_is_learned_once(documents: list[list[int]], max_length: int) -> None:
    whole = [token for ids in documents for token in (*ids, END)]
    rows = [row for row, ids in enumerate(documents, start=1) for _ in (*ids, END)]
    found = list(contexts(enumerate(documents, start=1), end_of_text=END, max_length=max_length))
    assert [token for one in found for token in one.ids[1:]] == whole[1:]
    assert all(len(one.ids) == max_length + 1 for one in found[:-1])
    assert all(2 <= len(one.ids) <= max_length + 1 for one in found)
    assert all(one.ids[-1] == other.ids[0] for one, other in itertools.pairwise(found))
    assert [one.row for one in found] == [rows[1 + k * max_length] for k in range(len(found))]
    assert len(found) == -(-max(0, len(whole) - 1) // max_length)


def test_a_long_document_is_cut_and_a_short_one_shares_an_example() -> None:
    found = contexts([(3, [1, 2, 3, 4, 5]), (8, [6]), (9, [])], end_of_text=0, max_length=3)
    assert [(one.row, one.ids) for one in found] == [(3, [1, 2, 3, 4]), (3, [4, 5, 0, 6]), (8, [6, 0, 0])]


@pytest.mark.parametrize("documents", [[], [(1, [])]])
def test_nothing_is_made_of_nothing(documents: list[tuple[int, list[int]]]) -> None:
    assert list(contexts(documents, end_of_text=0, max_length=4)) == []


def test_documents_are_taken_one_by_one() -> None:
    """A document's examples come before the next one is asked for, but for its last."""
    taken: list[int] = []

    def documents() -> Iterator[tuple[int, list[int]]]:
        for row in (1, 2, 3):
            taken.append(row)
            yield row, [row] * 10

    found = contexts(documents(), end_of_text=0, max_length=4)
    next(found)
    assert taken == [1]
    assert len(list(found)) == 7  # 33 ids
    assert taken == [1, 2, 3]
