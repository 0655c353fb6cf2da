"""The audit: each thing that is changed, not read or written for nothing is said with its count."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign import trained
from hypothesis import given
from hypothesis import strategies as st
from small_records import made_records

from fastft.cli import main
from fastft.common.errors import UserError
from fastft.data.audit import Findings, audit
from fastft.data.folder_tokenizer import FolderTokenizer
from fastft.data.prompts import ALPACA, PHI3
from fastft.data.reading import load_records
from fastft.data.records import ReadingRules, Record, split
from fastft.data.token_cache import RecordFile, TokenCache
from fastft.model.gpt2 import GPT2Config, config_for
from fastft.run.config import TrainOptions
from fastft.run.data import load_data, warn_of_data
from fastft.run.folder import Run
from fastft.training.models import tokenizer_to_be

MARK = "<|endoftext|>"
EOS = b'{"eos_token": "</s>"}'


def written(tmp_path: Path, changes: dict[int, dict[str, Any]], n: int = 40) -> Path:
    """A file of `n` records, those at some rows changed."""
    entries = made_records(n)
    for row, change in changes.items():
        entries[row - 1] = {**entries[row - 1], **change}
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries))
    return path


def found_in(path: Path, **options: Any) -> Findings:
    """What training would find, from memory and by way of the cache."""
    given = {"data": str(path), "model": "pico", **options}
    held = load_data(TrainOptions(**given, token_cache="none")).audit()
    for _ in ("made", "found"):
        assert load_data(TrainOptions(**given, token_cache=str(path.parent / "cache"))).audit() == held
    return held


def test_unknown_keys_are_named_with_their_counts(tmp_path: Path) -> None:
    more = {row: {"id": row, "source": "web"} for row in (1, 2, 3)} | {
        row: {"id": row, "category": "x", "choices": None, "system": ""} for row in (7, 8)
    }
    found = found_in(written(tmp_path, more))
    assert found.unknown_keys == {"id": 5, "source": 3, "system": 2}
    assert found.lines() == ["keys that are not read: `id` 5, `source` 3, `system` 2"]


def test_a_key_cannot_make_a_line_of_its_own(tmp_path: Path) -> None:
    (line,) = found_in(written(tmp_path, {1: {"a\nwarning: data: all is well": 1}})).lines()
    assert "\n" not in line
    path = tmp_path / "keys.json"
    path.write_text(json.dumps([{"a\nb": 1}]))
    with pytest.raises(UserError, match=r"^[^\n]*got the keys `a\\nb`[^\n]*$"):
        load_records(str(path))


def test_keys_read_by_another_name_are_said(tmp_path: Path) -> None:
    found = found_in(written(tmp_path, {1: {"context": "a"}, 2: {"context": "b"}, 3: {"context": "c"}}))
    assert found.aliases == {"context": 2}  # the record of row 2 has an input
    assert found.lines() == ["keys that are not read: `context` 1", "keys read by another name: `context` as `input` 2"]


SAYS_NOTHING = [
    *("<noinput>", "<No Input>", "N/A", "nan", "None", "-"),
    *("[NO_INPUT]", "null", " n/a ", " \n", "(none)", "n.a.", "No input."),
]


@pytest.mark.parametrize("text", SAYS_NOTHING)
def test_fillers_for_nothing_are_counted_as_inputs_and_as_categories(text: str, tmp_path: Path) -> None:
    found = found_in(written(tmp_path, {2: {"input": text}, 5: {"input": text}, 9: {"category": text}}))
    assert found.filled == {"input": [2, 5], "category": [9]}
    assert found.fillers == {"input": {text: 2}, "category": {text: 1}}
    assert found.lines() == [
        f"inputs that say that there is nothing, read as text: 2: rows 2, 5 (such as: {text!r} 2)",
        f"categories that say that there is nothing, read as text: 1: rows 9 (such as: {text!r} 1)",
    ]


@pytest.mark.parametrize("text", ["none of them", "banana", "0", "<b>", "a-b", "", "NaN is not a number"])
def test_what_says_something_is_no_filler(text: str, tmp_path: Path) -> None:
    assert found_in(written(tmp_path, {2: {"input": text}})).filled == {}


def test_outputs_that_are_fillers_are_counted_too(tmp_path: Path) -> None:
    assert found_in(written(tmp_path, {2: {"output": "<nooutput>"}})).filled == {"output": [2]}


def test_what_was_read_otherwise_is_counted(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {
            1: {"category": float("nan")},
            4: {"score": float("inf")},
            2: {"output": f"end{MARK}"},
            6: {"instruction": f"what is {MARK}?"},
            3: {"output": " "},
        },
    )
    path.write_text(path.read_text().replace('"number 7"', '"number 7", "output": "twice"'))
    with pytest.raises(UserError, match=r"2 of 40 .*row 3: `output` is empty.*row 6: `instruction` holds <\|endoftext"):
        load_records(str(path))
    found = found_in(path, skip_bad_records=True)
    assert (found.not_numbers, found.end_taken, found.repeated_keys) == ([1, 4], [2], [8])
    assert (found.end_as_text, found.empty_outputs) == ([], [])
    found = found_in(path, end_of_text_in_data="keep", allow_empty_output=True)
    assert (found.end_taken, found.end_as_text, found.empty_outputs) == ([], [2, 6], [3])
    assert "outputs with <|endoftext|>" not in "\n".join(found.lines())
    assert "records that hold <|endoftext|>, learned as text: 2: rows 2, 6" in found.lines()
    assert "empty outputs, learned as a response of nothing: 1: rows 3" in found.lines()


def test_a_models_own_end_of_text_is_looked_for(tmp_path: Path) -> None:
    """As another model's tokenizer has it, from memory and by way of the cache."""
    path = written(tmp_path, {2: {"output": "end</s>"}, 4: {"output": f"end{MARK}"}, 6: {"input": "a</s> b"}})
    tokenizer = FolderTokenizer(
        {"tokenizer.json": trained(ends="</s>").encode(), "tokenizer_config.json": EOS}, "x", {}
    )
    rules = ReadingRules().with_end(tokenizer.decode([tokenizer.end_of_text]))
    assert rules.end_marks == (MARK, "</s>")
    with pytest.raises(UserError, match=r"row 6: `input` holds </s>"):
        load_records(str(path), rules=rules)
    for keep, taken, as_text in (("refuse", [2, 4], []), ("keep", [], [2, 4, 6])):
        now = replace(rules, end_of_text_in_data=keep)
        held = load_records(str(path), rules=now, skip_bad_records=True).good
        found = audit(held, split(len(held)), ALPACA, now.end_marks)
        cached = RecordFile.open(path, TokenCache(tmp_path / "cache"), now)
        assert found == cached.audit(split(len(held)), ALPACA)
        assert (found.end_taken, found.end_as_text) == (taken, as_text)
        (line,) = (line for line in found.lines() if MARK in line)
        assert line.startswith(
            f"outputs with {MARK} or </s> at their end" if taken else f"records that hold {MARK} or </s>, learned"
        )
        assert found.as_json()["end_marks"] == [MARK, "</s>"]


