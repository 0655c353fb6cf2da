"""Whole files or none: every file of a run is written beside its place and renamed into it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastft.common.errors import UserError
from fastft.common.nearest import did_you_mean_path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the small text begins that Git keeps in a large file's place, where Git LFS has not fetched it."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file beside `path` for writing and renames it to `path` when the block ends without an error.

    The bytes are on the disk (fsync) before the rename, so that a crash leaves the old file or the new one.

    Raises:
        UserError: the file cannot be written (no permission, full disk, no such folder).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 to `path`, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Writes `value` as JSON to `path`, whole or not at all.

    Non-ASCII text stays readable, unless it holds half of a surrogate pair, which JSON can escape and UTF-8 cannot say.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    write_text(path, text + "\n")


def make_folder(path: Path, *, remedy: str = "choose another with --out") -> Path:
    """Creates `path` and its parents; raises UserError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror or error}; {remedy}") from error
    return path


def read_json(path: Path, *, what: str) -> Any:
    """Reads JSON from `path`; `what` names the file's role in the error.

    Raises:
        UserError: the file is missing, unreadable, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} not found: {path}{did_you_mean_path(path)}") from None
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} is not JSON: {error}") from error


def object_or_empty(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run, an empty one where there is no file or something else in it.

    Raises:
        UserError: the file cannot be read, or is not JSON.
    """
    value = read_json(path, what=f"the run's {path.name}") if path.is_file() else None
    return value if isinstance(value, dict) else {}


def identity(path: Path) -> dict[str, str | int]:
    """The size of a file in bytes, and the SHA-256 of its content."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file holds but the pointer of Git LFS to what should be there."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
    return False


def fsync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    if os.name == "posix":  # elsewhere folders cannot be opened, nor read-only files flushed
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cache_folder() -> Path:
    """`$FASTFT_CACHE`, else `$XDG_CACHE_HOME/fastft`, else `~/.cache/fastft`."""
    if own := os.environ.get("FASTFT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastft"
