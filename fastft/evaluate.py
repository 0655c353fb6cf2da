"""Evaluation while training: the validation loss, weighted by tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastft.batch import Batch, Batcher
from fastft.encode import EncodedSet
from fastft.world import ALONE, World

EvaluateBatch = Callable[[Batch], Tensor]
"""A batch to the sum of its supervised losses, a scalar on some device."""


@dataclass(frozen=True, slots=True)
class TokenMean:
    """The loss of the validation examples: the sum over their supervised targets divided by their count."""

    val: EncodedSet
    batcher: Batcher
    batch_size: int
    every: int
    limit: int | None = None
    world: World = ALONE

    def due(self, step: int, total_steps: int) -> bool:
        """Whether to evaluate when `step` steps are done: regularly, and at the end."""
        return step == total_steps or (self.every > 0 and step % self.every == 0)

    def sample_due(self, step: int, total_steps: int) -> bool:
        """Whether to answer validation prompts when `step` steps are done: after each evaluation but the first."""
        return step > 0 and self.due(step, total_steps)

    def losses(self, evaluate: EvaluateBatch, step: int) -> dict[str, float]:
        """`val_loss` when `step` steps are done."""
        del step  # the examples are always the same
        by_length = np.argsort(self.val.lengths[: self.limit], kind="stable")  # less padding; the sum does not mind
        batches = [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        batches += [by_length[:0]] * (-len(batches) % self.world.size)  # all ranks run the same number of forwards
        losses, targets = [], 0
        for examples in batches[self.world.rank :: self.world.size]:
            batch = self.batcher(self.val, examples)
            losses.append(evaluate(batch).double())
            targets += batch.count
        # One look at the end, so that a GPU goes from batch to batch. Added up in their order, as one by one.
        total, count = self.world.sum([sum(torch.stack(losses).tolist()), targets])
        return {"val_loss": total / count}
