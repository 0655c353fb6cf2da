"""Words that an option takes as themselves, whatever lies on the disk under the same name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Option = Literal["data", "val_data", "test_data", "weights", "conversation"]

_DATA = {"book": "the book's file", "sample": "the embedded records"}
KEYWORDS: dict[Option, dict[str, str]] = {
    "data": _DATA,
    "val_data": _DATA,
    "test_data": _DATA,
    "conversation": {"sample": "the embedded conversations"},
    "weights": {
        "none": "random weights",
        **dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), "the published weights"),
    },
}


def is_keyword(option: Option, value: object) -> bool:
    """Whether an option's value is a keyword; a path that looks like one is written `./gpt2`."""
    return isinstance(value, str) and value in KEYWORDS[option]


def hidden_path(option: Option, value: object) -> str | None:
    """A line that says which one is taken, where a keyword and a file or folder of its name both exist."""
    if not (isinstance(value, str) and is_keyword(option, value) and Path(value).exists()):
        return None
    kind = "folder" if Path(value).is_dir() else "file"
    return f"{value} means {KEYWORDS[option][value]}, not the {kind} here; for that give --{option} ./{value}"
