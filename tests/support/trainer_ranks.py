"""One rank of transformers' Trainer on CPUs, with fastft (`fast`) or without (`stock`): WAY FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from labelled_examples import labelled, padded
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from fastft.integrations.transformers import TreeCollator, accelerate, counted


def main(way: str, folder: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=4, n_embd=32, vocab_size=97, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    if way == "fast":
        accelerate(model)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=20, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        learning_rate=2e-3, lr_scheduler_type="constant", save_strategy="no", ddp_backend="gloo",
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    collate = TreeCollator(model) if way == "fast" else padded
    trainer = Trainer(model=model, args=arguments, train_dataset=labelled(), data_collator=collate)
    with counted() as ran:
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    said = {name: [entry[name] for entry in steps] for name in ("loss", "grad_norm")}
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "said.json").write_text(json.dumps({**said, "ran": ran}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
