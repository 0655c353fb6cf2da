"""What kind of thing a value is, in the words of error messages."""

from __future__ import annotations

from typing import Any


def kind_of(value: Any) -> str:
    """The kind of a value that JSON or YAML has given: `an object`, `an empty array`, `text`, `null`."""
    if value is None:
        return "null"
    if isinstance(value, list) and not value:
        return "an empty array"
    for kind, words in ((dict, "an object"), (list, "an array"), (str, "text"), (bool, "a boolean")):
        if isinstance(value, kind):
            return words
    return "a number" if isinstance(value, int | float) else type(value).__name__
