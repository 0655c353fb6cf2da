"""Shares of a file: the book's by default, whole and disjoint, refused where they mean nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.common.errors import UserError
from fastft.data.records import split
from fastft.data.splits import BOOKS_SHARES, Shares, shares_of, split_by


def counts(shares: Shares, n: int) -> tuple[int, int, int]:
    """Of training, validation and test."""
    parts = split_by(shares, n)
    return len(parts.train), len(parts.val), len(parts.test)


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_the_default_is_the_books(seed: int | None) -> None:
    for n in (*range(300), 935, 1100, 52_002, 999_999):
        ours, books = split_by(shares_of(None, val_file=False, test_file=False), n, seed), split(n, seed)
        for name in ("train", "test", "val"):
            assert np.array_equal(getattr(ours, name), getattr(books, name)), (n, name)
            assert getattr(ours, name).dtype == np.int64


def test_its_counts_are_the_books_int() -> None:
    """For every count: the correction for binary fractions never reaches the next whole number."""
    for n in range(20_000):
        assert counts(BOOKS_SHARES, n) == (int(n * 0.85), n - int(n * 0.85) - int(n * 0.10), int(n * 0.10))


@given(
    st.integers(0, 400),
    st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(lambda parts: parts[0] > 0),
    st.none() | st.integers(0, 9),
)
def test_parts_are_whole_and_disjoint_and_near_their_shares(n: int, twentieths: list[int], seed: int | None) -> None:
    shares = Shares(*(part / sum(twentieths) for part in twentieths))
    parts = split_by(shares, n, seed)
    assert sorted([*parts.train, *parts.test, *parts.val]) == list(range(n))
    for share, part in zip(shares, (parts.train, parts.val, parts.test), strict=True):
        assert abs(len(part) - share * n) < 2
        assert share or not len(part)
    if seed is None:
        assert [*parts.train, *parts.test, *parts.val] == list(range(n))


@pytest.mark.parametrize(
    ("shares", "n", "expected"),
    [
        ((0.9, 0.05, 0.05), 50, (45, 3, 2)),
        ((0.9, 0, 0.1), 95, (85, 0, 10)),  # without validation test has what rounding leaves
        ((0.29, 0.71, 0), 100, (29, 71, 0)),  # in binary 100 * 0.29 is less than 29
        ((1 / 3, 1 / 3, 1 / 3), 3, (1, 1, 1)),
        ((0.333333, 0.333333, 0.333334), 1000, (333, 334, 333)),
        ((1, 0, 0), 7, (7, 0, 0)),
    ],
)
def test_counts(shares: tuple[float, ...], n: int, expected: tuple[int, int, int]) -> None:
    assert counts(shares_of(shares, val_file=False, test_file=False), n) == expected


@pytest.mark.parametrize(
    ("val_file", "test_file", "expected"),
    [(True, False, (90, 0, 10)), (False, True, (95, 5, 0)), (True, True, (100, 0, 0))],
)
def test_a_part_with_a_file_leaves_its_share_to_training(
    val_file: bool, test_file: bool, expected: tuple[int, int, int]
) -> None:
    assert counts(shares_of(None, val_file=val_file, test_file=test_file), 100) == expected


@pytest.mark.parametrize(
    ("given_shares", "files", "words"),
    [
        ((0.9, 0.1), "", "shares of training, validation and test, which sum to 1"),
        ((0.9, 0.05, 0.04), "", "sum to 1"),
        ((1.1, -0.1, 0.0), "", "sum to 1"),
        ((float("nan"), 0.5, 0.5), "", "sum to 1"),
        ((1000, 50, 100), "", "got --split 1000,50,100, .*for counts.* --val_data, --test_data"),
        ((0, 0.5, 0.5), "", "above 0 for training"),
        ((0.85, 0.05, 0.1), "val", "with --val_data, expected a share of 0 .*such as 0.9,0,0.1"),
        ((0.85, 0.05, 0.1), "test", "with --test_data, expected a share of 0 .*such as 0.95,0.05,0"),
        ((0.85, 0.05, 0.1), "val test", "with --val_data, .*such as 1,0,0"),
    ],
)
def test_refused(given_shares: tuple[float, ...], files: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        shares_of(given_shares, val_file="val" in files, test_file="test" in files)
