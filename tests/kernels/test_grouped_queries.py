"""Grouped queries in torch: heads of queries that share heads of keys and values, beside copies of those."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fastft_kernels
import pytest
import torch
from fastft_kernels import attention_torch
from fastft_kernels.attention_decode import attention_decode
from fastft_kernels.attention_varlen import attention_varlen
from torch import Tensor
from torch.nn import functional as F

UNTIL = torch.tensor([12, 12, 5, 5, 5, 9, 9, 9, 9, 12, 12, 12], dtype=torch.int32)  # a prefix of 2, three documents
GROUPS = [(2, 2), (4, 2), (6, 2), (5, 1)]
"""Heads of queries and of keys."""


def heads(H: int, G: int, *, T: int = 12, D: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(T, n, D, generator=generator, dtype=dtype).requires_grad_() for n in (H, G, G)]


def copied(k: Tensor, H: int) -> Tensor:
    """As many heads of keys as of queries, one after the other, as transformers' `repeat_kv` has them."""
    return k[:, :, None].expand(-1, -1, H // k.shape[1], -1).reshape(k.shape[0], H, -1)


def dense(q: Tensor, k: Tensor, v: Tensor, until: Tensor, rows: Tensor | None = None) -> Tensor:
    """torch's own attention over copies of keys and values."""
    token = torch.arange(len(until))
    asked = token if rows is None else rows
    mask = (token <= asked[:, None]) & (asked[:, None] < until)
    by_head = (x.transpose(0, 1) for x in (q, copied(k, q.shape[1]), copied(v, q.shape[1])))
    return F.scaled_dot_product_attention(*by_head, attn_mask=mask).transpose(0, 1)


def with_gradients(out: Tensor, of: list[Tensor]) -> Iterator[Tensor]:
    yield out
    yield from torch.autograd.grad((out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum(), of)


def assert_same(a: Iterator[Tensor], b: Iterator[Tensor], atol: float = 1e-12) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        assert torch.allclose(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize(("H", "G"), GROUPS)
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("kept", [True, False])
def test_beside_copies(H: int, G: int, impl: Any, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_torch, "KEPT_PAIRS", 1 << 17 if kept else 0)
    made = heads(H, G)
    found = fastft_kernels.attention(*made, UNTIL, impl=impl)
    assert_same(with_gradients(found, made), with_gradients(dense(*made, UNTIL), made))


@pytest.mark.parametrize("rows", [[], [4], [0, 4, 4, 11]])
def test_some_queries(rows: list[int]) -> None:
    q, k, v = heads(6, 2)
    asked = torch.tensor(rows, dtype=torch.int64)
    made = [q.detach()[asked].requires_grad_(), k, v]
    found = fastft_kernels.attention(*made, UNTIL, q_rows=asked, impl="torch")
    assert_same(with_gradients(found, made), with_gradients(dense(*made, UNTIL, asked), made))


def test_many_groups_of_tiles() -> None:
    """Tiles of other sizes are computed apart, and put together by their places."""
    lengths = [3, 400, 10, 10, 10, 200]
    ends = torch.tensor(lengths).cumsum(0).repeat_interleave(torch.tensor(lengths))
    tiles = fastft_kernels.plan_tiles(ends)
    assert len(tiles) > 1
    made = heads(4, 2, T=len(ends), D=4)
    found = fastft_kernels.attention(*made, ends, tiles=tiles, impl="torch")
    assert_same(with_gradients(found, made), with_gradients(dense(*made, ends), made))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_rows_of_equal_length(impl: Any) -> None:
    made = heads(6, 2)
    until = torch.arange(4, 13, 4).repeat_interleave(4)
    found = fastft_kernels.attention(*made, until, row_length=4, impl=impl)
    assert_same(with_gradients(found, made), with_gradients(dense(*made, until), made))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_packed_sequences_and_the_log_sum_exp(impl: Any) -> None:
    made = heads(4, 2)
    bounds = torch.tensor([0, 5, 6, 12])
    until = torch.tensor([5] * 5 + [6] + [12] * 6)
    found, lse, _ = attention_varlen(*made, bounds, bounds, return_attn_probs=True, impl=impl)
    assert_same(with_gradients(found, made), with_gradients(dense(*made, until), made))
    q, k = made[0], copied(made[1], 4)
    assert torch.allclose(lse[3, 5], (q[5, 3] @ k[5, 3]) / 8**0.5, atol=1e-12)  # one token sees itself alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    made = heads(6, 2, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in made]
    found = fastft_kernels.attention(*made, UNTIL, impl="torch")
    atol = 1e-5 if dtype == torch.float32 else 0.05
    assert_same((x.double() for x in with_gradients(found, made)), with_gradients(dense(*wide, UNTIL), wide), atol)
    assert found.dtype == dtype


def test_heads_the_wrong_way_round_are_told_apart() -> None:
    """Head h reads `h // 2`, not `h % 2`: the comparison above sees the difference."""
    q, k, v = heads(4, 2)
    wrong = fastft_kernels.attention(q, k.roll(1, dims=1), v.roll(1, dims=1), UNTIL, impl="torch")
    assert (wrong - dense(q, k, v, UNTIL)).abs().max() > 0.1


@pytest.mark.parametrize(("H", "G"), GROUPS)
@pytest.mark.parametrize("P", [0, 4])
def test_decode(H: int, G: int, P: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, H, 8), (3, 5, G, 8), (3, 5, G, 8), (P, G, 8), (P, G, 8)]
    q, *caches = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    lengths = torch.tensor([1, 2, 5])
    for impl in ("torch", "reference", "auto"):
        out = attention_decode(q, *caches[:2], lengths, prefix_k=caches[2], prefix_v=caches[3], impl=impl)
        for n, length in enumerate(lengths.tolist()):
            k, v = (torch.cat([caches[i + 2], caches[i][n, :length]]) for i in (0, 1))
            until, last = torch.full((len(k),), len(k)), torch.tensor([len(k) - 1])
            assert torch.allclose(out[n : n + 1], dense(q[n : n + 1], k, v, until, last), atol=1e-12)


@pytest.mark.parametrize("G", [0, 3, 8])
def test_heads_that_do_not_divide(G: int) -> None:
    q, k, v = heads(4, 4)
    k, v = (torch.zeros(12, G, 8, dtype=torch.float64) for _ in range(2))
    with pytest.raises(ValueError, match=f"expected heads of keys that divide the heads of queries: 4 % {G} is not 0"):
        fastft_kernels.attention(q, k, v, UNTIL)
