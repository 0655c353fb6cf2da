"""A LoRA adapter by PEFT and transformers' own Trainer, with two lines of fastft: `accelerate` and `TreeCollator`.

python examples/peft_lora.py                                     # seconds on a CPU, small random weights
python examples/peft_lora.py --model openai-community/gpt2 --data instruction-data.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from fastft.data.encode import encode
from fastft.data.prompts import ALPACA
from fastft.data.reading import load_records
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.integrations.transformers import TreeCollator, accelerate, features_of, zero_dropout


def main(arguments: Sequence[str] | None = None) -> Trainer:
    """Trains, saves the adapter, and returns the trainer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder or name of Hugging Face's; small random weights without it")
    parser.add_argument("--data", default="sample", help="a file of instructions")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", default="out/peft_lora")
    options = parser.parse_args(arguments)

    records = load_records(options.data).good
    examples = features_of(encode(records, ALPACA, gpt2_tokenizer(), max_length=1024))
    small = GPT2Config(n_layer=2, n_head=2, n_embd=64)
    base = GPT2LMHeadModel.from_pretrained(options.model) if options.model else GPT2LMHeadModel(small)

    layers = ["c_attn", "c_proj", "c_fc"]
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=layers, fan_in_fan_out=True))
    zero_dropout(model)  # GPT-2's configuration has 0.1, and a shared token has one mask for all that share it
    print(accelerate(model))  # before PEFT would do as well
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.out, max_steps=options.steps, per_device_train_batch_size=8, learning_rate=1e-3,
            logging_steps=1, report_to="none",
        ),
        train_dataset=examples,
        data_collator=TreeCollator(model),
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(options.out)
    return trainer


if __name__ == "__main__":
    main()
