"""transformers' GPT2LMHeadModel in an ordinary PyTorch loop: torch's fused attention (SDPA), autocast, fused AdamW.

`padded` leaves the attention mask out: padding stands at the end of each row, behind everything that is asked for, so
causal attention hides it already, and torch's faster causal path is open. `masked` passes it, as a collator does.
`flat` is transformers' own DataCollatorWithFlattening: no padding, one row, positions that start again. `--compile` has
torch compile the model, its sizes marked dynamic, so that batches of any length share what is compiled. `--lora` has
PEFT put adapters into it, and `--narrow` holds what stays in bf16, the adapters in float32, as PEFT does by itself.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, GPT2LMHeadModel
from transformers import GPT2Config as HFConfig

from benchmarks import common
from benchmarks.peers import shared
from fastft.model.gpt2 import GPT2Config, config_for

KINDS = ("padded", "masked", "flat")
PAD = 50256


def hf_config(config: GPT2Config) -> HFConfig:
    """transformers' configuration of this size, without dropout."""
    return HFConfig(
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_positions=config.n_ctx,
        vocab_size=config.vocab_size,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=PAD,
        eos_token_id=PAD,
    )


def new_model(config: GPT2Config) -> GPT2LMHeadModel:
    """A GPT2LMHeadModel with the weights that all peers start from."""
    model = GPT2LMHeadModel._from_config(hf_config(config), attn_implementation="sdpa")
    shared.initialise(model.transformer.named_parameters(), config, transposed=True)
    return model


def adapted(model: GPT2LMHeadModel) -> Any:
    """The model with PEFT's adapters around its matrices."""
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=shared.LORA_RANK,
        lora_alpha=2 * shared.LORA_RANK,
        target_modules=list(shared.LORA_TARGETS),
        fan_in_fan_out=True,
        lora_dropout=0.0,
    )
    return peft.get_peft_model(model, config)


def collate(kind: str, examples: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    """What the model is given: ids and labels, -100 where nothing is asked for."""
    return laid_out(kind, [{"input_ids": ids, "labels": [-100] * start + ids[start:]} for ids, start in examples])


def laid_out(kind: str, labelled: list[dict[str, list[int]]], pad: int = PAD) -> dict[str, Tensor]:
    """The same of examples that have their `labels`."""
    if kind == "flat":
        flat: dict[str, Tensor] = DataCollatorWithFlattening()(labelled)
        return flat
    lengths = torch.tensor([len(each["input_ids"]) for each in labelled])
    width = int(lengths.max())
    batch = {
        key: torch.tensor([each[key] + [filler] * (width - len(each[key])) for each in labelled])
        for key, filler in (("input_ids", pad), ("labels", -100))
    }
    if kind == "masked":
        batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    return batch


def steps_of(options: argparse.Namespace) -> Iterator[Callable[[], float]]:
    """The steps of an ordinary loop."""
    device = common.chosen_device(options.device)
    model = new_model(config_for(options.size)).to(device)
    if options.narrow:
        model = model.bfloat16()
    if options.lora:
        model = adapted(model)
    model.train()
    if options.compile:
        model.compile(dynamic=True)
    learns = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=shared.RATE, weight_decay=shared.WEIGHT_DECAY, fused=True)
    narrow = options.dtype == "bf16"

    def step(examples: list[tuple[list[int], int]]) -> float:
        batch = {key: value.to(device) for key, value in collate(options.kind, examples).items()}
        with torch.autocast(device, dtype=torch.bfloat16) if narrow else contextlib.nullcontext():
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    for examples in shared.batches_of(options):
        yield lambda examples=examples: step(examples)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs and times the steps."""
    torch.set_num_threads(options.threads)
    seconds, losses = shared.in_steps(steps_of(options))
    added = [text for text, given in (("compiled", options.compile), ("LoRA by PEFT", options.lora)) if given]
    dtype = f"{options.dtype}{' throughout' if options.narrow else ''}"
    name = ", ".join(["transformers", options.kind, *added, dtype])
    packages = ("transformers", "peft") if options.lora else ("transformers",)
    return shared.report(options, name, seconds, losses, packages=packages)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = shared.arguments(__doc__, KINDS)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--narrow", action="store_true", help="weights in bf16; with --lora all but the adapters'")
    common.say(measure(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
