"""Numbers of files that anything may have written."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def finite(value: Any) -> float | None:
    """The value as a number, or None: no number, infinite, not-a-number, or a whole number larger than any other."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if usable and abs(value) <= sys.float_info.max else None


def values_of(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The numbers that lines have under a key; lines without one are passed over."""
    return [value for line in lines if (value := finite(line.get(key))) is not None]


def sum_of(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    """Their sum, without rounding on the way."""
    return math.fsum(values_of(lines, key))
