"""Ranges of whole numbers as options write them."""

from __future__ import annotations

import re

_RANGE = re.compile(r"(\d{1,4})-(\d{1,4})")
"""Numbers of layers: who lays out a range of more of them runs out of memory."""


def range_named(text: str) -> range | None:
    """`20-23` -> 20 to 23, both counted; empty where the first is the higher one; None where it is no range, or none
    of numbers below 10,000."""
    found = _RANGE.fullmatch(text)
    return None if found is None else range(int(found[1]), int(found[2]) + 1)
