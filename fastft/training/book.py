"""What the book's own run does to the order of examples, and how it reports losses (`--recipe book`).

The book (chapter 7, `gpt_instruction_finetuning.py`) shuffles with torch's DataLoader on the global generator, and
evaluates on batches of the same shuffled loader, which draws from that generator too. So the order of the second
epoch depends on how often the first one was evaluated. `BookOrder` replays those draws on a generator of its own:

- iterating any DataLoader draws one int64 (its base seed);
- iterating a shuffled one then draws another, which seeds the permutation (torch.utils.data.RandomSampler).

A reported loss is the mean of the means of the first few batches, not weighted by tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastft.batches.batch import Batcher
from fastft.batches.plan import Indices
from fastft.data.encode import EncodedSet
from fastft.training.token_mean import EvaluateBatch

EVAL_BATCHES = 5
EVAL_EVERY = 5
SAMPLE_TOKENS = 50


@dataclass(frozen=True, slots=True)
class _Draws:
    """All orders of a run, drawn in the order in which the book's loop draws them."""

    epochs: list[Indices]
    evaluations: list[Indices]


class BookOrder:
    """The order of the book's examples: epochs and evaluations.

    Args:
        n: training examples.
        batch_size: examples in a batch; a last incomplete one is dropped.
        epochs: passes over the examples.
        seed: the book's is 123, set before training.
        eval_every: the loop evaluates after every step whose number (from 0) this divides.
    """

    def __init__(self, n: int, *, batch_size: int, epochs: int, seed: int = 123, eval_every: int = EVAL_EVERY) -> None:
        self.batch_size = batch_size
        self.eval_every = eval_every
        self._draws = self._replay(n, n // batch_size, epochs, seed)

    def epoch_order(self, epoch: int) -> Indices:
        """`[n]` int64: the order of the training examples in `epoch`, from 0."""
        return self._draws.epochs[epoch]

    def evaluation_batches(self, step: int) -> list[Indices]:
        """The training batches that the evaluation after `step` reads its training loss from."""
        return self.first_batches(self._draws.evaluations[step // self.eval_every])

    def first_batches(self, order: Indices) -> list[Indices]:
        """The whole batches that an evaluation reads of an order of the training examples."""
        n_batches = min(EVAL_BATCHES, len(order) // self.batch_size)
        return [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(n_batches)]

    def _replay(self, n: int, steps_per_epoch: int, epochs: int, seed: int) -> _Draws:
        generator = torch.Generator().manual_seed(seed)
        draws = _Draws([], [])
        step = 0
        for _ in range(epochs):
            draws.epochs.append(_shuffled_loader(generator, n))
            for _ in range(steps_per_epoch):
                if step % self.eval_every == 0:
                    draws.evaluations.append(_shuffled_loader(generator, n))
                    _draw(generator)  # the validation loader is not shuffled, but draws its base seed
                step += 1
        return draws


@dataclass(frozen=True, slots=True)
class BookMeans:
    """The book's figures: the mean of the means of the first 5 batches, of the shuffled training set and of the
    validation set; before training, and after steps 0, 5, 10, ... counted from 0 (here 1, 6, 11, ... steps done)."""

    train: EncodedSet
    val: EncodedSet
    batcher: Batcher
    batch_size: int
    order: BookOrder

    def due(self, step: int, total_steps: int) -> bool:
        """Whether to evaluate when `step` steps are done: as the book does, which needs no last time."""
        del total_steps
        return step == 0 or (step - 1) % self.order.eval_every == 0

    def sample_due(self, step: int, total_steps: int) -> bool:
        """Whether to answer the first validation prompt when `step` steps are done: at each epoch's end."""
        del total_steps
        return step > 0 and step % (len(self.train) // self.batch_size) == 0

    def losses(self, evaluate: EvaluateBatch, step: int) -> dict[str, float]:
        """`train_loss` and `val_loss` when `step` steps are done."""
        # Before training the generator is seeded afresh, so that order is the first epoch's.
        train = self.order.evaluation_batches(step - 1) if step else self.order.first_batches(self.order.epoch_order(0))
        val = np.array_split(np.arange(len(self.val)), range(self.batch_size, len(self.val), self.batch_size))
        return {
            "train_loss": self._mean_of_means(evaluate, self.train, train),
            "val_loss": self._mean_of_means(evaluate, self.val, val[:EVAL_BATCHES]),
        }

    def _mean_of_means(self, evaluate: EvaluateBatch, encoded: EncodedSet, batches: Sequence[Indices]) -> float:
        made = [self.batcher(encoded, examples) for examples in batches]
        return sum(evaluate(batch).item() / batch.count for batch in made) / len(made)


def _shuffled_loader(generator: torch.Generator, n: int) -> Indices:
    _draw(generator)  # the loader's base seed
    sampler = torch.Generator().manual_seed(_draw(generator))
    order: Indices = torch.randperm(n, generator=sampler).numpy()
    return order


def _draw(generator: torch.Generator) -> int:
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())
