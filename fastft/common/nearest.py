"""The name that was meant, where one that there is lies near to what was typed."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable
from pathlib import Path

_NEAR = 0.7
"""Of `difflib.SequenceMatcher.ratio`."""


def nearest(got: str, names: Iterable[str]) -> str | None:
    """The name that is nearest to what was got, where one is near."""
    near = difflib.get_close_matches(got, list(names), n=1, cutoff=_NEAR)
    return near[0] if near else None


def did_you_mean(got: str, names: Iterable[str]) -> str:
    """` (did you mean NAME?)` where a name is near to what was got; else nothing."""
    near = nearest(got, names)
    return f" (did you mean {near}?)" if near else ""


def did_you_mean_path(path: Path) -> str:
    """The same of a file or folder that is not there, beside which others are."""
    names: list[str] = []
    if path.exists():  # it is there, and is not what was wanted
        return ""
    with contextlib.suppress(OSError):
        names = [one.name for one in path.parent.iterdir() if not one.name.startswith(".")]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=_NEAR)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""
