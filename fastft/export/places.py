"""Where an export lies. It is written beside its place and put there when it is whole; nobody else's file is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastft.common import files
from fastft.common.errors import UserError
from fastft.common.version import __version__
from fastft.run.folder import EXPORT_MADE


@contextlib.contextmanager
def new_files(folder: Path, *, overwrite: bool, made_of: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write into, whose files are put into `folder` when the block ends without an error.

    `export.json` goes with them: what they are made of, and each file's size and SHA-256. By it an export is known
    again, of which `overwrite` replaces the files it names, and no others.

    Args:
        folder: where they are to be.
        overwrite: whether an earlier export there may be replaced.
        made_of: what `export.json` says beside the files.

    Raises:
        UserError: something is there already, or it cannot be written to.
    """
    before = _earlier(folder, overwrite=overwrite)
    files.make_folder(folder.parent)
    beside = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    files.make_folder(beside)
    try:
        yield beside
        made = sorted(path.name for path in beside.iterdir())
        for name in made:
            if name not in before and _is_there(folder / name):
                raise UserError(
                    f"{folder / name} is there, and no export has written it; move it, or take another --out"
                )
        said = {name: files.identity(beside / name) for name in made}
        files.write_json(beside / EXPORT_MADE, {"fastft": __version__, **made_of, "files": said})
        _put(beside, folder, [EXPORT_MADE, *made], gone=before - set(made) - {EXPORT_MADE})
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _earlier(folder: Path, *, overwrite: bool) -> set[str]:
    """The names of the files of an earlier export there.

    Raises:
        UserError: there is one that is not to be replaced, or something else.
    """
    if not _is_there(folder):
        return set()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; take another --out")
    said = files.object_or_empty(folder / EXPORT_MADE)
    if not isinstance(said.get("files"), dict) or "fastft" not in said:
        if any(folder.iterdir()):
            raise UserError(f"{folder} holds files, and no export has written them; take another --out")
        return set()
    if not overwrite:
        raise UserError(f"{folder} already holds an export; replace it with --overwrite, or take another --out")
    return {name for name in said["files"] if Path(name).name == name} | {EXPORT_MADE}


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _put(beside: Path, folder: Path, names: list[str], *, gone: set[str]) -> None:
    """Moves the files, the one that says whose they are first, so that a killed move leaves what can be replaced."""
    files.make_folder(folder)
    try:
        for name in names:
            (beside / name).replace(folder / name)
        for name in gone:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}; check its permissions, and export again with "
            "--overwrite"
        ) from error
    files.fsync(folder)
