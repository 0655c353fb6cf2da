"""Files of JSON lines that only grow: what has been written outlives a kill.

A line is written at the end of the file at once. One that a kill or a full disk has torn is passed over by the reader,
and the next line starts a line of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastft.common.errors import UserError


def objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects of lines; what is none, as a torn line, is passed over."""
    for text in lines:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict):
                yield line


class JsonLines:
    """A file of JSON objects, one a line; made with its first line. Any thread may append."""

    def __init__(self, path: Path, *, what: str, sync: bool = False) -> None:
        """The file at `path`; `what` names its content in errors; `sync` waits until each line is on the disk, so that
        it outlives a loss of power too.
        """
        self.path = path
        self._what = what
        self._sync = sync
        self._lock = threading.Lock()
        self._torn = False

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines that are whole; none where there is no file.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"cannot read {self._what} {self.path}: {error.strerror or error}") from error
        self._torn = bool(content) and not content.endswith(b"\n")
        yield from objects(content.split(b"\n"))

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes a line.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        # ASCII, with any half of a surrogate pair escaped: a reply may hold what UTF-8 cannot say.
        content = json.dumps(line) + "\n"
        with self._lock:
            try:
                self._write((("\n" if self._torn else "") + content).encode("ascii"))
            except OSError as error:
                self._torn = True
                raise UserError(
                    f"cannot write {self.path}: {error.strerror or error}; free space and run it again: the answers "
                    "before this one are kept"
                ) from error
            self._torn = False

    def _write(self, content: bytes) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            while content:
                content = content[os.write(file, content) :]
            if self._sync:
                os.fsync(file)
        finally:
            os.close(file)
