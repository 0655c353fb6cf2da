"""What is odd about the data is said by `train` before it trains, kept in data.json, and no surprise for `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_records import made_records

from fastft.cli import main
from fastft.common.errors import UserError
from fastft.data.prompts import ALPACA
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.model.weights import load


def trained(tmp_path: Path, entries: list[dict[str, Any]], *options: str) -> Path:
    """A run of two steps on lines that are named as an array."""
    data, run = tmp_path / "data.json", tmp_path / "run"
    data.write_text("\n".join(map(json.dumps, entries)))
    argv = [
        "train",
        "--data",
        str(data),
        "--model",
        "pico",
        "--steps",
        "2",
        "--out",
        str(run),
        "--device",
        "cpu",
        *options,
    ]
    assert main(argv) == 0
    return run


def test_train_says_it_and_data_json_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = made_records(40)
    entries[1] |= {"input": "<noinput>", "source": "web"}
    entries[2]["output"] += "<|endoftext|>"
    entries[35] = entries[5]
    run = trained(tmp_path, entries)
    said = capsys.readouterr().err
    for line in (
        "warning: data: keys that are not read: `source` 1",
        "warning: data: inputs that say that there is nothing, read as text: 1: rows 2 (such as: '<noinput>' 1)",
        "warning: data: outputs with <|endoftext|> at their end, taken as the end: 1: rows 3",
        "warning: data: test prompts that also stand in train: 1: rows 36",
        "is taken for JSON lines by its content, not by its name",
    ):
        assert said.count(line) == 1, line
    seen = json.loads((run / "data.json").read_text())
    assert seen["audit"]["unknown_keys"] == {"source": 1}
    assert (seen["audit"]["end_taken"], seen["audit"]["test_in_train"]) == ([3], [36])
    (file,) = seen["files"]
    assert file["taken_for"].endswith("not by its name")
    assert [file[part] for part in ("records", "train", "test", "val")] == [40, 34, 4, 2]
    assert main(["generate", "--run", str(run), "--max_new_tokens", "2"]) == 0
    assert "data:" not in capsys.readouterr().err


def test_a_test_row_without_room_is_said_before_training_and_kept_by_generate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = made_records(40)
    entries[35]["input"] = "word " * 300
    with pytest.raises(AssertionError):
        trained(tmp_path, entries)
    assert "1 test examples are longer than the model's context of 256 tokens: row 36" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()
    run = trained(tmp_path, entries, "--too_long", "drop")
    assert "test: 1 examples do not fit the context of 256 tokens: row 36" in capsys.readouterr().err
    assert json.loads((run / "data.json").read_text())["test"] == {"longer_than_context": [36]}

    answer = ["generate", "--run", str(run), "--max_new_tokens", "2"]
    assert main([*answer, "--too_long", "raise"]) == 2
    assert "row 36; --too_long leave_out" in capsys.readouterr().err
    for _ in ("answered", "taken up"):
        assert main(answer) == 0
        answered = json.loads((run / "responses.json").read_text())
        assert [entry["instruction"] for entry in answered] == [entry["instruction"] for entry in entries[34:38]]
        assert answered[1]["model_response"] == ""
        assert answered[1]["left_out"] == "its prompt fills the context of 256 tokens"
        assert not any("left_out" in entry for entry in (answered[0], *answered[2:]))
    assert "are left without a response: row 36" in capsys.readouterr().err


def test_options_stand_in_the_prompt_that_generate_asks_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [{**made_records(40)[0], "choices": [f"a{i}", "b"], "output": "AB"[i % 2]} for i in range(40)]
    run = trained(tmp_path, entries)
    asked: list[str] = []
    encode_many = type(gpt2_tokenizer()).encode_many

    def noted(self: Any, texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return encode_many(self, texts)

    monkeypatch.setattr(type(gpt2_tokenizer()), "encode_many", noted)
    assert main(["generate", "--run", str(run), "--max_new_tokens", "2"]) == 0
    assert asked == [ALPACA.prompt(entry["instruction"], "", entry["choices"]) for entry in entries[34:38]]
    assert len(set(asked)) == 4


def test_a_folder_named_as_the_published_weights_does_not_replace_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def no_hub(model_id: str, **_: Any) -> str:
        asked.append(model_id)
        raise OSError("no route to host")

    run = trained(tmp_path, made_records())
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_hub)
    monkeypatch.chdir(tmp_path)
    (run / "model").rename(tmp_path / "gpt2")
    with pytest.raises(UserError, match="cannot download openai-community/gpt2"):
        load("gpt2")
    assert load("./gpt2").config.n_embd == load(Path("gpt2")).config.n_embd == 32
    argv = ["train", "--data", "data.json", "--model", "gpt2", "--out", "other", "--dry_run"]
    assert main(argv) == 2
    assert asked == ["openai-community/gpt2"] * 2
    said = "gpt2 means the published weights, not the folder here; for that give --weights ./gpt2"
    assert said in capsys.readouterr().err
    assert yaml.safe_load((run / "config.yaml").read_text())["weights"] is None


def in_one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    return said[0]


def test_score_takes_the_new_place_of_moved_data_and_refuses_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 40 records the test split is rows 35 to 38, of which one has no room for a response."""
    entries = made_records(40)
    entries[35]["input"] = "word " * 300
    run = trained(tmp_path, entries, "--too_long", "drop")
    moved = (tmp_path / "data.json").rename(tmp_path / "moved.jsonl")
    score = ["score", "--run", str(run), "--judge", "none"]
    assert main(["generate", "--run", str(run), "--data", str(moved), "--max_new_tokens", "2"]) == 0
    assert main([*score, "--data", str(moved)]) == 0
    assert "3 responses (1 more entries were left out by generate): exact match" in capsys.readouterr().out
    summary = json.loads((run / "scores.json").read_text())["summary"]
    assert (summary["n"], summary["left_out_rows"], summary["empty_responses"]) == (3, [2], 0)
    assert main(score) == 0  # responses.json holds what is scored

    for name, changed in (("train", 0), ("test", 36), ("val", 39)):
        other = [dict(entry) for entry in entries]
        other[changed]["output"] += " and more"
        moved.write_text("\n".join(map(json.dumps, other)))
        (run / "scores.json").unlink()
        assert main([*score, "--data", str(moved)]) == 2, name
        assert f"{moved} is not what {run} was trained on" in in_one_line(capsys)
        assert not (run / "scores.json").exists()
        main(score)
    assert main([*score, "--data", str(tmp_path / "gone.json")]) == 2
    assert "data file not found" in in_one_line(capsys)


@pytest.mark.parametrize("change", [{"output": "another"}, {"choices": ["a", "b"], "output": "a"}, {"input": "x"}])
def test_responses_to_other_records_than_the_datas_are_refused(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, made_records(40))
    assert main(["generate", "--run", str(run), "--max_new_tokens", "2", "--limit", "3"]) == 0
    score = ["score", "--run", str(run), "--judge", "none", "--data", str(tmp_path / "data.json")]
    assert main(score) == 0
    answered = json.loads((run / "responses.json").read_text())
    answered[2] |= change
    (run / "responses.json").write_text(json.dumps(answered))
    assert main(score) == 2
    assert "responses.json row 3: it answers no record of the test split" in in_one_line(capsys)
    (run / "responses.json").write_text(json.dumps([answered[0], answered[1], answered[1]]))
    assert main(score) == 2  # a record that stands once is answered once
    assert "row 3: it answers no record" in in_one_line(capsys)
