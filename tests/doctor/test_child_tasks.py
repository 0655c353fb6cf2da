"""Tasks that end their process, hang, or print: the others are done, and each is told what became of it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from unittest.mock import ANY

import child_of_tasks
import pytest

from fastft.doctor import child_tasks

COMMAND = [sys.executable, str(Path(child_of_tasks.__file__))]


def test_each_task_that_fails_costs_itself_alone() -> None:
    tasks = ["one", "abort", "raise", "print", "last"]
    found = dict(child_tasks.run_apart(COMMAND, tasks, silence=60))
    assert list(found) == tasks
    assert [found[task] for task in ("one", "print", "last")] == [{"did": task} for task in ("one", "print", "last")]
    assert found["raise"] == {"error": "ValueError: a mistake"}
    assert "its process ended (status -6): what broke" in found["abort"]["error"]


def test_a_task_that_hangs_is_ended() -> None:
    found = dict(child_tasks.run_apart(COMMAND, ["hang", "last"], silence=5))
    assert found == {"hang": {"error": "nothing came for 5 s (status -9): no word"}, "last": {"did": "last"}}


def test_an_end_in_time(tmp_path: Path) -> None:
    """The task that it comes in has failed, and none is begun behind it."""
    until, log = time.monotonic() + 5, tmp_path / "log"
    found = dict(child_tasks.run_apart(COMMAND, ["print", "hang", "last"], silence=600, until=until, log=log))
    assert found == {"print": {"did": "print"}, "hang": {"error": ANY}}
    assert "the time was over" in found["hang"]["error"]
    assert "nor this" in log.read_text()


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
        child_tasks.serve(["one", "raise", "last"], child_of_tasks.do)
    assert ended == [1]
    said = capfd.readouterr().out.splitlines()
    assert said[-1] == '{"task": "raise", "found": {"error": "ValueError: a mistake"}}'
