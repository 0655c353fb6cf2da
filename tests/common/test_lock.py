"""One writer of a run's folder: of processes that start together one trains, and a kill frees the folder."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from forks import in_fork, in_forks
from rating_pages import exported, rated, says
from runs import metrics, wait_for_lines, wait_until, write_records

from fastft.answers.generation import generate
from fastft.answers.options import GenerateOptions
from fastft.cli import main
from fastft.common.errors import UserError
from fastft.common.lock import LOCK_FILE, refuse_if_held, writing
from fastft.reports.report import ReportOptions, report
from fastft.run.config import TrainOptions
from fastft.run.folder import Run
from fastft.scores.ab import AbOptions, make_page
from fastft.scores.compare import CompareOptions, compare
from fastft.scores.ratings import import_ratings
from fastft.scores.score import ScoreOptions, score
from fastft.training.train import train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="locks are held in forks of this process")

STEPS = 6


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    data = write_records(tmp_path / "records.json")
    return [
        *(
            "train",
            "--data",
            str(data),
            "--model",
            "pico",
            "--steps",
            str(STEPS),
            "--batch_size",
            "4",
            "--samples",
            "0",
        ),
        *("--eval_every", "0", "--device", "cpu", "--dtype", "fp32", "--threads", "1", "--out", str(tmp_path / "run")),
    ]


def test_the_second_of_two_gets_one_line_and_the_first_is_left_alone(tmp_path: Path) -> None:
    with writing(tmp_path):
        second = in_fork(lambda: refuse_if_held(tmp_path))
        assert isinstance(second.gave, UserError)
        assert f"another process writes to {tmp_path}" in str(second.gave)
    refuse_if_held(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("shared", [True, False])
def test_a_lock_of_somebody_elses_in_a_shared_folder_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, shared: bool
) -> None:
    """Where the folder too is theirs, what is written says so."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("fastft.common.lock.filelock.FileLock.acquire", refuse)
    monkeypatch.setattr("fastft.common.lock.os.access", lambda *_: shared)
    with writing(tmp_path):
        said = " ".join(capsys.readouterr().err.split())
    assert (f"{tmp_path} cannot be locked ([Errno {errno.EACCES}] Permission denied)" in said) is shared


