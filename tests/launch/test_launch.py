"""`fastft.launch` and `launch/train.py`: what launchers add is taken, and what is fastft's is passed on."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
from forks import in_fork
from hypothesis import given, settings
from hypothesis import strategies as st

import fastft.launch
from fastft.launch import without_local_rank
from fastft.run.config import TrainOptions

LAUNCH = Path(__file__).parents[2] / "launch"

forked = pytest.mark.skipif(not hasattr(os, "fork"), reason="the script runs in a fork of this process")
both_ways = pytest.mark.parametrize("way", ["script", "module"])


def start(way: str, *arguments: str) -> object:
    """Runs the checkout's script, or the module, as a process does, with arguments."""
    sys.argv = ["launch", *arguments]
    if way == "script":
        return runpy.run_path(str(LAUNCH / "train.py"), run_name="__main__")
    return runpy.run_module("fastft.launch", run_name="__main__")


class Ending:
    """A module that takes so long to import that SIGTERM comes meanwhile."""

    @property
    def main(self) -> object:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError


CASES = {
    "deepspeed": (["--local_rank=0", "--model", "nano"], ["--model", "nano"]),
    "torch.distributed.launch": (["--local-rank=1", "--model", "nano"], ["--model", "nano"]),
    "apart": (["--local_rank", "1", "--model", "nano"], ["--model", "nano"]),
    "apart, with a hyphen": (["--model", "nano", "--local-rank", "1"], ["--model", "nano"]),
    "twice": (["--local_rank=0", "--resume", "--local_rank", "0"], ["--resume"]),
    "without its number": (["--resume", "--local_rank"], ["--resume"]),
    "none": (["--resume", "--seed", "1"], ["--resume", "--seed", "1"]),
    "nothing": ([], []),
    "another option": (["--local_rankings=1", "--local", "1"], ["--local_rankings=1", "--local", "1"]),
}


@pytest.mark.parametrize("name", CASES)
def test_local_rank_is_taken_away(name: str) -> None:
    given_, expected = CASES[name]
    before = [*given_]
    assert without_local_rank(given_) == expected
    assert given_ == before


arguments = st.lists(st.text(max_size=8).filter(lambda one: not one.startswith(("--local_rank", "--local-rank"))))


@settings(max_examples=100, deadline=None)
@given(arguments, arguments, st.integers(0, 99), st.booleans(), st.sampled_from(["--local_rank", "--local-rank"]))
def test_wherever_it_stands_the_others_stay(
    before: list[str], after: list[str], rank: int, joined: bool, name: str
) -> None:
    local_rank = [f"{name}={rank}"] if joined else [name, str(rank)]
    assert without_local_rank([*before, *local_rank, *after]) == [*before, *after]


@forked
@both_ways
def test_it_trains(way: str) -> None:
    """With the exit status of `fastft train`."""
    ended = in_fork(lambda: start(way, "--local_rank=0", "--epochs", "0"))
    assert (ended.exit, ended.gave) == (2, None), ended  # the process leaves there and then
    assert ended.said.splitlines()[-1].startswith("error: got --epochs 0, expected at least 1")


@forked
@both_ways
def test_a_job_that_is_ended_while_it_begins_may_be_started_again(way: str) -> None:
    """SIGTERM before there is anything to save: exit status 0, as when it comes later."""

    def ended_early() -> object:
        # The first thing that is imported once it has begun is fastft's command line.
        sys.modules["fastft.cli"] = Ending()
        return start(way)

    ended = in_fork(ended_early)
    assert (ended.exit, ended.gave) == (0, None)
    # By itself it would have ended the process.
    assert in_fork(lambda: signal.raise_signal(signal.SIGTERM)).exit == -signal.SIGTERM


def test_it_is_the_only_script() -> None:
    """What more there were to run would be nowhere tested."""
    assert [path.name for path in sorted(LAUNCH.rglob("*.py"))] == ["train.py"]


def test_what_its_docstring_names_is_there() -> None:
    text = fastft.launch.__doc__ or ""
    options = set(re.findall(r"--\w+", text)) - {"--module"}  # deepspeed's own
    assert options
    fields = {f"--{field.name}" for field in dataclasses.fields(TrainOptions)}
    assert [one for one in options if one not in fields and without_local_rank([f"{one}=1"])] == []
    assert [path for path in re.findall(r"launch/[\w.]+", text) if not (LAUNCH.parent / path).is_file()] == []
