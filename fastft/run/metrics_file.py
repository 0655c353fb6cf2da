"""`metrics.jsonl` and `ledger.jsonl`: a line for each thing that happened, kept over a kill."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastft.common import files
from fastft.common.errors import UserError
from fastft.common.jsonl import objects


def _of_an_update(line: dict[str, Any]) -> bool:
    return "lr" in line or "losses" in line


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a torn line (its process was killed while writing it) is passed over."""
    if path.is_file():
        with path.open("rb") as file:
            yield from objects(file)


def strict_json(line: dict[str, Any]) -> dict[str, Any]:
    """The line with null in place of numbers that JSON cannot say, infinities and not-a-number, also in its lists."""
    return {
        name: [_finite_or_none(item) for item in value] if isinstance(value, list) else _finite_or_none(value)
        for name, value in line.items()
    }


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """Appends lines to `metrics.jsonl`, each flushed, so that a killed run keeps all but the line being written."""

    def __init__(self, path: Path, *, resume_at: int, evaluated: bool = True) -> None:
        """Keeps the lines up to step `resume_at`, and where it is not `evaluated` of this step the line of its update
        alone: what is behind will be computed again."""

        def is_kept(line: dict[str, Any]) -> bool:
            step = line.get("step", 0)
            return bool(step < resume_at or (step == resume_at and (evaluated or _of_an_update(line))))

        kept = [line for line in read_metrics(path) if is_kept(line)] if resume_at else []
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._path = path
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; check its permissions") from error

    def append(self, line: dict[str, Any]) -> None:
        """Writes one line.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        try:
            self._file.write(json.dumps(strict_json(line)) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; free space and go on with --resume"
            ) from error

    def close(self) -> None:
        """Closes the file. What could not be written has been reported by `append`."""
        with contextlib.suppress(OSError):
            self._file.close()
