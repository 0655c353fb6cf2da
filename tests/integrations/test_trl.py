"""TRL's SFTTrainer: the same losses, gradient norms and token metrics with fastft as without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_trainers import LIMIT, LIMIT_IN_FLOAT64, METRICS, STEPS, difference, differences, trained, trainer_of
from labelled_examples import labelled

from fastft.common.errors import UserError
from fastft.integrations.transformers import TreeCollator, accelerate, counted

pytest.importorskip("trl", reason="pip install 'fastft[trl]'")
pytest.importorskip("datasets", reason="pip install 'fastft[trl]'")
Make = Callable[..., Any]
SFT = "SFTTrainer"
GRID = [
    {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": max(2, 8 // accumulation)}
    for accumulation in (1, 2, 4, 8)
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"evaluated": True}),
        ("llama", {**GRID[2], "max_steps": 5}),
        ("gpt2", {"loss_type": "dft", "max_steps": 5}),
        ("gpt2", {"gradient_checkpointing": True, "max_steps": 5}),
        pytest.param("gpt2", {"label_smoothing_factor": 0.1, "max_steps": 5}, marks=pytest.mark.long),
        *(pytest.param(name, one, marks=pytest.mark.long) for name in ("gpt2", "llama") for one in GRID),
    ],
    ids=str,
)
def test_twenty_steps_are_the_stock_trainers(
    make_model: Make, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    expected = trained(make_model(name), tmp_path, kind=SFT, fast=False, **options)
    found = trained(make_model(name), tmp_path, kind=SFT, fast=True, **options)
    assert set(expected.metrics) == set(METRICS)
    assert difference(found, expected) < LIMIT
    assert found.metrics["num_tokens"] == expected.metrics["num_tokens"]
    if "max_steps" not in options:
        assert expected.losses[-1] < expected.losses[0]  # it learns, and so would show a wrong step
    steps = found.micro_batches
    evaluations = 4 * 3 if "evaluated" in options else 0
    assert found.ran["loss"] == steps + evaluations
    assert found.ran["attention"] >= 2 * (steps + evaluations)
    assert found.ran["attention_sdpa"] == 0


@pytest.mark.long
def test_in_float64_the_steps_are_exact(make_model: Make, tmp_path: Path) -> None:
    """Beside transformers' own Trainer: TRL's head rounds to float32."""
    expected = trained(make_model("gpt2", torch.float64), tmp_path, fast=False, **GRID[2])
    found = trained(make_model("gpt2", torch.float64), tmp_path, kind=SFT, fast=True, **GRID[2])
    assert difference(found, expected) < LIMIT_IN_FLOAT64


def test_without_our_head_trls_own_runs_past_the_loss(make_model: Make, tmp_path: Path) -> None:
    """What `use_fused_head` is for: the op counter tells."""
    from fastft.integrations.trl import use_fused_head

    said = []
    for ours in (False, True):
        model = make_model()
        accelerate(model)
        trainer = trainer_of(model, tmp_path, kind=SFT, fast=False, collator=TreeCollator(model), max_steps=5)
        if ours:
            use_fused_head(trainer.model)
        with counted() as ran:
            trainer.train()
        said.append([entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry])
        assert ran["loss"] == (5 if ours else 0)
        assert ran["attention"] == 2 * 5
    assert max(differences(said[1], said[0])) < LIMIT


def test_lora(make_model: Make, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="pip install 'fastft[peft]'")
    expected = trained(make_model(), tmp_path, kind=SFT, fast=False, lora=True)
    found = trained(make_model(), tmp_path, kind=SFT, fast=True, lora=True)
    assert difference(found, expected) < LIMIT
    assert found.ran == {"attention": 2 * STEPS, "gelu": 2 * STEPS, "loss": STEPS}


def test_resuming_within_an_epoch_goes_on_as_if_nothing_had_been(make_model: Make, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 7}
    stock = trained(make_model(), tmp_path / "stock", kind=SFT, fast=False)
    expected = trained(make_model(), tmp_path, kind=SFT, fast=True, **options)
    checkpoint = str(tmp_path / "checkpoint-7")
    found = trained(make_model(), tmp_path / "again", kind=SFT, fast=True, resume=checkpoint)
    assert found.losses == expected.losses[7:]
    assert found.norms == expected.norms[7:]
    assert max(differences(found.losses, stock.losses[7:])) < LIMIT
    assert max(differences(found.metrics["entropy"], stock.metrics["entropy"][7:])) < LIMIT


TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}w5 {% generation %}{{ message['content'] }} "
    "w2 {% endgeneration %}{% else %}w4 {{ message['content'] }} {% endif %}{% endfor %}"
)
"""Of words that the tests' tokenizer knows."""


