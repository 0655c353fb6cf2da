"""TRL's SFTTrainer: the same losses, gradient norms and token metrics with fastft as without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from labelled_examples import labelled
from transformers import PreTrainedTokenizerFast

from fastft.common.errors import UserError
from fastft.integrations.transformers import TreeCollator, accelerate, counted

trl = pytest.importorskip("trl", reason="pip install 'fastft[trl]'")
datasets = pytest.importorskip("datasets", reason="pip install 'fastft[trl]'")
Make = Callable[..., Any]
STEPS, LIMIT = 20, 1e-5
METRICS = ("loss", "grad_norm", "entropy", "mean_token_accuracy")


def tokenizer() -> PreTrainedTokenizerFast:
    """Of a word for each id; the examples are tokenised already, and TRL asks for it all the same."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({f"w{index}": index for index in range(97)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0", unk_token="w3")


def dataset(n: int = 48) -> Any:
    return datasets.Dataset.from_list(labelled(n))


def trainer_of(kind: Any, model: Any, folder: Path, *, collator: Any = None, peft: Any = None, **options: Any) -> Any:
    usual = {"per_device_train_batch_size": 4, "gradient_checkpointing": False}
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=STEPS, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, lr_scheduler_type="constant", save_strategy="no", seed=5, bf16=False,
        **{**usual, **options},
    )  # fmt: skip
    return kind(
        model=model, args=arguments, data_collator=collator, train_dataset=dataset(), processing_class=tokenizer(),
        peft_config=peft,
    )  # fmt: skip


def logged(trainer: Any) -> dict[str, list[float]]:
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {name: [entry[name] for entry in entries] for name in METRICS}


def differs(found: dict[str, list[float]], expected: dict[str, list[float]], name: str) -> float:
    assert len(found[name]) == len(expected[name]) == STEPS
    return max(abs(a - b) / max(abs(b), 1e-2) for a, b in zip(found[name], expected[name], strict=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {}),
        ("llama", {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}),
        ("gpt2", {"loss_type": "dft"}),
        ("gpt2", {"gradient_checkpointing": True}),
        ("gpt2", {"label_smoothing_factor": 0.1}),
    ],
    ids=str,
)
def test_twenty_steps_are_the_stock_trainers(
    make_model: Make, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    from fastft.integrations.trl import FastftSFTTrainer

    expected = logged(trainer_of(trl.SFTTrainer, make_model(name), tmp_path, **options))
    trainer = trainer_of(FastftSFTTrainer, make_model(name), tmp_path, **options)
    with counted() as ran:
        found = logged(trainer)
    for metric in METRICS:
        assert differs(found, expected, metric) < LIMIT, metric
    assert expected["loss"][-1] < 0.98 * expected["loss"][0]
    steps = STEPS * options.get("gradient_accumulation_steps", 1)
    assert ran["loss"] == steps
    assert ran["attention"] >= 2 * steps
    assert ran["attention_sdpa"] == 0


def test_without_our_head_trls_own_runs_past_the_loss(make_model: Make, tmp_path: Path) -> None:
    """What `use_fused_head` is for: the op counter tells."""
    from fastft.integrations.trl import use_fused_head

    said = []
    for ours in (False, True):
        model = make_model()
        accelerate(model)
        trainer = trainer_of(trl.SFTTrainer, model, tmp_path, collator=TreeCollator(model))
        if ours:
            use_fused_head(trainer.model)
        with counted() as ran:
            said.append(logged(trainer))
        assert ran["loss"] == (STEPS if ours else 0)
        assert ran["attention"] == 2 * STEPS
    assert differs(said[1], said[0], "loss") < LIMIT


def test_lora(make_model: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install 'fastft[peft]'")
    from fastft.integrations.trl import FastftSFTTrainer

    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], lora_dropout=0.0, fan_in_fan_out=True)
    expected = logged(trainer_of(trl.SFTTrainer, make_model(), tmp_path, peft=config))
    with counted() as ran:
        found = logged(trainer_of(FastftSFTTrainer, make_model(), tmp_path, peft=config))
    for metric in METRICS:
        assert differs(found, expected, metric) < LIMIT, metric
    assert ran["loss"] >= STEPS


def test_evaluation(make_model: Make, tmp_path: Path) -> None:
    from fastft.integrations.trl import FastftSFTTrainer

    losses = []
    for kind in (trl.SFTTrainer, FastftSFTTrainer):
        trainer = trainer_of(kind, make_model(), tmp_path, per_device_eval_batch_size=7)
        losses.append(trainer.evaluate(dataset(17))["eval_loss"])
    assert abs(losses[1] - losses[0]) < LIMIT * losses[0]


def test_mistakes(make_model: Make, tmp_path: Path) -> None:
    from fastft.integrations.trl import FastftSFTTrainer, use_fused_head

    model = make_model()
    with pytest.raises(UserError, match="whose loss is not accelerated"):
        use_fused_head(model)
    accelerate(model)
    with pytest.raises(UserError, match="without TRL's fused head"):
        use_fused_head(model)
    with pytest.raises(UserError, match="got packing or padding_free"):
        trainer_of(FastftSFTTrainer, model, tmp_path, packing=True)
    with pytest.raises(UserError, match=r"dropout 0\.1"):
        trainer_of(FastftSFTTrainer, make_model(resid_pdrop=0.1), tmp_path)
