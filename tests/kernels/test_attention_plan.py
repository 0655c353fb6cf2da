"""The plan of the attention kernels: each visible pair of a query and a key once, and little beside them."""

from __future__ import annotations

import pytest
import torch
from fastft_kernels import AttentionPlan, plan_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

SIZES = {"BM": 4, "BN": 2, "BQ": 2, "BK": 4}


@st.composite
def tries(draw: st.DrawFn) -> Tensor:
    """`visible_until` of random trees in depth-first order: a token's descendants follow it without a gap."""
    until: list[int] = []
    open_until: list[int] = []
    T = draw(st.integers(0, 40))
    for token in range(T):
        while open_until and open_until[-1] <= token:
            open_until.pop()
        until.append(draw(st.integers(token + 1, open_until[-1] if open_until else T)))
        open_until.append(until[-1])
    return torch.tensor(until, dtype=draw(st.sampled_from([torch.int32, torch.int64])))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor | None]:
    until = draw(tries())
    if not len(until) or draw(st.booleans()):
        return until, None
    rows = draw(st.lists(st.integers(0, len(until) - 1), max_size=50))
    return until, torch.tensor(sorted(rows), dtype=torch.int64)


def visible(until: Tensor, q_rows: Tensor | None) -> Tensor:
    token = torch.arange(len(until))
    asked = token if q_rows is None else q_rows
    return (token[None, :] <= asked[:, None]) & (asked[:, None] < until[None, :])


def of_forward(plan: AttentionPlan, seen: Tensor) -> tuple[Tensor, int]:
    """How often each pair is computed where it is seen, as the kernel goes; and how many tiles it computes."""
    counted, tiles = torch.zeros_like(seen, dtype=torch.int64), 0
    for i, (begin, masked, end) in enumerate(plan.query_tiles.tolist()):
        rows = slice(i * plan.BM, min((i + 1) * plan.BM, plan.R))
        for entry in range(begin, end):
            first = plan.BN * int(plan.key_tiles[entry])
            keys = slice(first, min(first + plan.BN, plan.T))
            if entry < masked:  # computed without the mask
                assert first + plan.BN <= plan.T
                assert seen[rows, keys].all()
            counted[rows, keys] += seen[rows, keys]
            tiles += 1
    return counted, tiles