def test_duplicates_and_prompts_with_other_options(tmp_path: Path) -> None:
    question = {"instruction": "Which?", "input": "", "output": "A"}
    asked = {row: {**question, "choices": [f"a{row}", "b"]} for row in (1, 2)}
    again = {row: {**question, "choices": ["a1", "b"]} for row in (5, 39)}
    found = found_in(written(tmp_path, asked | again | {30: {**asked[2], "output": "B"}}))
    assert found.duplicates == [5, 39]
    assert found.duplicate_prompts == [[1, 5, 39], [2, 30]]
    assert found.val_in_train == [39]


def test_an_output_between_a_text_and_a_letter_is_said(tmp_path: Path) -> None:
    found = found_in(written(tmp_path, {4: {"choices": ["B", "C"], "output": "B"}}))
    assert found.between_letters == [4]
    assert "read as the text: 1: rows 4" in found.lines()[0]


def test_prompts_are_compared_as_the_model_sees_them() -> None:
    one = Record(instruction="a\nb", output="x", row=1)
    other = Record(instruction="a", input="b", output="y", row=2)
    assert audit([one, other], split(2), PHI3).duplicate_prompts == [[1, 2]]
    assert audit([one, other], split(2), ALPACA).duplicate_prompts == []


@given(kinds=st.lists(st.integers(0, 6), max_size=40), seed=st.none() | st.integers(0, 3))
def test_hashes_find_what_comparing_all_finds(kinds: list[int], seed: int | None) -> None:
    records = [Record(instruction=f"{kind // 2}", output=f"{kind}", row=row) for row, kind in enumerate(kinds, start=1)]
    parts = split(len(records), seed)
    found = audit(records, parts, ALPACA)
    prompts = [record.instruction for record in records]
    groups = {prompt: [i + 1 for i, one in enumerate(prompts) if one == prompt] for prompt in prompts}
    assert found.duplicate_prompts == [rows for rows in groups.values() if len(rows) > 1]
    assert found.duplicates == [i + 1 for i, kind in enumerate(kinds) if kind in kinds[:i]]
    trained = {prompts[i] for i in parts.train}
    assert found.test_in_train == [i + 1 for i in parts.test if prompts[i] in trained]


