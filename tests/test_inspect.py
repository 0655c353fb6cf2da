from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from foreign import foreign_weights
from hypothesis import given
from hypothesis import strategies as st
from small_records import made_records

from fastft.cli import main
from fastft.common.errors import UserError
from fastft.data.audit import audit
from fastft.data.prompts import ALPACA
from fastft.data.reading import load_records
from fastft.data.records import Record, split
from fastft.inspect import InspectOptions, inspect, padded_positions
from fastft.model.weights import load


def records_of(entries: list[dict[str, Any]]) -> list[Record]:
    return [Record(**entry, row=row) for row, entry in enumerate(entries, start=1)]


def flawed() -> list[dict[str, Any]]:
    """40 records: 34 train (rows 1-34), 4 test (35-38), 2 val (39, 40), with one flaw of each kind."""
    entries = made_records(40)
    for row, copied in ((9, 2), (36, 2), (40, 5)):
        entries[row - 1] = {**entries[copied - 1], "output": f"another answer {row}"}
    entries[37] = {**entries[36], "output": "twice in test, not in train"}
    entries[10]["output"] = "A ### Response: in the output"
    return entries


def test_the_audit_finds_what_makes_scores_lie() -> None:
    records = records_of(flawed())
    found = audit(records, split(len(records)), ALPACA)
    assert found.duplicate_prompts == [[2, 9, 36], [5, 40], [37, 38]]
    assert found.test_in_train == [36]
    assert found.val_in_train == [40]
    assert found.holding_header == [11]


def test_the_same_instruction_with_another_input_is_another_prompt() -> None:
    records = records_of([{"instruction": "Spell it.", "input": f"{i}", "output": "x"} for i in range(20)])
    found = audit(records, split(20), ALPACA)
    assert found == audit([], split(0), ALPACA)


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps(flawed()))
    assert main(["inspect", "--data", str(data), "--example", "3"]) == 0
    out = capsys.readouterr().out
    assert "end-of-text supervised in 40 of 40 rows\n" in out
    assert "prompts that stand more than once: 3 (7 rows): rows 2 = 9 = 36, 5 = 40, 37 = 38" in out
    assert "test prompts that also stand in train: 1: rows 36" in out
    assert "validation prompts that also stand in train: 1: rows 40" in out
    assert "outputs that hold the response header, lost in extraction: 1: rows" in out
    assert "row 3 in its padded batch of 8:" in out
    assert r"'\n\n### Response:\nnumber 2' + end-of-text" in out
    prompt, supervised = (next(line for line in out.splitlines() if line.startswith(f"  {name} ")) for name in PARTS)
    assert "### Instruction:" in prompt
    assert "### Instruction:" not in supervised


PARTS = ("prompt", "supervised")


@pytest.mark.parametrize("kind", ["same size", "smaller"])
def test_of_weights_their_own_tokenizer_and_context_count(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = tmp_path / "data.json", foreign_weights(kind, tmp_path / "weights")
    entries = made_records(40)
    data.write_text(json.dumps(entries))
    assert main(["inspect", "--data", str(data), "--weights", str(folder), "--example", "3"]) == 0
    out = capsys.readouterr().out
    tokenizer = load(folder).config.tokenizer
    prompt = ALPACA.prompt(entries[2]["instruction"], entries[2]["input"])
    supervised = tokenizer.encode(prompt + ALPACA.response(entries[2]["output"]))[len(tokenizer.encode(prompt)) :]
    assert f"  prompt     {len(tokenizer.encode(prompt)):>4} tokens  {prompt!r}\n" in out
    assert (
        f"  supervised {len(supervised) + 1:>4} tokens  {ALPACA.response(entries[2]['output'])!r} + end-of-text" in out
    )
    assert "end-of-text supervised in 40 of 40 rows\n" in out
    with pytest.raises(
        UserError, match="the model's context of 512" if kind == "smaller" else "the model's context of 256"
    ):
        inspect(InspectOptions(data=str(data), weights=str(folder), max_length=513))


def test_published_weights_are_gpt2s_and_not_downloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps(made_records(40)))
    assert main(["inspect", "--data", str(data)]) == 0
    plain = capsys.readouterr().out
    for weights in ("gpt2", "none"):
        assert main(["inspect", "--data", str(data), "--weights", weights]) == 0
        assert capsys.readouterr().out == plain


def test_cut_rows_lose_their_end_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = made_records(40)
    entries[3]["output"] = entries[36]["output"] = "word " * 300
    data = tmp_path / "data.json"
    data.write_text(json.dumps(entries))
    assert main(["inspect", "--data", str(data), "--model", "pico"]) == 0
    out = capsys.readouterr().out
    assert "end-of-text supervised in 38 of 40 rows, not in rows 4, 37" in out
    assert "train: 1 examples longer than 256 tokens and cut" in out
    assert "test: 1 examples longer than 256 tokens and cut" in out


def test_bad_records_are_shown_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([*made_records(30), {"instruction": "no output"}]))
    assert main(["inspect", "--data", str(data)]) == 0
    out = capsys.readouterr().out
    assert "row 31: `output` is missing, expected text" in out
    assert "1 of 31 records are malformed: training stops, unless --skip_bad_records" in out
    assert "end-of-text supervised in 30 of 30 rows" in out


@given(lengths=st.lists(st.integers(1, 50), max_size=40), batch_size=st.integers(1, 9))
def test_padded_positions(lengths: list[int], batch_size: int) -> None:
    rows = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    padded = [max(row) for row in rows for _ in row]
    assert padded_positions(lengths, batch_size) == sum(padded)
    assert padded_positions(lengths, 1) == sum(lengths)


def test_the_books_file_holds_2_and_4(book_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = load_records(str(book_data)).good
    found = audit(records, split(len(records)), ALPACA)
    assert (len(found.test_in_train), len(found.val_in_train)) == (2, 4)
    first, second = (next(r for r in records if r.row == row) for row in found.test_in_train)
    assert (first.instruction, first.input) == (second.instruction, second.input)
    assert first.output != second.output

    assert main(["inspect", "--data", str(book_data)]) == 0
    out = capsys.readouterr().out
    assert "test prompts that also stand in train: 2" in out
    assert "validation prompts that also stand in train: 4" in out
    assert "end-of-text supervised in 1100 of 1100 rows\n" in out