def test_looking_leaves_no_trace(tmp_path: Path) -> None:
    refuse_if_held(tmp_path)
    refuse_if_held(tmp_path / "not there")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_said_by_the_block(tmp_path: Path) -> None:
    with writing(tmp_path / "not there"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_kill_frees_the_folder(tmp_path: Path) -> None:
    def hold() -> None:
        with writing(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_fork(hold).exit == -signal.SIGKILL
    with writing(tmp_path):
        pass


def test_every_command_that_writes_takes_the_lock(argv: list[str], tmp_path: Path) -> None:
    assert main(argv) == 0
    run = tmp_path / "run"
    other = run.rename(tmp_path / "other")
    generate(GenerateOptions(run=other, max_new_tokens=2))
    assert main(argv) == 0
    generate(GenerateOptions(run=run, max_new_tokens=2))
    answers = json.loads((other / "responses.json").read_text())
    (other / "responses.json").write_text(json.dumps([{**one, "model_response": "other"} for one in answers]))
    ratings = exported(tmp_path, rated(make_page(AbOptions(run, other)), "Eve", says("other")))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    options = Run(run).options()
    commands: list[Callable[[], object]] = [
        lambda: train(replace(options, overwrite=True)),
        lambda: train(replace(options, resume=True)),
        lambda: generate(GenerateOptions(run=run, max_new_tokens=3)),
        lambda: score(ScoreOptions(run=run, judge="none")),
        lambda: report(ReportOptions(run=run)),
        lambda: compare(CompareOptions(run, other)),
        lambda: make_page(AbOptions(run, other)),
        lambda: import_ratings(AbOptions(import_=[ratings])),
    ]
    with writing(run):
        for number, command in enumerate(commands):
            with pytest.raises(UserError, match="another process writes to"):
                command()
            assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, number


def test_a_run_that_ended_while_another_one_was_loading_is_not_replaced(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is free again: what the folder holds is looked at once more."""
    from fastft.training import train as training

    real = training.initial_model

    def slow(options: TrainOptions) -> object:
        monkeypatch.setattr(training, "initial_model", real)
        assert main(argv) == 0
        return real(options)

    monkeypatch.setattr(training, "initial_model", slow)
    assert main([*argv, "--lr", "0.5"]) == 2
    assert Run(tmp_path / "run").options().lr == 5e-5


def both_at_once(argv: list[str], run: Path, rng: random.Random) -> None:
    """Two processes on one folder: one trains and the other says why not."""
    delays = [0.0, rng.uniform(0, 0.4)]
    rng.shuffle(delays)

    def of(delay: float) -> Callable[[], object]:
        def start() -> object:
            time.sleep(delay)
            return main(argv)

        return start

    ended = in_forks(*map(of, delays))
    assert sorted(one.gave for one in ended) == [0, 2], [one.said for one in ended]
    (refused,) = (one for one in ended if one.gave == 2)
    said = [line for line in refused.said.splitlines() if line.startswith("error:")]
    assert len(said) == 1, refused.said
    assert "another process writes to" in said[0] or "already holds a run" in said[0]
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, STEPS + 1))
    assert (run / "model/model.safetensors").is_file()
    assert main([*argv, "--resume", "--steps", str(STEPS)]) == 0  # nothing of it is torn


@pytest.mark.parametrize("seed", [0, 1])
def test_of_two_that_start_at_once_one_trains(argv: list[str], tmp_path: Path, seed: int) -> None:
    both_at_once(argv, tmp_path / "run", random.Random(seed))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(50))
def test_of_two_that_start_at_once_one_trains_always(argv: list[str], tmp_path: Path, seed: int) -> None:
    both_at_once(argv, tmp_path / "run", random.Random(100 + seed))


def test_resuming_beside_a_running_process_is_refused_and_costs_it_nothing(argv: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    longer = [*argv, "--steps", "40"]
    with subprocess.Popen([sys.executable, "-m", "fastft", *longer], stderr=subprocess.PIPE) as process:
        wait_until(lambda: (run / LOCK_FILE).is_file() and (run / "config.yaml").is_file())
        wait_for_lines(run, 2)
        process.send_signal(signal.SIGSTOP)  # else it may be over before the other one has begun
        try:
            second = in_fork(lambda: main(["train", "--resume", "--out", str(run)]))
        finally:
            process.send_signal(signal.SIGCONT)
        assert second.gave == 2
        assert "another process writes to" in second.said
        process.communicate()
    assert process.returncode == 0
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, 41))


# --overwrite


def test_overwrite_removes_what_is_listed_and_follows_no_link(argv: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*argv, "--ledger", "--save_every", "2", "--keep", "9", "--eval_every", "2"]) == 0
    generate(GenerateOptions(run=run, max_new_tokens=2))
    score(ScoreOptions(run=run, judge="none"))
    report(ReportOptions(run=run))
    mine = ["notes.txt", "model/my_code.py", "checkpoints/step-2/notes.md", "tensorboard/mine.txt", "checkpoints/a/b"]
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True, parents=True)
        (run / name).write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "rank-0.txt").write_text("mine")
    (run / "hangs").symlink_to(elsewhere)
    (run / "demo.json").symlink_to(elsewhere / "rank-0.txt")
    (run / "checkpoints/step-9").symlink_to(elsewhere)
    Run(run).clear()
    left = {str(path.relative_to(run)) for path in run.rglob("*") if not path.is_dir()}
    assert left == {*mine, LOCK_FILE}
    assert not (run / "checkpoints/step-4").exists()
    assert [path.name for path in elsewhere.iterdir()] == ["rank-0.txt"]
    assert main(argv) == 0  # it holds no run any more


@pytest.mark.parametrize("what", ["a folder for a file", "a folder that cannot be changed"])
def test_overwrite_looks_at_all_before_it_removes_the_first(
    argv: list[str], tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert main(argv) == 0
    if what == "a folder for a file":
        (run / "data.json").unlink()
        (run / "data.json").mkdir()
    else:
        real = os.access  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != run / "model" and real(path, mode))
    before = sorted(run.rglob("*"))
    assert main([*argv, "--overwrite"]) == 2
    assert sorted(run.rglob("*")) == before


def test_all_that_a_run_writes_is_listed(argv: list[str], tmp_path: Path) -> None:
    """Else --overwrite would leave a part of the old run in the new one's folder."""
    run = tmp_path / "run"
    events = ["--track", "tensorboard"]  # where it is not installed there are none
    assert main([*argv, "--ledger", *events, "--eval_every", "3"]) == 0
    for split in ("test", "val", "train"):
        generate(GenerateOptions(run=run, max_new_tokens=2, split=split, limit=2))
    score(ScoreOptions(run=run, judge="none"))
    report(ReportOptions(run=run))
    (run / "demo.json").write_text(json.dumps({}))
    Run(run).clear()
    assert [path.name for path in run.rglob("*")] == [LOCK_FILE]
