"""The book's own training step, from its package `llms-from-scratch`: chapter 4's model, chapter 5's loss, chapter 7's
collate with the instruction masked as its exercise does. Always float32, as in the book.

`fast` is the package's own faster model (torch's layer norm, GELU and fused attention).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from llms_from_scratch.ch04 import GPTModel, GPTModelFast
from llms_from_scratch.ch05 import calc_loss_batch
from llms_from_scratch.ch07 import custom_collate_fn

from benchmarks import common
from benchmarks.peers import shared
from fastft.model.gpt2 import GPT2Config, config_for

KINDS = ("plain", "fast")


def new_model(kind: str, config: GPT2Config) -> torch.nn.Module:
    """The book's model with the weights that all peers start from; its head is trained apart."""
    model = (GPTModel if kind == "plain" else GPTModelFast)(
        {**shared.book_layout(config), "drop_rate": 0.0, "qkv_bias": True}
    )
    with torch.no_grad():
        shared.initialise(iter([("wte.weight", model.tok_emb.weight), ("wpe.weight", model.pos_emb.weight)]), config)
        model.out_head.weight.copy_(model.tok_emb.weight)
        for layer, block in enumerate(model.trf_blocks):
            _initialise_block(block, f"h.{layer}", config)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    return model


def _initialise_block(block: Any, name: str, config: GPT2Config) -> None:
    fused = shared.initial_weight(f"{name}.attn.c_attn.weight", config)
    attention = block.att
    if hasattr(attention, "qkv"):
        attention.qkv.weight.copy_(fused)
    else:
        parts = (attention.W_query, attention.W_key, attention.W_value)
        for linear, weight in zip(parts, fused.chunk(3), strict=True):
            linear.weight.copy_(weight)
    projection = attention.proj if hasattr(attention, "proj") else attention.out_proj
    others = (("attn.c_proj", projection), ("mlp.c_fc", block.ff.layers[0]), ("mlp.c_proj", block.ff.layers[2]))
    for end, linear in others:
        linear.weight.copy_(shared.initial_weight(f"{name}.{end}.weight", config))


def steps_of(options: argparse.Namespace) -> Iterator[Callable[[], float]]:
    """The steps of the book's loop."""
    device = torch.device(common.chosen_device(options.device))
    model = new_model(options.kind, config_for(options.size)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=shared.RATE, weight_decay=shared.WEIGHT_DECAY)
    model.train()

    def step(examples: list[tuple[list[int], int]]) -> float:
        # The book's collate puts the end-of-text there itself. Its exercise masks `targets[i, :L - 1]`.
        inputs, targets = custom_collate_fn([ids[:-1] for ids, _ in examples])
        for row, (_, first_target) in enumerate(examples):
            targets[row, : first_target - 1] = -100
        optimizer.zero_grad()
        loss = calc_loss_batch(inputs, targets, model, device)
        loss.backward()
        optimizer.step()
        return loss.item()

    for examples in shared.batches_of(options):
        yield lambda examples=examples: step(examples)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs and times the steps."""
    torch.set_num_threads(options.threads)
    options.dtype = "fp32"
    seconds, losses = shared.in_steps(steps_of(options))
    name = "the book" if options.kind == "plain" else "the book, its fast model"
    return shared.report(options, f"{name}, fp32", seconds, losses, packages=("llms-from-scratch",))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    common.say(measure(shared.arguments(__doc__, KINDS).parse_args(argv)))


if __name__ == "__main__":
    main()
