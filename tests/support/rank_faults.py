"""Faults that `warm_launcher.py` plants in every rank of a run: each must be noticed."""

from __future__ import annotations

import os
import resource
import time
from typing import Any

import torch
from torch import Tensor

from fastft.batches.batch import Batch
from fastft.common.errors import UserError
from fastft.engines.engine import Engine
from fastft.engines.zero import ZeroEngine
from fastft.run.metrics_file import MetricsFile
from fastft.training.steps import Steps
from fastft.training.train import Trainer

RANK = "RANK"
BAD_STEP = 3


def _is_rank(rank: int) -> bool:
    return os.environ.get(RANK) == str(rank)


def averaged_over_ranks() -> None:
    """The factor that DeepSpeed divides by is forgotten."""
    right = ZeroEngine.accumulate

    def accumulate(self: ZeroEngine, batch: Batch, count: int, *, last: bool = True) -> tuple[Tensor, Tensor]:
        loss, sums = right(self, batch, count * self.world.size, last=last)
        return loss * self.world.size, sums

    ZeroEngine.accumulate = accumulate


def mean_of_means() -> None:
    """Each batch is divided by its own count."""
    for engine in (Engine, ZeroEngine):
        right = engine.accumulate

        def accumulate(
            self: Any, batch: Batch, count: int, *, last: bool = True, right: Any = right
        ) -> tuple[Tensor, Tensor]:
            del count
            return right(self, batch, max(1, batch.count) * self.world.size, last=last)

        engine.accumulate = accumulate


def first_ranks_examples_twice() -> None:
    """The second rank trains what the first one does."""
    Steps.packs_of = lambda self, step: step.packs[:: self._job.world.size]


def _at_the_bad_step(change: Any) -> None:
    """Has `change(loss, sums)` made of the second rank's losses in one step."""
    right_begin, now = Steps.forward_backward, {"step": 0}

    def begin(self: Steps, built: Any) -> Any:
        now["step"] = built.step.index
        return right_begin(self, built)

    Steps.forward_backward = begin
    for engine in (Engine, ZeroEngine):
        right = engine.accumulate

        def accumulate(self: Any, *args: Any, right: Any = right, **kwargs: Any) -> tuple[Tensor, Tensor]:
            loss, sums = right(self, *args, **kwargs)
            return change(loss, sums) if _is_rank(1) and now["step"] == BAD_STEP else (loss, sums)

        engine.accumulate = accumulate


def ledger_cannot_be_written() -> None:
    """The first rank, which writes it, finds the disk full."""
    right = MetricsFile.append

    def append(self: MetricsFile, line: dict[str, Any]) -> None:
        if "losses" in line and line["step"] > BAD_STEP:
            raise UserError("cannot write ledger.jsonl: No space left on device")
        right(self, line)

    MetricsFile.append = append


def loss_not_finite_on_rank_1() -> None:
    """One example's loss is infinite."""

    def change(loss: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        sums = sums.clone()
        sums[0] = torch.inf
        return loss * torch.inf, sums

    _at_the_bad_step(change)


def gradient_not_finite_on_rank_1() -> None:
    """One weight's gradient is infinite in one step, though the loss is not."""
    now = {"step": 0}
    right_begin, right_init = Steps.forward_backward, Trainer.__init__

    def begin(self: Steps, built: Any) -> Any:
        now["step"] = built.step.index
        return right_begin(self, built)

    def init(self: Trainer, run: Any, options: Any, data: Any, engine: Any, **kwargs: Any) -> None:
        right_init(self, run, options, data, engine, **kwargs)
        bias = engine.model.h[0].mlp.c_fc.bias
        bias.register_hook(lambda g: g * torch.inf if _is_rank(1) and now["step"] == BAD_STEP else g)

    Steps.forward_backward, Trainer.__init__ = begin, init


def gradient_never_finite() -> None:
    """One weight's gradient overflows in every step, whatever the loss is scaled by."""
    right_init = Trainer.__init__

    def init(self: Trainer, run: Any, options: Any, data: Any, engine: Any, **kwargs: Any) -> None:
        right_init(self, run, options, data, engine, **kwargs)
        engine.model.h[0].mlp.c_fc.bias.register_hook(lambda g: g * torch.inf)

    Trainer.__init__ = init


def rank_1_sleeps() -> None:
    """The second rank hangs in the middle of a step."""

    def hang(loss: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(3600)
        return loss, sums

    _at_the_bad_step(hang)


def rank_1_is_slow() -> None:
    """The second rank's processor has half its speed."""
    from fastft.ranks import watch

    right = watch.probe_seconds
    watch.LOOK_EVERY = 3
    watch.probe_seconds = lambda device: right(device) + (0.05 if _is_rank(1) else 0.0)


def rank_1_cannot_write_shards() -> None:
    """The second rank's disk is full: the system refuses files of more than a kilobyte."""
    if _is_rank(1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))


def rank_0_cannot_write_whole() -> None:
    """The first rank's disk has room for shards of 2 ranks, not for the whole."""
    if _is_rank(0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (11_000_000, resource.RLIM_INFINITY))
