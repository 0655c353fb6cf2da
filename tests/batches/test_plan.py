"""Plans: every example once an epoch, the same examples however a step is cut, any step without its predecessors."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastft.batches.plan import Cost, Indices, Packing, Plan, balanced, make_plan
from fastft.common.errors import UserError
from fastft.data.encode import EncodedSet
from fastft.model.gpt2 import config_for
from fastft.run.config import TrainOptions
from fastft.run.data import load_data


def encoded_set(lengths: list[int]) -> EncodedSet:
    """Examples of the given numbers of inputs; the first half of each is prompt."""
    ids = np.array(lengths, dtype=np.int64) + 1
    return EncodedSet.of_suffixes(
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
        assert all(1 <= len(step.packs) <= accumulate for step in steps)
        assert all(len(part) for step in steps for part in step.packs)
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
    return EncodedSet.of_suffixes(
        ids=none.astype(np.int32), offsets=np.zeros(1, dtype=np.int64), first_target=none, rows=none
    )


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(1, 120), st.integers(0, 20))
def test_packs_hold_each_example_once_within_the_budget(
    lengths: list[int], batch_size: int, ranks: int, accumulate: int, pack_tokens: int, shared: int
) -> None:
    shared = min(shared, *lengths)
    packing = Packing(pack_tokens=pack_tokens, shared=shared, ranks=ranks, cost=Cost(token=1.0, pair=0.01, row=5.0))
    encoded = encoded_set(lengths)
    plan = make_plan(encoded, batch_size=batch_size, accumulate=accumulate, packing=packing)
    whole = make_plan(encoded, batch_size=batch_size)
    for index in range(plan.total_steps):
        step = plan.step(index)
        assert sorted(step.examples) == sorted(whole.step(index).examples)
        assert len(step.packs) % ranks == 0
        assert len(step.packs) >= min(accumulate, len(step.examples))
        for pack in step.packs:
            assert len(pack) <= 1 or (encoded.lengths[pack] - shared).sum() + shared <= pack_tokens


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=60),
    st.integers(1, 3),
    st.integers(2, 120),
    st.integers(0, 20),
)
@example([2, 3], 1, 2, 2)  # no room beyond what is shared
def test_a_step_is_cut_into_the_fewest_balanced_packs_that_fit(
    lengths: list[int], ranks: int, pack_tokens: int, shared: int
) -> None:
    """As trying one number of packs after the other does, each to its end."""
    shared = min(shared, *lengths)
    packing = Packing(pack_tokens=pack_tokens, shared=shared, ranks=ranks, cost=Cost(token=1.0, pair=0.01, row=5.0))
    encoded = encoded_set(lengths)
    step = make_plan(encoded, batch_size=len(lengths), packing=packing).step(0)
    examples = make_plan(encoded, batch_size=len(lengths)).step(0).examples
    own = encoded.lengths[examples] - shared
    costs = packing.cost(encoded.lengths[examples], shared, encoded.supervised[examples])
    n_packs = -(-min(max(1, -(-int(own.sum()) // max(1, pack_tokens - shared))), len(lengths)) // ranks) * ranks
    while True:
        packs = balanced(costs, n_packs)
        if n_packs >= len(lengths) or all(len(p) <= 1 or own[p].sum() + shared <= pack_tokens for p in packs):
            break
        n_packs += ranks
    expected = [examples] if n_packs == 1 else [examples[pack] for pack in packs]
    assert sorted(pack.tolist() for pack in step.packs) == sorted(pack.tolist() for pack in expected)


RANK_PLANS = (
    sizes,
    st.integers(1, 12),  # examples in a step
    st.integers(1, 5),  # ranks
    st.integers(1, 4),  # passes on each rank, at least
    st.none() | st.integers(1, 120),  # tokens of a pack
    st.integers(0, 20),  # of which all examples share these
    st.booleans(),  # similar lengths form a step
)


def rank_plan(
    encoded: EncodedSet, batch_size: int, ranks: int, accumulate: int, budget: int | None, shared: int, bucketed: bool
) -> Plan:
    shared = min(shared, int(encoded.lengths.min())) if budget is not None else 0
    packing = Packing(pack_tokens=budget, shared=shared, ranks=ranks, cost=Cost(token=1.0, pair=0.01, row=5.0))
    return make_plan(
        encoded, batch_size=batch_size, accumulate=accumulate, packing=packing, epochs=2, bucketed=bucketed
    )


@settings(max_examples=150, deadline=None)
@given(*RANK_PLANS)
@example([7] * 5, 5, 3, 4, None, 0, False)  # fewer examples than passes in all
@example([7] * 4, 4, 3, 1, 7, 0, False)  # more packs than examples: the ranks need as many
@example([7], 12, 5, 4, 120, 7, True)  # one example for five ranks
def test_ranks_share_a_step_in_equal_numbers_of_packs(
    lengths: list[int], batch_size: int, ranks: int, accumulate: int, budget: int | None, shared: int, bucketed: bool
) -> None:
    """Each example is one rank's in an epoch, all wait for the same number of passes, and the divisor is that of the
    whole step: what one process has."""
    encoded = encoded_set(lengths)
    plan = rank_plan(encoded, batch_size, ranks, accumulate, budget, shared, bucketed)
    alone = make_plan(encoded, batch_size=batch_size, epochs=2, bucketed=bucketed)
    assert plan.total_steps == alone.total_steps
    assert plan.steps_per_epoch == alone.steps_per_epoch
    for epoch in range(2):
        seen = np.zeros(len(lengths), dtype=int)
        for index in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            step, whole = plan.step(index), alone.step(index)
            of_ranks = [step.packs[rank::ranks] for rank in range(ranks)]
            passes = {len(packs) for packs in of_ranks}
            assert len(passes) == 1
            # `accumulate` counts the passes of each rank: fewer only where there are too few examples for more.
            enough = min(accumulate, -(-len(whole.examples) // ranks))
            assert enough <= min(passes)
            assert budget is not None or passes == {enough}
            mine = [np.concatenate(packs) for packs in of_ranks]
            for examples in mine:
                np.add.at(seen, examples, 1)
            assert sorted(np.concatenate(mine)) == sorted(whole.examples)
            assert step.count == whole.count == sum(encoded.supervised[examples].sum() for examples in mine)
            assert step.epoch == whole.epoch == epoch
        assert (seen == 1).all()


@settings(max_examples=60, deadline=None)
@given(*RANK_PLANS)
def test_a_rank_without_examples_is_one_of_more_ranks_than_examples(
    lengths: list[int], batch_size: int, ranks: int, accumulate: int, budget: int | None, shared: int, bucketed: bool
) -> None:
    plan = rank_plan(encoded_set(lengths), batch_size, ranks, accumulate, budget, shared, bucketed)
    for index in range(plan.total_steps):
        step = plan.step(index)
        idle = sum(not sum(map(len, step.packs[rank::ranks])) for rank in range(ranks))
        assert idle == max(0, ranks - len(step.examples))


def million() -> EncodedSet:
    """A million examples as instruction data has them: 30 to 1,000 tokens, most of them short."""
    lengths = np.random.default_rng(0).lognormal(4.2, 0.5, 1_000_000).astype(np.int64).clip(30, 1000)
    return EncodedSet.of_suffixes(
        ids=np.zeros(0, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths + 1)]),
        first_target=lengths // 2,
        rows=np.arange(1, 1_000_001),
    )


MILLION_PLANS: dict[str, dict[str, Any]] = {
    "one pack a step": {"batch_size": 8, "packing": Packing(pack_tokens=16384, shared=24)},
    "packs": {"batch_size": 128, "packing": Packing(pack_tokens=4096, shared=24, ranks=8)},
    "bucketed": {"batch_size": 128, "bucketed": True},
}


@pytest.mark.parametrize("options", MILLION_PLANS.values(), ids=MILLION_PLANS)
def test_a_million_examples_are_planned_in_little_memory(options: dict[str, Any]) -> None:
    """Every step of an epoch with its packs, in less than 200 MB beyond the lengths; each example once."""
    encoded = million()
    seen = np.zeros(len(encoded), dtype=np.int8)
    tracemalloc.start()
    plan = make_plan(encoded, **options)
    few = range(0, plan.steps_per_epoch, max(1, plan.steps_per_epoch // 2000))
    for index in few:
        seen[plan.step(index).examples] += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6
    for index in set(range(plan.steps_per_epoch)) - set(few):
        seen[plan.step(index).examples] += 1
    assert (seen == 1).all()


@pytest.mark.long
@pytest.mark.parametrize("options", MILLION_PLANS.values(), ids=MILLION_PLANS)
def test_a_million_examples_are_planned_in_seconds(options: dict[str, Any]) -> None:
    encoded = million()
    began = time.perf_counter()
    plan = make_plan(encoded, **options)
    for index in range(plan.steps_per_epoch):
        plan.step(index)
    assert time.perf_counter() - began < 10


def test_ranks_get_nearly_equal_cost() -> None:
    lengths = np.random.default_rng(0).integers(40, 93, 1024)
    costs = Cost.of_gpt2(12, 768, 50257)(lengths, 24, lengths // 3)
    packs = [costs[pack].sum() for pack in balanced(costs, 8)]
    assert max(packs) < 1.01 * min(packs)
    halves = [half.sum() for half in np.split(np.sort(costs), 2)]
    assert max(halves) > 1.2 * min(halves)  # what a careless split would give


@pytest.fixture(scope="module")
def sample() -> EncodedSet:
    """The training examples of the embedded data."""
    options = TrainOptions(data="sample")
    return load_data(options).encode("train", options, config_for("gpt2"))


GPT2_COST = Cost.of_gpt2(12, 768, 50257)


def spread(sample: EncodedSet, steps: list[list[Indices]], ranks: int, shared: int) -> float:
    """How much more an epoch costs the rank that it costs most than the one that it costs least."""
    costs = GPT2_COST(sample.lengths, shared, sample.supervised)
    totals = [sum(costs[pack].sum() for packs in steps for pack in packs[rank::ranks]) for rank in range(ranks)]
    return float(max(totals) / min(totals) - 1)


@pytest.mark.parametrize("batch_size", [8, 128])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_an_epoch_of_the_sample_costs_each_rank_the_same(
    sample: EncodedSet, ranks: int, accumulate: int, batch_size: int
) -> None:
    """Within 5% of each other, also where a step has no more examples than ranks."""
    shared = sample.common_prefix()
    packing = Packing(pack_tokens=16384, shared=shared, ranks=ranks, cost=GPT2_COST)
    plan = make_plan(sample, batch_size=batch_size, accumulate=accumulate, packing=packing)
    steps = [plan.step(index).packs for index in range(plan.steps_per_epoch)]
    assert spread(sample, steps, ranks, shared) < 0.05
    # A step's examples in order of their length, cut into equal numbers.
    in_order = [np.concatenate(packs) for packs in steps]
    careless = [np.array_split(one[np.argsort(sample.lengths[one])], ranks) for one in in_order]
    assert spread(sample, careless, ranks, shared) > 0.05


def test_a_step_costs_each_rank_nearly_the_same_in_several_passes(sample: EncodedSet) -> None:
    """Of 12 examples in 12 packs each rank gets those that make it equal to the others, not any three."""
    packing = Packing(pack_tokens=60, ranks=4, cost=GPT2_COST)
    plan = make_plan(sample, batch_size=12, accumulate=3, packing=packing)
    costs = GPT2_COST(sample.lengths, 0, sample.supervised)

    def excess(packs: list[Indices]) -> float:
        of_ranks = [sum(costs[pack].sum() for pack in packs[rank::4]) for rank in range(4)]
        return float(max(of_ranks) / np.mean(of_ranks) - 1)

    steps = [plan.step(index).packs for index in range(20)]
    assert np.mean([excess(packs) for packs in steps]) < 0.05
    in_order = [sorted(packs, key=lambda pack: -costs[pack].sum()) for packs in steps]
    assert np.mean([excess(packs) for packs in in_order]) > 0.05


def test_bucketed_steps_hold_similar_lengths_and_every_example() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 515).tolist()
    encoded = encoded_set(lengths)
    plain, bucketed = (make_plan(encoded, batch_size=8, bucketed=b) for b in (False, True))

    def padded(plan: Plan) -> int:
        steps = [plan.step(i).examples for i in range(plan.total_steps)]
        return sum(len(step) * encoded.lengths[step].max() for step in steps)

    assert sorted(np.concatenate([bucketed.step(i).examples for i in range(65)])) == list(range(515))
    assert padded(bucketed) < 0.7 * padded(plain)
    assert len(bucketed.step(64).examples) == 3


def test_the_cost_of_an_example() -> None:
    """By counting: own tokens, pairs that see each other, supervised rows."""
    length, shared, supervised = 7, 3, 2
    pairs = sum(q + 1 for q in range(shared, length))
    cost = Cost(token=1.0, pair=100.0, row=10_000.0)
    got = cost(np.array([length]), shared, np.array([supervised]))
    assert got.tolist() == [4 + 100 * pairs + 10_000 * supervised]
