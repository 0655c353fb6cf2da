"""Options that cannot have an effect: each is in the table, and refused or said where its condition does not hold."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from fastft import effects
from fastft.config import TrainOptions, recipe_options
from fastft.effects import CONDITIONS, Facts, check_effects
from fastft.errors import UserError

ALWAYS = {
    "data", "model", "weights", "out", "recipe", "template", "mask_prompt", "max_length", "too_long",
    "allow_empty_output", "end_of_text_in_data", "skip_bad_records", "split_seed", "batching", "batch_size", "steps",
    "drop_last", "seed", "lr", "schedule", "weight_decay", "clip", "max_skipped", "tie_head", "dtype", "device", "impl",
    "compile", "cuda_graphs", "activation_checkpointing", "threads", "deepspeed_config", "save_every", "keep",
    "whole_every", "keep_best", "resume", "overwrite", "dry_run", "ledger", "tensorboard",
}  # fmt: skip
"""Options that need nothing else; what is impossible (`--cuda_graphs true` on a CPU) is refused by the engine."""

WHOLE = Facts(steps=100, val_examples=4, ranks=2, device="cuda")
WITHOUT: dict[str, list[tuple[dict[str, Any], Facts, dict[str, Any]]]] = {
    "token_cache": [({"token_cache": "none", "data": "sample"}, WHOLE, {"data": "mine.json"})],
    "share_prefix": [({"share_prefix": False, "batching": "padded"}, WHOLE, {"batching": "packed"})],
    "pack_tokens": [({"pack_tokens": 99, "batching": "bucketed"}, WHOLE, {"batching": "packed"})],
    "accumulate": [({"accumulate": 9, "batch_size": 8}, WHOLE, {"accumulate": 8})],
    "epochs": [({"epochs": 5, "steps": 4}, WHOLE, {"steps": None})],
    "warmup": [({"warmup": 100}, WHOLE, {"warmup": 99})],
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
"""Options with which one has no effect, the facts, and the change that mends it."""


def test_every_option_is_accounted_for() -> None:
    names = {one.name for one in fields(TrainOptions)}
    assert names == ALWAYS | CONDITIONS.keys()
    assert not ALWAYS & CONDITIONS.keys()
    assert WITHOUT.keys() == CONDITIONS.keys()


CASES = [(name, *case) for name, cases in WITHOUT.items() for case in cases]


@pytest.mark.parametrize(("name", "given", "facts", "mend"), CASES)
def test_an_option_without_effect_is_refused_or_said(
    name: str, given: dict[str, Any], facts: Facts, mend: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(effects, "warn", said.append)
    options = TrainOptions(**given)
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


def test_each_condition_has_its_case() -> None:
    assert {name: len(cases) for name, cases in WITHOUT.items()} | {"patience": 2} == {
        name: len(conditions) for name, conditions in CONDITIONS.items()
    }


def test_defaults_and_recipes_are_nobodys_mistake() -> None:
    for options in (TrainOptions(), recipe_options("book"), recipe_options("book", weight_decay=0.0)):
        check_effects(options, WHOLE)
    nothing_known = Facts()
    check_effects(TrainOptions(warmup=100, tf32=True, hang_timeout=5.0, patience=1), nothing_known)
