"""Training from a program of one's own: records as objects, functions that hear what happens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import fastft
from fastft.common.errors import FastftError, UserError
from fastft.run.folder import Run

ROWS = [{"instruction": f"Say {n}.", "output": f"{n} it is"} for n in range(40)]


def options_for(out: Path, **changes: Any) -> fastft.TrainOptions:
    some = {"model": "pico", "steps": 4, "save_every": 2, "eval_every": 2, "samples": 1, "dtype": "fp32"}
    return fastft.TrainOptions(**{**some, "out": out, "device": "cpu", **changes})


def test_each_callback_hears_what_is_written(tmp_path: Path) -> None:
    steps: list[Any] = []
    evaluations: list[Any] = []
    saved: list[Path] = []

    def on_save(checkpoint: Path) -> None:
        assert (checkpoint / "DONE").is_file()
        saved.append(checkpoint)

    heard = fastft.Callbacks(on_step=steps.append, on_evaluate=evaluations.append, on_save=on_save)
    outcome = fastft.train(options_for(tmp_path / "run"), records=ROWS, callbacks=heard)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [line for line in lines if "loss" in line]
    assert evaluations == [line for line in lines if "val_loss" in line]
    assert (len(steps), len(evaluations), [path.name for path in saved]) == (4, 3, ["step-2", "step-4"])
    assert outcome.progress.step == 4


def test_records_are_a_runs_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fastft.train(options_for(tmp_path / "given"), records=iter(ROWS))
    fastft.train(options_for(tmp_path / "file", data=str(file)))
    given, read = (Run(tmp_path / name) for name in ("given", "file"))
    assert given.weights.read_bytes() == read.weights.read_bytes()
    entries = fastft.generate(fastft.GenerateOptions(run=given.folder, max_new_tokens=2, device="cpu"))
    assert [entry["instruction"] for entry in entries] == [row["instruction"] for row in ROWS[34:38]]
    fastft.train(options_for(tmp_path / "given", steps=6, resume=True), records=ROWS)
    held = (given.folder / "records.jsonl").read_bytes()
    for wrong, says in (
        ({"resume": True}, "have changed"),
        ({"overwrite": True, "weights": "./nowhere"}, "no weights"),
    ):
        with pytest.raises(UserError, match=says):
            fastft.train(options_for(tmp_path / "given", steps=8, **wrong), records=ROWS[::-1])
        assert (given.folder / "records.jsonl").read_bytes() == held
    again = (json.loads(line) for line in (given.folder / "records.jsonl").open())
    fastft.train(options_for(tmp_path / "given", steps=6, resume=True), records=again)
    assert [path.name for path in given.folder.glob(".records*")] == []


def test_a_run_keeps_the_hash_of_the_weights_that_it_began_with(tmp_path: Path) -> None:
    base = fastft.train(options_for(tmp_path / "base", steps=1), records=ROWS).run
    began_with = {"model.safetensors": hashlib.sha256(base.weights.read_bytes()).hexdigest()}
    assert json.loads(base.data.read_text())["began_with"] is None
    given = {"weights": str(base.folder), "eval_every": 0}
    run = fastft.train(options_for(tmp_path / "run", steps=1, **given), records=ROWS).run
    fastft.save_hf(fastft.load(run.model), base.model)
    fastft.train(options_for(tmp_path / "run", steps=2, resume=True, **given), records=ROWS)
    assert json.loads(run.data.read_text())["began_with"] == began_with


def test_records_never_replace_a_file_of_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("mine")
    with pytest.raises(UserError, match="not the data of a run"):
        fastft.train(options_for(tmp_path), records=ROWS)
    assert (tmp_path / "records.jsonl").read_text() == "mine"


@pytest.mark.parametrize("name", ["on_step", "on_evaluate", "on_save"])
def test_one_that_raises_ends_the_run_and_says_so(tmp_path: Path, name: str) -> None:
    def broken(_: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(FastftError, match=rf"the callback {name} raised KeyError: 'mine'"):
        fastft.train(options_for(tmp_path / "run"), records=ROWS, callbacks=fastft.Callbacks(**{name: broken}))
    fastft.train(options_for(tmp_path / "run", resume=True), records=ROWS)
    assert Run(tmp_path / "run").weights.is_file()


def test_one_that_raises_at_the_last_step_is_not_passed_over(tmp_path: Path) -> None:
    def broken(line: dict[str, Any]) -> None:
        if line["step"] == 4:
            raise ValueError("late")

    with pytest.raises(FastftError, match="late"):
        fastft.train(options_for(tmp_path / "run"), records=ROWS, callbacks=fastft.Callbacks(on_evaluate=broken))


@pytest.mark.parametrize(
    ("changes", "records", "says"),
    [
        ({"data": "sample"}, ROWS, "expected one of them"),
        ({"dry_run": True}, ROWS, "writes nothing"),
        ({}, "rows.jsonl", "record 1 that is str"),
        ({}, [*ROWS, {"instruction": {1}, "output": "a"}], "record 41"),
        ({}, [*ROWS, {"instruction": 3, "output": "a"}], "row 41"),
    ],
)
def test_records_that_cannot_be_trained_on(tmp_path: Path, changes: Any, records: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        fastft.train(options_for(tmp_path / "run", **changes), records=records)
    assert says in str(error.value)


def test_what_is_no_function_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(UserError, match="got on_save=3, expected a function"):
        fastft.Callbacks(on_save=3)  # type: ignore[arg-type] # the mistake
