"""A run on several files, mixed, with validation and test records of its own: killed and resumed, on other ranks, and
what comes after it."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import Launcher
from runs import Trained, arguments, assert_one_curve, assert_same_run, metrics, wait_for_lines
from small_records import made_records

from fastft.cli import main
from fastft.common.errors import UserError
from fastft.run.config import TrainOptions
from fastft.run.metrics_file import read_metrics
from fastft.training.train import train

STEPS = 14
PARTS = {"a.json": 12, "b.json": 30, "v.json": 6, "t.json": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of `PARTS`, whose records name them: 42 training examples, 11 steps of 4 an epoch."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, n in PARTS.items():
        records = [{**record, "instruction": f"{name}: {record['instruction']}"} for record in made_records(n)]
        (folder / name).write_text(json.dumps(records))
    return folder


def settings(folder: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """Three epochs and a part of the fourth of a.json are drawn in fourteen steps."""
    return {
        "data": [str(folder / "a.json"), str(folder / "b.json")], "mix": "2,1", "val_data": str(folder / "v.json"),
        "test_data": str(folder / "t.json"), "model": "pico", "steps": STEPS, "batch_size": 4, "lr": 1e-3,
        "save_every": 7, "eval_every": 5, "samples": 1, "keep_best": False, "dtype": "fp32", "device": "cpu",
        "threads": 1, "ledger": True, "out": run, **changes,
    }  # fmt: skip


def argv(values: dict[str, Any]) -> list[str]:
    rest = {name: value for name, value in values.items() if name != "data"}
    return ["train", "--data", *values["data"], *arguments(rest)]


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Path:
    run = folder / "unbroken"
    train(TrainOptions(**settings(folder, run)))
    return run


def ledger(run: Path) -> list[str]:
    """What each place of a run's steps is, in order."""
    return [row for line in read_metrics(run / "ledger.jsonl") for row in line["rows"]]


def test_an_epoch_is_drawn_in_its_ratio(unbroken: Path) -> None:
    first = ledger(unbroken)[:42]
    assert Counter(row.partition(":")[0] for row in first) == {"a.json": 28, "b.json": 14}
    times = Counter(ledger(unbroken))
    assert set(range(1, 13)) == {int(row.partition(":")[2]) for row in times if row.startswith("a.json")}
    assert min(count for row, count in times.items() if row.startswith("a.json")) >= 2
    assert max(count for row, count in times.items() if row.startswith("b.json")) == 1
    said = json.loads((unbroken / "data.json").read_text())
    assert [Path(one["source"]).name for one in said["files"]] == list(PARTS)
    assert [(one["train"], one["val"], one["test"]) for one in said["files"]] == [
        (12, 0, 0), (30, 0, 0), (0, 6, 0), (0, 0, 5)
    ]  # fmt: skip


@pytest.mark.parametrize("stop_after", [7, *(pytest.param(step, marks=pytest.mark.long) for step in (1, 11))])
def test_stopped_and_resumed_it_is_the_same_run(stop_after: int, folder: Path, unbroken: Path, tmp_path: Path) -> None:
    """Within the first epoch, at its end, and in the second."""
    options = TrainOptions(**settings(folder, tmp_path / "run"))
    train(options, stop_after=stop_after)
    train(replace(options, resume=True))
    assert_same_run(options.out, unbroken)
    assert ledger(options.out) == ledger(unbroken)


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of a warm process")
def test_killed_at_random_moments_it_is_the_same_run(
    folder: Path, launcher: Launcher, unbroken: Path, tmp_path: Path
) -> None:
    values = settings(folder, tmp_path / "run")
    rng = random.Random(3)
    exits: list[int] = []
    for position, lines in enumerate(sorted(rng.sample(range(1, STEPS), 5))):
        pid = launcher.start(argv({**values, "resume": position > 0}))
        wait_for_lines(values["out"], lines)
        os.kill(pid, signal.SIGKILL)
        exits.append(launcher.wait().exit)
    assert set(exits) <= {0, -signal.SIGKILL}  # near its end it may be over
    assert exits.count(-signal.SIGKILL) > 2
    ended = launcher.run(["train", "--resume", "--out", str(values["out"])])  # its config.yaml tells the rest
    assert ended.exit == 0, ended.said
    assert_same_run(values["out"], unbroken)


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks ranks of a warm process")
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_two_ranks_train_the_same(
    batching: str, folder: Path, launcher: Launcher, unbroken: Path, tmp_path: Path
) -> None:
    for one in launcher.run_ranks(argv(settings(folder, tmp_path / "run", batching=batching, lr=5e-5)), 2):
        assert one.exit == 0, one.said
    alone = launcher.run(argv(settings(folder, tmp_path / "alone", lr=5e-5)))
    assert alone.exit == 0, alone.said
    assert_one_curve(Trained(tmp_path / "run"), Trained(tmp_path / "alone"))
    by_step = [
        [sorted(line["rows"]) for line in read_metrics(run / "ledger.jsonl")] for run in (tmp_path / "run", unbroken)
    ]
    assert by_step[0] == by_step[1]


