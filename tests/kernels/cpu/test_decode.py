"""Compiled attention over the cache: against the float64 equation, whatever lies in places that do not count."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compiled import needs_compiled
from fastft_kernels import attention_decode, support
from fastft_kernels.cpu import decode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytestmark = needs_compiled
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """A cache in rows, with NaN in the places that do not count."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    prefix: tuple[Tensor, Tensor] | None

    def prefixes(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return (
            {} if self.prefix is None else {f"prefix_{x}": t.to(dtype) for x, t in zip("kv", self.prefix, strict=True)}
        )

    def exact(self, more: int = 0) -> Tensor:
        lengths = (self.lengths + more).clamp_max(self.k.shape[1])
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        return attention_decode(q, k, v, lengths, **self.prefixes(torch.float64), impl="reference")

    def in_rows(self) -> Tensor:
        return attention_decode(self.q, self.k, self.v, self.lengths, **self.prefixes(self.q.dtype), impl="compiled")

    def in_blocks(self, layer: int = 1, *, last_is_new: bool = False) -> Tensor:
        kept, addresses = blocks_of(self, layer)
        new = None
        if last_is_new:
            rows, last = torch.arange(len(self.q)), self.lengths - 1
            # As they come out of one product: strided.
            new = torch.stack([self.k[rows, last], self.v[rows, last]], dim=1).unbind(1)
            for row, place in zip(addresses.tolist(), last.tolist(), strict=True):
                kept[row[place // decode.PLACES]][layer, :, :, place % decode.PLACES] = math.nan
        block = next(iter(kept.values()))
        table = decode.BlockTable(block, addresses, self.lengths)
        return table.attention(layer, self.q, prefix=self.prefix, new=new)


def case_of(
    dtype: torch.dtype, lengths: list[int], *, heads: tuple[int, int] = (2, 2), D: int = 64, P: int = 0, seed: int = 0
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    (H, G), N, S = heads, len(lengths), max(lengths) + 2

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    prefix = (random(P, G, D), random(P, G, D)) if P else None
    # As the cache lies: a head's places beside each other.
    case = Case(
        random(N, H, D), random(N, G, S, D).transpose(1, 2), random(N, G, S, D).transpose(1, 2), torch.tensor(lengths),
        prefix,
    )  # fmt: skip
    for n, length in enumerate(lengths):
        case.k[n, length:] = case.v[n, length:] = math.nan
    return case


def blocks_of(case: Case, layer: int) -> tuple[dict[int, Tensor], Tensor]:
    """The case's cache in blocks by their addresses, filled token by token, and each row's addresses."""
    (N, _, D), G = case.q.shape, case.k.shape[2]
    W = -(-int(case.lengths.max()) // decode.PLACES)
    blocks = [decode.new_block(2, G, D, case.q).fill_(math.nan) for _ in range(max(1, N * W))]
    addresses = torch.tensor([block.data_ptr() for block in blocks][::-1][: N * W], dtype=torch.int64).view(N, W)
    rows = torch.arange(N).repeat_interleave(case.lengths)
    places = torch.cat([torch.arange(int(length)) for length in case.lengths])
    if len(rows):
        table = decode.BlockTable(blocks[0], addresses, case.lengths)
        table.fill(layer, rows, places, case.k[rows, places], case.v[rows, places])
    return {block.data_ptr(): block for block in blocks}, addresses


def limit(exact: Tensor) -> Tensor:
    """The rounding of the result in bf16, and float32's of the sums: 100 roundings of values of 1."""
    return 100 * torch.finfo(torch.float32).eps + exact.abs() * torch.finfo(torch.bfloat16).eps / 2


def is_close(got: Tensor, exact: Tensor) -> bool:
    bound = limit(exact) if got.dtype == torch.bfloat16 else limit(exact * 0)
    return bool(((got.double() - exact).abs() <= bound).all())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=5),
    group=st.integers(1, 10),
    G=st.integers(1, 3),
    D=st.sampled_from([8, 20, 32, 64, 256]),
    P=st.sampled_from([0, 1, 15, 70]),
    seed=st.integers(0, 100),
)
def test_it_is_the_equation(
    dtype: torch.dtype, lengths: list[int], group: int, G: int, D: int, P: int, seed: int
) -> None:
    case = case_of(dtype, lengths, heads=(group * G, G), D=D, P=P, seed=seed)
    exact = case.exact()
    assert is_close(case.in_rows(), exact)
    assert is_close(case.in_blocks(), exact)
    if min(lengths):
        assert is_close(case.in_blocks(last_is_new=True), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("more", [-1, 1])
def test_the_limit_rejects_a_place_too_many_or_too_few(dtype: torch.dtype, more: int) -> None:
    case = case_of(dtype, [70, 33, 80, 5], P=20)
    case.k.nan_to_num_(0.0)
    case.v.nan_to_num_(0.0)
    apart = (case.in_rows().double() - case.exact(more)).abs()
    assert (apart > limit(case.exact())).float().mean() > 0.8


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(threads: None, dtype: torch.dtype) -> None:
    case = case_of(dtype, [70, 3, 0, 129, 41, 1], heads=(6, 3), P=17)
    found = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        found.append((case.in_rows(), case.in_blocks()))
    for rows, blocks in found[1:]:
        assert torch.equal(rows, found[0][0])
        assert torch.equal(blocks, found[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_is_torchs(dtype: torch.dtype) -> None:
    """Scores of infinity, of minus infinity at some places or at all, NaN; values of infinity."""
    case = case_of(dtype, [40] * 6)
    case.q[:] = case.q.abs()
    case.k[0, 20], case.k[1, 20], case.k[2, :40], case.k[3, 20] = math.inf, -math.inf, -math.inf, math.nan
    case.k[4, :20] = -math.inf
    case.v[5, 20] = math.inf
    got, expected = case.in_rows(), attention_decode(case.q, case.k, case.v, case.lengths, impl="torch")
    assert torch.equal(got.isnan(), expected.isnan())
    assert [bool(row.isnan().all()) for row in got] == [True, False, True, True, False, False]
    assert torch.equal(got.isinf(), expected.isinf())
    assert torch.equal(case.in_blocks().isnan(), expected.isnan())


def test_the_exponential_is_within_two_roundings() -> None:
    """By the weight of a place whose score lies x below another's; and what the sum and the division round."""
    x = torch.linspace(-87, 0, 20_001)
    q, k, v = x.view(-1, 1, 1), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    N = len(x)
    lengths = torch.full((N,), 2)
    got = attention_decode(q, k.repeat(N, 1, 1, 1), v.repeat(N, 1, 1, 1), lengths, scale=1.0, impl="compiled")
    exact = torch.sigmoid(x.double())
    assert float(((got.flatten().double() - exact) / exact).abs().max()) < 4 * 2.0**-24 * 1.01


def test_what_is_filled_is_what_was_given_and_nothing_else() -> None:
    case = case_of(torch.bfloat16, [21, 16, 1], heads=(3, 3), D=8)
    kept, addresses = blocks_of(case, layer=1)
    for n, length in enumerate(case.lengths.tolist()):
        for place in range(length):
            block = kept[int(addresses[n, place // 16])]
            assert torch.equal(block[1, :, 0, place % 16], case.k[n, place])
            assert torch.equal(block[1, :, 1, place % 16], case.v[n, place])
    whole = torch.stack([*kept.values()])
    assert whole[:, 0].isnan().all()
    assert int((~whole[:, 1].isnan()).sum()) == 2 * 3 * 8 * (21 + 16 + 1)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lengths": torch.tensor([3, 17])}, "got lengths from 3 to 17, expected 0 to 16"),
        ({"lengths": torch.tensor([3, -1])}, "got lengths from -1 to 3, expected 0 to 16"),
        ({"layer": 2}, "got layer 2, expected 0 to 1"),
        ({"addresses": torch.zeros(3, 1, dtype=torch.int64)}, r"got addresses \(3, 1\)"),
        ({"q": torch.zeros(2, 3, 8)}, "got 3 heads of queries, expected a multiple of the 2 of keys"),
        ({"q": torch.zeros(2, 2, 8, dtype=torch.float64)}, r"expected \[2 or more, H, 8\] torch.float32"),
        ({"q": torch.zeros(2, 2, 16)}, r"expected \[2 or more, H, 8\]"),
        ({"q": torch.zeros(2, 2, 8, dtype=torch.bfloat16)}, r"expected \[2 or more, H, 8\] torch.float32"),
        ({"block": torch.zeros(2, 2, 2, 15, 8)}, "got a block"),
        ({"new": (torch.zeros(2, 1, 8), torch.zeros(2, 2, 8))}, "got new"),
        ({"new": 2 * (torch.zeros(2, 2, 8),), "lengths": torch.tensor([0, 1])}, "got a length of 0"),
        ({"prefix": 2 * (torch.zeros(4, 1, 8),)}, r"got a prefix \(4, 1, 8\)"),
    ],
)
def test_what_would_be_read_outside_is_refused(changed: dict[str, Any], said: str) -> None:
    block = decode.new_block(2, 2, 8, torch.zeros(1)).zero_()
    given: dict[str, Any] = {
        "q": torch.zeros(2, 2, 8), "block": block, "addresses": torch.full((2, 1), block.data_ptr()), "layer": 0,
        "lengths": torch.tensor([3, 1]),
    }  # fmt: skip

    def answered(layer: int, block: Tensor, addresses: Tensor, lengths: Tensor, **rest: Any) -> Tensor:
        return decode.BlockTable(block, addresses, lengths).attention(layer, **rest)

    answered(**given)
    with pytest.raises(ValueError, match=said):
        answered(**{**given, **changed})


def test_rows_behind_the_sequences_see_and_write_nothing() -> None:
    """As a step is padded to few sizes: the others have the same bits, and no place is written for the padding."""
    case = case_of(torch.bfloat16, [5, 33, 17], P=3)
    alone = case.in_blocks(last_is_new=True)
    kept, addresses = blocks_of(case, 1)
    rows, last = torch.arange(3), case.lengths - 1
    more = torch.full((2, 2, 64), math.nan, dtype=torch.bfloat16)  # no number of theirs may come near the others
    q, k, v = (torch.cat([x, more]) for x in (case.q, case.k[rows, last], case.v[rows, last]))
    table = decode.BlockTable(next(iter(kept.values())), addresses, case.lengths)
    found = table.attention(1, q, prefix=case.prefix, new=(k, v))
    assert torch.equal(found[:3], alone)
    assert not found[3:].any()
    with pytest.raises(ValueError, match="got q"):
        table.attention(1, q[:2], prefix=case.prefix)


def test_places_outside_are_not_filled() -> None:
    block = decode.new_block(1, 2, 8, torch.zeros(1))
    addresses, kv = torch.tensor([[block.data_ptr()]]), torch.zeros(1, 2, 8)
    for rows, places, said in (([1], [0], "got rows from 1 to 1"), ([0], [16], "got places from 16 to 16")):
        with pytest.raises(ValueError, match=said):
            decode.BlockTable(block, addresses, torch.tensor([0])).fill(
                0, torch.tensor(rows), torch.tensor(places), kv, kv
            )


def test_where_there_is_no_code_torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(torch.float32, [5, 9], D=300)
    with pytest.raises(ValueError, match="the head dim is 300"):
        case.in_rows()
    assert is_close(attention_decode(case.q, case.k, case.v, case.lengths), case.exact())
    monkeypatch.setattr(support, "why_not_compiled", lambda *_: "it is switched off")
    case = case_of(torch.float32, [5, 9])
    assert is_close(attention_decode(case.q, case.k, case.v, case.lengths), case.exact())
    with pytest.raises(ValueError, match="it is switched off"):
        case.in_rows()
