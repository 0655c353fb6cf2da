"""Options that cannot have an effect: each is in the table, and refused or said where its condition does not hold."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import pytest

from fastft.answers.chat import chat
from fastft.answers.generation import generate
from fastft.cli import COMMANDS, main
from fastft.common import effects
from fastft.common.effects import check_effects
from fastft.common.errors import UserError
from fastft.common.options import Condition, Facts, table
from fastft.doctor import doctor
from fastft.export.export import export
from fastft.inspect import inspect
from fastft.run.config import TrainOptions, defaults_of, recipe_options
from fastft.scores.ratings import import_ratings
from fastft.training.verify import VerifyOptions, verify_resume

OF_TRAINING = {
    "data", "model", "weights", "out", "recipe", "template", "mask_prompt", "train_on", "max_length", "too_long",
    "allow_empty_output", "end_of_text_in_data", "skip_bad_records", "val_data", "test_data", "batching", "batch_size",
    "steps",
    "drop_last", "seed", "lr", "schedule", "weight_decay", "clip", "max_skipped", "tie_head", "dtype", "device", "impl",
    "compile", "cuda_graphs", "activation_checkpointing", "threads", "deepspeed_config", "save_every", "keep",
    "whole_every", "keep_best", "resume", "overwrite", "dry_run", "ledger", "track",
    "format", "fields", "lora_r", "train_only",
}  # fmt: skip
OF_ANSWERING = {"run", "model", "max_new_tokens", "repetition_penalty", "dtype", "device"}

ELSEWHERE = {"score", "compare", "report"}
"""Commands that judge have a test of their own (tests/judging/test_judge_options.py); a report takes runs alone."""

WHOLE = Facts(steps=100, val_examples=4, ranks=2, device="cuda")
NOTHING_KNOWN = Facts()
DRAWN = {"temperature": 0.7}
_OF_ANSWERS: dict[str, list[tuple[dict[str, Any], Facts, dict[str, Any]]]] = {
    "temperature": [({"temperature": 0.7, "top_k": 1}, NOTHING_KNOWN, {"temperature": 0.0, "top_k": 0})],
    "top_k": [({"top_k": 4}, NOTHING_KNOWN, DRAWN), ({"top_k": 1}, NOTHING_KNOWN, {"top_k": 0})],
    "top_p": [
        ({"top_p": 0.9}, NOTHING_KNOWN, DRAWN),
        ({"top_p": 0.9, "repetition_penalty": 1.1}, NOTHING_KNOWN, DRAWN),
    ],
    "seed": [({"seed": 4}, NOTHING_KNOWN, DRAWN), ({"seed": 4, "repetition_penalty": 1.1}, NOTHING_KNOWN, DRAWN)],
}
BOTH = {"val_data": "v.json", "test_data": "t.json"}
_OF_SPLITS: dict[str, list[tuple[dict[str, Any], Facts, dict[str, Any]]]] = {
    "split": [({"split": [1, 0, 0], **BOTH}, NOTHING_KNOWN, {"test_data": None})],
    "split_seed": [
        ({"split_seed": 4, **BOTH}, NOTHING_KNOWN, {"val_data": None}),
        ({"split_seed": 4, "split": [1, 0, 0]}, NOTHING_KNOWN, {"split": [0.9, 0.1, 0]}),
    ],
}
_OF_LEARNING: dict[str, list[tuple[dict[str, Any], Facts, dict[str, Any]]]] = {
    "train_roles": [({"train_roles": "user", "mask_prompt": False}, NOTHING_KNOWN, {"mask_prompt": True})],
}
_OF_TRAINING: dict[str, list[tuple[dict[str, Any], Facts, dict[str, Any]]]] = {
    **_OF_SPLITS,
    **_OF_LEARNING,
    "mix": [
        ({"mix": [2, 1]}, WHOLE, {"data": ["a.json", "b.json"]}),
        ({"mix": [2, 1], "data": ["a.json", "b.json"], "recipe": "book", "drop_last": True}, WHOLE, {"recipe": None}),
    ],
    "token_cache": [({"token_cache": "none", "data": "sample"}, WHOLE, {"data": "mine.json"})],
    "share_prefix": [({"share_prefix": False, "batching": "padded"}, WHOLE, {"batching": "packed"})],
    "pack_tokens": [({"pack_tokens": 99, "batching": "bucketed"}, WHOLE, {"batching": "packed"})],
    "accumulate": [({"accumulate": 9, "batch_size": 8}, WHOLE, {"accumulate": 8})],
    "epochs": [({"epochs": 5, "steps": 4}, WHOLE, {"steps": None})],
    "warmup": [({"warmup": 100}, WHOLE, {"warmup": 99})],
    **{
        f"lora_{name}": [({f"lora_{name}": value}, WHOLE, {"lora_r": 8})]
        for name, value in (("alpha", 4.0), ("targets", "c_fc"), ("layers", "0-1"), ("rslora", True), ("dora", True))
    },
    "decay_all": [({"decay_all": True, "weight_decay": 0.0}, WHOLE, {"weight_decay": 0.1})],
    "tf32": [({"tf32": True}, replace(WHOLE, device="cpu"), {"tf32": False})],
    "hang_timeout": [({"hang_timeout": 9.0}, replace(WHOLE, ranks=1), {"hang_timeout": 1800.0})],
    "eval_every": [({"eval_every": 9}, replace(WHOLE, val_examples=0), {"eval_every": 50})],
    "eval_examples": [
        ({"eval_examples": 9, "recipe": "book", "drop_last": True}, WHOLE, {"recipe": None}),
        ({"eval_examples": 9}, replace(WHOLE, val_examples=0), {"eval_examples": None}),
    ],
    "samples": [
        ({"samples": 3, "recipe": "book", "drop_last": True}, WHOLE, {"samples": 0}),
        ({"samples": 3}, replace(WHOLE, val_examples=0), {"samples": 1}),
    ],
    "patience": [
        ({"patience": 1, "keep_best": False}, WHOLE, {"keep_best": True}),
        ({"patience": 1, "eval_every": 0}, WHOLE, {"eval_every": 1}),
        ({"patience": 1}, replace(WHOLE, val_examples=0), {"patience": 0}),
    ],
}
ALWAYS = {
    "train": OF_TRAINING,
    "verify-resume": OF_TRAINING | _OF_TRAINING.keys() - {"epochs"},
    "generate": OF_ANSWERING | {"prompt", "prompts", "conversation", "batch_size", "too_long"},
    "chat": OF_ANSWERING | {"remember"},
    "inspect": {
        "data", "val_data", "test_data", "weights", "template", "mask_prompt", "train_on", "max_length", "too_long",
        "allow_empty_output", "end_of_text_in_data", "batch_size", "example", "format", "fields",
    },
    "ab": {"run_a", "run_b", "import_"},
    "doctor": {"device", "json"},
    "demo": {"out", "judge", "seed", "dtype", "steps"},
    "export": {"run", "to", "out", "overwrite"},
}  # fmt: skip
"""By command, options that need nothing else; what is impossible (`--cuda_graphs true` on a CPU) is refused by the
engine."""

WITHOUT: dict[str, dict[str, list[tuple[dict[str, Any], Facts, dict[str, Any]]]]] = {
    "train": _OF_TRAINING,
    "verify-resume": {"epochs": [({"epochs": 3}, NOTHING_KNOWN, {"epochs": 2})]},
    "generate": {
        **_OF_ANSWERS,
        "template": [({"template": "plain", "prompt": "a"}, NOTHING_KNOWN, {"run": None, "model": "m"})],
        "adapter": [({"adapter": "d", "prompt": "a"}, NOTHING_KNOWN, {"run": None, "model": "m"})],
        **{
            name: [
                ({name: value, "prompt": "a"}, NOTHING_KNOWN, {"prompt": None}),
                ({name: value, "prompts": "a.json"}, NOTHING_KNOWN, {"prompts": None}),
            ]
            for name, value in (("name", "greedy"), ("overwrite", True))
        },
        "split": [
            ({"split": "val", "prompt": "a"}, NOTHING_KNOWN, {"prompt": None}),
            ({"split": "val", "conversation": "a"}, NOTHING_KNOWN, {"conversation": None}),
        ],
        "data": [
            ({"data": "a.json", "prompts": "a"}, NOTHING_KNOWN, {"prompts": None}),
            ({"data": "a.json", "conversation": "a"}, NOTHING_KNOWN, {"run": None, "model": "m", "out": Path("b")}),
        ],
        "limit": [({"limit": 2, "prompt": "a"}, NOTHING_KNOWN, {"prompt": None})],
        "out": [({"out": Path("a"), "prompt": "a"}, NOTHING_KNOWN, {"prompt": None, "prompts": "a"})],
    },
    "chat": {
        **_OF_ANSWERS,
        "template": [({"template": "plain"}, NOTHING_KNOWN, {"run": None, "model": "m"})],
        "adapter": [({"adapter": "d"}, NOTHING_KNOWN, {"run": None, "model": "m"})],
    },
    "inspect": {
        **_OF_SPLITS,
        **_OF_LEARNING,
        "model": [
            ({"model": "pico", "weights": "./mine"}, NOTHING_KNOWN, {"weights": None}),
            ({"model": "pico", "weights": "gpt2"}, NOTHING_KNOWN, {"weights": "none"}),
        ],
    },
    "ab": {
        "name": [({"name": "t1.0", "import_": [Path("a.json")]}, NOTHING_KNOWN, {"name": None})],
        "seed": [({"seed": 4, "import_": [Path("a.json")]}, NOTHING_KNOWN, {"seed": 123})],
        "limit": [({"limit": 4, "import_": [Path("a.json")]}, NOTHING_KNOWN, {"limit": None})],
        "reference": [({"reference": False, "import_": [Path("a.json")]}, NOTHING_KNOWN, {"reference": True})],
        "scale": [({"scale": True, "import_": [Path("a.json")]}, NOTHING_KNOWN, {"scale": False})],
        "reason": [({"reason": True, "import_": [Path("a.json")]}, NOTHING_KNOWN, {"reason": False})],
    },
    "doctor": {"speed": [({"speed": False}, Facts(device="cpu"), {"speed": True})]},
    "export": {
        "dtype": [({"dtype": "bf16", "to": "book"}, NOTHING_KNOWN, {"to": "hf"})],
        "shard_size": [({"shard_size": "1GB", "to": "gguf"}, NOTHING_KNOWN, {"to": "hf"})],
        "push": [({"push": "me/mine", "to": "ollama"}, NOTHING_KNOWN, {"to": "hf"})],
        "quantize": [
            ({"quantize": "q8_0"}, NOTHING_KNOWN, {"to": "gguf"}),
            ({"quantize": "f32", "to": "book"}, NOTHING_KNOWN, {"to": "ollama"}),
        ],
        "name": [({"name": "mine", "to": "gguf"}, NOTHING_KNOWN, {"to": "ollama"})],
    },
}
"""By command and option: options with which it has no effect, the facts, and the change that mends it."""
NEEDED: dict[str, dict[str, Any]] = {
    "generate": {"run": Path("run")}, "chat": {"run": Path("run")}, "export": {"run": Path("run"), "to": "hf"},
}  # fmt: skip
"""Options without a default."""


def conditions(command: str) -> dict[str, tuple[Condition, ...]]:
    """The options of a command that need something; of verify-resume those that need something else than train's."""
    of_train = {one.name: one.needs for one in table(TrainOptions)} if command == "verify-resume" else {}
    needs = {one.name: one.needs for one in table(COMMANDS[command].options)}
    return {name: found for name, found in needs.items() if found != of_train.get(name, ())}


