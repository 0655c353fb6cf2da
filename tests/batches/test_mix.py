"""A mix: an epoch in the ratio that is asked for, each file gone through whole before anything comes again, any step
without its predecessors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.batches.plan import Mix, Packing, make_plan
from fastft.data.encode import EncodedSet


def encoded_set(n: int) -> EncodedSet:
    """`n` examples of 2 to 6 inputs."""
    ids = 3 + np.arange(n, dtype=np.int64) % 5
    return EncodedSet.of_suffixes(
        ids=np.zeros(ids.sum(), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(ids)]),
        first_target=np.ones(n, dtype=np.int64),
        rows=np.arange(1, n + 1),
    )


@st.composite
def mixes(draw: st.DrawFn) -> Mix:
    """Up to four files, none with so little weight that an epoch has none of it."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    weights = [draw(st.floats(0.5, 8)) for _ in sizes]
    mix = Mix(tuple(sizes), tuple(weights))
    return mix if min(mix.counts()) > 0 else Mix(mix.sizes, tuple(map(float, sizes)))


def file_of(mix: Mix, examples: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(mix.sizes), examples, side="right")


@given(mixes(), st.integers(0, 5))
def test_an_epoch_has_the_ratio_and_goes_through_each_file_whole(mix: Mix, seed: int) -> None:
    n, counts = sum(mix.sizes), mix.counts()
    assert sum(counts) == n
    for count, weight in zip(counts, mix.weights, strict=True):
        assert abs(count - n * weight / sum(mix.weights)) < 1
    epochs = [mix.drawn(seed, epoch) for epoch in range(4)]
    for drawn in epochs:
        assert np.bincount(file_of(mix, drawn), minlength=len(counts)).tolist() == counts
    for file, size in enumerate(mix.sizes):
        begin = sum(mix.sizes[:file])
        row = np.concatenate([drawn[file_of(mix, drawn) == file] for drawn in epochs]) - begin
        for at in range(0, len(row), size):  # a file's draws, over the epochs' ends
            times = np.bincount(row[at : at + size], minlength=size)
            assert times.max() == 1, "an example comes again before all others have come"


@settings(max_examples=50)
@given(mixes(), st.integers(1, 7), st.booleans(), st.integers(0, 3))
def test_any_step_is_the_same_whatever_came_before_and_however_it_is_cut(
    mix: Mix, batch_size: int, bucketed: bool, seed: int
) -> None:
    encoded = encoded_set(sum(mix.sizes))
    how = {"batch_size": batch_size, "epochs": 3, "seed": seed, "mix": mix, "bucketed": bucketed}
    whole = make_plan(encoded, **how)
    steps = [whole.step(index).examples for index in range(whole.total_steps)]
    per_epoch = len(steps) // 3
    for epoch in range(3):
        seen = np.concatenate(steps[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(seen) == sorted(mix.drawn(seed, epoch))
    resumed = make_plan(encoded, **how)
    for index in reversed(range(whole.total_steps)):
        assert np.array_equal(resumed.step(index).examples, steps[index])
    ranks = make_plan(encoded, **how, packing=Packing(pack_tokens=12, ranks=2), accumulate=2)
    for index, step in enumerate(steps):
        assert sorted(ranks.step(index).examples) == sorted(step)
        assert ranks.step(index).count == whole.step(index).count


def test_a_mix_of_the_files_own_sizes_is_every_example_once() -> None:
    mix = Mix((7, 12, 1), (7.0, 12.0, 1.0))
    assert sorted(mix.drawn(3, 5)) == list(range(20))


def test_seeds_epochs_and_weights_differ() -> None:
    """Also where one file is large enough that an epoch does not see all of it."""
    mix = Mix((40, 40), (3.0, 1.0))
    drawn = {tuple(mix.drawn(seed, epoch).tolist()) for seed in (0, 1, 123) for epoch in range(3)}
    assert len(drawn) == 9
    assert mix.counts() == [60, 20]
    assert Mix((40, 40), (1.0, 3.0)).counts() == [20, 60]
    first, second = (set(mix.drawn(0, epoch)[60:].tolist()) for epoch in (0, 1))
    assert not first & second  # the two halves of the second file


def test_files_of_very_different_sizes() -> None:
    """One example beside a million, and half a million beside half: in well under a second, and in their ratio."""
    mix = Mix((1, 10, 1_000_000), (1.0, 1.0, 2.0))
    drawn = mix.drawn(0, 3)
    assert (drawn == 0).sum() == mix.counts()[0] == 250_003
    assert np.ptp(np.bincount(drawn[(drawn > 0) & (drawn < 11)])[1:]) <= 2  # the epoch begins and ends within a pass
    first, second = (Mix((5000, 7000), (1.0, 1.0)).drawn(0, epoch) for epoch in (0, 1))
    assert len(set(first[:5000].tolist())) == 5000  # beyond what is drawn at once
    assert not np.array_equal(first[:5000], second[:5000])


@pytest.mark.parametrize(("sizes", "weights", "counts"), [((1, 1, 1), (1, 1, 1), [1, 1, 1]), ((5, 5), (2, 1), [7, 3])])
def test_rounding_keeps_the_sum(sizes: tuple[int, ...], weights: tuple[float, ...], counts: list[int]) -> None:
    assert Mix(sizes, weights).counts() == counts


def test_a_plan_without_a_mix_is_what_it_was() -> None:
    """And a mixed one is not."""
    encoded = encoded_set(12)
    plain = make_plan(encoded, batch_size=12, seed=5).step(0).examples
    assert np.array_equal(plain, np.random.default_rng([5, 0]).permutation(12))
    mixed = make_plan(encoded, batch_size=12, seed=5, mix=Mix((4, 8), (2.0, 1.0))).step(0).examples
    assert np.bincount(mixed < 4).tolist() == [4, 8]