def words(ids: list[int]) -> str:
    return " ".join(f"w{each}" for each in ids)


def parted(n: int = 24) -> list[tuple[str, str]]:
    """Prompts and answers in words."""
    made = []
    for example in labelled(n):
        first = sum(label == -100 for label in example["labels"])
        made.append((words(example["input_ids"][:first]), words(example["input_ids"][first:])))
    return made


def conversations() -> list[dict[str, Any]]:
    """Two turns each: labels in the middle of what others begin with alike, too."""
    made = []
    for (first, answer), (second, last) in zip(parted(), reversed(parted()), strict=True):
        said = (("user", first), ("assistant", answer), ("user", second), ("assistant", last))
        made.append({"messages": [{"role": role, "content": content} for role, content in said]})
    return made


def pairs() -> list[dict[str, Any]]:
    return [{"prompt": f"{prompt} ", "completion": answer} for prompt, answer in parted()]


@pytest.mark.parametrize(
    ("dataset", "options", "all_asked"),
    [
        (pairs, {}, False),  # the completion alone, where it is not told otherwise
        (pairs, {"completion_only_loss": False}, True),
        (conversations, {}, True),
        (conversations, {"assistant_only_loss": True}, False),
    ],
    ids=["completions", "prompts and completions", "conversations", "assistants"],
)
def test_what_is_asked_for_is_the_stock_trainers(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Any, options: Any, all_asked: bool
) -> None:
    """TRL writes it into `labels` before any collator sees it.

    Of GPT-2, whose `loss_type` is None, transformers counts in padded rows the first token's label as well, which
    nothing predicts, so that where it is there its loss is smaller by 1 in each example's tokens; not so of Llama.
    """
    import foreign_trainers

    plain = foreign_trainers.tokenizer

    def templated() -> Any:
        made = plain()
        made.chat_template = TEMPLATE
        return made

    monkeypatch.setattr(foreign_trainers, "tokenizer", templated)
    said = []
    for fast in (False, True):
        trainer = trainer_of(
            make_model("llama"), tmp_path, kind=SFT, fast=fast, dataset=dataset(), max_steps=3, **options
        )
        asked = {label != -100 for example in trainer.train_dataset for label in example["labels"]}
        assert asked == ({True} if all_asked else {True, False})
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        said.append([entry[name] for entry in steps for name in ("loss", "grad_norm", *METRICS)])
    assert len(said[0]) == 3 * 5
    assert max(differences(said[1], said[0])) < LIMIT


def test_mistakes(make_model: Make, tmp_path: Path) -> None:
    from fastft.integrations.trl import use_fused_head

    model = make_model()
    with pytest.raises(UserError, match="whose loss is not accelerated"):
        use_fused_head(model)
    accelerate(model)
    with pytest.raises(UserError, match="without TRL's fused head"):
        use_fused_head(model)
    for asked in ("packing", "eval_packing", "padding_free"):
        with pytest.raises(UserError, match=f"got {asked}"):
            trainer_of(model, tmp_path, kind=SFT, fast=True, **{asked: True})
    with pytest.raises(UserError, match=r"dropout 0\.1"):
        trainer_of(make_model(resid_pdrop=0.1), tmp_path, kind=SFT, fast=True)
    left_unlabelled = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    bare = [{"input_ids": one["input_ids"]} for one in labelled()]
    with pytest.raises(UserError, match="expected input_ids and labels"):
        trainer_of(make_model(), tmp_path, kind=SFT, fast=True, dataset=bare, **left_unlabelled).train()


def test_dropout_that_an_adapter_brings_after_the_collator_is_refused(make_model: Make, tmp_path: Path) -> None:
    """The fused head goes past the model's forward, which looks for it."""
    from fastft.integrations.trl import use_fused_head

    peft = pytest.importorskip("peft", reason="pip install 'fastft[peft]'")
    model = make_model("llama")
    accelerate(model)
    collator = TreeCollator(model, least_shared=1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.3))
    trainer = trainer_of(adapted, tmp_path, kind=SFT, fast=False, collator=collator, max_steps=1)
    use_fused_head(trainer.model)
    with pytest.raises(UserError, match=r"dropout 0\.3"):
        trainer.train()
