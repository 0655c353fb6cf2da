"""Runs fastft command lines one after the other, each in forks of this process: what they import is paid for once.

A request is a JSON line on standard input: `argv`, `ranks`, `log` (a file for what it says; of further ranks their
number is appended), `folder`, `kill_at` (or null), `fault` (the name of a function of `rank_faults.py`, or null). A
fork is killed by SIGKILL just before its `kill_at`th change in the file system: a file of `folder` opened for writing,
or anything made, renamed or removed. Replies are JSON lines: the forks' `pids`, then `ended`: of each its `exit` status
(negative where a signal ended it), how many `changes` it made (0 where it was killed) and its `log`. Where one of
several ranks fails, the others get SIGTERM, and SIGKILL if that is not enough.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from typing import Any

import rank_faults
import torch
import torch._dynamo  # the first optimizer imports it, which takes longer than everything else
from fastft_kernels.cpu import library

from fastft.cli import main, parse
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.engines.zero_setup import deepspeed_for

GRACE_S = 30.0


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


def run_fork(request: dict[str, Any], log_path: str, report: int) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, sys.stderr.fileno())
    os.dup2(log, sys.stdout.fileno())
    changes = Changes(request["folder"], request["kill_at"])
    sys.addaudithook(changes)
    status = 70  # a traceback
    try:
        if request["fault"] is not None:
            getattr(rank_faults, request["fault"])()
        status = main(request["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os.write(report, str(changes.count).encode())
        os._exit(status)


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank."""
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def wait(pids: list[int]) -> dict[int, int]:
    """The exit status of each process."""
    exits: dict[int, int] = {}
    deadline = None
    while len(exits) < len(pids):
        for pid in pids:
            if pid not in exits and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                exits[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        left = [pid for pid in pids if pid not in exits]
        if deadline is None and any(exits.values()):
            deadline = time.monotonic() + GRACE_S
            send(left, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            send(left, signal.SIGKILL)
        time.sleep(0.002)
    return exits


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def reply(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def import_deepspeed() -> None:
    """Once for all forks: what its first engine imports, and asks the compiler, takes longer than a small run."""
    deepspeed_for(torch.device("cpu"))
    importlib.import_module("deepspeed.runtime.zero.stage3")
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def serve() -> None:
    importlib.import_module("fastft.training.train")  # as the command does when it is run: in each fork
    library.why_not()  # asks the compiler
    _ = gpt2_tokenizer().encoding  # reads its files
    parse("train", ["--data", "sample"])  # imports the parser and reads the options' texts
    for line in sys.stdin:
        request = json.loads(line)
        if "--deepspeed_config" in request["argv"]:
            import_deepspeed()
        gc.collect()
        gc.freeze()  # a fork that collects garbage, as DeepSpeed does, would look at all that is here, and so copy it
        ranks, port = request["ranks"], free_port()
        pids, reports, logs = [], [], []
        for rank in range(ranks):
            changes, report = os.pipe()
            log = request["log"] + (f".{rank}" if rank else "")
            pid = os.fork()
            if pid == 0:
                os.environ.update(environment(rank, ranks, port))
                run_fork(request, log, report)
            os.close(report)
            pids.append(pid)
            reports.append(changes)
            logs.append(log)
        reply(pids=pids)
        exits = wait(pids)
        ended = []
        for pid, changes, log in zip(pids, reports, logs, strict=True):
            ended.append({"exit": exits[pid], "changes": int(os.read(changes, 20) or 0), "log": log})
            os.close(changes)
        reply(ended=ended)


if __name__ == "__main__":
    serve()
