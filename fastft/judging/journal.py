"""Every answer that was read, one JSON line each, on disk before the next question is asked.

A killed run goes on from here, and a second run asks nothing. A line is written by one system call at the end of the
file; one that a kill or a full disk has torn is passed over, and the next line starts a line of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastft.errors import UserError


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer, as it was read."""

    content: str
    finish: str | None = None
    """Why it ended: `stop`, or `length` where its room was full."""
    prompt_tokens: int | None = None
    """As the server counts them, where it says so; those that it cut are not among them."""
    reply_tokens: int | None = None


class Journal:
    """The answers of a file, by the key of their question, and what is known of the judges that gave them.

    Args:
        path: the file; it is made with the first line.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._replies: dict[str, Reply] = {}
        self._judges: dict[str, dict[str, Any]] = {}
        self._torn = False
        self._read()

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
        self._append({"key": key, **asdict(reply)})
        self._replies[key] = reply

    def judge(self, name: str) -> dict[str, Any] | None:
        """What was known of a judge when it was last seen."""
        return self._judges.get(name)

    def keep_judge(self, name: str, known: Mapping[str, Any]) -> None:
        """Remembers what is known of a judge: its answers hold while its server is away."""
        if self._judges.get(name) != dict(known):
            self._append({"judge": name, "known": dict(known)})
            self._judges[name] = dict(known)

    def _read(self) -> None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"cannot read the judge's answers {self._path}: {error.strerror or error}") from error
        self._torn = bool(content) and not content.endswith(b"\n")
        for line in content.split(b"\n"):
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                self._take(json.loads(line))

    def _take(self, line: Any) -> None:
        if "judge" in line:
            self._judges[str(line["judge"])] = dict(line["known"])
        elif isinstance(line["content"], str):
            fields = {name: line.get(name) for name in ("content", "finish", "prompt_tokens", "reply_tokens")}
            self._replies[str(line["key"])] = Reply(**fields)

    def _append(self, line: Mapping[str, Any]) -> None:
        # ASCII, with any half of a surrogate pair escaped: a reply may hold what UTF-8 cannot say.
        content = json.dumps(line) + "\n"
        with self._lock:
            try:
                self._write((("\n" if self._torn else "") + content).encode("ascii"))
            except OSError as error:
                self._torn = True
                raise UserError(
                    f"cannot write {self._path}: {error.strerror or error}; free space and run it again: the answers "
                    "before this one are kept"
                ) from error
            self._torn = False

    def _write(self, content: bytes) -> None:
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            while content:
                content = content[os.write(file, content) :]
            os.fsync(file)
        finally:
            os.close(file)
