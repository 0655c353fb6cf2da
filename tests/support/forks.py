"""Forks of the test process: for what ends a process, hangs it, or takes several that talk to each other."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastft.ranks.world import World, joined

LONGEST_S = 60.0
"""A fork that takes longer is killed, which no test expects: its exit is then -9."""


@dataclass(frozen=True)
class Ended:
    """How a fork ended: its exit status (negative: by a signal), what it printed, and what its function gave.

    `gave` is the exception where one was raised, and None where the process ended before.
    """

    exit: int
    said: str
    gave: Any


def in_forks(*acts: Callable[[], object]) -> list[Ended]:
    """Runs functions at the same time, each in a fork of this process; returns when all have ended."""
    running = [_start(act) for act in acts]
    killers = [threading.Timer(LONGEST_S, os.kill, (pid, signal.SIGKILL)) for pid, _, _ in running]
    for killer in killers:
        killer.start()
    ended = []
    for killer, (pid, log, result) in zip(killers, running, strict=True):
        with open(result, "rb") as pipe:  # noqa: PTH123 (a file descriptor)
            pickled = pipe.read()
        # Waited for without being reaped: a process id that is free again might be another process when it is killed.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        killer.cancel()
        killer.join()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        log.seek(0)
        ended.append(Ended(status, log.read().decode(), pickle.loads(pickled) if pickled else None))
        log.close()
    return ended


def in_fork(act: Callable[[], object]) -> Ended:
    """Runs a function in a fork of this process."""
    return in_forks(act)[0]


def on_ranks(size: int, act: Callable[[World], object], *, timeout_s: float = 30.0) -> list[Ended]:
    """Runs a function on ranks that have met over gloo, as a launcher's variables tell them."""
    port = free_port()

    def of(rank: int) -> Callable[[], object]:
        def start() -> object:
            os.environ.update(launched(rank, size, port))
            with joined(torch.device("cpu"), timeout_s=timeout_s) as world:
                return act(world)

        return start

    return in_forks(*map(of, range(size)))


def launched(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank on a machine of its own."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _start(act: Callable[[], object]) -> tuple[int, Any, int]:
    """The fork's process id, the file of what it prints, and the pipe of what its function gives."""
    log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by the caller)
    result, give = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(result)
        _run(act, log.fileno(), give)
    os.close(give)
    return pid, log, result


def _run(act: Callable[[], object], log: int, give: int) -> None:
    status = 70  # not even the result could be told
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        try:
            gave: object = act()
        except BaseException as error:
            gave = error
        with os.fdopen(give, "wb") as pipe:
            pickle.dump(gave, pipe)
        status = 0
    finally:
        os._exit(status)
