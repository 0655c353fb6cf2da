"""Tasks of which any may take its process along: a kernel that reads where it must not breaks the CUDA context of its
process for good, one that never ends cannot be ended from within.

So they run one after another in a child process. It says what it begins and what it found, a line of JSON each. When
it ends too early, or says nothing for too long, the task that it was at has failed, and a new child goes on behind it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

Found = dict[str, Any]
"""What a task found: something that JSON can say. One that failed has `error`, and nothing else."""

_END_OF_CHILD = ""
_LAST_WORDS = 400
"""Characters of a dead child's standard error that are told."""


def run_here(tasks: Sequence[str], do: Callable[[str], Found]) -> Iterator[tuple[str, Found]]:
    """Each task and what it found, in this process. An exception is the task's own failure."""
    for task in tasks:
        yield task, _found(task, do)


def serve(tasks: Sequence[str], do: Callable[[str], Found]) -> None:
    """The child: does the tasks and says so on standard output; what they print goes to standard error.

    A broken CUDA context ends it.
    """
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for task in tasks:
            _say(out, {"task": task})
            found = _found(task, do)
            _say(out, {"task": task, "found": found})
            if "error" in found and _is_broken():
                os._exit(1)  # an orderly end would wait for the context


def run_apart(
    command: Sequence[str],
    tasks: Sequence[str],
    *,
    silence: float,
    until: float = math.inf,
    log: Path | None = None,
) -> Iterator[tuple[str, Found]]:
    """Each task and what it found, in child processes.

    Args:
        command: what to start; the names of the tasks come as further arguments, and it is to call `serve` with them.
        tasks: their names, each once.
        silence: seconds without a line after which a child counts as hung.
        until: the `time.monotonic()` at which the child is ended; its task has failed, and the others are not begun.
        log: a file that what the children print is added to.
    """
    waiting = list(tasks)
    while waiting and time.monotonic() < until:
        for task, found in _child(command, tuple(waiting), silence, until, log):
            waiting.remove(task)
            yield task, found


def _child(
    command: Sequence[str], tasks: Sequence[str], silence: float, until: float, log: Path | None
) -> Iterator[tuple[str, Found]]:
    """One child, until it ends: what was found, and that the task which it was at has failed.

    Where it did not come to the first one, all have: no other child will.
    """
    unsaid = list(tasks)
    with tempfile.TemporaryFile() if log is None else log.open("ab+") as errors:
        child = subprocess.Popen(
            [*command, *tasks], stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        why = "its process ended"
        try:
            for line in _lines(child.stdout, silence, until):
                if line is None:
                    why = "the time was over" if time.monotonic() >= until else f"nothing came for {silence:g} s"
                    break
                said = json.loads(line)
                if "found" in said:
                    unsaid = []
                    yield said["task"], said["found"]
                else:
                    unsaid = [said["task"]]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and what it has started: compilers, profilers
            status = child.wait()
        for task in unsaid:
            yield task, {"error": f"{why} (status {status}): {_last_words(errors)}"}


def _lines(stream: IO[str] | None, silence: float, until: float) -> Iterator[str | None]:
    """The lines as they come; None where none came for so many seconds, or in time."""
    assert stream is not None
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        with contextlib.suppress(ValueError):  # closed while it was read
            for line in stream:
                lines.put(line)
        lines.put(_END_OF_CHILD)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.0, min(silence, until - time.monotonic())))
        except queue.Empty:
            yield None
            return
        if line == _END_OF_CHILD:
            return
        yield line


def _found(task: str, do: Callable[[str], Found]) -> Found:
    """What a task found; its kernels are waited for, so that their errors are its own."""
    try:
        found = do(task)
        _wait_for_gpu()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:_LAST_WORDS]}"}
    return found


def _is_broken() -> bool:
    try:
        _wait_for_gpu()
    except Exception:
        return True
    return False


def _wait_for_gpu() -> None:
    """Waits for what a task has asked of a GPU, if it has; a process that needs no torch does not load it for this."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _say(out: IO[str], line: Found) -> None:
    print(json.dumps(line), file=out, flush=True)


def _last_words(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return " | ".join(lines)[-_LAST_WORDS:] or "no word"
