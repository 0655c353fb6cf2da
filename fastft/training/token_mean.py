"""Evaluation while training: the validation loss, weighted by tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastft.batches.batch import Batch, Batcher
from fastft.batches.plan import Indices
from fastft.data.encode import EncodedSet
from fastft.ranks.world import ALONE, World

EvaluateBatch = Callable[[Batch], Tensor]
"""A batch to the sum of its supervised losses, a scalar on some device."""


@dataclass(frozen=True, slots=True)
class TokenMean:
    """The loss of the validation examples: the sum over their supervised targets divided by their count."""

    val: EncodedSet
    batcher: Batcher
    batch_size: int
    every: int
    examples: Indices | None = None
    """Those that are read; all where it is not given."""
    world: World = ALONE
    pack_tokens: int | None = None
    """The most tokens of a batch of more than one example, where batches are packed."""
    shares_prefix: bool = False
    """Whether a pack holds the beginning that all examples have in common once."""

    def due(self, step: int, total_steps: int) -> bool:
        """Whether to evaluate when `step` steps are done: regularly, and at the end."""
        return step == total_steps or (self.every > 0 and step % self.every == 0)

    def sample_due(self, step: int, total_steps: int) -> bool:
        """Whether to answer validation prompts when `step` steps are done: after each evaluation but the first."""
        return step > 0 and self.due(step, total_steps)

    def losses(self, evaluate: EvaluateBatch, step: int) -> dict[str, float]:
        """`val_loss` when `step` steps are done."""
        del step  # the examples are always the same
        batches = self.batches()
        batches += [batches[0][:0]] * (-len(batches) % self.world.size)  # all ranks run the same number of forwards
        losses, targets = [], 0
        for examples in batches[self.world.rank :: self.world.size]:
            batch = self.batcher(self.val, examples)
            losses.append(evaluate(batch).double())
            targets += batch.count
        # One look at the end, so that a GPU goes from batch to batch. Added up in their order, as one by one.
        total, count = self.world.sum([sum(torch.stack(losses).tolist()), targets])
        return {"val_loss": total / count}

    def batches(self) -> list[Indices]:
        """The examples of each batch: at most `batch_size`, and no more tokens than a pack of a step has."""
        examples = np.arange(len(self.val)) if self.examples is None else self.examples
        lengths = self.val.lengths[examples]
        shared = self.val.common_prefix() if self.shares_prefix else 0
        room = math.inf if self.pack_tokens is None else self.pack_tokens - shared
        batches: list[list[int]] = []
        own = 0
        for index in np.argsort(lengths, kind="stable").tolist():  # less padding; the sum does not mind
            own += int(lengths[index]) - shared
            if not batches or len(batches[-1]) == self.batch_size or own > room:
                batches.append([])
                own = int(lengths[index]) - shared
            batches[-1].append(index)
        return [examples[batch] for batch in batches]

    def largest_batch(self) -> Batch:
        """The batch that memory must suffice for."""
        return max(
            (self.batcher(self.val, examples) for examples in self.batches()), key=lambda batch: batch.tokens.numel()
        )
