"""Tasks that end their process, hang, or print: the others are done, and each is told what became of it."""

from __future__ import annotations

import os
import sys
import time

import pytest

from fastft import child_tasks
from fastft.child_tasks import Found

COMMAND = [sys.executable, __file__]


def do(task: str) -> Found:
    match task:
        case "abort":
            os.write(2, b"what broke\n")
            os.abort()
        case "raise":
            raise ValueError("a mistake")
        case "hang":
            time.sleep(600)
        case "print":
            print("not a line of the protocol")
            os.write(1, b"nor this\n")
    return {"did": task}


def test_each_task_that_fails_costs_itself_alone() -> None:
    tasks = ["one", "abort", "raise", "print", "last"]
    found = dict(child_tasks.run_apart(COMMAND, tasks, silence=60))
    assert list(found) == tasks
    assert [found[task] for task in ("one", "print", "last")] == [{"did": task} for task in ("one", "print", "last")]
    assert found["raise"] == {"error": "ValueError: a mistake"}
    assert "its process ended (status -6): what broke" in found["abort"]["error"]


def test_a_task_that_hangs_is_ended() -> None:
    found = dict(child_tasks.run_apart(COMMAND, ["hang", "last"], silence=8))
    assert found == {"hang": {"error": "nothing came for 8 s (status -9): no word"}, "last": {"did": "last"}}


def test_a_child_that_does_not_begin_fails_all() -> None:
    found = dict(child_tasks.run_apart([sys.executable, "-c", "raise SystemExit('no')"], ["one", "two"], silence=60))
    assert list(found) == ["one", "two"]
    assert all("status 1): no" in each["error"] for each in found.values())


def test_a_broken_context_ends_the_child(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """After it has said what failed; what comes next gets a new one."""
    ended: list[int] = []

    def leave(status: int) -> None:
        ended.append(status)
        raise SystemExit

    monkeypatch.setattr(child_tasks, "_is_broken", lambda: True)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit):
        child_tasks.serve(["one", "raise", "last"], do)
    assert ended == [1]
    said = capfd.readouterr().out.splitlines()
    assert said[-1] == '{"task": "raise", "found": {"error": "ValueError: a mistake"}}'


if __name__ == "__main__":
    child_tasks.serve(sys.argv[1:], do)