def test_lines_are_bounded_and_json_holds_all(tmp_path: Path) -> None:
    keys = {f"key {i}": i for i in range(12)}
    found = found_in(written(tmp_path, {row: {"input": "N/A", **keys} for row in range(1, 31)}))
    assert "30: rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 20 more (" in found.lines()[1]
    assert found.lines()[0].endswith("and 4 more")
    assert len(found.as_json()["filled"]["input"]) == 30
    assert "duplicates" not in found.as_json()


def test_a_prompt_of_all_rows_is_a_line_of_some(tmp_path: Path) -> None:
    found = found_in(written(tmp_path, dict.fromkeys(range(1, 41), made_records(1)[0])))
    assert found.duplicate_prompts == [list(range(1, 41))]
    assert (
        "prompts that stand more than once: 1 (40 rows): rows 1 = 2 = 3 = 4 = 5 = 6 = 7 = 8 = 9 = 10 and 30 more"
        in (found.lines())
    )
    assert max(map(len, found.lines())) < 160


def test_what_train_warns_of_is_what_inspect_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(
        tmp_path, {1: {"system": None}, 2: {"input": "N/A"}, 36: made_records(40)[6], 5: {"output": f"a{MARK}"}}
    )
    path = path.rename(tmp_path / "data.jsonl")
    options = TrainOptions(data=str(path), model="pico")
    findings = warn_of_data(options, load_data(options))
    warned = [line.removeprefix("warning: data: ") for line in capsys.readouterr().err.splitlines()]
    assert warned == [f"warning: {path} is taken for a JSON array by its content, not by its name", *findings.lines()]
    assert len(findings.lines()) == 6
    assert main(["inspect", "--data", str(path), "--model", "pico"]) == 0
    printed = capsys.readouterr().out.splitlines()
    for line in findings.lines():
        assert line in printed
    assert warned[0].removeprefix("warning: ") in printed


def test_nothing_is_said_of_clean_data(tmp_path: Path) -> None:
    assert found_in(written(tmp_path, {})) == Findings()
    assert audit(load_records("sample").good, split(len(load_records("sample").good)), ALPACA).lines() == []


def test_the_books_findings(book_data: Path) -> None:
    records = load_records(str(book_data)).good
    found = audit(records, split(len(records)), ALPACA)
    assert (len(found.test_in_train), len(found.val_in_train), found.duplicates) == (2, 4, [])
    assert [name for name, value in asdict(found).items() if value] == [
        "duplicate_prompts", "test_in_train", "val_in_train",
    ]  # fmt: skip


# Conversations, documents and token ids


