"""`fastft chat`: what is said, when, and what is held back."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastft.answers import chat as chat_module
from fastft.answers.chat import _printer, _settled, chat
from fastft.answers.options import ChatOptions
from fastft.common.errors import UserError
from fastft.data.prompts import ALPACA
from fastft.data.records import Record
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.decoding.decode import decode
from fastft.model.gpt2 import GPT2, SIZES
from fastft.model.weights import load, save_hf
from fastft.run.config import TrainOptions, to_yaml
from fastft.run.folder import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    torch.manual_seed(3)
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    run.config.write_text(to_yaml(TrainOptions(data="sample", model="pico", out=run.folder)))
    save_hf(GPT2(SIZES["pico"]), run.model)
    return run


def said(run: Run, lines: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    chat(ChatOptions(run=run.folder, max_new_tokens=6, device="cpu", **options))


def response(run: Run, instruction: str, given: str = "") -> str:
    ids = gpt2_tokenizer().encode(ALPACA.prompt(instruction, given))
    (answer,) = decode(load(run.model), [ids], max_new_tokens=6)
    return ALPACA.extract(gpt2_tokenizer().decode(answer.ids))


def test_each_line_is_answered_by_itself(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said(run, "Name frogs\n\n/input some text\nSay why\nSay why\n/quit\nSay c.\n", monkeypatch)
    expected = [response(run, "Name frogs"), response(run, "Say why", "some text"), response(run, "Say why")]
    assert len(set(expected)) == 3
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)


def test_what_is_no_command_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said(run, "/halp\n" + "word " * 300 + "\nSay a.\n", monkeypatch)
    heard = capsys.readouterr()
    assert "got /halp, expected an instruction; /input TEXT" in heard.err
    assert "fills the model's context of 256 tokens" in heard.err
    assert heard.out == f"\n{response(run, 'Say a.')}\n"


def test_a_line_in_another_encoding_is_answered(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Say caf\xe9\n"), encoding="utf-8"))
    chat(ChatOptions(run=run.folder, max_new_tokens=6, device="cpu"))
    assert capsys.readouterr().out == response(run, "Say caf\ufffd") + "\n"


def test_a_response_that_is_broken_off_does_not_end_the_chat(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def interrupted(*args: Any, **rest: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return decode(*args, **rest)

    monkeypatch.setattr(chat_module, "decode", interrupted)
    said(run, "Say a.\nSay b.\n", monkeypatch)
    assert capsys.readouterr().out == f"\n{response(run, 'Say b.')}\n"


def test_a_seed_is_a_talk(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    talks = []
    for seed in (1, 1, 2):
        said(run, "Say a.\nSay a.\n", monkeypatch, temperature=1.0, seed=seed)
        talks.append(capsys.readouterr().out)
    assert talks[0] == talks[1] != talks[2]


@pytest.mark.parametrize(
    ("generated", "settled"),
    [
        ("", ""), ("\n\n", "\n\n"), ("\n\n### Resp", "\n\n"), ("\n\n### Response:\nYes", "\n\n### Response:\nYes"),
        ("one #", "one "), ("one #2", "one #2"), ("caf\ufffd", "caf"),
    ],
)  # fmt: skip
def test_what_may_turn_out_otherwise_waits(generated: str, settled: str) -> None:
    assert _settled(generated, ALPACA) == settled


@pytest.mark.parametrize(
    "text", ["\n\n### Response:\nA café ☕ is # 1 ### here.\n", "", "\n\n### Response:", "ends in #"]
)
def test_token_by_token_it_is_the_extracted_response(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = gpt2_tokenizer()
    ids = tokenizer.encode(text)
    show = _printer(ALPACA)
    parts = []
    for n in range(len(ids) + 1):
        show(tokenizer.decode(ids[:n]), False)
        parts.append(capsys.readouterr().out)
    show(tokenizer.decode(ids), True)
    parts.append(capsys.readouterr().out)
    assert "".join(parts) == ALPACA.extract(text)
    if len(ids) > 12:
        assert sum(map(bool, parts)) > 5  # as it is written, and not at the end


def test_the_options_are_those_of_generate(run: Run) -> None:
    for wrong in ({"max_new_tokens": 0}, {"top_p": 2.0}):
        with pytest.raises(Exception, match=f"got --{next(iter(wrong))}"):
            ChatOptions(run=run.folder, **wrong)
    assert json.dumps(ChatOptions(run=run.folder).sampling.in_effect())


def test_what_was_said_goes_along(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[int]] = []

    def heard(model: Any, prompts: Any, **rest: Any) -> Any:
        asked.extend(prompts)
        return decode(model, prompts, **rest)

    monkeypatch.setattr(chat_module, "decode", heard)
    said(run, "Say a.\n/input b\nSay c.\n/new\n/system Be brief.\nSay d.\n", monkeypatch, remember=True)
    answers = capsys.readouterr().out.split("\n")
    tokenizer = gpt2_tokenizer()
    first = Record(instruction="Say a.", output=answers[0])
    end = tokenizer.end_of_text
    before = [*tokenizer.encode(ALPACA.prompt("Say a.")), *tokenizer.encode(ALPACA.response(answers[0])), end]
    question = "\n\n### Instruction:\nSay c.\n\n### Input:\nb"
    assert asked[0] == tokenizer.encode(ALPACA.prompt_of(first))
    assert asked[1] == [*before, *tokenizer.encode(question)]
    assert tokenizer.decode(asked[2]) == "Be brief.\n\n### Instruction:\nSay d."


def test_what_the_context_has_no_room_for_is_forgotten(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "word " * 90
    said(run, f"{long}a\n{long}b\n{long}c\n", monkeypatch, remember=True)
    heard = capsys.readouterr()
    assert heard.err.count("the oldest question and its answer are forgotten") >= 1
    assert heard.out.count("\n") >= 3


def test_a_question_that_never_fits_forgets_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[int]] = []

    def heard(model: Any, prompts: Any, **rest: Any) -> Any:
        asked.extend(prompts)
        return decode(model, prompts, **rest)

    monkeypatch.setattr(chat_module, "decode", heard)
    said(run, f"Say a.\n{'word ' * 400}\nSay b.\n", monkeypatch, remember=True)
    told = capsys.readouterr().err
    assert ("forgotten" in told, "shorten it" in told) == (False, True)
    assert "Say a." in gpt2_tokenizer().decode(asked[1])


def test_without_standard_input_it_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        chat(ChatOptions(run=run.folder))