def of_backward(plan: AttentionPlan, seen: Tensor) -> tuple[Tensor, int]:
    counted, scores = torch.zeros_like(seen, dtype=torch.int64), 0
    written: list[int] = []
    slots: dict[int, int] = {}
    for tile, first, end, slot in plan.items.tolist():
        assert 0 <= first <= end <= plan.R
        if tile < 0:
            assert (first, end, slot) == (0, 0, -1)
            continue
        keys = slice(tile * plan.BK, min((tile + 1) * plan.BK, plan.T))
        counted[first:end, keys] += seen[first:end, keys]
        scores += -(-(end - first) // plan.BQ) * plan.BQ * plan.BK
        if slot < 0:
            written.append(tile)
        else:
            assert slot not in slots
            assert slot < plan.slots
            slots[slot] = tile
    for tile, first, end in plan.sums.tolist():
        if tile < 0:
            assert first == end
            continue
        written.append(tile)
        assert [slots.pop(slot) for slot in range(first, end)] == [tile] * (end - first)
    assert not slots
    assert sorted(written) == list(range(-(-plan.T // plan.BK)))  # each key tile is written by one
    return counted, scores


@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from([2, 5, 1024]), st.sampled_from([2, 64]), st.booleans())
def test_each_visible_pair_once(
    case: tuple[Tensor, Tensor | None], chunk: int, most_slots: int, round_sizes: bool
) -> None:
    until, q_rows = case
    plan = plan_attention(until, q_rows, **SIZES, chunk=chunk, most_slots=most_slots, round_sizes=round_sizes)
    seen = visible(until, q_rows)
    counted, tiles = of_forward(plan, seen)
    assert torch.equal(counted, seen.long())
    assert plan.scores == tiles * plan.BM * plan.BN
    counted, scores = of_backward(plan, seen)
    assert torch.equal(counted, seen.long())
    assert plan.scores_dkv == scores
    assert plan.slots <= most_slots
    if round_sizes:
        assert not len(plan.key_tiles) & (len(plan.key_tiles) - 1)


@settings(max_examples=100, deadline=None)
@given(tries())
def test_no_tile_for_nothing(until: Tensor) -> None:
    """Where all ask, a tile is computed exactly if one of its queries sees one of its keys."""
    plan, seen = plan_attention(until, **SIZES), visible(until, None)
    pad = torch.nn.functional.pad(seen, (0, -len(until) % plan.BN, 0, -len(until) % plan.BM))
    by_tile = pad.view(-1, plan.BM, pad.shape[1] // plan.BN, plan.BN) if len(until) else pad
    needed = by_tile.any(dim=3).any(dim=1).sum() if len(until) else 0
    assert plan.scores == int(needed) * plan.BM * plan.BN


def shared_prefix(documents: int, prefix: int, length: int) -> Tensor:
    ends = prefix + length * torch.arange(1, documents + 1)
    T = prefix + documents * length
    return torch.cat([torch.full((prefix,), T), ends.repeat_interleave(length)])


def test_scores_behind_a_shared_prefix() -> None:
    """64 suffixes of 33 tokens behind 32 shared ones: without sharing each token would see up to 65 keys alone."""
    until = shared_prefix(64, 32, 33)
    plan = plan_attention(until)
    assert 49 < plan.scores / plan.T <= 140
    assert plan.scores_dkv / plan.T <= 160
    assert plan_attention(torch.full((plan.T,), plan.T)).scores / plan.T > 1000


def test_work_follows_the_tiles() -> None:
    """A million packed tokens: what is T x T anywhere would not fit."""
    length, documents = 65, 1 << 14
    until = shared_prefix(documents, 0, length)
    plan = plan_attention(until)
    assert length * documents == plan.T
    assert plan.scores / plan.T < 150
    assert plan.slots == 0


def test_long_ranges_are_cut_into_few_slots() -> None:
    plan = plan_attention(shared_prefix(200, 32, 33))
    assert plan.slots == 7  # 6632 queries see the prefix
    assert plan.sums.tolist() == [[0, 0, 7]]
    lengths = plan.items[:, 2] - plan.items[:, 1]
    assert lengths.max() == 1024
    assert (plan.items[:, 3] >= 0).sum() == 7
    causal = plan_attention(torch.full((8192,), 8192))
    assert causal.slots <= 64
    assert causal.scores_dkv == 64 * 64 * 128 * 129 // 2


def test_rounded_sizes_depend_on_the_numbers_of_tokens_and_queries() -> None:
    plans = [
        plan_attention(until, round_sizes=True)
        for until in (shared_prefix(64, 32, 33), torch.full((2144,), 2144), torch.arange(1, 2145))
    ]
    for name in ("items", "sums", "query_tiles"):
        assert len({getattr(plan, name).shape for plan in plans}) == 1
    assert {plan.slots for plan in plans} == {64}
    assert {len(plan.key_tiles) for plan in plans} == {512, 2048}  # 8 a query tile, or what plain causal needs
    short = plan_attention(torch.full((1000,), 1000), round_sizes=True)
    assert short.slots == 0
    assert short.sums.shape == (0, 3)


def test_to_a_device() -> None:
    plan = plan_attention(shared_prefix(2, 3, 4)).to("meta")
    assert {x.device.type for x in (plan.query_tiles, plan.key_tiles, plan.items, plan.sums)} == {"meta"}
    assert {x.dtype for x in (plan.query_tiles, plan.key_tiles, plan.items, plan.sums)} == {torch.int32}


@pytest.mark.parametrize(
    ("until", "q_rows", "message"),
    [
        ([3, 1, 3], None, r"got visible_until\[1\] = 1, expected more than 1: each token sees itself"),
        ([3, 3, 3], [2, 1], "expected them sorted"),
        ([3, 3, 3], [0, 3], r"no sorted tokens of \[0, 3\)"),
        ([3, 3, 3], [-1, 0], r"no sorted tokens of \[0, 3\)"),
        ([[1]], None, r"got visible_until \(1, 1\)"),
    ],
)
def test_errors(until: list[int], q_rows: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_attention(torch.tensor(until), None if q_rows is None else torch.tensor(q_rows))
