"""Evaluation while training: the validation loss, weighted by tokens or as the book reports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastft.batch import Batch, Batcher
from fastft.book import EVAL_BATCHES, BookOrder
from fastft.encode import EncodedSet
from fastft.plan import Indices

EvaluateBatch = Callable[[Batch], tuple[float, int]]
"""A batch to the sum of its supervised losses and their count."""


@dataclass(frozen=True, slots=True)
class TokenMean:
    """The loss of the validation examples: the sum over their supervised targets divided by their count."""

    val: EncodedSet
    batcher: Batcher
    batch_size: int
    every: int
    limit: int | None = None

    def due(self, step: int) -> bool:
        """Whether to evaluate when `step` steps are done."""
        return self.every > 0 and step % self.every == 0

    def losses(self, evaluate: EvaluateBatch, step: int) -> dict[str, float]:
        """`val_loss` when `step` steps are done."""
        del step  # the examples are always the same
        by_length = np.argsort(self.val.lengths[: self.limit], kind="stable")  # less padding; the sum does not mind
        batches = [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        total, count = 0.0, 0
        for examples in batches:
            loss, targets = evaluate(self.batcher(self.val, examples))
            total, count = total + loss, count + targets
        return {"val_loss": total / count}


@dataclass(frozen=True, slots=True)
class BookMeans:
    """The book's figures: the mean of the means of the first 5 batches, of the shuffled training set and of the
    validation set; before training, and after steps 0, 5, 10, ... counted from 0 (here 1, 6, 11, ... steps done)."""

    train: EncodedSet
    val: EncodedSet
    batcher: Batcher
    batch_size: int
    order: BookOrder

    def due(self, step: int) -> bool:
        """Whether to evaluate when `step` steps are done."""
        return step == 0 or (step - 1) % self.order.eval_every == 0

    def losses(self, evaluate: EvaluateBatch, step: int) -> dict[str, float]:
        """`train_loss` and `val_loss` when `step` steps are done."""
        if step == 0:  # the generator is seeded afresh, so this order is the first epoch's
            first = self.order.epoch_order(0)
            train = [first[i * self.batch_size : (i + 1) * self.batch_size] for i in range(EVAL_BATCHES)]
        else:
            train = self.order.evaluation_batches(step - 1)
        in_order = np.arange(len(self.val))
        val = [in_order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(EVAL_BATCHES)]
        return {
            "train_loss": self._mean_of_means(evaluate, self.train, train),
            "val_loss": self._mean_of_means(evaluate, self.val, val),
        }

    def _mean_of_means(self, evaluate: EvaluateBatch, encoded: EncodedSet, batches: Sequence[Indices]) -> float:
        sums = [evaluate(self.batcher(encoded, examples)) for examples in batches if len(examples)]
        return sum(loss / targets for loss, targets in sums) / len(sums)
