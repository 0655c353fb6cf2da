"""Runs fastft command lines one after the other, each in a fork of this process: importing torch is paid for once.

A request is a JSON line on standard input: `argv`, `log` (a file for what it says), `folder`, `kill_at` (or null).
A fork is killed by SIGKILL just before its `kill_at`th change in the file system: a file of `folder` opened for
writing, or anything made, renamed or removed. Replies are JSON lines: the fork's `pid`, then its `exit` status
(negative where a signal ended it) and how many `changes` it made (0 where it was killed).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch._dynamo  # noqa: F401 (the first optimizer imports it, which takes longer than everything else)

from fastft.cli import main
from fastft.tokenizer import gpt2_tokenizer


class Changes:
    """Counts changes in the file system."""

    def __init__(self, folder: str, kill_at: int | None) -> None:
        self.count = 0
        self.folder = folder
        self.kill_at = kill_at

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open"
            and str(arguments[0]).startswith(self.folder)
            and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            self.count += 1
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


def run_fork(request: dict[str, Any], report: int) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, sys.stderr.fileno())
    changes = Changes(request["folder"], request["kill_at"])
    sys.addaudithook(changes)
    status = 70  # a traceback
    try:
        status = main(request["argv"])
    finally:
        sys.stderr.flush()
        os.write(report, str(changes.count).encode())
        os._exit(status)


def reply(**values: int) -> None:
    print(json.dumps(values), flush=True)


def serve() -> None:
    gpt2_tokenizer()
    for line in sys.stdin:
        changes, report = os.pipe()
        pid = os.fork()
        if pid == 0:
            run_fork(json.loads(line), report)
        os.close(report)
        reply(pid=pid)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        reply(exit=status, changes=int(os.read(changes, 20) or 0))
        os.close(changes)


if __name__ == "__main__":
    serve()
