"""How answers were decoded, and what several sets of them in one run are called: `greedy`, `t1.0`, ..."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastft.common import files
from fastft.common.errors import UserError

SETTINGS = ("max_new_tokens", "dtype", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
"""What answers depend on beside model and question."""
SPLIT_NAMES = ("train", "val", "test")
"""Names of a run's splits, which no set of answers may have: `responses.val.json` is the validation split's."""

Names = tuple[str | None, str | None]
"""What the responses of one run are called, and those of another; None without a name."""

UNNAMED = SPLIT_NAMES[-1]
"""Stands for the responses without a name, where others have one."""
_MADE_FROM = ".made-from.json"
_NEUTRAL = {"top_k": 0, "top_p": 1.0}
"""What greedy answers leave unsaid, and means nothing where it is said."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


def made_from(answers: Path) -> Path:
    """The file beside answers that says what they were made from."""
    return answers.with_suffix(_MADE_FROM)


def check_name(name: str | None) -> None:
    """Refuses what cannot stand in the name of a file, or means another file there.

    Raises:
        UserError: a `--name` is such.
    """
    if name is None:
        return
    if _NAME.fullmatch(name) is None:
        raise UserError(
            f"got --name {name!r}, expected at most 64 letters, digits and . _ + - of which the first is a letter or a "
            "digit, such as greedy or t1.0: it becomes a part of a file's name"
        )
    first = name.lower().partition(".")[0]
    if first in SPLIT_NAMES or name.lower().endswith("made-from"):
        meant = "a split" if first in SPLIT_NAMES else "what responses are made from"
        raise UserError(f"got --name {name}, which is reserved for {meant}; expected another one, such as greedy")


def names_of_two(given: str | list[str] | None) -> Names:
    """What the responses of one run and of another are called, by a `--name` that takes one name or two; None of those
    without a name, which stand as `test` beside a name.

    Raises:
        UserError: there are more than two, or one is no name.
    """
    names = given if isinstance(given, list) else [UNNAMED if given is None else given]
    if not 1 <= len(names) <= 2:
        raise UserError(
            f"got --name {' '.join(names) or 'without a name'}, expected one name, or two: of A's responses and of B's"
        )
    a, b = (None if one == UNNAMED else one for one in (names[0], names[-1]))
    check_name(a)
    check_name(b)
    return a, b


def names_joined(names: Names) -> str:
    """Two names as a part of a file's: `t1.0` where both are that, `greedy-t1.0`, `test-t1.0`."""
    return "-".join(dict.fromkeys(one or UNNAMED for one in names))


def page_called(file: str, names: Names) -> str:
    """`ab.html`, of named responses `ab.t1.0.html`, of two names `ab.greedy-t1.0.html`."""
    stem, _, kind = file.rpartition(".")
    return f"{stem}.{names_joined(names)}.{kind}" if any(names) else file


def called(stem: str, name: str | None) -> str:
    """The name of a file of a set of answers: `scores.json`, `scores.t1.0.json`."""
    return f"{stem}.json" if name is None else f"{stem}.{name}.json"


def decoding_of(answers: Path) -> dict[str, Any] | None:
    """The settings that answers were decoded with, as the file beside them says; None where there is none."""
    return settings_in(files.object_or_empty(made_from(answers)))


def settings_in(made: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings in what answers were made from; None where it says nothing of them."""
    return {name: made[name] for name in SETTINGS if name in made} or None


def all_said(decoding: Mapping[str, Any]) -> dict[str, Any]:
    """A decoding's settings, also those that greedy answers leave unsaid."""
    return {**_NEUTRAL, **decoding}


def differing(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> dict[str, list[Any]]:
    """The settings that are not the same in two decodings, with both values; none where one is not known.

    A seed matters only where both draw.
    """
    if one is None or other is None:
        return {}
    found = {name: [all_said(decoding).get(name) for decoding in (one, other)] for name in SETTINGS}
    return {name: pair for name, pair in found.items() if None not in pair and pair[0] != pair[1]}
