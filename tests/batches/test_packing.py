"""Packing is exact: the same loss and the same gradients as padded rows, for fewer tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from fastft_kernels import attention, plan_tiles, tiles
from fastft_kernels.attention import visible_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastft.batches.batch import (
    Batch,
    Rounding,
    few_sizes,
    from_cu_seqlens,
    from_padded,
    near_sizes,
    pack,
    padded_batch,
    unasked,
)
from fastft.model.gpt2 import GPT2, GPT2Config

Examples = list[np.ndarray]
FLOAT64, FLOAT32 = 1e-10, 2e-5
VOCAB = 257
END = VOCAB - 1
"""What a batch is has nothing to do with the size of the vocabulary, which is most of what GPT-2's would compute."""


def make_model(dtype: torch.dtype = torch.float64) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_ctx=64, vocab_size=VOCAB)).to(dtype)
    for name, parameter in model.named_parameters():  # away from 0 and 1, so that a lost bias or norm is seen
        mean = 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.2)
    return model


MODELS = {dtype: make_model(dtype) for dtype in (torch.float64, torch.float32)}


@st.composite
def example_sets(draw: st.DrawFn) -> tuple[Examples, list[int]]:
    """Few ids and common beginnings, so that tries of several levels, duplicates and contained examples come up."""
    vocabulary = draw(st.integers(1, 4))
    ids = st.integers(0, vocabulary)
    beginnings = draw(st.lists(st.lists(ids, max_size=12), min_size=1, max_size=3))
    examples: Examples = []
    starts: list[int] = []
    for _ in range(draw(st.integers(1, 7))):
        example = [*draw(st.sampled_from(beginnings)), *draw(st.lists(ids, min_size=1, max_size=8)), END]
        examples.append(np.array(example, dtype=np.int32))
        starts.append(draw(st.integers(1, len(example) - 1)))
    return examples, starts


