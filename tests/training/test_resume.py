"""A run that is killed and resumed is the run that was never killed, bit for bit."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Launcher
from torch import Tensor

from fastft.batches.batch import Batch
from fastft.cli import parse
from fastft.common.errors import TrainingError
from fastft.engines.engine import Engine
from fastft.run.metrics_file import read_metrics
from fastft.training import checkpoint
from fastft.training.steps import Steps
from fastft.training.train import train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of a warm process")

STEPS, SAVE_EVERY, EVAL_EVERY = 24, 3, 4
LINES = STEPS + STEPS // EVAL_EVERY + 1
PATIENCE_S = 120.0
OF_THE_CLOCK = {"seconds", "eval_seconds", "memory_bytes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 60 records, which makes 51 training examples and 4 validation examples."""
    folder = tmp_path_factory.mktemp("resume")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    records = [
        {
            "instruction": f"Say {words[i % 10]} {words[i // 10]}.",
            "input": "" if i % 3 else f"{i}",
            "output": " ".join(words[: 1 + i % 5]),
        }
        for i in range(60)
    ]
    (folder / "records.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def command(folder: Path) -> Callable[..., list[str]]:
    def command(run: Path, **options: Any) -> list[str]:
        values = {
            "data": folder / "records.json", "model": "pico", "steps": STEPS, "batch_size": 4, "lr": 1e-3,
            "save_every": SAVE_EVERY, "eval_every": EVAL_EVERY, "samples": 0, "dtype": "fp32", "device": "cpu",
            "threads": 1, "out": run, **options,
        }  # fmt: skip
        arguments = [
            (f"--{name}", str(value).lower() if value is True else str(value)) for name, value in values.items()
        ]
        return ["train", *(text for argument in arguments for text in argument)]

    return command


@dataclass(frozen=True)
class Unbroken:
    """The run that was never killed."""

    run: Path
    changes: int


@pytest.fixture(scope="module")
def unbroken(folder: Path, launcher: Launcher, command: Callable[..., list[str]]) -> Unbroken:
    run = folder / "unbroken"
    ended = launcher.run(command(run))
    assert ended.exit == 0, ended.said
    assert len(metrics(run)) == LINES
    return Unbroken(run, ended.changes)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` but for what the clock and the memory say."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in OF_THE_CLOCK} for line in lines]


def assert_same_run(run: Path, expected: Path, *, but_checkpoints: bool = False) -> None:
    """Every step once with the same figures, the same bits in every weight, and the same files (`but_checkpoints`: of
    those that a signal had saved, the last ones alone are compared)."""
    assert metrics(run) == metrics(expected)
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    names, expected_names = (sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (run, expected))
    assert names == expected_names or but_checkpoints
    assert {name for name in expected_names if name.startswith("model/")} <= {*names}
    for name in {*names} & {*expected_names}:
        if name.endswith(".safetensors"):
            assert (run / name).read_bytes() == (expected / name).read_bytes(), name


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.001)


def wait_for_lines(run: Path, count: int) -> None:
    path = run / "metrics.jsonl"
    wait_until(lambda: path.is_file() and path.read_bytes().count(b"\n") >= count)


@pytest.fixture
def finished(unbroken: Unbroken, tmp_path: Path) -> Path:
    """A copy of the unbroken run, to be damaged."""
    return shutil.copytree(unbroken.run, tmp_path / "run")


# Killed


def kill_at_random_times(
    launcher: Launcher, command: Callable[..., list[str]], run: Path, *, kills: int, seed: int
) -> None:
    """Kills a run `kills` times, over the whole of its life, and lets it finish."""
    rng = random.Random(seed)
    exits: list[int] = []
    for position, lines in enumerate(sorted(rng.sample(range(1, LINES), kills))):
        pid = launcher.start(command(run, resume=position > 0))
        wait_for_lines(run, lines)
        time.sleep(rng.uniform(0, 0.06))  # a step takes about half of that
        os.kill(pid, signal.SIGKILL)
        exits.append((ended := launcher.wait()).exit)
        assert exits[-1] in (0, -signal.SIGKILL), ended.said  # near its end it may be over
    assert exits.count(-signal.SIGKILL) > kills // 2
    ended = launcher.run(command(run, resume=True))
    assert ended.exit == 0, ended.said


def test_killed_five_times_at_random_moments(
    launcher: Launcher, command: Callable[..., list[str]], unbroken: Unbroken, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    kill_at_random_times(launcher, command, run, kills=5, seed=1)
    assert_same_run(run, unbroken.run)


def test_killed_five_times_between_two_changes_of_its_folder(
    launcher: Launcher, command: Callable[..., list[str]], unbroken: Unbroken, tmp_path: Path
) -> None:
    """Most changes belong to a save: files and folders made, renamed, marked as whole, pruned."""
    run = tmp_path / "run"
    rng = random.Random(2)
    for position in range(5):  # together at most as many changes as the unbroken run makes, so none finishes
        ended = launcher.run(command(run, resume=position > 0), kill_at=rng.randint(1, unbroken.changes // 5))
        assert ended.exit == -signal.SIGKILL, ended.said
    ended = launcher.run(command(run, resume=True))
    assert ended.exit == 0, ended.said
    assert_same_run(run, unbroken.run)


def test_a_real_process_killed_while_it_saves(
    command: Callable[..., list[str]], unbroken: Unbroken, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fastft = [sys.executable, "-m", "fastft"]
    with subprocess.Popen([*fastft, *command(run)], stderr=subprocess.PIPE) as process:
        wait_until(lambda: (run / "checkpoints/step-6").is_dir())
        wait_until(lambda: any((run / "checkpoints").glob(".step-*.tmp")))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (run / "model").exists()
    # The run's own config.yaml tells the rest.
    resumed = subprocess.run([*fastft, "train", "--resume", "--out", str(run)], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    assert_same_run(run, unbroken.run)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10, 16))
def test_killed_many_times_at_random_moments(
    launcher: Launcher, command: Callable[..., list[str]], unbroken: Unbroken, tmp_path: Path, seed: int
) -> None:
    kill_at_random_times(launcher, command, tmp_path / "run", kills=12, seed=seed)
    assert_same_run(tmp_path / "run", unbroken.run)


@pytest.mark.long
def test_killed_before_each_change_of_its_folder(
    launcher: Launcher, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    short = {"steps": 5, "save_every": 2, "eval_every": 2, "keep": 1, "patience": 9}
    expected = tmp_path / "expected"
    changes = launcher.run(command(expected, **short)).changes
    assert changes > 80
    for number in range(1, changes + 1):
        run = tmp_path / f"run-{number}"
        assert launcher.run(command(run, **short), kill_at=number).exit == -signal.SIGKILL
        ended = launcher.run(command(run, **short, resume=True))
        assert ended.exit == 0, ended.said
        assert_same_run(run, expected)
        shutil.rmtree(run)


def stopped_at_random_times(
    launcher: Launcher, command: Callable[..., list[str]], folder: Path, *, stops: int, seed: int
) -> None:
    """Stops a run by SIGKILL, SIGHUP and SIGTERM in turn, with early stopping, and holds it against one without."""
    options = {"patience": 50, "eval_every": 2, "keep": 1, "samples": 1, "steps": max(STEPS, stops + 4)}
    expected, run = folder / "expected", folder / "run"
    assert launcher.run(command(expected, **options)).exit == 0
    rng = random.Random(seed)
    lines = len(metrics(expected))
    kinds = itertools.cycle((signal.SIGKILL, signal.SIGHUP, signal.SIGTERM))
    for position, line in enumerate(sorted(rng.sample(range(1, lines - 2), stops))):
        pid = launcher.start(command(run, **options, resume=position > 0))
        wait_for_lines(run, line)
        time.sleep(rng.uniform(0, 0.06))
        kind = next(kinds)
        os.kill(pid, kind)
        ended = launcher.wait()
        assert ended.exit in (0, -kind), ended.said
    ended = launcher.run(command(run, **options, resume=True))
    assert ended.exit == 0, ended.said
    assert_same_run(run, expected, but_checkpoints=True)


def test_stopped_three_times_by_three_signals(
    launcher: Launcher, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    stopped_at_random_times(launcher, command, tmp_path, stops=3, seed=3)


@pytest.mark.long
def test_stopped_twenty_times_by_three_signals(
    launcher: Launcher, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    stopped_at_random_times(launcher, command, tmp_path, stops=20, seed=4)


# Other ways of stopping


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)])
def test_a_stop_signal_saves_before_leaving(
    launcher: Launcher,
    command: Callable[..., list[str]],
    unbroken: Unbroken,
    tmp_path: Path,
    number: signal.Signals,
    status: int,
) -> None:
    run = tmp_path / "run"
    pid = launcher.start(command(run, save_every=100))
    wait_for_lines(run, 11)
    os.kill(pid, number)
    ended = launcher.wait()
    assert ended.exit == status
    step = metrics(run)[-1]["step"]
    assert 8 <= step < STEPS
    assert f"stopped by {number.name} at step {step}, saved" in ended.said
    assert "Traceback" not in ended.said
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [f"step-{step}"]
    assert not (run / "model").exists()

    resumed = launcher.run(command(run, resume=True))
    assert resumed.exit == 0, resumed.said
    assert f"resuming at step {step} of {STEPS}" in resumed.said
    assert_same_run(run, unbroken.run)


def test_resuming_a_finished_run_changes_nothing(
    launcher: Launcher, command: Callable[..., list[str]], unbroken: Unbroken, finished: Path
) -> None:
    ended = launcher.run(command(finished, resume=True))
    assert ended.exit == 0, ended.said
    assert_same_run(finished, unbroken.run)


def test_what_a_kill_after_the_last_save_left_undone_is_done_after_resuming(
    launcher: Launcher, command: Callable[..., list[str]], unbroken: Unbroken, finished: Path
) -> None:
    half_removed = shutil.copytree(finished / f"checkpoints/step-{STEPS}", finished / f"checkpoints/step-{STEPS - 9}")
    (half_removed / "DONE").unlink()
    (finished / "model/config.json").unlink()
    (finished / "model/model.safetensors").rename(finished / "model/.model.safetensors.123.tmp")
    assert launcher.run(command(finished, resume=True)).exit == 0
    assert_same_run(finished, unbroken.run)


# Damaged files


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "fault"),
    [
        (cut, "optimizer.safetensors", "optimizer.safetensors has "),
        (flip, "model.safetensors", "model.safetensors does not match"),
        (flip, "rng.safetensors", "rng.safetensors does not match"),
        (Path.unlink, "state.json", "state.json is missing"),
        (Path.unlink, "DONE", "no DONE file"),
        (cut, "DONE", "DONE file"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    launcher: Launcher,
    command: Callable[..., list[str]],
    unbroken: Unbroken,
    finished: Path,
    damage: Callable[[Path], None],
    name: str,
    fault: str,
) -> None:
    damage(finished / f"checkpoints/step-{STEPS}" / name)
    ended = launcher.run(command(finished, resume=True))
    assert ended.exit == 0, ended.said
    assert f"warning: checkpoint {finished}/checkpoints/step-{STEPS} is passed over: " in ended.said
    assert fault in ended.said
    assert f"resuming at step {STEPS - SAVE_EVERY} of {STEPS}" in ended.said
    assert_same_run(finished, unbroken.run)


def test_a_torn_last_line_of_the_metrics_is_written_again(
    launcher: Launcher, command: Callable[..., list[str]], unbroken: Unbroken, finished: Path
) -> None:
    shutil.rmtree(finished / f"checkpoints/step-{STEPS}")
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    torn = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == STEPS - 1)
    (finished / "metrics.jsonl").write_text("".join(lines[:torn]) + lines[torn][:50])
    assert len(list(read_metrics(finished / "metrics.jsonl"))) == torn
    assert launcher.run(command(finished, resume=True)).exit == 0
    assert_same_run(finished, unbroken.run)


# Other options


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 3, "schedule": "cosine", "warmup": 2, "steps": 8},
        {"accumulate": 2, "schedule": "linear", "clip": 0, "steps": 8},
        {"patience": 2, "lr": 1.0, "eval_every": 2, "keep": 1},
        {"recipe": "book", "eval_every": 5, "steps": 7, "batch_size": 10, "save_every": 2},
    ],
    ids=["cosine", "linear", "early stopping", "book"],
)
def test_every_kind_of_state_survives(
    launcher: Launcher, command: Callable[..., list[str]], tmp_path: Path, options: dict[str, Any]
) -> None:
    expected, run = tmp_path / "expected", tmp_path / "run"
    ended = launcher.run(command(expected, **options))
    assert ended.exit == 0, ended.said
    changes = ended.changes
    for resume in (False, True):
        assert launcher.run(command(run, **options, resume=resume), kill_at=changes // 2).exit == -signal.SIGKILL
    ended = launcher.run(command(run, **options, resume=True))
    assert ended.exit == 0, ended.said
    assert "resuming at step" in ended.said
    assert_same_run(run, expected)
    if "patience" in options:
        assert metrics(run)[-1]["step"] < STEPS
        assert "exporting the weights" in ended.said  # of the best step, or those that it started from


def test_skipped_steps_are_counted_once(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stopped after too many skipped steps goes on with a larger limit as if it had not stopped."""
    poisoned = {2, 4}
    now = 0
    real_begin, real_accumulate = Steps.forward_backward, Engine.accumulate

    def begin(self: Steps, built: Any) -> Any:
        nonlocal now
        now = built.step.index
        return real_begin(self, built)

    def accumulate(self: Engine, batch: Batch, count: int, **_: bool) -> tuple[Tensor, Tensor]:
        loss, example_losses = real_accumulate(self, batch, count)
        return loss * (float("nan") if now in poisoned else 1), example_losses

    monkeypatch.setattr(Steps, "forward_backward", begin)
    monkeypatch.setattr(Engine, "accumulate", accumulate)

    def trained(run: Path, **options: Any) -> checkpoint.Progress:
        return train(parse("train", command(run, steps=6, eval_every=3, **options)[1:])).progress

    expected = trained(tmp_path / "expected", max_skipped=5)
    assert expected.skipped == 2
    with pytest.raises(TrainingError, match=r"step 3 has loss nan.*rows? .*--max_skipped allows 0"):
        trained(tmp_path / "run", max_skipped=0)
    with pytest.raises(TrainingError, match=r"step 5 .*--max_skipped allows 1"):
        trained(tmp_path / "run", max_skipped=1, resume=True)
    assert trained(tmp_path / "run", max_skipped=5, resume=True) == expected
    lines, expected_lines = (str(metrics(tmp_path / name)) for name in ("run", "expected"))  # nan is not equal to nan
    assert lines == expected_lines
    weights, expected_weights = ((tmp_path / name / "model/model.safetensors") for name in ("run", "expected"))
    assert weights.read_bytes() == expected_weights.read_bytes()


# These tests can fail


@pytest.mark.parametrize("forgotten", ["moments", "weights"])
def test_forgotten_state_is_noticed(
    command: Callable[..., list[str]],
    unbroken: Unbroken,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    forgotten: str,
) -> None:
    shutil.rmtree(finished / f"checkpoints/step-{STEPS}")
    shutil.rmtree(finished / f"checkpoints/best-{STEPS}")
    options = parse("train", command(finished, resume=True)[1:])
    real_load = Engine.load

    def load(self: Engine, weights: Path, moments: dict[str, Tensor]) -> None:
        before = copy.deepcopy(self.model.state_dict())
        real_load(self, weights, {} if forgotten == "moments" else moments)
        if forgotten == "weights":
            self.model.load_state_dict(before)

    monkeypatch.setattr(Engine, "load", load)
    train(options)
    with pytest.raises(AssertionError):
        assert_same_run(finished, unbroken.run)
    assert torch.get_num_threads() == 1


def test_a_step_computed_twice_is_noticed(unbroken: Unbroken, finished: Path) -> None:
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (finished / "metrics.jsonl").write_text("".join([*lines, lines[-2]]))
    with pytest.raises(AssertionError):
        assert_same_run(finished, unbroken.run)
