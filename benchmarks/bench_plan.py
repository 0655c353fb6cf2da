"""Planning a run over 52,000 made-up examples, Alpaca's number: which examples form which step, in which pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastft.batches.plan import Cost, Packing, Plan, make_plan
from fastft.data.encode import EncodedSet
from fastft.model.gpt2 import config_for

EXAMPLES = 52_000
BATCH_SIZE = 64
SHARED = 24
"""Inputs that all examples begin with, as the Alpaca template's."""


@pytest.fixture(scope="module")
def encoded() -> EncodedSet:
    """Examples of 40 to 300 ids, their last third supervised."""
    random = np.random.default_rng(0)
    lengths = random.integers(40, 300, EXAMPLES)
    return EncodedSet.of_suffixes(
        ids=np.zeros(int(lengths.sum()), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        first_target=lengths * 2 // 3,
        rows=np.arange(EXAMPLES, dtype=np.int64),
    )


def packing() -> Packing:
    """Packs of 4,096 tokens: a step of 64 examples is cut into two or three."""
    gpt2 = config_for("gpt2")
    cost = Cost.of_gpt2(gpt2.n_layer, gpt2.n_embd, gpt2.vocab_size)
    return Packing(pack_tokens=4096, shared=SHARED, cost=cost)


def new_plan(encoded: EncodedSet, *, bucketed: bool) -> Plan:
    """The plan of one epoch."""
    return make_plan(encoded, batch_size=BATCH_SIZE, packing=None if bucketed else packing(), bucketed=bucketed)


@pytest.mark.parametrize("bucketed", [False, True], ids=["packed", "bucketed"])
def bench_plan_epoch(benchmark: Callable[..., Any], encoded: EncodedSet, bucketed: bool) -> None:
    """A new plan, and every step of its epoch."""

    def plan_all() -> int:
        plan = new_plan(encoded, bucketed=bucketed)
        return sum(plan.step(index).count for index in range(plan.total_steps))

    count = benchmark.pedantic(plan_all, rounds=5, warmup_rounds=1)
    assert count == encoded.supervised.sum()


def bench_plan_one_step(benchmark: Callable[..., Any], encoded: EncodedSet) -> None:
    """A step in the middle of an epoch whose order is there: what the training loop waits for."""
    plan = new_plan(encoded, bucketed=False)
    assert benchmark(plan.step, plan.total_steps // 2).count


def bench_plan_resume(benchmark: Callable[..., Any], encoded: EncodedSet) -> None:
    """A new plan and a step of a late epoch: what resuming costs."""
    plan = new_plan(encoded, bucketed=False)

    def resume() -> int:
        return new_plan(encoded, bucketed=False).step(plan.steps_per_epoch * 3 + 5).count

    assert benchmark.pedantic(resume, rounds=10, warmup_rounds=1)
