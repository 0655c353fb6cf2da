"""Conversations that a model has: what is asked, in which words, and what a kill leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastft.answers import conversations
from fastft.answers.benchmark import Conversation, read_conversations
from fastft.answers.chat import Talk
from fastft.answers.conversations import converse
from fastft.answers.options import GenerateOptions
from fastft.cli import main
from fastft.common.errors import UserError
from fastft.data.prompts import ALPACA, VICUNA, Template
from fastft.data.records import Turn
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.decoding.decode import Answer, decode
from fastft.model.gpt2 import GPT2, SIZES
from fastft.model.weights import load, save_hf
from fastft.run.config import TrainOptions, to_yaml
from fastft.run.folder import Run

ROWS = [
    {"turns": ["Name frogs.", "Why these?"], "reference": ["tree frogs", None], "category": "facts"},
    {"turns": ["Say a."], "id": "alone"},
    {"turns": ["Count.", "Go on.", "Now stop."], "system": "Be brief."},
]


class TestReading:
    def read(self, tmp_path: Path, text: str) -> list[Conversation]:
        path = tmp_path / "conversations.jsonl"
        path.write_text(text)
        return read_conversations(str(path))

    @pytest.mark.parametrize("form", ["lines", "array"])
    def test_rows_of_turns(self, tmp_path: Path, form: str) -> None:
        found = self.read(tmp_path, json.dumps(ROWS) if form == "array" else "\n".join(map(json.dumps, ROWS)))
        assert found == [
            Conversation(
                id=1, turns=("Name frogs.", "Why these?"), references=("tree frogs", None), category="facts"
            ),
            Conversation(id="alone", turns=("Say a.",), references=(None,)),
            Conversation(id=3, turns=("Count.", "Go on.", "Now stop."), references=(None,) * 3, system="Be brief."),
        ]  # fmt: skip

    def test_one_row_alone_and_mt_benchs_own(self, tmp_path: Path) -> None:
        row = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}
        (found,) = self.read(tmp_path, json.dumps(row))
        assert (found.id, found.category, found.turns) == (81, "writing", ("Write.", "Again."))

    def test_rows_of_messages_have_their_answers_for_references(self, tmp_path: Path) -> None:
        roles = ["system", "user", "assistant", "user", "assistant"]
        messages = [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]
        (found,) = self.read(tmp_path, json.dumps([{"messages": messages}]))
        assert found == Conversation(
            id=1, turns=("user 1", "user 3"), references=("assistant 2", "assistant 4"), system="system 0"
        )

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ({"turns": []}, "row 1: `turns` is empty, expected the user's texts"),
            ({"instruction": "a"}, "row 1: `turns` is missing"),
            ({"turns": "a"}, "`turns` is text, expected an array of texts"),
            ({"turns": ["a", 3]}, "`turns` number 2 is a number, expected text"),
            ({"turns": ["a", " "]}, "`turns` number 2 is empty"),
            ({"turns": ["a", "b"], "reference": ["c"]}, "`reference` has 1 texts of 2 turns"),
            ({"turns": ["a"], "category": ["b"]}, "`category` is an array"),
            ({"turns": ["a"], "id": [1]}, "`id` is an array"),
            ({"turns": ["a"], "system": 4}, "`system` is a number"),
            ({"messages": [{"role": "user", "content": "a"}]}, "ends with the user"),
            (3, "it is a number, expected an object with `turns`"),
        ],
    )
    def test_a_row_that_is_none_is_named(self, tmp_path: Path, row: Any, words: str) -> None:
        with pytest.raises(UserError) as raised:
            self.read(tmp_path, json.dumps([row]))
        assert words in str(raised.value)

    def test_no_row_and_one_id_twice(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds no conversation"):
            self.read(tmp_path, "[]")
        with pytest.raises(UserError, match="the same `id`"):
            self.read(tmp_path, json.dumps([{"turns": ["a"], "id": 2}, {"turns": ["a"]}]))

    def test_keys_that_are_not_read_are_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.read(tmp_path, json.dumps([{"turns": ["a"], "references": ["b"]}, {"turns": ["a"], "note": "c"}]))
        said = " ".join(capsys.readouterr().err.split())
        assert "keys of rows with `turns` that are not read: `references` (did you mean reference?), `note`;" in said
        self.read(tmp_path, json.dumps(ROWS))
        assert "not read" not in capsys.readouterr().err

    def test_the_sample_is_short_and_of_many_kinds(self) -> None:
        sample = read_conversations("sample")
        assert len(sample) == 20 == len({one.turns for one in sample})
        assert all(len(one.turns) == len(one.references) == 2 for one in sample)
        kinds = [one.category for one in sample]
        assert set(kinds) >= {"knowledge", "arithmetic", "language", "reasoning", "reading", "writing"}
        assert all(any(one.references) == (one.category != "writing") for one in sample)
        tokens = [len(gpt2_tokenizer().encode(text)) for one in sample for text in one.turns]
        assert max(tokens) <= 40


def make_run(folder: Path, template: str = "alpaca") -> Run:
    torch.manual_seed(3)
    run = Run(folder)
    run.folder.mkdir()
    run.config.write_text(to_yaml(TrainOptions(data="sample", model="pico", out=run.folder, template=template)))
    save_hf(GPT2(SIZES["pico"]), run.model)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(ROWS))
    return path


class Asked:
    """Stands in for `decode`: keeps the prompts, and is killed before its `die_at`th answer."""

    def __init__(self, die_at: int | None = None) -> None:
        self.die_at = die_at
        self.prompts: list[list[int]] = []
        self.n_answers = 0

    def __call__(self, model: GPT2, prompts: Sequence[Sequence[int]], **options: Any) -> Iterator[Answer]:
        self.prompts += map(list, prompts)
        for answer in decode(model, prompts, **options):
            self.n_answers += 1
            if self.n_answers == self.die_at:
                raise KeyboardInterrupt
            yield answer


Have = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def have(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> Have:
    def have(asked: Asked | None = None, **options: Any) -> list[dict[str, Any]]:
        monkeypatch.setattr(conversations, "decode", asked or Asked())
        values = {"conversation": str(file), "max_new_tokens": 6, "device": "cpu", **options}
        return converse(GenerateOptions(run=run.folder, **values))

    return have


LONG = pytest.mark.long


@pytest.mark.parametrize("template", [ALPACA, pytest.param(VICUNA, marks=LONG)], ids=["alpaca", "vicuna"])
def test_each_turn_is_asked_with_the_models_own_answers_by_the_runs_template(
    tmp_path: Path, file: Path, template: Template
) -> None:
    """As `fastft chat` asks where it remembers, one turn after the other."""
    run = make_run(tmp_path / "talking", template.name)
    found = converse(
        GenerateOptions(run=run.folder, conversation=str(file), max_new_tokens=6, device="cpu", batch_size=2)
    )
    model = load(run.model)
    for row, conversation in zip(ROWS, found, strict=True):
        talk = Talk(remembers=True, system=str(row.get("system", "")))
        assert [turn["question"] for turn in conversation["turns"]] == row["turns"]
        for turn in conversation["turns"]:
            ids = talk.ids(turn["question"], "", template, model)
            (answer,) = decode(model, [ids], max_new_tokens=6)
            assert turn["answer"] == template.extract(model.config.tokenizer.decode(answer.ids)) != ""
            talk.answered(Turn("user", turn["question"]), turn["answer"])
    assert found[0]["turns"][0]["reference"] == "tree frogs"
    assert "reference" not in found[0]["turns"][1]
    assert [(one["id"], one.get("category"), one.get("system")) for one in found] == [
        (1, "facts", None), ("alone", None, None), (3, None, "Be brief."),
    ]  # fmt: skip


def test_the_second_prompt_holds_the_first_answer_word_for_word(run: Run, have: Have) -> None:
    asked = Asked()
    found = have(asked)
    texts = [gpt2_tokenizer().decode(ids) for ids in asked.prompts]
    assert len(texts) == 6
    first, second = found[0]["turns"]
    (of_second,) = [text for text in texts if second["question"] in text]
    begin = ALPACA.prompt(first["question"]) + ALPACA.response(first["answer"])
    assert of_second.startswith(begin)
    assert of_second.endswith(second["question"])


@pytest.mark.parametrize("die_at", [4, *(pytest.param(n, marks=LONG) for n in (1, 2, 3, 5, 6))])
def test_a_killed_call_is_taken_up_where_it_stopped(run: Run, have: Have, die_at: int) -> None:
    whole = have()
    path = run.conversations()
    assert json.loads(path.read_text()) == whole
    for one in run.folder.glob("conversations*"):
        one.unlink()
    with pytest.raises(KeyboardInterrupt):
        have(Asked(die_at))
    rest = Asked()
    assert have(rest, batch_size=1) == whole
    assert len(rest.prompts) == 6 - (die_at - 1)
    assert json.loads(path.read_text()) == whole
    again = Asked(1)
    assert have(again) == whole
    assert again.prompts == []


def test_a_conversation_is_there_when_all_of_its_turns_are(
    run: Run, have: Have, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastft.answers.responses._SECONDS_BETWEEN_WRITES", 0.0)
    with pytest.raises(KeyboardInterrupt):
        have(Asked(5))
    held = json.loads(run.conversations().read_text())
    assert "alone" in [one["id"] for one in held]
    assert all(len(one["turns"]) == len(ROWS[0 if one["id"] == 1 else 1]["turns"]) for one in held)
    assert 3 not in [one["id"] for one in held]


@LONG
def test_drawn_answers_do_not_depend_on_what_is_answered_beside_them(have: Have) -> None:
    drawn = {"temperature": 1.0, "seed": 5}
    together = have(**drawn)
    assert have(**drawn, batch_size=1, name="b") == together
    assert have(**drawn, limit=2, name="c") == together[:2]
    assert have(**{**drawn, "seed": 6}, name="d") != together


@LONG
def test_a_limit_and_then_the_rest(run: Run, have: Have) -> None:
    first, rest = Asked(), Asked()
    one = have(first, limit=1)
    assert (len(first.prompts), len(one)) == (2, 1)
    assert have(rest)[:1] == one
    assert len(rest.prompts) == 4


def test_other_settings_ask_for_a_name_and_another_file_does_not(
    run: Run, have: Have, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = have()
    with pytest.raises(UserError, match=r"conversations\.json was made with other settings \(temperature 0.0 there"):
        have(temperature=1.0)
    drawn = have(temperature=1.0, name="t1.0")
    assert json.loads(run.conversations("t1.0").read_text()) == drawn != greedy
    assert json.loads(run.conversations().read_text()) == greedy
    assert {run.conversations("t1.0"), run.conversations()} <= set(run.written())
    made = json.loads((run.folder / "conversations.made-from.json").read_text())
    assert (made["temperature"], made["max_new_tokens"]) == (0.0, 6)
    file.write_text(json.dumps(ROWS[1:2]))
    assert [one["id"] for one in have()] == ["alone"]


def test_a_turn_whose_prompt_fills_the_context_is_left_out_with_those_behind_it(
    run: Run, have: Have, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The context of 256 tokens has room for the first turn alone."""
    rows = [{"turns": ["Say a.", "word " * 250, "And now?"]}, ROWS[1]]
    file.write_text(json.dumps(rows))
    found = have()
    turns = found[0]["turns"]
    assert turns[0]["answer"] != ""
    assert turns[1]["left_out"] == "its prompt fills the context of 256 tokens"
    assert turns[2]["left_out"] == "a turn before it has no answer"
    assert [turn["answer"] for turn in turns[1:]] == ["", ""]
    said = " ".join(capsys.readouterr().err.split())
    assert "1 turns fill the model's context of 256 tokens with what was said before: 1, turn 2; they are left" in said
    with pytest.raises(UserError, match="--too_long leave_out goes on"):
        have(too_long="raise", name="b")


@LONG
def test_a_model_of_no_run_becomes_one(
    run: Run, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "untuned"
    argv = ["generate", "--model", str(run.model), "--data", "sample", "--out", str(out), "--template", "alpaca",
            "--conversation", str(file), "--max_new_tokens", "6", "--device", "cpu"]  # fmt: skip
    assert main(argv) == 0
    assert capsys.readouterr().out.endswith(f"had 3 conversations: {out / 'conversations.json'}\n")
    ours = converse(GenerateOptions(run=run.folder, conversation=str(file), max_new_tokens=6, device="cpu"))
    assert json.loads((out / "conversations.json").read_text()) == ours
    assert main([*argv, "--prompt", "a"]) == 2
    assert "got --prompt and --conversation, expected one of them" in " ".join(capsys.readouterr().err.split())


def test_the_sample_is_a_keyword(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("sample").write_text("[]")
    assert len(read_conversations("sample")) == 20
    assert "sample means the embedded conversations, not the file here" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="holds no conversation"):
        read_conversations("./sample")
    with pytest.raises(UserError, match=r"nope\.json; --conversation takes a file, or `sample`"):
        read_conversations("nope.json")
