"""transformers' own Trainer, its options as fast as they go on this device: mixed precision, fused AdamW, torch's fused
attention, neither evaluation nor saving. It clips the gradient, as fastft does.

`fastft` is the stock Trainer on a model that `accelerate` was given, whose process then keeps the memory that it frees,
with `TreeCollator`. `padded` pads each batch to its longest example and leaves the attention mask out, as `hf` does;
`flat` is transformers' padding-free collator.

`--smollm2` takes a model of SmolLM2-135M's shape with random weights in place of GPT-2, and GPT-2's token ids modulo
its vocabulary: what a step costs does not depend on what the ids mean.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks import common
from benchmarks.peers import hf, shared
from fastft.integrations.transformers import TreeCollator, accelerate
from fastft.model.gpt2 import config_for

KINDS = ("fastft", "padded", "flat")


class Clock(TrainerCallback):
    """Seconds of each step, from the end of the one before it, so that loading its data counts."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        self._last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Notes a step."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Notes a loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def smollm2() -> LlamaForCausalLM:
    """A model of SmolLM2-135M's shape, the same random weights each time."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


def arguments_of(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What TrainingArguments and SFTConfig are given alike."""
    return {
        "output_dir": folder,
        "max_steps": options.steps + common.WARMUP,
        "per_device_train_batch_size": options.batch_size,
        "train_sampling_strategy": "sequential",
        "bf16": options.dtype == "bf16",
        "use_cpu": common.chosen_device(options.device) == "cpu",
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "learning_rate": shared.RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": shared.WEIGHT_DECAY,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }


def examples_of(options: argparse.Namespace, vocab: int) -> list[dict[str, list[int]]]:
    """The data set: `input_ids` and `labels` of each example, in order."""
    made = []
    for batch in shared.batches_of(options):
        for ids, start in batch:
            ids = [token % vocab for token in ids]
            made.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return made


def new_trainer(options: argparse.Namespace, folder: str) -> Trainer:
    """The trainer of one kind."""
    model = smollm2() if options.smollm2 else hf.new_model(config_for(options.size))
    model.config.use_cache = False
    if options.kind == "fastft":
        accelerate(model)
        collate: Any = TreeCollator(model)
    else:
        collate = functools.partial(hf.laid_out, options.kind, pad=hf.PAD % model.config.vocab_size)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments_of(options, folder)),
        train_dataset=examples_of(options, model.config.vocab_size),
        data_collator=collate,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs and times the steps."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = new_trainer(options, folder), Clock()
        trainer.add_callback(clock)
        trainer.train()
    of = "SmolLM2-135M, " if options.smollm2 else ""
    by = "Trainer over fastft" if options.kind == "fastft" else f"Trainer, {options.kind}"
    packages = ("transformers", "accelerate", *(("fastft",) if options.kind == "fastft" else ()))
    return shared.report(options, f"{of}{by}, {options.dtype}", clock.seconds, clock.losses, packages=packages)


def arguments() -> argparse.ArgumentParser:
    """The command line's."""
    parser = shared.arguments(__doc__, KINDS)
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M's shape in place of GPT-2's")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    common.say(measure(arguments().parse_args(argv)))


if __name__ == "__main__":
    main()
