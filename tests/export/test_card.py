"""The model card says what the run's files say, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from exported import made_run

from fastft.data.prompts import ALPACA, CHATML
from fastft.export.base import base_of
from fastft.export.card import model_card
from fastft.run.config import TrainOptions, to_yaml
from fastft.run.folder import Run
from fastft.scores.score import ScoreOptions, responses_sha256, score


@pytest.fixture
def run(tmp_path: Path) -> Run:
    data, base = tmp_path / "secret place" / "mine.json", tmp_path / "secret place" / "base"
    base.mkdir(parents=True)
    data.write_text("[]")
    (base / "model.safetensors").write_bytes(b"weights")
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Base\n")
    run = made_run(tmp_path / "run", "alpaca", data=str(data), weights=str(base), lr=0.003, batch_size=4)
    files = [{"source": str(data), "records": 60, "train": 51, "val": 3, "test": 6}]
    said = {**json.loads(run.data.read_text()), "files": files, "split_sha256": "5911", "left_out": [{"row": 3}]}
    run.data.write_text(json.dumps(said))
    losses = [{"step": step, "loss": 4.0 - step} for step in (1, 2, 3)]
    validation = [{"step": 0, "val_loss": 5.25}, {"step": 3, "val_loss": 2.125}]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in [*losses, *validation]))
    return run


def card(run: Run) -> str:
    return model_card(run, ALPACA, "c0ffee", 256)


def scored(run: Run, weights: str) -> None:
    entries = [{"instruction": "q", "input": "", "output": "a b", "model_response": said} for said in ("a b", "c d")]
    run.responses.write_text(json.dumps(entries))
    run.folder.joinpath("responses.made-from.json").write_text(json.dumps({"weights_sha256": weights}))
    judgements = [{"score": None, "reason": "no judge"}] * 2
    summary: dict[str, Any] = {"n": 2, "exact_match": 50.0, "rouge_l": 51.5, "judge_mean": None, "bleu": None}
    summary["responses_sha256"] = responses_sha256(run.folder)
    scores = {"summary": summary, "judgements": judgements, "responses_sha256": summary["responses_sha256"]}
    (run.folder / "scores.json").write_text(json.dumps(scores))


def test_data_recipe_curve_and_base_are_told(run: Run) -> None:
    text = card(run)
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["license"], head["library_name"]) == ("cc-by-4.0", "transformers")
    assert "base_model" not in head
    assert "| mine.json | 60 | 51 | 3 | 6 |" in text
    for content in (b"[]", b"weights"):
        assert hashlib.sha256(content).hexdigest() in text
    assert "as they were trained on: `5911`" in text
    assert "1 malformed records were left out" in text
    assert "| 0 |  | 5.2500 |\n| 3 | 2.0000 | 2.1250 |" in text
    assert "lr: 0.003\n" in text
    assert "batch_size: 4\n" in text
    assert "weight_decay" not in text
    assert "The licence of the base is `cc-by-4.0`." in text
    assert ALPACA.prompt("Name the plural of goose.") in text
    assert "begins its answer with `### Response:`" in text
    assert "secret" not in text


def test_the_hashes_of_the_base_are_those_that_the_run_wrote_down(run: Run) -> None:
    assert "has not written down its own" in card(run)
    run.data.write_text(json.dumps({**json.loads(run.data.read_text()), "began_with": {"model.safetensors": "c0ffee"}}))
    text = card(run)
    assert "- `model.safetensors`: SHA-256 `c0ffee`" in text
    assert "The run wrote the hashes down when it began." in text
    assert hashlib.sha256(b"weights").hexdigest() not in text


def test_a_model_of_no_steps_is_not_called_tuned(run: Run) -> None:
    assert "A GPT-2, instruction-tuned with fastft from the folder `base`." in card(run)
    run.config.write_text(to_yaml(replace(run.options(), steps=0)))
    assert "A GPT-2, not tuned: no step was trained" in card(run)
    assert "instruction-tun" not in card(run)


def test_what_is_not_known_is_said(run: Run) -> None:
    for path in (run.folder.parent / "secret place").rglob("*"):
        if path.is_file():
            path.unlink()
    run.metrics.unlink()
    run.data.write_text("{}")
    text = card(run)
    assert "license" not in yaml.safe_load(text.split("---\n")[1])
    for said in ("`mine.json`: not there any more at the export; its hash is not known", "No losses were written down",
                 "The licence of the base is not known.", "the hash of its files, are not known",
                 "The run has not written down a hash of its records.", "None were measured."):  # fmt: skip
        assert said in text, said
    assert "begins its answer" not in model_card(run, CHATML, "", 1)


def test_scores_are_told_of_these_weights_alone(run: Run) -> None:
    scored(run, "c0ffee")
    text = card(run)
    assert "Over 2 test records." in text
    assert "| exact match, % | 50.00 | 9.45 to 90.55 |" in text  # Wilson's interval of 1 of 2
    assert "| ROUGE-L F1, % | 51.50 |" in text
    assert "BLEU" not in text
    scored(run, "0ther")
    assert "the answers that were scored are of others" in card(run)
    assert "50.00" not in card(run)
    run.responses.write_text(run.responses.read_text() + " ")
    assert "they have changed since they were scored" in card(run)


def test_named_responses_and_conversations_are_told_too(run: Run) -> None:
    scored(run, "c0ffee")
    for path in (run.responses, run.scores(), run.folder / "responses.made-from.json"):
        shutil.copy(path, path.with_name(path.name.replace("s.", "s.t1.0.", 1)))
    made = run.folder / "responses.t1.0.made-from.json"
    made.write_text(json.dumps({"weights_sha256": "c0ffee", "temperature": 1.0, "seed": 7}))
    text = card(run)
    assert "### Responses t1.0\n\nTemperature 1.0, seed 7.\n\nOver 2 test records." in text
    made.write_text(json.dumps({"weights_sha256": "0ther"}))
    assert "### Responses t1.0\n\nNothing says how they were decoded.\n\nThere are none that are known" in card(run)
    turns = [{"question": "Twice five?", "answer": "Ten.", "reference": "ten"}]
    run.conversations().write_text(json.dumps([{"id": 1, "turns": turns}]))
    (run.folder / "conversations.made-from.json").write_text('{"weights_sha256": "c0ffee"}')
    run.responses.unlink()
    score(ScoreOptions(run=run.folder, judge="none"))
    text = card(run)
    assert "Of conversations, turn by turn: 1 conversations: 100.00% of 1 answers say the short right one." in text
    assert "Over 0 test records" not in text


def test_long_curves_are_told_in_twenty_rows(run: Run) -> None:
    lines = [{"step": step, "loss": float(step)} for step in range(1, 1001)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [line for line in card(run).splitlines() if line.startswith("| ") and line.endswith(" |  |")]
    assert len(rows) == 20
    assert rows[0] == "| 1 | 1.0000 |  |"
    assert rows[-1].startswith("| 1000 | ")


def test_bases(tmp_path: Path) -> None:
    options = TrainOptions(model="gpt2-medium")
    base = base_of(options)
    assert (base.hub_id, base.licence) == ("openai-community/gpt2-medium", "mit")
    other = base_of(replace(options, weights="somebody/gpt2-de"))
    assert (other.hub_id, other.licence) == ("somebody/gpt2-de", None)
    assert base_of(TrainOptions(model="pico", seed=4)).what == "random weights (size `pico`, seed 4)"
    assert base_of(replace(options, weights=str(tmp_path / "w.pth"))).what == "`w.pth`, which is not there any more"
    (tmp_path / "w.pth").write_bytes(b"x")
    assert base_of(replace(options, weights=str(tmp_path / "w.pth"))).hashes == {
        "w.pth": hashlib.sha256(b"x").hexdigest()
    }
