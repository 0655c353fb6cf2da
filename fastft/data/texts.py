"""The texts of a row: as standard JSON has them, valid Unicode, and without an end-of-text that would be learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastft.common.kinds import kind_of
from fastft.data.json_rows import RepeatedKeys
from fastft.data.records import END_TAKEN, NOT_A_NUMBER, REPEATED_KEY, ReadingRules, is_encodable, is_not_finite


class Malformed(Exception):
    """A row is no record: what was got, what was expected, and what to do, in one line."""


def plain(value: Any, notes: list[str]) -> Any:
    """A value as standard JSON can say it: null where it is not a number, no key twice; notes what was otherwise."""
    if is_not_finite(value):
        notes.append(NOT_A_NUMBER)
        return None
    if isinstance(value, dict):
        if isinstance(value, RepeatedKeys):
            notes.append(REPEATED_KEY)
        return {key: plain(item, notes) for key, item in value.items()}
    if isinstance(value, list):
        are_integers = all(type(item) is int for item in value)
        return value if are_integers else [plain(item, notes) for item in value]
    return value


def from_text(value: Any) -> Any:
    """An array or an object that is written in a text as JSON, as in a cell of a table, and in columns that `datasets`
    wrote; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def check_text(value: Any, where: str) -> str:
    """A text.

    Args:
        value: what should be one.
        where: it stands, as `` `messages` number 2 ``.

    Raises:
        Malformed: it is something else, or no valid Unicode.
    """
    if not isinstance(value, str):
        raise Malformed(f"{where} is {kind_of(value)}, expected text")
    if not is_encodable(value):
        raise Malformed(f"{where} holds half of a surrogate pair, expected valid Unicode text")
    return value


def without_end(text: str, rules: ReadingRules, notes: list[str]) -> str:
    """What is learned to its end, without an end-of-text's text there: every example ends with the token itself."""
    if rules.end_of_text_in_data == "keep":
        return text
    while end_mark_in(text, rules.end_marks) is not None:
        rest = text.rstrip()
        mark = next((one for one in rules.end_marks if rest.endswith(one)), None)
        if mark is None:
            break
        text = rest.removesuffix(mark)
        notes.append(END_TAKEN)
    return text


def check_no_end(text: str, where: str, rules: ReadingRules, ended: str = "an output") -> None:
    """Refuses text that holds an end-of-text's, which a model would learn to write and never to end with.

    Args:
        text: it.
        where: it stands.
        rules: which texts these are.
        ended: at whose end one would be taken as the end.

    Raises:
        Malformed: it holds one.
    """
    if rules.end_of_text_in_data == "keep":
        return
    mark = end_mark_in(text, rules.end_marks)
    if mark is not None:
        raise Malformed(
            f"{where} holds {mark}, which would be learned as text; expected none but at the very end of {ended}; "
            "--end_of_text_in_data keep takes it as text"
        )


def end_mark_in(text: str, marks: Sequence[str]) -> str | None:
    """The first of the marks that a text holds."""
    return next((mark for mark in marks if mark in text), None)
