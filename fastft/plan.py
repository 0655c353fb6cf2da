"""Which examples form which optimizer step, before any tensor exists.

The plan depends on the lengths, the seed and the epoch alone, so a run can be resumed at any step, and every way of
cutting a step (accumulation) holds the same examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastft.encode import EncodedSet
from fastft.errors import UserError

Indices = npt.NDArray[np.int64]
EpochOrder = Callable[[int], Indices]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step.

    Attributes:
        index: the step's number in the run, from 0.
        epoch: the epoch that it belongs to, from 0.
        micro_batches: the examples (indices into the encoded set) of each forward and backward pass.
        count: supervised targets of the whole step: the one divisor of its loss.
    """

    index: int
    epoch: int
    micro_batches: list[Indices]
    count: int

    @property
    def examples(self) -> Indices:
        """All examples of the step."""
        return np.concatenate(self.micro_batches)


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a run. Built by `make_plan`."""

    supervised: Indices
    lengths: Indices
    batch_size: int
    accumulate: int
    steps_per_epoch: int
    total_steps: int
    epoch_order: EpochOrder

    def step(self, index: int) -> Step:
        """The step with number `index`, from 0."""
        epoch, within = divmod(index, self.steps_per_epoch)
        begin = within * self.batch_size
        examples = self.epoch_order(epoch)[begin : begin + self.batch_size]
        parts = min(self.accumulate, len(examples))
        return Step(
            index=index,
            epoch=epoch,
            micro_batches=np.array_split(examples, parts),
            count=int(self.supervised[examples].sum()),
        )

    def largest_step(self) -> Step:
        """The step of the first epoch with the largest padded micro-batch: what memory must suffice for."""
        steps = min(self.steps_per_epoch, self.total_steps)

        def size(index: int) -> int:
            return max(len(part) * int(self.lengths[part].max()) for part in self.step(index).micro_batches)

        return self.step(max(range(steps), key=size))


def make_plan(
    encoded: EncodedSet,
    *,
    batch_size: int,
    epochs: int = 1,
    steps: int | None = None,
    accumulate: int = 1,
    seed: int = 123,
    drop_last: bool = False,
    epoch_order: EpochOrder | None = None,
) -> Plan:
    """Plans a run.

    Args:
        encoded: the training examples.
        batch_size: examples in one optimizer step.
        epochs: passes over the examples; `steps`, where given, overrides it.
        steps: optimizer steps in all, over as many epochs as they need.
        accumulate: micro-batches that each step is cut into.
        seed: with the epoch it determines the order of the examples.
        drop_last: leave a last incomplete step out, as the book does.
        epoch_order: epoch to `[n]` order of the examples, in place of the seeded one.

    Raises:
        UserError: there are no examples, or too few for one step with `drop_last`.
    """
    n = len(encoded)
    if n == 0:
        raise UserError("no training example: the data has too few records for a split of 85% / 10% / 5%")
    if drop_last and n < batch_size:
        raise UserError(f"got {n} training examples, expected at least --batch_size {batch_size} of them")
    per_epoch = n // batch_size if drop_last else -(-n // batch_size)
    return Plan(
        supervised=encoded.supervised,
        lengths=encoded.lengths,
        batch_size=batch_size,
        accumulate=accumulate,
        steps_per_epoch=per_epoch,
        total_steps=epochs * per_epoch if steps is None else steps,
        epoch_order=epoch_order or _Shuffled(n, seed),
    )


class _Shuffled:
    """A permutation of `n` examples for each epoch; the newest one is kept, as steps ask for it one by one."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed
        self._newest: tuple[int, Indices] | None = None

    def __call__(self, epoch: int) -> Indices:
        if self._newest is None or self._newest[0] != epoch:
            self._newest = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n)
        return self._newest[1]
