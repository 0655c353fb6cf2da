"""Plans: every example once an epoch, the same examples however a step is cut, any step without its predecessors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.encode import EncodedSet
from fastft.errors import UserError
from fastft.plan import make_plan


def encoded_set(lengths: list[int]) -> EncodedSet:
    """Examples of the given numbers of inputs; the first half of each is prompt."""
    ids = np.array(lengths, dtype=np.int64) + 1
    return EncodedSet(
        ids=np.zeros(ids.sum(), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(ids)]),
        first_target=np.maximum(1, ids // 2),
        rows=np.arange(1, len(lengths) + 1),
    )


sizes = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_holds_every_example_once(lengths: list[int], batch_size: int, accumulate: int, seed: int) -> None:
    plan = make_plan(encoded_set(lengths), batch_size=batch_size, accumulate=accumulate, epochs=2, seed=seed)
    for epoch in range(2):
        steps = [plan.step(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]
        seen = np.concatenate([step.examples for step in steps])
        assert sorted(seen) == list(range(len(lengths)))
        assert all(step.epoch == epoch for step in steps)
        assert all(1 <= len(step.micro_batches) <= accumulate for step in steps)
        assert all(len(part) for step in steps for part in step.micro_batches)
    assert plan.total_steps == 2 * plan.steps_per_epoch


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 9), st.integers(2, 5))
def test_cutting_a_step_changes_neither_its_examples_nor_its_count(
    lengths: list[int], batch_size: int, parts: int
) -> None:
    encoded = encoded_set(lengths)
    whole = make_plan(encoded, batch_size=batch_size)
    cut = make_plan(encoded, batch_size=batch_size, accumulate=parts)
    for index in range(whole.total_steps):
        assert np.array_equal(whole.step(index).examples, cut.step(index).examples)
        assert whole.step(index).count == cut.step(index).count == encoded.supervised[whole.step(index).examples].sum()


def test_a_step_needs_no_predecessor() -> None:
    encoded = encoded_set(list(range(1, 31)))
    in_order = make_plan(encoded, batch_size=4, epochs=3)
    steps = [in_order.step(index).examples for index in range(in_order.total_steps)]
    resumed = make_plan(encoded, batch_size=4, epochs=3)
    for index in (17, 3, 20):
        assert np.array_equal(resumed.step(index).examples, steps[index])


def test_epochs_and_seeds_differ() -> None:
    encoded = encoded_set(list(range(1, 31)))
    plan = make_plan(encoded, batch_size=30, epochs=2, seed=1)
    other = make_plan(encoded, batch_size=30, seed=2)
    assert not np.array_equal(plan.step(0).examples, plan.step(1).examples)
    assert not np.array_equal(plan.step(0).examples, other.step(0).examples)


def test_drop_last_and_steps() -> None:
    encoded = encoded_set([5] * 10)
    assert make_plan(encoded, batch_size=4, epochs=3).total_steps == 9
    assert make_plan(encoded, batch_size=4, epochs=3, drop_last=True).total_steps == 6
    plan = make_plan(encoded, batch_size=4, steps=100)
    assert plan.total_steps == 100
    assert plan.step(99).epoch == 33


def test_largest_step() -> None:
    lengths = [3] * 9 + [40]
    plan = make_plan(encoded_set(lengths), batch_size=2)
    assert 9 in plan.largest_step().examples


def test_too_few_examples_are_named() -> None:
    with pytest.raises(UserError, match="no training example"):
        make_plan(_empty(), batch_size=1)
    with pytest.raises(UserError, match="got 3 training examples, expected at least --batch_size 4"):
        make_plan(encoded_set([1, 2, 3]), batch_size=4, drop_last=True)


def _empty() -> EncodedSet:
    none = np.zeros(0, dtype=np.int64)
    return EncodedSet(ids=none.astype(np.int32), offsets=np.zeros(1, dtype=np.int64), first_target=none, rows=none)
