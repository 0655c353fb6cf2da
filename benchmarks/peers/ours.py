"""fastft's own step: packed, prefixes shared, as `fastft train` runs it by default."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.peers import shared
from fastft.engines.choose import make_engine
from fastft.model.gpt2 import GPT2, config_for
from fastft.model.lora_spec import LoRA
from fastft.model.part import Part
from fastft.ranks.world import ALONE
from fastft.run.config import TrainOptions


def steps_of(options: argparse.Namespace) -> Iterator[Callable[[], float]]:
    """The steps; a batch is made within its step."""
    model = GPT2(config_for(options.size))
    shared.initialise(model.named_parameters(), model.config)
    device = common.chosen_device(options.device)
    settings = TrainOptions(dtype=options.dtype, device=device, weight_decay=shared.WEIGHT_DECAY)
    if options.lora:
        lora = LoRA(r=shared.LORA_RANK, alpha=2.0 * shared.LORA_RANK, targets=shared.LORA_TARGETS)
        Part(lora=lora, train_only=None, new_rows=None, base_sha256="").take(model)
    engine = make_engine(model, settings, ALONE)
    encoded, n = shared.encoded_of(options), options.batch_size
    batcher = common.batcher_of(engine)

    def step(begin: int) -> float:
        batch = batcher(encoded, np.arange(begin, begin + n))
        loss, _ = engine.accumulate(batch, batch.count)
        return engine.update(shared.RATE, loss)().loss

    for begin in range(0, len(encoded), n):
        yield lambda begin=begin: step(begin)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs and times the steps."""
    common.begin(options.threads)
    seconds, losses = shared.in_steps(steps_of(options))
    name = f"fastft, {'LoRA, ' if options.lora else ''}{options.dtype}"
    return shared.report(options, name, seconds, losses, packages=("fastft",))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    common.say(measure(shared.arguments(__doc__).parse_args(argv)))


if __name__ == "__main__":
    main()
