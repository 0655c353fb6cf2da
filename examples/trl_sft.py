"""TRL's SFTTrainer: `FastftSFTTrainer` in its place, and nothing else.

    python examples/trl_sft.py                                     # seconds on a CPU, small random weights
    python examples/trl_sft.py --model openai-community/gpt2 --data instruction-data.json

Losses, gradients and token metrics are the ones that SFTTrainer has.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import SFTConfig

from fastft.data.prompts import ALPACA
from fastft.data.reading import load_records
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.integrations.transformers import zero_dropout
from fastft.integrations.trl import FastftSFTTrainer


def main(arguments: Sequence[str] | None = None) -> Any:
    """Trains, and returns the trainer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder or name of Hugging Face's; small random weights without it")
    parser.add_argument("--data", default="sample", help="a file of instructions")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", default="out/trl_sft")
    options = parser.parse_args(arguments)

    data = Dataset.from_list(
        [
            {"prompt": ALPACA.prompt_of(record), "completion": ALPACA.response(record.output)}
            for record in load_records(options.data).good
        ]
    )
    small = GPT2Config(n_layer=2, n_head=2, n_embd=64)
    model = GPT2LMHeadModel.from_pretrained(options.model) if options.model else GPT2LMHeadModel(small)
    zero_dropout(model)  # GPT-2's configuration has 0.1, and a shared token has one mask for all that share it
    gpu = torch.cuda.is_available()
    trainer = FastftSFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=options.out, max_steps=options.steps, per_device_train_batch_size=8, learning_rate=5e-5,
            logging_steps=1, report_to="none", bf16=gpu, use_cpu=not gpu,
        ),
        train_dataset=data,
        processing_class=tokenizer_in(Path(options.out) / "tokenizer"),
    )  # fmt: skip
    print(trainer.report)
    trainer.train()
    return trainer


def tokenizer_in(folder: Path) -> Any:
    """GPT-2's tokenizer, without a download."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in gpt2_tokenizer().files(1024).items():
        (folder / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


if __name__ == "__main__":
    main()
