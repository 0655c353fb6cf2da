"""Trainers that are not fastft's, transformers' Trainer and TRL's SFTTrainer, on small models, with fastft and without.

As a script it is one rank: FOLDER, which has `runs.json` (a list of keyword arguments of `trained`) and the model; it
writes `said.json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from labelled_examples import labelled, padded
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from fastft.integrations.transformers import TreeCollator, accelerate, counted

STEPS = 20
METRICS = ("entropy", "mean_token_accuracy", "num_tokens")
USUAL = {
    "max_steps": STEPS, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 5,
    "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no", "per_device_train_batch_size": 4,
}  # fmt: skip
FOR_SFT = {"gradient_checkpointing": False, "bf16": False}
"""What SFTConfig has otherwise where it is not told."""


@dataclass
class Logged:
    """What a trainer said of each step and evaluation, and which operations ran.

    Attributes:
        losses: of each step, as the trainer computed them (its log is float32).
        norms: of each step's gradient, before it is clipped.
        evaluations: each `eval_loss`.
        metrics: SFTTrainer's, of each step.
        ran: what `counted` counted.
        micro_batches: of all steps; an epoch's last step may have fewer than the others.
    """

    losses: list[float]
    norms: list[float]
    evaluations: list[float]
    metrics: dict[str, list[float]]
    ran: Counter[str]
    micro_batches: int


class _Losses(TrainerCallback):
    """Sums the losses of a step's micro-batches."""

    def __init__(self, trainer: Trainer) -> None:
        self.steps: list[torch.Tensor] = []
        self.micro_batches = 0
        self._parts: list[torch.Tensor] = []
        self._own = trainer.training_step
        trainer.training_step = self._step
        trainer.add_callback(self)

    def _step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.micro_batches += 1
        self._parts.append(self._own(*args, **kwargs))
        return self._parts[-1]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(torch.stack(self._parts).sum())
        self._parts.clear()


def trained(model: Any, folder: Path, *, resume: str | None = None, **which: Any) -> Logged:
    """Trains; the arguments are those of `trainer_of`. With several ranks, losses are the mean of theirs."""
    trainer = trainer_of(model, folder, **which)
    losses = _Losses(trainer)
    with counted() as ran:
        trainer.train(resume_from_checkpoint=resume)
    ranks = trainer.accelerator.gather(torch.stack(losses.steps)).unflatten(0, (-1, len(losses.steps)))
    since = 0 if resume is None else int(resume.rpartition("-")[2])
    history = trainer.state.log_history
    steps = [entry for entry in history if "grad_norm" in entry and entry["step"] > since]
    metrics = {name: [entry[name] for entry in steps] for name in METRICS if name in steps[0]}
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    norms = [entry["grad_norm"] for entry in steps]
    return Logged(ranks.mean(0).tolist(), norms, evaluations, metrics, ran, losses.micro_batches)


