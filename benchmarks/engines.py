"""fastft's training step as the benchmarks time it, and forward passes that lack one of its savings.

The library saves head rows and last-block rows together. `AllLogits` and `AllTokens` take them apart: they are put
together from the model's public parts, and an engine trains them as it trains a `GPT2`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import WARMUP, spread, wait_for
from fastft.batches.batch import Batch
from fastft.engines.choose import make_engine
from fastft.engines.engine import AnyEngine, Engine
from fastft.engines.gpu_engine import GpuEngine
from fastft.model import ops
from fastft.model.gpt2 import GPT2, config_for
from fastft.ranks.world import ALONE
from fastft.run.config import TrainOptions

RATE = 5e-5


class AllTokens(GPT2):
    """GPT-2 whose last block computes every token; the head still reads the loss rows alone."""

    head_impl = "auto"

    def forward(self, batch: Batch, *, row_weights: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
        """As `GPT2.forward`."""
        weights = batch.weights if row_weights is None else row_weights
        hidden = self.hidden(
            batch.tokens, batch.positions, lambda _layer, q, k, v: ops.attention(q, k, v, batch, impl)
        ).to(self.head.dtype)
        return ops.linear_cross_entropy(hidden, self.head, batch, weights, self.head_impl, rows_only=False)


class AllLogits(AllTokens):
    """GPT-2 that computes the logits of every token, as an ordinary loss on labels with -100 does."""

    head_impl = "reference"


def new_engine(
    size: str, *, dtype: str, device: str, model: type[GPT2] = GPT2, impl: str = "auto", **options: Any
) -> AnyEngine:
    """The trainer's engine over a randomly initialised model of this size."""
    torch.manual_seed(0)
    settings = TrainOptions(dtype=dtype, device=device, impl=impl, **options)  # type: ignore[arg-type]
    return make_engine(model(config_for(size)), settings, ALONE)


def train_step(engine: AnyEngine, batches: Iterable[Batch], rate: float = RATE) -> float:
    """One optimizer step over the batches; returns its loss when the device is done with the whole step."""
    batches = list(batches)
    count = sum(batch.count for batch in batches)
    losses = [engine.accumulate(batch, count)[0].double() for batch in batches]
    update = engine.update(rate, torch.stack(losses).sum())()
    wait_for(engine.device.type)
    return update.loss


def gradients(engine: AnyEngine) -> dict[str, Tensor]:
    """The float32 gradients that `accumulate` has left, by the weights' names."""
    if isinstance(engine, GpuEngine):
        return {name: engine.flat.part(engine.flat.gradients, name) for name in engine.flat.tensors}
    # Where the products run in bf16 on a CPU, the engine keeps gradients beside its bf16 copies of the weights.
    if isinstance(engine, Engine) and engine.copies is not None:
        return {name: gradient.float() for name, gradient in engine.copies.gradients().items()}
    return {name: p.grad.float() for name, p in engine.model.named_parameters() if p.grad is not None}


def largest_difference(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Over all tensors the largest max|a - b| / max|b|; a missing gradient counts as zeros."""

    def of(name: str, b: Tensor) -> float:
        a = ours.get(name)
        difference = b if a is None else a - b
        return float(difference.abs().max() / b.abs().max().clamp_min(1e-30))

    return max(of(name, b) for name, b in reference.items())


@dataclass(slots=True)
class Timed:
    """Seconds of each step, the first `WARMUP` of them for warming up."""

    seconds: list[float]

    @property
    def timed(self) -> list[float]:
        """The steps that count."""
        return self.seconds[WARMUP:]

    @property
    def median(self) -> float:
        """Median seconds of the steps that count."""
        return spread(self.timed)["median"]


class Stopwatch:
    """`with Stopwatch() as watch: ...` and then `watch.seconds`."""

    seconds: float

    def __enter__(self) -> Stopwatch:
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begin