def results(model: GPT2, batches: Sequence[Batch], impl: str = "cpu") -> list[Tensor]:
    """Loss and gradients of a step that is cut into these batches."""
    count = sum(batch.count for batch in batches)
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss, _ = model(batch, row_weights=batch.weights.double() / count, impl=impl)
        loss.backward()
        total += loss.detach()
    return [total, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def error(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in zip(got, expected, strict=True)
    )


@settings(max_examples=120, deadline=None)
@given(
    example_sets(),
    st.booleans(),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([None, few_sizes, near_sizes]),
    st.sampled_from(["cpu", "reference"]),
)
def test_loss_and_gradients_are_the_padded_references(
    drawn: tuple[Examples, list[int]], share: bool, least: int, rounding: Rounding | None, impl: str
) -> None:
    for dtype, limit in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
        model = MODELS[dtype]
        expected = results(model, [padded_batch(*drawn)], "reference")
        packed = pack(*drawn, share_prefix=share, least_shared=least, rounding=rounding)
        assert error(results(model, [packed], impl), expected) < limit


@settings(max_examples=40, deadline=None)
@given(example_sets(), st.integers(1, 4), st.randoms())
def test_any_cut_of_a_step_gives_the_same_gradients(drawn: tuple[Examples, list[int]], ranks: int, random) -> None:
    """Packs of any examples, some of them empty, as ranks or accumulation make them."""
    model = MODELS[torch.float64]
    examples, starts = drawn
    owner = [random.randrange(ranks) for _ in examples]
    batches = []
    for rank in range(ranks):
        mine = [i for i, of in enumerate(owner) if of == rank]
        some = mine or [0]
        batch = pack([examples[i] for i in some], [starts[i] for i in some])
        batches.append(batch if mine else unasked(batch))
    expected = results(model, [padded_batch(*drawn)], "reference")
    assert error(results(model, batches), expected) < FLOAT64


@settings(max_examples=100, deadline=None)
@given(example_sets(), st.booleans())
def test_rows_and_weights_are_a_brute_force_count(drawn: tuple[Examples, list[int]], share: bool) -> None:
    examples, starts = drawn
    batch = pack(examples, starts, share_prefix=share, least_shared=1)
    told: Counter[tuple[tuple[int, ...], int, int]] = Counter()
    for index, (example, start) in enumerate(zip(examples, starts, strict=True)):
        for at in range(start, len(example)):
            own = -1 if share else index
            told[(tuple(example[:at].tolist()), int(example[at]), own)] += 1
    assert len(batch.rows) == len(told)
    assert sorted(batch.weights.tolist()) == sorted(map(float, told.values()))
    assert batch.count == sum(told.values()) == sum(len(e) - s for e, s in zip(examples, starts, strict=True))
    assert torch.equal(batch.weights, torch.bincount(batch.pair_rows, minlength=len(batch.rows)).float())
    if share:  # every different beginning once
        beginnings = {tuple(example[: n + 1].tolist()) for example in examples for n in range(len(example) - 1)}
        assert len(batch.tokens) == len(beginnings)
    assert torch.equal(batch.rows, batch.rows.sort().values)


@settings(max_examples=60, deadline=None)
@given(example_sets())
def test_example_losses(drawn: tuple[Examples, list[int]]) -> None:
    model = MODELS[torch.float64]
    batch = pack(*drawn, least_shared=1)
    _, losses = model(batch)
    together = batch.example_losses(losses)
    for index, (example, start) in enumerate(zip(*drawn, strict=True)):
        alone, _ = model(padded_batch([example], [start]), impl="reference")
        assert abs(together[index] - alone) <= FLOAT64 * abs(alone)


@settings(max_examples=60, deadline=None)
@given(example_sets(), st.booleans(), st.sampled_from([1, 3, 32]), st.sampled_from([1, 100, 1 << 19]), st.booleans())
def test_tiles_cover_each_visible_pair_once(
    drawn: tuple[Examples, list[int]], of_rows: bool, size: int, largest: int, keep: bool
) -> None:
    batch = pack(*drawn, least_shared=1)
    visible_until, q_rows = batch.visible_until, batch.rows if of_rows else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_QUERIES", (size,))
        patch.setattr(tiles, "LARGEST_GROUP", largest)
        patch.setattr(tiles, "WORTH_PADDING", largest)
        patch.setattr(import_module("fastft_kernels.attention_torch"), "KEPT_PAIRS", 1 << 17 if keep else 0)
        planned = plan_tiles(visible_until, q_rows)
        expected = visible_mask(visible_until, q_rows)
        covered = torch.zeros_like(expected, dtype=torch.int64)
        for group in planned:
            for queries, keys, mask in zip(group.queries, group.keys, group.mask, strict=True):
                real = queries < len(covered)
                covered.index_put_((queries[real][:, None], keys[None, :]), mask[real].long(), accumulate=True)
        assert torch.equal(covered, expected.long())
        q, k, v = (
            torch.randn(n, 2, 4, dtype=torch.float64, requires_grad=True)
            for n in (len(covered), len(visible_until), len(visible_until))
        )
        grad = torch.randn_like(q)

        def attended(**kwargs) -> list[Tensor]:
            out = attention(q, k, v, visible_until, q_rows=q_rows, **kwargs)
            return [out, *torch.autograd.grad(out, (q, k, v), grad)]

        assert error(attended(tiles=planned), attended(impl="reference")) < FLOAT64


def test_no_example_sees_another_by_a_single_bit() -> None:
    """Another example's tokens change (same length, same tree): this one's logits do not."""
    model = MODELS[torch.float32]
    shared = np.arange(100, 120)
    first = [
        np.array([*shared, 1, 2, 3, 4, END], dtype=np.int32),
        np.array([*shared, 5, 6, 7, END], dtype=np.int32),
    ]
    other = [first[0], np.array([*shared, 8, 9, 10, END], dtype=np.int32)]
    before, after = (model.logits(pack(examples, [1, 1])) for examples in (first, other))
    assert len(before) == 20 + 4 + 3
    assert torch.equal(before[:24], after[:24])
    assert not torch.equal(before[24:], after[24:])


BRANCHING = [np.array([*range(10, 22), *tail, END], dtype=np.int32) for tail in ([1, 2], [1, 3, 4], [5], [1, 2])]
STARTS = [12, 12, 9, 3]


class TestMutations:
    """The error that a wrong batch makes, far above the limits that the tests above set."""

    def _error(self, batch: Batch) -> float:
        model = MODELS[torch.float64]
        return error(results(model, [batch]), results(model, [padded_batch(BRANCHING, STARTS)], "reference"))

    def test_the_right_batch_is_right(self) -> None:
        assert self._error(pack(BRANCHING, STARTS)) < FLOAT64

    def test_wrong_visible_until(self) -> None:
        batch = pack(BRANCHING, STARTS)
        until = batch.visible_until.clone()
        until[13] += 1  # a segment's last key, seen by one query too many
        assert self._error(replace(batch, visible_until=until, tiles=None, row_tiles=None)) > 1e-4

    def test_dropped_row(self) -> None:
        batch = pack(BRANCHING, STARTS)
        fewer = {name: getattr(batch, name)[1:] for name in ("rows", "targets", "weights")}
        assert self._error(replace(batch, **fewer, row_tiles=None)) > 1e-4

    def test_missing_weight(self) -> None:
        batch = pack(BRANCHING, STARTS)
        assert batch.weights.max() > 1
        assert self._error(replace(batch, weights=torch.ones_like(batch.weights))) > 1e-4

    def test_wrong_position(self) -> None:
        batch = pack(BRANCHING, STARTS)
        assert self._error(replace(batch, positions=torch.arange(len(batch.tokens)))) > 1e-4


def test_converters_agree() -> None:
    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    examples = [np.array([*row, END], dtype=np.int32) for row in rows]
    packed = pack(examples, [1, 1, 1], share_prefix=False)
    tokens = torch.tensor([token for row in rows for token in row])
    labels = torch.tensor([token for row in rows for token in [*row[1:], END]])
    converted = from_cu_seqlens(tokens, labels, torch.tensor([0, 4, 6, 9], dtype=torch.int32))
    for name in ("tokens", "positions", "visible_until", "rows", "targets", "weights", "pair_rows", "pair_examples"):
        assert torch.equal(getattr(packed, name), getattr(converted, name)), name
    model = MODELS[torch.float64]
    assert error(results(model, [converted]), results(model, [padded_batch(examples, [1, 1, 1])])) < FLOAT64


def test_wrong_converter_input_is_named() -> None:
    tokens = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected to rise from 0 to T = 4"):
        from_cu_seqlens(tokens, tokens, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="expected the same shape"):
        from_cu_seqlens(tokens, tokens[:2], torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="expected at least one"):
        pack([], [])


@pytest.mark.parametrize(
    ("rounding", "count", "step", "share"), [(few_sizes, 70, 64, 1 / 8), (near_sizes, 200, 16, 1 / 32)]
)
def test_rounded_sizes_are_few_and_near(rounding: Rounding, count: int, step: int, share: float) -> None:
    sizes = {rounding(n) for n in range(1, 16385)}
    assert len(sizes) <= count
    assert all(size % step == 0 for size in sizes)
    assert all(n <= rounding(n) <= max(n + step - 1, n * (1 + share)) for n in range(1, 16385))


def test_all_ignored_padded_batch_is_a_connected_zero() -> None:
    model = MODELS[torch.float64]
    for impl in ("cpu", "reference"):
        model.zero_grad()
        loss, losses = model(from_padded(torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), -100)), impl=impl)
        assert (loss.item(), losses.numel()) == (0, 0)
        loss.backward()
        assert model.wte.weight.grad is not None
