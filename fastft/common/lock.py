"""One writer of a run's folder at a time.

The lock is the system's own (`flock`), on a file that stays: it is free again when its process ends, however it ends.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from fastft.common.console import warn
from fastft.common.errors import UserError

LOCK_FILE = ".lock"
_PATIENCE_S = 1.0
"""`refuse_if_held` of another process holds the lock for an instant, which is not to be taken for a writer."""
_EVERY_S = 0.02
_TOLD_BY_THE_WRITE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Holds the lock of a run's folder for the length of a block.

    A folder that is not there, or that nothing can be written to, is not locked: the block will say so in words of its
    own.

    Raises:
        UserError: another process writes to the folder.
    """
    lock = filelock.FileLock(folder / LOCK_FILE)
    if not folder.is_dir():  # filelock would make it
        yield
        return
    try:
        lock.acquire(timeout=_PATIENCE_S, poll_interval=_EVERY_S)
    except filelock.Timeout:
        raise UserError(
            f"another process writes to {folder} (fastft train, generate, score, report, compare or ab); wait for its "
            "end, or take another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        if not (isinstance(error, OSError) and _is_told_by_the_write(error, folder)):
            warn(f"{folder} cannot be locked ({error}): see to it that no other process writes to it")
    try:
        yield
    finally:
        lock.release()


def _is_told_by_the_write(error: OSError, folder: Path) -> bool:
    """Whether the block will fail too: not where the lock alone is somebody else's, in a folder that several share."""
    return error.errno in _TOLD_BY_THE_WRITE and not os.access(folder, os.W_OK | os.X_OK)


def refuse_if_held(folder: Path) -> None:
    """Refuses a folder that another process writes to, and leaves no trace.

    Raises:
        UserError: it is held.
    """
    if (folder / LOCK_FILE).is_file():
        with writing(folder):
            pass
