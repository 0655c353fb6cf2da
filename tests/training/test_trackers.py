"""What trackers show of a run is what its metrics.jsonl has, also of one that was killed; and they end no training."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

import fastft
from fastft.common.errors import UserError
from fastft.training.trackers import tracking
from fastft.training.trackers.figures import Point, points_of
from fastft.training.trackers.tracker import End, Start
from fastft.training.trackers.tracking import Told, tracked

ROWS = [{"instruction": f"Say {n}.", "output": f"{n} it is"} for n in range(40)]
STEPS = 6
NAMES = {
    "loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm", "epoch": "train/epoch",
    "seconds": "time/step_seconds", "memory_bytes": "memory/peak_bytes", "tokens_padded": "tokens/padded",
    "tokens_real": "tokens/real", "tokens_computed": "tokens/computed", "tokens_supervised": "tokens/supervised",
    "examples": "train/examples", "val_loss": "val/loss", "eval_seconds": "time/eval_seconds",
}  # fmt: skip
OF_THE_CLOCK = {"time/step_seconds", "time/eval_seconds", "memory/peak_bytes"}

Curves = dict[str, list[tuple[int, float]]]


def options(out: Path, track: str | None, **changes: Any) -> fastft.TrainOptions:
    some = {"model": "pico", "steps": STEPS, "save_every": 2, "eval_every": 2, "samples": 0, "dtype": "fp32", "keep": 9}
    return fastft.TrainOptions(**{**some, "out": out, "device": "cpu", "track": track, **changes})


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curves_of(run: Path) -> Curves:
    """The curves that a tracker is to have, by the run's own file."""
    curves: Curves = defaultdict(list)
    for line in lines_of(run):
        for key, value in line.items():
            if key not in ("step", "sample"):
                curves[NAMES[key]].append((line["step"], float(value)))
    return dict(curves)


def of_tensorboard(run: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def of_mlflow(run: Path) -> Curves:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("fastft").experiment_id])
    status = "FINISHED" if (run / "model").is_dir() else "KILLED"
    assert (found.info.run_name, found.info.status, found.data.params["model"]) == ("run", status, "pico")
    histories = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    return {name: [(one.step, one.value) for one in history] for name, history in histories.items()}


def of_trackio(run: Path) -> Curves:
    del run
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (found,) = trackio.Api().runs("fastft")
    assert found.config["model"] == "pico"
    curves: Curves = defaultdict(list)
    for entry in SQLiteStorage.get_logs("fastft", found.name):
        for name, value in entry.items():
            if name not in ("step", "timestamp"):
                curves[name].append((entry["step"], float(value)))
    return dict(curves)


def of_wandb(run: Path) -> Curves:
    from wandb.proto.wandb_internal_pb2 import Record

    curves: Curves = defaultdict(list)
    ids, numbers = set(), []
    for file in sorted(run.parent.glob("wandb/offline-run-*/run-*.wandb")):
        for text in leveldb_records(file.read_bytes()):
            record = Record.FromString(text)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                assert record.run.project == "fastft"
            if not record.HasField("history"):
                continue
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            numbers.append(items["_step"])
            for name, value in items.items():
                if "/" in name:
                    curves[name].append((items["step"], float(value)))
    assert len(ids) == 1
    assert numbers == sorted(set(numbers)), "what its server would leave out"
    return dict(curves)