def of_rows(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> Findings:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return found_in(path, **options)


def said(*texts: str, system: str | None = None, **marks: Any) -> dict[str, Any]:
    """A conversation, a text for each turn."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [*turns[:-1], {**turns[-1], **marks}]}


def test_conversations_are_the_same_where_all_their_turns_are(tmp_path: Path) -> None:
    """The same last question behind other turns is another prompt."""
    rows = [said(f"q{i}", f"a{i}") for i in range(40)]
    rows[1] = said("p", "b", "q", "a")
    rows[2] = said("o", "b", "q", "a")
    rows[3] = said("p", "b", "q", "a", system="s")
    rows[4] = said("p", "b", "q", "other")
    rows[5] = said("p", "c", "q", "a")
    rows[6] = said("p", "b", "q", "a", train=False)
    rows[9] = said("q9", "a9", train=False)
    rows[38] = said("q7", "another")
    found = of_rows(tmp_path, rows)
    assert found.duplicates == [7]
    assert found.duplicate_prompts == [[2, 5, 7], [8, 39]]
    assert (found.test_in_train, found.val_in_train) == ([], [39])
    assert found.nothing_learned == [10]
    assert "conversations of which no assistant's turn is learned, by their marks: 1: rows 10" in found.lines()


def test_what_is_odd_in_any_turn_is_found(tmp_path: Path) -> None:
    rows = [said(f"q{i}", f"a{i}") for i in range(40)]
    rows[1] = said("p", "b", "q1", f"a{MARK}")
    rows[2] = said(f"p{MARK}", "b", "q2", "a")
    rows[3] = said("p", "", "q3", "a")
    rows[4] = said("q4", "a", system="")
    rows[5] = said("q5", "<nooutput>", name="Ann") | {"id": 7}
    found = of_rows(tmp_path, rows, end_of_text_in_data="keep", allow_empty_output=True)
    assert (found.end_as_text, found.empty_outputs, found.empty_systems) == ([2, 3], [4], [5])
    assert found.filled == {"output": [6]}
    assert found.unknown_keys == {"id": 1, "messages.name": 1}
    assert found.holding_header == found.nothing_learned == []
    assert of_rows(tmp_path, [*rows[:2], *rows[5:]]).end_taken == [2]


@pytest.mark.parametrize(
    "row_of",
    [
        lambda i: {"text": f"page {i}"},
        lambda i: {"input_ids": [1, 2, i]},
        lambda i: {"segments": [{"label": True, "text": f"{i}"}]},
    ],
    ids=["text", "tokens", "segments"],
)
def test_what_asks_nothing_has_no_prompts_but_can_be_there_twice(row_of: Any, tmp_path: Path) -> None:
    rows = [row_of(i) for i in range(40)]
    rows[5] = rows[36] = rows[2]
    found = of_rows(tmp_path, rows)
    assert (found.duplicates, found.test_in_train, found.val_in_train) == ([6, 37], [37], [])
    assert {name for name, value in asdict(found).items() if value} == {"duplicates", "test_in_train"}


def test_segments_in_front_of_the_last_are_a_prompt(tmp_path: Path) -> None:
    rows = [{"segments": [{"label": i % 2 == 0, "text": "a"}, {"label": True, "text": f"{i}"}]} for i in range(40)]
    assert of_rows(tmp_path, rows).duplicate_prompts == [list(range(1, 41))]


# All three splits before training


def of_context(n_ctx: int) -> GPT2Config:
    return replace(config_for("pico"), n_ctx=n_ctx)


@pytest.mark.parametrize("token_cache", ["none", "cache"])
def test_test_records_that_do_not_fit_are_found_before_training(token_cache: str, tmp_path: Path) -> None:
    """40 records: rows 35 to 38 are the test split. A limit of the training examples does not bind them."""
    path = written(tmp_path, {36: {"input": "word " * 300}, 38: {"output": "word " * 120}})
    given: dict[str, Any] = {"data": str(path), "model": "pico"}
    given["token_cache"] = token_cache if token_cache == "none" else str(tmp_path / token_cache)
    for too_long in ("drop", "truncate"):
        options = TrainOptions(**given, max_length=100, too_long=too_long)
        data = load_data(options)
        assert len(data.encode("train", options, of_context(256))) == 34
        assert data.longer_than(of_context(256), options) == [36]
        assert data.longer_than(of_context(150), options) == [36, 38]
        assert data.longer_than(of_context(1024), options) == []
    options = TrainOptions(**given)
    with pytest.raises(UserError, match=r"2 test examples .* 150 tokens: rows 36, 38; .*--too_long drop"):
        load_data(options).longer_than(of_context(150), options)


def test_the_fingerprint_of_clean_data_is_as_before() -> None:
    """Of the embedded records: what a run was trained on is known by it."""
    data = load_data(TrainOptions(data="sample", model="pico"))
    encoded = data.encode("train", TrainOptions(data="sample", model="pico"), of_context(256))
    assert data.fingerprint()[:16] == "ae628601a76ead97"
    assert encoded.fingerprint()[:16] == "7dc7bde552eb018e"
    assert np.array_equal(encoded.rows, np.arange(1, len(encoded) + 1))


def test_a_templates_own_tokens_are_none_of_the_datas(tmp_path: Path) -> None:
    def found(path: Path) -> Findings:
        options = TrainOptions(data=str(path), model="pico", template="chatml", end_of_text_in_data="keep")
        return load_data(options, tokenizer_to_be(options, Run(tmp_path / "run"))).audit()

    assert found(written(tmp_path, {})).end_as_text == []
    assert found(written(tmp_path, {3: {"output": "say <|im_end|> now"}})).end_as_text == [3]
