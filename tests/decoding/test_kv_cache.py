"""The cache's rows against plain lists, through any order of coming and going."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import needs_compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastft.decoding.kv_cache import BlockCache, FixedCache, KVCache
from fastft.model import ops

H, D, LAYERS = 2, 4, 2

coming = st.tuples(st.just("add"), st.lists(st.integers(1, 90), min_size=1, max_size=4))
going = st.tuples(st.just("drop"), st.sets(st.integers(0, 7)))
steps = st.lists(st.one_of(coming, going, st.tuples(st.just("extend"), st.just(None))), max_size=14)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps)
def test_rows_are_what_has_been_written_to_them(steps: list[tuple[str, object]]) -> None:
    cache = KVCache(LAYERS, H, torch.zeros(1, dtype=torch.float64), D)
    expected: list[list[float]] = []  # of each sequence the numbers that its places hold
    written = 0.0

    def write(rows: list[int], places: list[int]) -> None:
        nonlocal written
        k = torch.arange(written + 1, written + 1 + len(rows)).double()[:, None, None].expand(-1, H, D)
        for layer in range(LAYERS):
            cache.write(layer, torch.tensor(rows), torch.tensor(places), k + layer / 4, -k - layer / 4)
        for row, value in zip(rows, k[:, 0, 0].tolist(), strict=True):
            expected[row].append(value)
        written += len(rows)

    for step, what in steps:
        if step == "add":
            assert isinstance(what, list)
            first = len(expected)
            cache.add(torch.tensor(what))
            expected.extend([] for _ in what)
            write(
                [first + number for number, length in enumerate(what) for _ in range(length)],
                [place for length in what for place in range(length)],
            )
        elif step == "extend" and expected:
            places = cache.extend().tolist()
            assert places == [len(values) for values in expected]
            write(list(range(len(expected))), places)
        elif step == "drop":
            assert isinstance(what, set)
            order = cache.drop({number for number in what if number < len(expected)})
            assert sorted(order) == [number for number in range(len(expected)) if number not in what]
            expected = [expected[number] for number in order]
        assert cache.lengths.tolist() == [len(values) for values in expected]
        for first in range(len(expected)):
            for layer in range(LAYERS):
                keys, values = cache.read(layer, first)
                assert keys.shape == values.shape == (len(expected) - first, H, keys.shape[2], D)
                assert keys.shape[2] >= max(map(len, expected[first:]))
                assert keys.isfinite().all()
                for row, held in enumerate(expected[first:]):
                    there = torch.tensor(held).double()[None, :, None].expand(H, -1, D) + layer / 4
                    assert torch.equal(keys[row, :, : len(held)], there)
                    assert torch.equal(values[row, :, : len(held)], -there)


def test_few_rows_move_when_one_ends() -> None:
    """Only the last one does: a copy of the whole cache at each answer's end would cost as much as a step."""
    cache = KVCache(1, H, torch.zeros(1), D)
    cache.add(torch.tensor([1] * 9))
    assert cache.drop({3}) == [0, 1, 2, 8, 4, 5, 6, 7]
    assert cache.drop({0, 7}) == [6, 1, 2, 3, 4, 5]
    before = cache.keys[0]
    cache.add(torch.tensor([1, 1, 1]))
    assert cache.keys[0] is before  # the rows that became free


def test_room_for_what_is_needed() -> None:
    cache = KVCache(1, H, torch.zeros(1), D)
    cache.add(torch.tensor([3, 200]))
    assert cache.keys[0].shape == (2, H, 208, D)
    for _ in range(9):
        cache.extend()
    assert cache.keys[0].shape == (2, H, 224, D)
    assert cache.values[0].isfinite().all()


class TestFixedCache:
    def test_it_grows_in_few_large_steps_and_keeps_what_it_holds(self) -> None:
        cache = FixedCache(LAYERS, H, torch.zeros(1, dtype=torch.float64), D, rows=3, most=700)
        sizes = []
        for place in range(700):
            cache.make_room(place + 1)
            sizes.append(cache.places)
            k = torch.full((3, H, D), float(place), dtype=torch.float64)
            cache.write(1, torch.arange(3), torch.full((3,), place), k, -k)
            assert cache.keys[1].isfinite().all()
        assert sorted(set(sizes)) == [128, 256, 512, 700]
        places = torch.arange(700).double()[None, None, :, None].expand(3, H, -1, D)
        assert torch.equal(cache.keys[1], places)
        assert torch.equal(cache.values[1], -places)
        assert not cache.keys[0].any()

    def test_short_sequences_take_no_more_than_they_need(self) -> None:
        cache = FixedCache(LAYERS, H, torch.zeros(1), D, rows=3, most=20)
        cache.make_room(3)
        assert cache.places == 20
        with pytest.raises(ValueError, match="got 21 places, expected at most 20"):
            cache.make_room(21)


@needs_compiled
class TestBlocks:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(steps)
    def test_sequences_see_what_has_been_written_for_them(self, steps: list[tuple[str, Any]]) -> None:
        """A query of zeros sees the mean of the values. No block is made while one is free."""
        cache = BlockCache(LAYERS, H, torch.zeros(1), D)
        expected: list[list[float]] = []
        written, most = 0, 1

        def values(count: int) -> Tensor:
            nonlocal written
            written += count
            return torch.arange(written - count, written).float()[:, None, None].expand(-1, H, D)

        for step, what in steps:
            if step == "add":
                first = len(expected)
                cache.add(torch.tensor(what))
                v = values(sum(what))
                rows = torch.arange(first, first + len(what)).repeat_interleave(torch.tensor(what))
                for layer in range(LAYERS):
                    cache.write(layer, rows, torch.cat([torch.arange(n) for n in what]), -v, v + layer)
                expected += [part[:, 0, 0].tolist() for part in v.split(what)]
            elif step == "extend" and expected:
                assert cache.extend().tolist() == [len(of_row) for of_row in expected]
                v = values(len(expected))
                for layer in range(LAYERS):
                    seen = cache.step_attention(layer, torch.zeros(len(v), H, D), -v, v + layer, None, "cpu")
                    assert seen.shape == v.shape
                expected = [[*of_row, value] for of_row, value in zip(expected, v[:, 0, 0].tolist(), strict=True)]
            elif step == "drop":
                order = cache.drop({number for number in what if number < len(expected)})
                expected = [expected[number] for number in order]
            most = max(most, sum(-(-len(of_row) // ops.BLOCK_PLACES) for of_row in expected))
            assert len(cache.blocks) == most
            for first in range(len(expected)):
                for layer in range(LAYERS):
                    seen = cache.attention(layer, torch.zeros(len(expected) - first, H, D), None, "cpu", first=first)
                    means = torch.tensor([sum(of_row) / len(of_row) + layer for of_row in expected[first:]])
                    torch.testing.assert_close(seen, means[:, None, None].expand_as(seen), rtol=1e-5, atol=1e-4)
