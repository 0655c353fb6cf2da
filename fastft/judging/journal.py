"""Every answer that was read, one JSON line each, on disk before the next question is asked.

A killed run goes on from here, and a second run asks nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastft.jsonl import JsonLines


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer, as it was read."""

    content: str
    finish: str | None = None
    """Why it ended: `stop`, or `length` where its room was full."""
    prompt_tokens: int | None = None
    """As the server counts them, where it says so; those that it cut are not among them."""
    reply_tokens: int | None = None
    seconds: float | None = None
    """That it took, waiting for the server included; None where an earlier version wrote it down."""


class Journal:
    """The answers of a file, by the key of their question, and what is known of the judges that gave them.

    Args:
        path: the file; it is made with the first line.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path, what="the judge's answers", sync=True)
        self._replies: dict[str, Reply] = {}
        self._judges: dict[str, dict[str, Any]] = {}
        for line in self._lines.read():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                self._take(line)

    def __len__(self) -> int:
        return len(self._replies)

    def reply(self, key: str) -> Reply | None:
        """The answer to a question, or None where none was read."""
        return self._replies.get(key)

    def keep(self, key: str, reply: Reply) -> None:
        """Writes an answer to the disk.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        self._lines.append({"key": key, **asdict(reply)})
        self._replies[key] = reply

    def judge(self, name: str) -> dict[str, Any] | None:
        """What was known of a judge when it was last seen."""
        return self._judges.get(name)

    def keep_judge(self, name: str, known: Mapping[str, Any]) -> None:
        """Remembers what is known of a judge: its answers hold while its server is away."""
        if self._judges.get(name) != dict(known):
            self._lines.append({"judge": name, "known": dict(known)})
            self._judges[name] = dict(known)

    def _take(self, line: dict[str, Any]) -> None:
        if "judge" in line:
            self._judges[str(line["judge"])] = dict(line["known"])
        elif isinstance(line["content"], str):
            counts = (line.get(name) for name in ("finish", "prompt_tokens", "reply_tokens", "seconds"))
            self._replies[str(line["key"])] = Reply(line["content"], *counts)
