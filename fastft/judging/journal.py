"""Every answer that was read, one JSON line each, on disk before the next question is asked.

A killed run goes on from here, and a second run asks nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastft.common.jsonl import JsonLines

_FULL = {"length", "max_tokens", "max_length", "model_length"}
"""Words of servers for a reply that ended because its room was full."""


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
    thinking: str = ""
    """The trace of a reasoning model, where its server gives it apart from the answer."""


def with_finish(reply: Reply, room: int) -> Reply:
    """The reply with `length` for its end where its server does not say so and it may have filled its `room` tokens.

    By the server's count, or else by its length: a token is at least a byte.
    """
    if reply.finish is not None:
        return replace(reply, finish="length") if reply.finish.casefold() in _FULL else reply
    tokens = reply.reply_tokens
    if tokens is None:
        tokens = len((reply.content + reply.thinking).encode(errors="replace"))
    return replace(reply, finish="length") if tokens >= room else reply


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

    def judges(self) -> list[str]:
        """Those that are known, the one that was last heard of for the first time, or anew, at the end."""
        return list(self._judges)

    def keep_judge(self, name: str, known: Mapping[str, Any]) -> None:
        """Remembers what is known of a judge: its answers hold while its server is away."""
        if self._judges.get(name) != dict(known):
            self._lines.append({"judge": name, "known": dict(known)})
            self._take_judge(name, known)

    def _take(self, line: dict[str, Any]) -> None:
        if "judge" in line:
            self._take_judge(str(line["judge"]), line["known"])
        elif isinstance(line["content"], str):
            counts = {name: line.get(name) for name in ("finish", "prompt_tokens", "reply_tokens", "seconds")}
            thinking = str(line.get("thinking") or "")
            self._replies[str(line["key"])] = Reply(line["content"], **counts, thinking=thinking)

    def _take_judge(self, name: str, known: Mapping[str, Any]) -> None:
        self._judges.pop(name, None)
        self._judges[name] = dict(known)
