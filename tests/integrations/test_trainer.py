"""transformers' own Trainer: the same losses and gradient norms with fastft as without."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_examples import labelled, padded
from transformers import Trainer, TrainingArguments

from fastft.integrations.transformers import TreeCollator, accelerate, counted

pytest.importorskip("accelerate", reason="pip install 'fastft[transformers]'")
Make = Callable[..., Any]
STEPS = 20
LIMIT = 1e-5


@dataclass
class Logged:
    """What a trainer logged at each step and evaluation, and which operations ran."""

    losses: list[float]
    norms: list[float]
    evaluations: list[float]
    ran: Counter[str]


def trained(model: Any, folder: Path, *, fast: bool, resume: str | None = None, **options: Any) -> Logged:
    usual = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 7, "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, lr_scheduler_type="constant", seed=5, **{**usual, **options},
    )  # fmt: skip
    if fast:
        accelerate(model)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=labelled(), eval_dataset=labelled(17),
        data_collator=TreeCollator(model) if fast else padded,
    )  # fmt: skip
    with counted() as ran:
        trainer.train(resume_from_checkpoint=resume)
    steps = [
        entry for entry in trainer.state.log_history if "grad_norm" in entry and entry["step"] > resumed_at(resume)
    ]
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return Logged([entry["loss"] for entry in steps], [entry["grad_norm"] for entry in steps], evaluations, ran)


def resumed_at(folder: str | None) -> int:
    return 0 if folder is None else int(folder.rpartition("-")[2])


def differs(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_twenty_steps_are_the_stock_trainers(make_model: Make, tmp_path: Path, name: str, accumulation: int) -> None:
    size = {"per_device_train_batch_size": 8 // min(accumulation, 4), "gradient_accumulation_steps": accumulation}
    expected = trained(make_model(name), tmp_path, fast=False, **size)
    found = trained(make_model(name), tmp_path, fast=True, **size)
    assert differs(found.losses, expected.losses) < LIMIT
    assert differs(found.norms, expected.norms) < LIMIT
    assert expected.losses[-1] < expected.losses[0] - 0.1  # it learns, and so would show a wrong step
    steps = STEPS * accumulation
    once = {"attention": 2 * steps, "loss": steps}
    assert found.ran == ({**once, "gelu": 2 * steps} if name == "gpt2" else once)


def test_evaluation_is_the_stock_trainers(make_model: Make, tmp_path: Path) -> None:
    """17 examples by 7: the last batch is smaller, and counts less."""
    options = {"eval_strategy": "steps", "eval_steps": 5}
    expected = trained(make_model(), tmp_path, fast=False, **options)
    found = trained(make_model(), tmp_path, fast=True, **options)
    assert differs(found.evaluations, expected.evaluations) < LIMIT


def test_resuming_within_an_epoch_goes_on_as_if_nothing_had_been(make_model: Make, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 7}
    expected = trained(make_model(), tmp_path, fast=True, **options)
    found = trained(make_model(), tmp_path / "again", fast=True, resume=str(tmp_path / "checkpoint-7"))
    assert found.losses == expected.losses[7:]
    assert found.norms == expected.norms[7:]


def test_label_smoothing_is_the_stock_trainers(make_model: Make, tmp_path: Path) -> None:
    """It needs logits, and gets them."""
    options = {"label_smoothing_factor": 0.1}
    expected = trained(make_model(), tmp_path, fast=False, **options)
    found = trained(make_model(), tmp_path, fast=True, **options)
    assert differs(found.losses, expected.losses) < LIMIT


def test_metrics_of_evaluation_get_their_logits(make_model: Make, tmp_path: Path) -> None:
    """The share of right tokens, from logits of packs of different lengths."""

    def right(prediction: Any) -> dict[str, float]:
        logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        asked = labels != -100
        return {"right": float((logits.argmax(-1) == labels)[asked].mean()), "asked": float(asked.sum())}

    said = []
    for fast in (False, True):
        model = make_model()
        if fast:
            accelerate(model)
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
        collate = TreeCollator(model) if fast else padded
        trainer = Trainer(model=model, args=arguments, data_collator=collate, compute_metrics=right)
        said.append(trainer.evaluate(labelled(17)))
    assert said[0]["eval_asked"] == said[1]["eval_asked"]
    assert said[0]["eval_right"] == said[1]["eval_right"]


def test_bf16_wraps_the_forward_and_stays_close(make_model: Make, tmp_path: Path) -> None:
    expected = trained(make_model(), tmp_path, fast=False)
    found = trained(make_model(), tmp_path, fast=True, bf16=True)
    assert 0 < differs(found.losses[:5], expected.losses[:5]) < 2e-2
    assert found.ran == {"attention": 2 * STEPS, "gelu": 2 * STEPS, "loss": STEPS}


@pytest.mark.parametrize("order", ["accelerate first", "PEFT first"])
def test_lora_is_the_stock_trainers(make_model: Make, tmp_path: Path, order: str) -> None:
    peft = pytest.importorskip("peft", reason="pip install 'fastft[peft]'")

    def adapted(model: Any) -> Any:
        torch.manual_seed(4)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], lora_dropout=0.0))

    expected = trained(adapted(make_model()), tmp_path, fast=False)
    model = make_model()
    if order == "accelerate first":
        accelerate(model)
    found = trained(adapted(model), tmp_path, fast=True)
    assert differs(found.losses, expected.losses) < LIMIT
    assert differs(found.norms, expected.norms) < LIMIT
    assert found.ran == {"attention": 2 * STEPS, "gelu": 2 * STEPS, "loss": STEPS}


def test_an_adapter_of_the_head_is_not_left_out(make_model: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install 'fastft[peft]'")

    def adapted(model: Any) -> Any:
        torch.manual_seed(4)
        config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    expected = trained(adapted(make_model("llama")), tmp_path, fast=False)
    model = make_model("llama")
    accelerate(model)
    found = trained(adapted(model), tmp_path, fast=True)
    assert differs(found.losses, expected.losses) < LIMIT
    assert found.ran == {"attention": 2 * STEPS, "loss_of_logits": STEPS}


@pytest.mark.long
def test_two_ranks_are_the_stock_trainers_two_ranks(tmp_path: Path) -> None:
    """Packs of different lengths on two ranks, whose targets are counted over both."""
    said = {}
    for way in ("stock", "fast"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        script = Path(__file__).parents[1] / "support" / "trainer_ranks.py"
        subprocess.run([*command, script, way, tmp_path / way], check=True, timeout=600)
        said[way] = json.loads((tmp_path / way / "said.json").read_text())
    for name in ("loss", "grad_norm"):
        assert differs(said["fast"][name], said["stock"][name]) < LIMIT
    assert said["fast"]["ran"]["loss"] == 2 * STEPS  # two micro-batches each
