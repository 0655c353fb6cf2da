"""What every peer shares: the same examples in the same order, the same initial weights, the same line of JSON.

The weights are random, as there is no published checkpoint without a network, but they are the same for every peer:
each tensor is drawn from a generator seeded with its name, and copied to where the peer keeps it. So all peers must
report the same loss in their first step, which `compare.py` checks.
"""

from __future__ import annotations

import argparse
import math
import time
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import common
from fastft.model.gpt2 import GPT2Config, config_for

if TYPE_CHECKING:
    from fastft.data.encode import EncodedSet
    from fastft.data.records import Record

RATE = 5e-5
WEIGHT_DECAY = 0.1


LORA_RANK = 16
LORA_TARGETS = ("c_attn", "c_proj", "c_fc")


def arguments(description: str | None, kinds: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """The options of a peer; `kinds` are its ways of batching, the first one its default."""
    parser = common.arguments(description)
    parser.add_argument("--steps", type=int, default=7, help=f"timed steps; {common.WARMUP} more warm up")
    parser.add_argument("--batch_size", type=int, default=common.BATCH_SIZE)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--lora", action="store_true", help=f"adapters of rank {LORA_RANK} in place of all weights")
    if kinds:
        parser.add_argument("--kind", default=kinds[0], choices=kinds)
    return parser


def records_of(options: argparse.Namespace) -> list[Record]:
    """The records of all steps, warm-up included, in order."""
    return common.records_in_order((options.steps + common.WARMUP) * options.batch_size)


def encoded_of(options: argparse.Namespace) -> EncodedSet:
    """The same records as token ids.

    Raises:
        ValueError: one is longer than the model's context, so that peers would see other examples.
    """
    records = records_of(options)
    encoded = common.encoded_records(records, config_for(options.size).n_ctx)
    if len(encoded) != len(records):
        raise ValueError(f"{len(records) - len(encoded)} examples are longer than the context of {options.size}")
    return encoded


def batches_of(options: argparse.Namespace) -> Iterator[list[tuple[list[int], int]]]:
    """For each step its examples: the ids with the end-of-text, and the index of the first supervised one."""
    encoded, n = encoded_of(options), options.batch_size
    for begin in range(0, len(encoded), n):
        yield [(encoded[i].tolist(), int(encoded.first_target[i])) for i in range(begin, begin + n)]


def initial_weight(name: str, config: GPT2Config) -> Tensor:
    """The initial value of a weight matrix by its GPT-2 name, `[out, in]` for a linear layer."""
    C = config.n_embd
    shapes = {
        "wte.weight": (config.vocab_size, C),
        "wpe.weight": (config.n_ctx, C),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_proj.weight": (C, C),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_proj.weight": (C, 4 * C),
    }
    shape = next(shape for end, shape in shapes.items() if name.endswith(end))
    std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(parameters: Iterator[tuple[str, Tensor]], config: GPT2Config, *, transposed: bool = False) -> None:
    """Sets matrices that bear GPT-2's names to their initial values; layer norms and biases are what they are made as.

    `transposed`: linear layers are `[in, out]`, as in transformers.
    """
    for name, parameter in parameters:
        if parameter.ndim < 2:
            continue
        value = initial_weight(name, config)
        linear = transposed and not name.startswith(("wte.", "wpe."))
        parameter.copy_(value.t() if linear else value)


def book_layout(config: GPT2Config) -> dict[str, int]:
    """The book's configuration of this size."""
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.n_ctx,
        "emb_dim": config.n_embd,
        "n_heads": config.n_head,
        "n_layers": config.n_layer,
    }


def in_steps(steps: Iterator[Callable[[], float]]) -> tuple[list[float], list[float]]:
    """Runs each step, which returns its loss; gives seconds and losses. A loss that is a number has been computed."""
    seconds, losses = [], []
    for step in steps:
        begin = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - begin)
    return seconds, losses


def report(
    options: argparse.Namespace,
    name: str,
    seconds: list[float],
    losses: list[float],
    *,
    packages: tuple[str, ...],
    examples: list[int] | None = None,
) -> dict[str, Any]:
    """A peer's result, from the seconds and losses of all its steps.

    Args:
        options: the peer's options.
        name: what it is called in the table.
        seconds, losses: of every step, warm-up included.
        packages: whose versions are named.
        examples: of every step, where it is not the batch size.
    """
    examples = examples or [options.batch_size] * len(seconds)
    timed = list(zip(examples, seconds, strict=True))[common.WARMUP :]
    return {
        "name": name,
        "size": options.size,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "data": common.data_name(),
        "threads": torch.get_num_threads(),
        "examples_per_second": [n / s for n, s in timed],
        "peak_bytes": common.peak_bytes(common.chosen_device(options.device)),
        "losses": losses,
        "versions": common.versions("torch", *packages),
        "machine": common.machine(),
    }