def made(command: str, given: dict[str, Any]) -> Any:
    return COMMANDS[command].options(**{**NEEDED.get(command, {}), **given})


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - ELSEWHERE))
def test_every_option_is_accounted_for(command: str) -> None:
    names = {one.name for one in fields(COMMANDS[command].options)}
    needing = conditions(command).keys()
    assert names == ALWAYS[command] | needing
    assert not ALWAYS[command] & needing
    assert WITHOUT.get(command, {}).keys() == needing


CASES = [(command, name, *case) for command, of in WITHOUT.items() for name, cases in of.items() for case in cases]


@pytest.mark.parametrize(("command", "name", "given", "facts", "mend"), CASES)
def test_an_option_without_effect_is_refused_or_said(
    command: str,
    name: str,
    given: dict[str, Any],
    facts: Facts,
    mend: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(effects, "warn", said.append)
    options = made(command, given)
    try:
        check_effects(options, facts)
    except UserError as error:
        said.append(str(error))
    assert len(said) == 1
    assert said[0].startswith(f"got --{name} ")
    assert "no effect" in said[0]
    said.clear()
    check_effects(replace(options, **mend), facts)
    assert said == []


def test_each_condition_of_training_has_its_case() -> None:
    assert {name: len(cases) for name, cases in WITHOUT["train"].items()} | {"patience": 2, "split_seed": 1} == {
        name: len(needs) for name, needs in conditions("train").items()
    }


def test_defaults_and_recipes_are_nobodys_mistake() -> None:
    for options in (TrainOptions(), recipe_options("book"), recipe_options("book", weight_decay=0.0)):
        check_effects(options, WHOLE, defaults=defaults_of(options))
    check_effects(TrainOptions(warmup=100, tf32=True, hang_timeout=5.0, patience=1), NOTHING_KNOWN)
    for command in WITHOUT:
        check_effects(made(command, {"import_": [Path("a.json")]} if command == "ab" else {}), WHOLE)


def test_what_a_value_of_nothing_does_has_its_effect_without_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """No evaluation and no sample are had there too."""
    said: list[str] = []
    monkeypatch.setattr(effects, "warn", said.append)
    check_effects(TrainOptions(eval_every=0, samples=0), replace(WHOLE, val_examples=0))
    assert said == []


def test_each_command_looks_at_its_table(tmp_path: Path) -> None:
    """Before it looks at anything else: nothing of what is named here is there. (`train` has rows of its own in the
    table of errors, `doctor` warns.)"""
    calls: dict[str, Any] = {
        "verify-resume": lambda options: verify_resume(cast(VerifyOptions, options)),
        "generate": generate,
        "chat": chat,
        "inspect": inspect,
        "ab": import_ratings,
        "export": export,
    }
    for command, call in calls.items():
        name, cases = list(WITHOUT[command].items())[-1]
        with pytest.raises(UserError, match=f"got --{name} .*no effect"):
            call(made(command, cases[0][0]))
    assert calls.keys() == WITHOUT.keys() - {"train", "doctor"}


def test_the_doctor_says_that_there_are_no_speeds_to_leave_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_results", lambda *_, **__: iter(()))
    assert main(["doctor", "--device", "cpu", "--speed", "false"]) == 0
    assert "got --speed false, which has no effect here" in " ".join(capsys.readouterr().err.split())
