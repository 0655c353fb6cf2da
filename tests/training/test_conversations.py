"""Trainings on conversations, from the file to the answer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fastft.answers.chat import chat
from fastft.answers.generation import generate
from fastft.answers.options import ChatOptions, GenerateOptions
from fastft.common.errors import UserError
from fastft.data.folder_tokenizer import tokenizer_of
from fastft.metrics.perplexity import response_perplexities
from fastft.model.weights import load
from fastft.run.config import TrainOptions, from_yaml
from fastft.run.folder import Run
from fastft.training.train import train

NAMES = ("Anna", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivan", "Jill", "Kurt", "Lena")
THINGS = ("apple", "book", "car", "dog", "egg", "fish", "gate", "hat", "ink", "jar", "key", "lamp", "map", "nut", "oil")
COLOURS = ("red", "blue", "green", "black", "white", "grey", "pink", "brown")


def conversation(name: str, thing: str, colour: str) -> dict[str, Any]:
    """The second question's answer stands in the first turn."""
    texts = (f"{name} has a {colour} {thing}.", "Good to know.", "Which colour is it?", colour)
    roles = ("user", "assistant") * 2
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]}


def written(path: Path, n: int) -> Path:
    every = [conversation(*one) for one in ((n, t, c) for n in NAMES for t in THINGS for c in COLOURS)]
    random.Random(0).shuffle(every)
    path.write_text("".join(json.dumps(row) + "\n" for row in every[:n]))
    return path


def options_for(data: Path, out: Path, **changes: Any) -> TrainOptions:
    some = {
        "model": "pico",
        "template": "chatml",
        "device": "cpu",
        "dtype": "fp32",
        "samples": 0,
        "lr": 1e-3,
        "eval_every": 0,
        "keep_best": False,
    }
    return TrainOptions(**{**some, "data": str(data), "out": out, **changes})


def test_a_run_keeps_its_template_and_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    template = tmp_path / "mine.yaml"
    template.write_text(
        "before_instruction: '<|im_start|>user '\nafter_instruction: '<|im_end|>'\n"
        "before_response: '<|im_start|>assistant '\nend: '<|im_end|>'\nspecial_tokens: ['<|im_start|>', '<|im_end|>']\n"
    )
    options = options_for(written(tmp_path / "chats.jsonl", 60), tmp_path / "run", steps=4, template=str(template))
    train(options)
    run = Run(options.out)
    assert from_yaml(run.config).template == str(template)
    template.unlink()  # what the run was trained with stands in its folder
    generate(GenerateOptions(run=run.folder, device="cpu", max_new_tokens=3))
    entries = json.loads(run.responses.read_text())
    assert entries[0]["input"].startswith("user: ")
    assert [turn["role"] for turn in entries[0]["messages"]] == ["user", "assistant", "user"]
    found = response_perplexities(run.folder, entries)
    assert found[None] < 50_304
    model, tokenizer = load(run.model), tokenizer_of(run.model)
    assert model.config.vocab_size == 50_304
    assert tokenizer is not None
    assert tokenizer.end_of_text == tokenizer.special("<|im_end|>") == 50_258
    assert "im_start" in (run.model / "chat_template.jinja").read_text()
    assert json.loads((run.model / "generation_config.json").read_text())["eos_token_id"] == 50_258
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.StringIO("Anna has a red hat.\n"))
    chat(ChatOptions(run=run.folder, max_new_tokens=3, device="cpu"))


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    data = written(tmp_path / "chats.jsonl", 60)
    train(options_for(data, tmp_path / "whole", steps=6, save_every=3))
    train(options_for(data, tmp_path / "parts", steps=3, save_every=3))
    train(options_for(data, tmp_path / "parts", steps=6, save_every=3, resume=True))
    whole, parts = (Run(tmp_path / name).weights.read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    trained_on = Run(tmp_path / "whole").model
    train(options_for(data, tmp_path / "more", steps=1, weights=str(trained_on)))  # its tokens are there already
    assert load(Run(tmp_path / "more").model).config.vocab_size == 50_304


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mask_prompt": False, "train_on": "last"}, "expected one of them"),
        ({"train_roles": "assistent"}, "'assistent'"),
        ({"train_roles": "user,user"}, "each role once"),
        ({"template": "chatlm"}, "did you mean chatml"),
    ],
)
def test_options_that_contradict_each_other(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        train(options_for(written(tmp_path / "chats.jsonl", 20), tmp_path / "run", steps=1, **changes))
    assert says in str(error.value)


def test_what_is_learned_changes_the_curve(tmp_path: Path) -> None:
    data = written(tmp_path / "chats.jsonl", 40)
    losses = []
    for number, changes in enumerate(
        ({}, {"train_on": "last"}, {"train_on": "all"}, {"train_roles": "user"}, {"mask_prompt": False})
    ):
        out = tmp_path / f"run-{number}"
        train(options_for(data, out, steps=1, **changes))
        line = next(json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line)
        losses.append(line["loss"])
    assert len({*losses}) == 4
    assert losses[2] == losses[4]


@pytest.mark.long
def test_a_model_of_nano_size_needs_the_first_turn_for_the_second(tmp_path: Path) -> None:
    options = options_for(
        written(tmp_path / "chats.jsonl", 1000), tmp_path / "run", model="nano", epochs=4, batch_size=16, eval_every=0
    )
    train(options)
    generate(GenerateOptions(run=options.out, device="cpu", max_new_tokens=8))
    entries = json.loads(Run(options.out).responses.read_text())
    assert len(entries) == 100
    right = sum(entry["model_response"] == entry["output"] for entry in entries)
    print(f"{right} of 100 right")
    assert right >= 80


def test_a_model_that_had_a_chat_template_is_exported_with_the_runs_alone(tmp_path: Path) -> None:
    """A `tokenizer_config.json` may hold one: two would say how to ask."""
    chats = written(tmp_path / "chats.jsonl", 20)
    train(options_for(chats, tmp_path / "first", steps=1))
    theirs = tmp_path / "first" / "model" / "tokenizer_config.json"
    theirs.write_text(json.dumps({**json.loads(theirs.read_text()), "chat_template": "{{ messages }}"}))
    train(options_for(chats, tmp_path / "second", steps=1, weights=str(theirs.parent)))
    model = Run(tmp_path / "second").model
    assert "chat_template" not in json.loads((model / theirs.name).read_text())
    assert "im_start" in (model / "chat_template.jinja").read_text()