def trainer_of(
    model: Any, folder: Path, *, fast: bool, kind: str = "Trainer", evaluated: bool = False, lora: bool = False,
    collator: Any = None, dataset: Sequence[dict[str, Any]] | None = None, **options: Any,
) -> Any:  # fmt: skip
    """A trainer of a model.

    Args:
        model: it, from which nothing has been accelerated yet (SFTTrainer with a `collator` but for that).
        folder: for what it writes.
        fast: with fastft.
        kind: `Trainer` or `SFTTrainer`.
        evaluated: on 17 examples, every 5 steps, 7 at a time: the last batch is smaller, and counts less.
        lora: of an adapter alone.
        collator: in place of the usual one.
        dataset: of SFTTrainer, in place of the usual one.
        options: of its arguments.
    """
    options = {**USUAL, **options, "output_dir": str(folder)}
    if evaluated:
        options |= {"eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 7}
    if kind == "SFTTrainer":
        return _sft_trainer(model, fast, lora, collator, dataset or labelled(), {**FOR_SFT, **options})
    if model.dtype == torch.float64 and not fast:
        model.loss_function = _loss_in_float64
    if lora:
        model = adapted(model)
    if fast:
        accelerate(model)
    return Trainer(
        model=model, args=TrainingArguments(**options), train_dataset=labelled(), eval_dataset=labelled(17),
        data_collator=collator or (TreeCollator(model) if fast else padded),
    )  # fmt: skip


def _loss_in_float64(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
) -> torch.Tensor:
    """transformers' own loss rounds logits to float32, and TRL's hidden states, which float64 is to be seen past."""
    targets = labels[:, 1:].flatten()
    count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum") / count


def _sft_trainer(
    model: Any, fast: bool, lora: bool, collator: Any, dataset: Sequence[dict[str, Any]], options: dict[str, Any]
) -> Any:
    import trl
    from datasets import Dataset

    from fastft.integrations.trl import FastftSFTTrainer

    torch.manual_seed(4)  # of an adapter's weights
    return (FastftSFTTrainer if fast else trl.SFTTrainer)(
        model=model, args=trl.SFTConfig(**options), data_collator=collator, processing_class=tokenizer(),
        train_dataset=Dataset.from_list(list(dataset)), eval_dataset=Dataset.from_list(labelled(17)),
        peft_config=_adapter() if lora else None,
    )  # fmt: skip


def adapted(model: Any) -> Any:
    """A model with an adapter of PEFT's."""
    import peft

    torch.manual_seed(4)
    return peft.get_peft_model(model, _adapter())


def _adapter() -> Any:
    import peft

    layers = ["c_attn", "c_proj"]
    return peft.LoraConfig(r=4, target_modules=layers, lora_dropout=0.0, fan_in_fan_out=True)


def tokenizer() -> PreTrainedTokenizerFast:
    """Of a word for each id; the examples are tokenised already, and TRL asks for it all the same."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel({f"w{index}": index for index in range(97)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0", unk_token="w3")


LIMIT = 1e-5
"""How far float32 may lie apart, relative, at these seeds and this rate. Losses are within 3e-7 of the stock trainer's;
norms of gradients drift, from 1e-7 in the first step to 3e-6 in the twentieth. How far is the data's affair: with seed
42 on two ranks it is 5e-5, and the stock trainer with attention `eager` is then 4e-5 from itself with `sdpa`. In
float64 the same runs are equal to 1e-13: the drift is float32's, which a high rate enlarges step by step."""
LIMIT_IN_FLOAT64 = 1e-10
"""Found: 5e-14. A mean over ranks or micro-batches in place of one over targets is off by 1e-2."""


def difference(found: Logged, expected: Logged) -> float:
    """The largest relative difference of a loss, a norm, an evaluation, or a metric of any step."""
    of, to = (
        {"losses": said.losses, "norms": said.norms, "evaluations": said.evaluations, **said.metrics}
        for said in (found, expected)
    )
    return max(max(differences(of[name], values), default=0) for name, values in to.items())


def differences(found: Sequence[float], expected: Sequence[float]) -> list[float]:
    """The relative difference of each; what is less than 0.01 (a share of right tokens) counts as that."""
    return [abs(a - b) / max(abs(b), 1e-2) for a, b in zip(found, expected, strict=True)]


def on_two_ranks(model: Any, folder: Path, runs: Sequence[dict[str, Any]]) -> list[Logged]:
    """What each of several runs said on two CPU ranks, all within one pair of processes.

    Run number n writes into `folder / str(n)`; `resume` is a path within `folder`.
    """
    model.save_pretrained(folder / "model")
    (folder / "runs.json").write_text(json.dumps(list(runs)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, folder]
    subprocess.run(command, check=True, timeout=1200)
    return [Logged(**{**one, "ran": Counter(one["ran"])}) for one in json.loads((folder / "said.json").read_text())]


def _as_a_rank(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    said = []
    for index, run in enumerate(json.loads((folder / "runs.json").read_text())):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto", attn_implementation="eager")
        if "resume" in run:
            run["resume"] = str(folder / run["resume"])
        said.append(vars(trained(model, folder / str(index), ddp_backend="gloo", **run)))
    if torch.distributed.get_rank() == 0:
        (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    _as_a_rank(Path(sys.argv[1]))