def leveldb_records(content: bytes) -> list[bytes]:
    """The records of a .wandb file, which is a log of LevelDB's behind a header of 7 bytes: blocks of 32 KiB of pieces,
    each with checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    records, at, partly = [], 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        piece = content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(partly + piece)
        partly = partly + piece if kind in (2, 3) else b""
    return records


SETTINGS: dict[str, Callable[[Path], dict[str, str]]] = {
    "tensorboard": lambda _: {},
    "wandb": lambda tmp: {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp), "WANDB_ERROR_REPORTING": "false"},
    "mlflow": lambda tmp: {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp}/mlflow.db"},
    "trackio": lambda tmp: {"TRACKIO_DIR": str(tmp / "trackio")},
}
READ = {"tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": of_mlflow, "trackio": of_trackio}
INSTALLED_BY = "make test-long installs it"


def train(out: Path, tracker: str, *, stop_after: int | None = None, **changes: Any) -> None:
    """Trains; with trackers that keep much of what they are in their modules in a process of its own."""
    if tracker == "tensorboard":
        fastft.train(options(out, tracker, **changes), records=ROWS, stop_after=stop_after)
        return
    code = (
        "import json, sys, fastft; given = json.loads(sys.argv[1]); "
        "fastft.train(fastft.TrainOptions(**given['options']), records=given['rows'], stop_after=given['stop'])"
    )
    asked = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options(out, tracker, **changes)).items()}
    given = json.dumps({"options": asked, "rows": ROWS, "stop": stop_after})
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, given], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"tracked by {tracker}: " in done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    assert done.stdout == ""


def assert_same_curves(got: Curves, run: Path, *, but: Collection[str] = ()) -> None:
    expected = curves_of(run)
    assert got.keys() == expected.keys()
    for name in expected.keys() - set(but):
        assert [step for step, _ in got[name]] == [step for step, _ in expected[name]], name
        # TensorBoard keeps 32 bits of a figure.
        pairs = zip(got[name], expected[name], strict=True)
        assert all(math.isclose(a, b, rel_tol=2**-24) for (_, a), (_, b) in pairs), name


@pytest.mark.parametrize(
    "tracker",
    [
        "tensorboard",
        pytest.param("wandb", marks=pytest.mark.long),
        pytest.param("mlflow", marks=pytest.mark.long),
        pytest.param("trackio", marks=pytest.mark.long),
    ],
)
def test_the_curves_read_back_are_those_of_the_file(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that was killed behind step 3 and goes on behind step 2: one run of the tracker's, each step once."""
    for name, value in SETTINGS[tracker](tmp_path).items():
        monkeypatch.setenv(name, value)
    pytest.importorskip(tracker, reason="not installed here: `make test` and `make test-long` install what they need")
    run = tmp_path / "run"
    train(run, tracker, stop_after=3, samples=1)
    assert json.loads((run / "trackers.json").read_text()).keys() == {tracker}
    assert_same_curves(READ[tracker](run), run)
    shutil.rmtree(run / "checkpoints" / "step-3")
    train(run, tracker, resume=True, samples=1)
    assert [line["step"] for line in lines_of(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    # What the clock said of step 3, the first call told them, and of the evaluation behind step 2.
    assert_same_curves(READ[tracker](run), run, but=OF_THE_CLOCK)


class Heard:
    """A tracker that keeps what it hears, and does what a test plans at it."""

    forgets: ClassVar[bool] = False
    starts: ClassVar[list[Start]] = []
    points: ClassVar[list[Point]] = []
    ends: ClassVar[list[End]] = []
    plan: ClassVar[Callable[[str], None]] = staticmethod(lambda _: None)
    id = "mine"
    place = "here"

    def __init__(self, start: Start) -> None:
        type(self).plan("open")
        self.starts.append(start)

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            type(self).plan(f"step {point[0]}")
            self.points.append(point)

    def close(self, end: End) -> None:
        type(self).plan("close")
        self.ends.append(end)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> type[Heard]:
    """In TensorBoard's place."""
    found: type[Heard] = type("Heard", (Heard,), {"starts": [], "points": [], "ends": []})
    monkeypatch.setattr("fastft.training.trackers.tensorboard.TensorBoard", found)
    return found


def breaks_at(place: str, error: Exception) -> Any:
    def plan(now: str) -> None:
        if now == place:
            raise error

    return staticmethod(plan)


def test_it_is_told_the_run_its_settings_and_its_end(tmp_path: Path, heard: type[Heard]) -> None:
    run = tmp_path / "run"
    fastft.train(options(run, "tensorboard"), records=ROWS, stop_after=2)
    fastft.train(options(run, "tensorboard", resume=True), records=ROWS)
    first, second = heard.starts
    assert (first.name, first.step, first.id) == ("run", 0, None)
    assert first.config["model"] == "pico"
    assert json.dumps(first.config)
    assert (second.step, second.id) == (2, "mine")
    assert heard.ends == ["stopped", "finished"]
    assert without_the_clock(heard.points) == without_the_clock(points_of(lines_of(run)))


@pytest.mark.parametrize(
    ("place", "error", "says"),
    [
        ("open", ImportError("No module named 'x'"), "pip install 'fastft[tensorboard]'"),
        ("open", ConnectionError("no network"), "ConnectionError: no network"),
        ("step 3", OSError("disk full"), "OSError: disk full"),
        ("close", RuntimeError("late"), "RuntimeError: late"),
    ],
    ids=["missing", "at first", "in the midst", "at the end"],
)
def test_one_that_fails_costs_one_warning_and_is_made_up_for(
    place: str,
    error: Exception,
    says: str,
    tmp_path: Path,
    heard: type[Heard],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(heard, "plan", breaks_at(place, error))
    assert fastft.train(options(run, "tensorboard", steps=4), records=ROWS).progress.step == 4
    said = capsys.readouterr().err
    assert said.count("warning: tensorboard does not track this run any more: ") == 1
    assert says in said
    monkeypatch.setattr(heard, "plan", staticmethod(lambda _: None))
    fastft.train(options(run, "tensorboard", resume=True), records=ROWS)
    assert "warning" not in capsys.readouterr().err
    figures = sorted(heard.points, key=lambda point: point[:2])
    assert without_the_clock(figures) == without_the_clock(points_of(lines_of(run)))


def test_steps_of_a_call_without_it_are_made_up_for(tmp_path: Path, heard: type[Heard]) -> None:
    run = tmp_path / "run"
    fastft.train(options(run, "tensorboard"), records=ROWS, stop_after=2)
    fastft.train(options(run, None, resume=True), records=ROWS, stop_after=4)
    assert max(step for step, _, _ in heard.points) == 2
    fastft.train(options(run, "tensorboard", resume=True), records=ROWS)
    assert without_the_clock(heard.points) == without_the_clock(points_of(lines_of(run)))


def without_the_clock(points: Sequence[Point]) -> list[Point]:
    """Of an evaluation that is done again the clock says something else."""
    kept = [(*point[:2], {name: x for name, x in point[2].items() if name not in OF_THE_CLOCK}) for point in points]
    return [(step, evaluation, figures) for step, evaluation, figures in kept if figures]


def test_one_that_never_answers_is_waited_for_in_vain_at_the_end_alone(
    tmp_path: Path, heard: type[Heard], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(heard, "plan", staticmethod(lambda _: answers.wait(60) and None))
    monkeypatch.setattr(tracking, "_PATIENCE_S", 0.2)
    began = time.monotonic()
    start = Start(tmp_path, {}, 0)
    with tracked(["tensorboard"], start, tmp_path / "t.json", before=[], kept=[], is_over=lambda: True) as (one,):
        one.heard({"step": 1, "loss": 2.0})
    assert time.monotonic() - began < 5
    assert capsys.readouterr().err.count("it has not taken everything in time") == 1
    answers.set()


def test_what_is_no_finite_number_and_no_number_is_left_out() -> None:
    line = {"step": 3, "loss": None, "lr": 0.5, "grad_norm": math.nan, "skipped": True, "rows": [1, "a"]}
    assert points_of([line]) == [(3, False, {"train/lr": 0.5, "train/skipped": 1.0})]
    assert points_of([{"step": 3, "val_loss": 2.0, "eval_seconds": 1.0, "train_loss": 3.0}]) == [
        (3, True, {"val/loss": 2.0, "time/eval_seconds": 1.0, "val/train_loss": 3.0})
    ]


def test_what_was_told_is_kept_apart_for_steps_and_evaluations() -> None:
    told = Told().after([{"step": 0, "val_loss": 1}, {"step": 1, "loss": 1}, {"step": 2, "loss": 1}])
    assert told == Told(2, 0)
    assert told.has({"step": 2, "loss": 1})
    assert not told.has({"step": 2, "val_loss": 1})


@pytest.mark.parametrize(
    ("track", "says"),
    [("wandbb", "'wandbb'"), ("tensorboard,", "no name beside it"), ("", "''"), ("mlflow,mlflow", "each tracker once")],
)
def test_names_of_no_tracker_are_refused(track: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        options(tmp_path, track)
    assert options(tmp_path, "wandb, mlflow").trackers() == ["wandb", "mlflow"]
