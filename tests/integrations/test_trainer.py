"""transformers' own Trainer: the same losses and gradient norms with fastft as without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_trainers import LIMIT, LIMIT_IN_FLOAT64, STEPS, difference, differences, on_two_ranks, trained
from labelled_examples import labelled, padded
from transformers import Trainer, TrainingArguments

from fastft.integrations.transformers import TreeCollator, accelerate

pytest.importorskip("accelerate", reason="pip install 'fastft[transformers]'")
Make = Callable[..., Any]
ONCE_A_STEP = {"attention": 2 * STEPS, "gelu": 2 * STEPS, "loss": STEPS}


def of(accumulation: int, examples: int = 8) -> dict[str, int]:
    """Options for steps of `examples` or, where one is too few for a micro-batch, more."""
    each = max(2, examples // accumulation)
    return {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": each}


@pytest.mark.parametrize(
    ("name", "accumulation"),
    [
        ("gpt2", 1),
        ("llama", 4),
        *(
            pytest.param(name, accumulation, marks=pytest.mark.long)
            for name in ("gpt2", "llama", "qwen3")
            for accumulation in (1, 2, 4, 8)
        ),
    ],
)
def test_twenty_steps_are_the_stock_trainers(make_model: Make, tmp_path: Path, name: str, accumulation: int) -> None:
    """With evaluation every five steps."""
    options = {**of(accumulation), "evaluated": accumulation == 1}
    if name == "qwen3":  # at 1e-2 its twentieth norm is 3e-5 off, and the stock trainer's with `sdpa` from `eager` 5e-5
        options["learning_rate"] = 2e-3
    expected = trained(make_model(name), tmp_path, fast=False, **options)
    found = trained(make_model(name), tmp_path, fast=True, **options)
    assert len(expected.losses) == STEPS
    assert len(expected.evaluations) == (4 if accumulation == 1 else 0)
    assert difference(found, expected) < LIMIT
    assert expected.losses[-1] < expected.losses[0] - 0.05  # it learns, and so would show a wrong step
    if accumulation > 1:
        steps = found.micro_batches
        once = {"attention": 2 * steps, "loss": steps}
        own = {"gelu": 2 * steps} if name == "gpt2" else {"rms_norm": (9 if name == "qwen3" else 5) * steps}
        assert found.ran == {**once, **own}  # qwen3 has two norms more a layer, of queries and keys


@pytest.mark.parametrize(
    ("name", "accumulation"),
    [
        ("gpt2", 2),
        *(pytest.param(name, n, marks=pytest.mark.long) for name in ("gpt2", "llama", "qwen3") for n in (1, 2, 4, 8)),
    ],
)
def test_in_float64_the_steps_are_exact(make_model: Make, tmp_path: Path, name: str, accumulation: int) -> None:
    """Beside `sdpa`: the `eager` attention of Llama rounds to float32."""
    models = [make_model(name, torch.float64) for _ in range(2)]
    models[0].set_attn_implementation("sdpa")
    expected = trained(models[0], tmp_path, fast=False, **of(accumulation))
    found = trained(models[1], tmp_path, fast=True, **of(accumulation))
    assert difference(found, expected) < LIMIT_IN_FLOAT64


def test_a_mean_over_micro_batches_would_be_seen(make_model: Make, tmp_path: Path) -> None:
    """What the limits are for: the answers' lengths differ, and so does each micro-batch's share of the targets."""
    expected = trained(make_model(), tmp_path, fast=False, **of(4), max_steps=2)
    model = make_model()
    model.accepts_loss_kwargs = False  # the Trainer counts no targets then, and divides by the micro-batches
    found = trained(model, tmp_path, fast=True, **of(4), max_steps=2)
    assert differences(found.losses, expected.losses)[0] > 1e3 * LIMIT


def test_resuming_within_an_epoch_goes_on_as_if_nothing_had_been(make_model: Make, tmp_path: Path) -> None:
    """The epoch has 12 steps."""
    options = {"save_strategy": "steps", "save_steps": 7}
    stock = trained(make_model(), tmp_path / "stock", fast=False)
    expected = trained(make_model(), tmp_path, fast=True, **options)
    found = trained(make_model(), tmp_path / "again", fast=True, resume=str(tmp_path / "checkpoint-7"))
    assert found.losses == expected.losses[7:]
    assert found.norms == expected.norms[7:]
    assert max(differences(found.losses, stock.losses[7:])) < LIMIT
    assert max(differences(found.norms, stock.norms[7:])) < LIMIT


def test_label_smoothing_is_the_stock_trainers(make_model: Make, tmp_path: Path) -> None:
    """It needs logits, and gets them."""
    options = {"label_smoothing_factor": 0.1, "max_steps": 5}
    expected = trained(make_model(), tmp_path, fast=False, **options)
    found = trained(make_model(), tmp_path, fast=True, **options)
    assert difference(found, expected) < LIMIT


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


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bf16_wraps_the_forward_and_stays_close(make_model: Make, tmp_path: Path, name: str) -> None:
    """Rotary positions make queries and keys float32 under autocast, beside values in bf16."""
    expected = trained(make_model(name), tmp_path, fast=False, max_steps=5)
    found = trained(make_model(name), tmp_path, fast=True, bf16=True, max_steps=5)
    assert 0 < max(differences(found.losses, expected.losses)) < 2e-2
    own = {"gelu": 2 * 5} if name == "gpt2" else {"rms_norm": 5 * 5}
    assert found.ran == {"attention": 2 * 5, "loss": 5, **own}


@pytest.mark.parametrize("order", [pytest.param("accelerate first", marks=pytest.mark.long), "PEFT first"])
def test_lora_is_the_stock_trainers(make_model: Make, tmp_path: Path, order: str) -> None:
    pytest.importorskip("peft", reason="pip install 'fastft[peft]'")
    expected = trained(make_model(), tmp_path, fast=False, lora=True)
    model = make_model()
    if order == "accelerate first":
        accelerate(model)
    found = trained(model, tmp_path, fast=True, lora=True)
    assert difference(found, expected) < LIMIT
    assert found.ran == ONCE_A_STEP


def test_an_adapter_of_the_head_is_not_left_out(make_model: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install 'fastft[peft]'")

    def headed(model: Any) -> Any:
        torch.manual_seed(4)
        config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    expected = trained(headed(make_model("llama")), tmp_path, fast=False, max_steps=5)
    model = make_model("llama")
    accelerate(model)
    found = trained(headed(model), tmp_path, fast=True, max_steps=5)
    assert difference(found, expected) < LIMIT
    norms = 4  # the first one is given, and has, nothing that is trained: on a CPU torch's is as fast forward
    assert found.ran == {"attention": 2 * 5, "loss_of_logits": 5, "rms_norm": norms * 5}


KINDS = ("Trainer", "SFTTrainer")


@pytest.mark.long
def test_two_ranks_are_the_stock_trainers_two_ranks(make_model: Make, tmp_path: Path) -> None:
    """Packs of different lengths on two ranks, whose targets are counted over both; 48 examples by 16 or 32 a step."""
    pytest.importorskip("trl", reason="pip install 'fastft[trl]'")
    each: list[dict[str, Any]] = [of(accumulation) for accumulation in (1, 2, 4, 8)]
    each += [{"evaluated": True}, {"lora": True}, {"save_strategy": "steps", "save_steps": 4}]
    runs = [{"kind": kind, "fast": fast, **one} for kind in KINDS for one in each for fast in (False, True)]
    again = [
        {**run, "save_strategy": "no", "resume": f"{index}/checkpoint-4"}
        for index, run in enumerate(runs) if "save_steps" in run and run["fast"]
    ]  # fmt: skip
    said = on_two_ranks(make_model(), tmp_path, [*runs, *again])
    for index in range(0, len(runs), 2):
        stock, fast = said[index : index + 2]
        worst = difference(fast, stock)
        print(runs[index], f"{worst:.1e}")
        assert worst < LIMIT, runs[index]
        assert fast.ran["attention_sdpa"] == 0
        assert fast.ran["loss"] >= fast.micro_batches == stock.micro_batches
    for run, resumed in zip(again, said[len(runs) :], strict=True):
        whole = said[int(run["resume"].partition("/")[0])]
        assert resumed.losses == whole.losses[4:]
        assert resumed.norms == whole.norms[4:]


@pytest.mark.long
def test_two_ranks_are_exact_in_float64(make_model: Make, tmp_path: Path) -> None:
    """SFTTrainer with fastft beside transformers' own: TRL's rounds to float32."""
    pytest.importorskip("trl", reason="pip install 'fastft[trl]'")
    runs = [
        {"kind": kind, "fast": fast, **of(accumulation)}
        for accumulation in (1, 2, 4, 8)
        for kind, fast in (("Trainer", False), ("Trainer", True), ("SFTTrainer", True))
    ]
    said = on_two_ranks(make_model("gpt2", torch.float64), tmp_path, runs)
    for index in range(0, len(runs), 3):
        stock, *others = said[index : index + 3]
        assert max(difference(other, stock) for other in others) < LIMIT_IN_FLOAT64, runs[index]