def test_each_option_changes_what_it_says(folder: Path, unbroken: Path, tmp_path: Path) -> None:
    """Of the mix, the steps; of the files of validation and test, what is evaluated, and nothing of the steps."""

    def trained(name: str, **changes: Any) -> list[dict[str, Any]]:
        train(TrainOptions(**settings(folder, tmp_path / name, **{"steps": 3, "eval_every": 0, **changes})))
        return metrics(tmp_path / name)

    def losses(lines: list[dict[str, Any]], name: str) -> list[float]:
        return [line[name] for line in lines if name in line]

    whole = metrics(unbroken)
    mixed = trained("mixed")
    assert losses(mixed, "loss") == losses(whole, "loss")[:3]
    assert losses(trained("plain", mix=None), "loss") != losses(mixed, "loss")
    assert losses(trained("other", mix=[1, 2]), "loss") != losses(mixed, "loss")
    swapped = trained("swapped", val_data=str(folder / "t.json"), test_data=str(folder / "v.json"))
    assert losses(swapped, "loss") == losses(mixed, "loss")
    assert losses(swapped, "val_loss") != losses(mixed, "val_loss")


def test_what_comes_after_it_takes_the_same_parts(
    folder: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = ["generate", "--run", str(unbroken), "--max_new_tokens", "2"]
    for split, name in (("test", "t.json"), ("val", "v.json"), ("train", "a.json")):
        assert main([*answer, "--split", split, "--limit", "3"]) == 0
        path = unbroken / ("responses.json" if split == "test" else f"responses.{split}.json")
        assert [entry["instruction"].partition(":")[0] for entry in json.loads(path.read_text())[:3]] == [name] * 3
        made_from = json.loads(path.with_suffix(".made-from.json").read_text())
        assert all(tie["row"].startswith(f"{name}:") for tie in made_from["near_ties"])
    assert main([*answer, "--data", *(str(folder / name) for name in ("a.json", "b.json"))]) == 0
    everything = [str(folder / name) for name in PARTS]
    assert main(["score", "--run", str(unbroken), "--judge", "none", "--data", *everything]) == 0
    assert main(["report", "--run", str(unbroken)]) == 0
    assert "a.json:" in (unbroken / "report.html").read_text()
    capsys.readouterr()
    for files, words in (
        (everything[:1], "expected 2, or all 4 in this order"),
        ([everything[1], everything[0]], "is not what"),
        (everything[::-1], "is not what"),
    ):
        assert main([*answer, "--data", *files]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.long
def test_verify_resume_proves_it(folder: Path, tmp_path: Path) -> None:
    proof = argv(settings(folder, tmp_path / "proof", steps=4, ledger=False, samples=0))[1:]
    assert main(["verify-resume", *proof]) == 0


def test_moved_files_resume_and_other_ones_do_not(folder: Path, unbroken: Path, tmp_path: Path) -> None:
    options = TrainOptions(**settings(folder, tmp_path / "run"))
    train(options, stop_after=3)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in PARTS:
        (moved / f"its {name}").write_bytes((folder / name).read_bytes())
    a, b, v, t = (str(moved / f"its {name}") for name in PARTS)
    now = replace(options, resume=True, data=[a, b], val_data=v, test_data=t)
    for wrong in (
        replace(now, data=[b, a]),
        replace(now, val_data=t, test_data=v),
        replace(now, val_data=None),
        replace(now, mix=[1, 1]),
        replace(now, mix=None),
        replace(now, test_data=None, split=[0.5, 0, 0.5]),
    ):
        with pytest.raises(UserError, match=r"not what .* was trained on|would compute something else|trained on"):
            train(wrong)
    train(now)
    assert ledger(now.out) == [f"its {row}" if k >= 12 else row for k, row in enumerate(ledger(unbroken))]
    assert Path(yaml.safe_load((now.out / "config.yaml").read_text())["test_data"]).name == "its t.json"


def test_a_run_of_an_older_fastft_goes_on_and_answers(folder: Path, tmp_path: Path) -> None:
    """Its config.yaml knows none of these options."""
    run = tmp_path / "run"
    options = TrainOptions(
        **settings(folder, run, data=str(folder / "b.json"), mix=None, val_data=None, test_data=None)
    )
    train(options, stop_after=3)
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("val_data", "test_data", "split", "mix"):
        del config[name]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--resume", "--out", str(run), "--steps", "4"]) == 0
    assert main(["generate", "--run", str(run), "--max_new_tokens", "2"]) == 0
    assert len(json.loads((run / "responses.json").read_text())) == 3


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ([1e-9, 1], "a.json, which would give none of the 42 of an epoch"),
        ([1, 1, 1], "got --mix 1,1,1, expected a number above 0 for each of the 2 files"),
    ],
)
def test_a_mix_that_leaves_a_file_out_is_refused(mix: list[float], words: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        train(TrainOptions(**settings(folder, tmp_path / "run", mix=mix)))


def test_a_file_without_a_training_example_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(made_records(1)))
    data = [str(folder / "a.json"), str(tmp_path / "one.json")]
    given = settings(folder, tmp_path / "run", data=data, val_data=None, test_data=None, split=[0.5, 0.25, 0.25])
    with pytest.raises(UserError, match=r"got --mix with one.json, which has no training example"):
        train(TrainOptions(**given))
