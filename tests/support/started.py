"""Starts command lines whose processes start others, and leaves none of them behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from runs import PATIENCE_S, wait_until

_MARK = "FASTFT_STARTED"


class Started:
    """A command line that runs, with all processes that have come of it."""

    def __init__(self, process: subprocess.Popen[bytes], mark: str, log: Path | None) -> None:
        self.process = process
        self._mark = mark
        self._log = log

    @property
    def said(self) -> str:
        """What it has written so far, its lines in one: rich and launchers break them in places of their own."""
        text = "" if self._log is None else self._log.read_text(errors="replace")
        return " ".join(text.split())

    def ended(self) -> int:
        """Waits for its end; returns its exit status (-9 after SIGKILL)."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end: {self.said[-4000:]}") from None

    def ranks(self) -> dict[int, psutil.Process]:
        """Its running processes that were told a rank."""
        found: dict[int, psutil.Process] = {}
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                rank = process.environ().get("RANK", "")
                if rank.isdecimal() and "--data" in process.cmdline():
                    found.setdefault(int(rank), process)
        return found

    def left(self) -> list[psutil.Process]:
        """All of its processes that still run, also those whose parent has ended."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait_until_none_is_left(self) -> None:
        """Waits for the end of all that its launcher has left behind."""
        wait_until(lambda: not self.left(), every_s=0.1)

    def stop_reading(self) -> None:
        """Closes the pipe that it writes to, as the end of whoever reads it does."""
        assert self.process.stdout is not None
        self.process.stdout.close()

    def kill(self) -> None:
        """Ends all of its processes."""
        while left := self.left():
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self.process.poll()  # a child that has ended is one no more only when it was waited for
            time.sleep(0.02)
        self.process.wait(PATIENCE_S)


@contextmanager
def started(
    argv: Sequence[str | Path],
    *,
    log: Path | None,
    cwd: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Started]:
    """Starts a command line in a session of its own, for the length of a block.

    Args:
        argv: of the command.
        log: the file for what its processes write; None for a pipe that nobody reads.
        cwd: its folder.
        environ: further variables.
    """
    mark = uuid.uuid4().hex
    with contextlib.ExitStack() as stack:
        out = subprocess.PIPE if log is None else stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(environ or {}), _MARK: mark},
            start_new_session=True,
        )
        running = Started(process, mark, log)
        try:
            yield running
        finally:
            running.kill()


def catches_sigterm(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)
