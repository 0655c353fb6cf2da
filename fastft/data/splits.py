"""Which records are for training, validation and test: by shares of a file, or each by a file of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastft.common.errors import UserError
from fastft.data.records import Split

_OF_ONE = 1e-6
"""How far from 1 the sum of written shares may be: three thirds are."""
_OF_BINARY = 1e-12
"""Relative, how far below it a product of a count and a decimal share may come out: 100 times 0.29 is not quite 29."""


class Shares(NamedTuple):
    """The parts of each data file's records, which sum to 1; in the order of `--split`."""

    train: float
    val: float
    test: float


BOOKS_SHARES = Shares(0.85, 0.05, 0.10)


def shares_of(given: Sequence[float] | None, *, val_file: bool, test_file: bool) -> Shares:
    """The shares that `--split` asks for; where it is not given the book's, of which training also has that of a part
    with a file of its own.

    Args:
        given: three numbers, for training, validation and test.
        val_file, test_file: whether that part has a file of its own.

    Raises:
        UserError: they are no shares of a whole, none is for training, or a part has a file and a share.
    """
    if given is None:
        val, test = 0.0 if val_file else BOOKS_SHARES.val, 0.0 if test_file else BOOKS_SHARES.test
        return Shares(1.0 - val - test, val, test) if val_file or test_file else BOOKS_SHARES
    written = ",".join(f"{share:g}" for share in given)
    if len(given) != 3 or not all(0 <= share <= 1 for share in given) or abs(math.fsum(given) - 1) > _OF_ONE:
        raise UserError(
            f"got --split {written}, expected the shares of training, validation and test, which sum to 1, such as "
            "0.85,0.05,0.1; for counts, put the records into files of their own: --val_data, --test_data"
        )
    shares = Shares(*given)
    if not shares.train:
        raise UserError(f"got --split {written}, expected a share above 0 for training, which comes first")
    val, test = 0.0 if val_file else shares.val, 0.0 if test_file else shares.test
    if (val, test) != shares[1:]:
        flag = "val_data" if val != shares.val else "test_data"
        raise UserError(
            f"got --split {written} with --{flag}, expected a share of 0 for what has a file of its own: such as "
            f"{1 - val - test:g},{val:g},{test:g}"
        )
    return shares


def split_by(shares: Shares, n: int, seed: int | None = None) -> Split:
    """The indices of each part of `n` records: training comes first, then test, then validation.

    The first two counts are rounded down, as in the book, and the last part that has a share has what is left.

    Args:
        shares: of each part.
        n: records.
        seed: they are shuffled by it first; file order where it is not given.
    """
    order = np.arange(n, dtype=np.int64) if seed is None else np.random.default_rng(seed).permutation(n)
    train = _rounded_down(n, shares.train) if shares.val or shares.test else n
    test = min(_rounded_down(n, shares.test), n - train) if shares.val else n - train
    return Split(train=order[:train], test=order[train : train + test], val=order[train + test :])


def _rounded_down(n: int, share: float) -> int:
    return min(n, int(n * share * (1 + _OF_BINARY)))
