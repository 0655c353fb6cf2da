"""The examples run as they stand, and what they accelerate does run, as often as it should."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import Trainer

from fastft.common.errors import UserError
from fastft.integrations.transformers import counted
from fastft.integrations.transformers.activations import Gelu
from fastft.integrations.transformers.loss import CausalLM
from fastft.integrations.transformers.speedup import base_of
from fastft.integrations.transformers.swap import swap_back

pytest.importorskip("accelerate", reason="pip install 'fastft[transformers]'")
EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"transformers_trainer.py": "transformers", "peft_lora.py": "peft", "trl_sft.py": "trl"}
STEPS = 3


def run(name: str, folder: Path) -> tuple[Any, Counter[str]]:
    """An example's trainer, and what ran while it trained."""
    own, found = Trainer.train, []

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        with counted() as ran:
            found.append(ran)
            return own(self, *args, **kwargs)

    torch.manual_seed(0)
    main = runpy.run_path(str(EXAMPLES / name))["main"]
    with mock.patch.object(Trainer, "train", train):
        trainer: Any = main(["--steps", str(STEPS), "--out", str(folder)])
    (ran,) = found
    return trainer, ran


def check(name: str, ran: Counter[str]) -> None:
    """Each op once a step and layer, twice where TRL checkpoints activations, as it does if it is not told otherwise.
    Layer norms are torch's own on a CPU."""
    layers, times = 2, 2 if name == "trl_sft.py" else 1
    assert ran["loss"] == STEPS
    assert ran["attention"] == layers * STEPS * times
    assert ran["gelu"] == layers * STEPS * times
    assert set(ran) == {"loss", "attention", "gelu"}


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_trains(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(NEEDS[name], reason=f"pip install 'fastft[{NEEDS[name]}]'")
    trainer, ran = run(name, tmp_path)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert isinstance(base_of(trainer.model), CausalLM)
    assert "rows with a label alone" in capsys.readouterr().out
    check(name, ran)


def planted(op: str, model: Any) -> None:
    """Takes an op back after `accelerate` has reported it, as a library that replaces modules or forwards would."""
    base = base_of(model)
    if op == "loss":
        base.facts["loss"] = False
    elif op == "attention":
        base.set_attn_implementation("sdpa")
    else:
        for module in base.modules():
            if isinstance(module, Gelu):
                swap_back(module)


@pytest.mark.parametrize("op", ["gelu", "loss"])
def test_a_planted_no_op_is_caught(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Trainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        planted(op, self.model)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", train)
    _, ran = run("transformers_trainer.py", tmp_path)
    with pytest.raises(AssertionError, match=rf"\b{ran[op]} == "):
        check("transformers_trainer.py", ran)


def test_attention_taken_back_is_refused_by_the_collator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Trainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        planted("attention", self.model)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", train)
    with pytest.raises(UserError, match="attn_implementation='sdpa'"):
        run("transformers_trainer.py", tmp_path)
