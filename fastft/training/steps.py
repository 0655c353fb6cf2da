"""An optimizer step: its batches, forward and backward, the update, and its line for the metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastft.batches.batch import Batch
from fastft.batches.plan import Indices, Step
from fastft.common.console import warn
from fastft.common.memory import peak_memory
from fastft.engines.engine import Update
from fastft.engines.optim import learning_rate
from fastft.ranks.watch import Stragglers
from fastft.training.ahead import ahead
from fastft.training.job import Job
from fastft.training.lines import Lines
from fastft.training.skips import why_skipped

_STEPS_AHEAD = 2
"""Steps whose batches are made ahead of a GPU."""


@dataclass(frozen=True, slots=True)
class Built:
    """A step, and its batches of this rank."""

    step: Step
    batches: list[Batch]
    seconds: float
    """That building them took."""


@dataclass(frozen=True, slots=True)
class Losses:
    """What forward and backward of a step's batches gave, on the device.

    Attributes:
        built: the step.
        of_batches: each batch's part of the step's mean loss, scalars.
        of_rows: of each batch the loss of each row.
        began: when it was begun, on the clock of `time.perf_counter`.
    """

    built: Built
    of_batches: list[Tensor]
    of_rows: list[Tensor]
    began: float

    def of_examples(self) -> list[Tensor]:
        """Of each batch the sum of each example's losses, `[examples]`, in host memory."""
        return [
            batch.example_losses(losses.cpu()) for batch, losses in zip(self.built.batches, self.of_rows, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A step that the device has been asked for.

    Attributes:
        losses: which are there when `result` has been given.
        lr: its learning rate.
        result: gives what became of it, and waits for it.
    """

    losses: Losses
    lr: float
    result: Callable[[], Update]


class Steps:
    """Makes a run's steps. Each method is called for one step after the other, by all ranks."""

    def __init__(self, job: Job, lines: Lines) -> None:
        self._job = job
        self._lines = lines
        self._stragglers = Stragglers(job.world, job.engine.device)
        self._ahead = _STEPS_AHEAD if job.engine.device.type == "cuda" else 0
        self._ended_at = 0.0
        """When the last step ended, or what was done behind it."""

    def built(self) -> AbstractContextManager[Iterator[Built]]:
        """The steps that are still to be done, in order; beside a GPU's steps a thread builds them."""
        return ahead(self.build, range(self._job.progress.step, self._job.total_steps), depth=self._ahead)

    def build(self, index: int) -> Built:
        """The step of that index, with this rank's batches."""
        began = time.perf_counter()
        step = self._job.prepared.plan.step(index)
        batches = self.batches_of(step)
        return Built(step, batches, time.perf_counter() - began)

    def batches_of(self, step: Step) -> list[Batch]:
        """This rank's batches of a step."""
        prepared = self._job.prepared
        return [prepared.batcher(prepared.train_set, examples) for examples in self.packs_of(step)]

    def packs_of(self, step: Step) -> list[Indices]:
        """The packs of a step that are this rank's."""
        return step.packs[self._job.world.rank :: self._job.world.size]

    def forward_backward(self, built: Built) -> Losses:
        """Asks the device for the gradients of a step."""
        began = time.perf_counter() - (0.0 if self._ahead else built.seconds)
        self._stragglers.built(built.seconds)
        number = len(built.batches)
        results = []
        for n, batch in enumerate(built.batches, start=1):
            self._job.watchdog.beat(f"step {built.step.index + 1}, batch {n} of {number}")
            results.append(self._job.engine.accumulate(batch, built.step.count, last=n == number))
        return Losses(built, [loss for loss, _ in results], [rows for _, rows in results], began)

    def update(self, losses: Losses) -> UnderWay:
        """Asks the device to update the weights, at the rate that the step has."""
        options = self._job.options
        lr = learning_rate(
            losses.built.step.index,
            peak=options.lr,
            schedule=options.schedule,
            warmup=options.warmup,
            total_steps=self._job.total_steps,
        )
        first, *others = losses.of_batches
        loss = sum((part.double() for part in others), start=first.double())
        return UnderWay(losses, lr, self._job.engine.update(lr, loss))

    def line(self, under_way: UnderWay) -> dict[str, Any]:
        """Waits for a step; returns its line for the metrics, the same on all ranks but for seconds and memory."""
        update, losses = under_way.result(), under_way.losses
        now = time.perf_counter()
        began, self._ended_at = max(losses.began, self._ended_at), now
        step, progress = losses.built.step, self._job.progress
        tokens = self._tokens(losses.built.batches)
        progress.step += 1
        progress.tokens_seen += tokens["tokens_computed"]
        if self._job.options.ledger:
            self._note_losses(step, losses.of_examples())
        line: dict[str, Any] = {
            "step": step.index + 1,
            "epoch": step.epoch + 1,
            "loss": update.loss,
            "lr": under_way.lr,
            "grad_norm": update.grad_norm,
            **tokens,
            "tokens_supervised": step.count,
            "examples": len(step.examples),
            "memory_bytes": peak_memory(self._job.engine.device),
            "seconds": now - began,
        }
        if not update.applied:
            line |= {"skipped": True, "rescaled": update.rescaled}
            if not update.rescaled:  # that is fp16's way of finding its loss scale
                progress.skipped += 1
                line["rows"] = self._suspects(step, losses.of_examples())
                warn(why_skipped(line))
        return line

    def name_slow_ranks(self, line: dict[str, Any]) -> None:
        """Warns of ranks that hold up the others."""
        step = self._job.progress.step
        for slow in self._stragglers.look(step, line["seconds"]):
            warn(f"step {step}: {slow}")

    def begin_anew(self) -> None:
        """What was done since the last step ended is not the next one's time."""
        self._ended_at = time.perf_counter()

    def _tokens(self, batches: list[Batch]) -> dict[str, int]:
        """The tokens of a step, over all ranks."""
        padded, real, computed = self._job.world.sum(
            [
                sum(batch.tokens_padded for batch in batches),
                sum(batch.tokens_real for batch in batches),
                sum(batch.tokens.numel() for batch in batches),
            ]
        )
        return {"tokens_padded": int(padded), "tokens_real": int(real), "tokens_computed": int(computed)}

    def _note_losses(self, step: Step, sums: list[Tensor]) -> None:
        """Writes the ledger's line of a step: the mean loss of each of its examples before the update."""
        of_ranks = self._job.world.gather([one.numpy() for one in sums])
        if not self._lines.has_ledger:
            return
        size, prepared = self._job.world.size, self._job.prepared
        in_order = [of_ranks[pack % size][pack // size] for pack in range(len(step.packs))]
        means = np.concatenate(in_order) / prepared.plan.supervised[step.examples]
        rows = [prepared.data.places.called(place) for place in prepared.train_set.rows[step.examples].tolist()]
        entry = {"step": step.index + 1, "epoch": step.epoch + 1, "rows": rows, "losses": means.round(6).tolist()}
        self._lines.append_to_ledger(entry)

    def _suspects(self, step: Step, sums: list[Tensor]) -> list[int | str]:
        """The rows whose own losses are not finite; where all are, all rows of the step: a gradient does not say whose
        it is."""
        row_of, places = self._job.prepared.train_set.rows, self._job.prepared.data.places
        mine = [
            row_of[examples[~torch.isfinite(losses).numpy()]].tolist()
            for examples, losses in zip(self.packs_of(step), sums, strict=True)
        ]
        found = sorted(row for rows in self._job.world.gather(mine) for pack in rows for row in pack)
        return [places.called(place) for place in found or sorted(row_of[step.examples].tolist())]
