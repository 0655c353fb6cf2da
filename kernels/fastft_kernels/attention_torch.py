"""Interval attention in torch alone: the tiles of `plan_tiles` as batched products, or torch's fused attention where
all rows have one length.

Letters: T tokens, R queries, H heads of queries, G heads of keys and values, D head dim. The queries of the H / G heads
that share a head of keys are rows of one tile, the heads of a token side by side: each product reads the shared keys
once, and sums their gradient over the heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft_kernels.once import differentiable_once
from fastft_kernels.tiles import TileGroup

KEPT_PAIRS = 1 << 17
"""Pairs, of all tiles of a call, up to which their probabilities are kept for the backward pass."""


def in_tiles(q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[TileGroup], scale: float) -> Tensor:
    """q `[R, H, D]`, k and v `[T, G, D]` -> `[R, H, D]`, over the tiles of `plan_tiles`."""
    apply: Callable[..., Tensor] = _Tiled.apply
    return apply(q, k, v, tiles, scale)


def in_rows(q: Tensor, k: Tensor, v: Tensor, W: int, scale: float) -> Tensor:
    """q `[T, H, D]`, k and v `[T, G, D]` -> `[T, H, D]`: T / W rows of W tokens, each causal by itself."""
    q, k, v = (x.unflatten(0, (-1, W)).transpose(1, 2) for x in (q, k, v))  # [B, H, W, D], [B, G, W, D]
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


class _Tiled(torch.autograd.Function):
    """Attention over the tiles of `plan_tiles`; q `[R, H, D]`, k and v `[T, G, D]` -> `[R, H, D]`.

    Probabilities are kept for the backward pass where they are small, and else computed again, tile by tile: their
    memory would grow with the number of pairs.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[TileGroup], scale: float) -> Tensor:
        R, whole = q.shape[0], sum(group.queries.numel() for group in groups)
        q = _by_key_head(F.pad(q * scale, (0, 0, 0, 0, 0, whole - R)), k.shape[1])  # [G, whole, H / G, D]
        k, v = (_by_key_head(x, x.shape[1]) for x in (k, v))  # [G, T, 1, D]
        ctx.of_q = (q.shape[0], *q.shape[2:])
        keep = sum(group.mask.numel() for group in groups) <= KEPT_PAIRS
        out: Tensor = k.new_empty(whole, *ctx.of_q)
        kept = []
        for group in groups:
            weights = _weights(_take(q, group.queries), _take(k, group.keys), group.mask)
            _put(out, group, len(groups), torch.bmm(weights, _take(v, group.keys)))
            if keep:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.groups, ctx.scale = groups, scale
        return out[:R].flatten(1, 2)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        grad = grads[0]
        R, (G, whole, _, D), T = grad.shape[0], q.shape, k.shape[1]
        grad = _by_key_head(F.pad(grad, (0, 0, 0, 0, 0, whole - R)), G)
        wide = torch.promote_types(q.dtype, torch.float32)  # a shared key's gradient is a sum over all that see it
        dq = q.new_empty(whole, *ctx.of_q)
        dk, dv = (q.new_zeros(T, G, 1, D, dtype=wide) for _ in range(2))
        for index, group in enumerate(ctx.groups):
            q_tile, k_tile, v_tile = _take(q, group.queries), _take(k, group.keys), _take(v, group.keys)
            d_out = _take(grad, group.queries)
            weights = kept[index] if kept else _weights(q_tile, k_tile, group.mask)
            d_weights = torch.bmm(d_out, v_tile.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            _put(dq, group, len(ctx.groups), torch.bmm(d_scores, k_tile))
            _add(dk, group, torch.bmm(d_scores.transpose(1, 2), q_tile))
            _add(dv, group, torch.bmm(weights.transpose(1, 2), d_out))
        dk, dv = (x.squeeze(2).to(q.dtype) for x in (dk, dv))
        return dq[:R].flatten(1, 2) * ctx.scale, dk, dv, None, None


def _by_key_head(x: Tensor, G: int) -> Tensor:
    """`[N, H, D]` as `[G, N, H / G, D]`: query head h reads head `h // (H / G)` of the keys."""
    by_head: Tensor = x.unflatten(1, (G, -1))
    return by_head.transpose(0, 1)


def _take(x: Tensor, indices: Tensor) -> Tensor:
    """The tiles of x `[G, N, J, D]` at indices `[B, n]`: `[G B, n J, D]`."""
    _, _, J, D = x.shape
    return x.index_select(1, indices.flatten()).view(-1, indices.shape[1] * J, D)


def _put(into: Tensor, group: TileGroup, n_groups: int, tiles: Tensor) -> None:
    """Writes tiles `[G B, t J, D]` to their queries' places in `[N, G, J, D]`; a single group has them all, in
    order."""
    rows = _rows_of(tiles, into)
    if n_groups == 1:
        into.copy_(rows)
    else:
        into.index_copy_(0, group.queries.flatten(), rows)


def _add(into: Tensor, group: TileGroup, tiles: Tensor) -> None:
    """Adds tiles `[G B, m, D]` to their keys' places in `[T, G, 1, D]`."""
    rows = _rows_of(tiles, into)
    into.index_add_(0, group.keys.flatten(), rows.to(into.dtype, memory_format=torch.contiguous_format))


def _rows_of(tiles: Tensor, into: Tensor) -> Tensor:
    """Tiles as `[B n, G, J, D]`, for rows of `[N, G, J, D]`."""
    _, G, J, D = into.shape
    return tiles.view(G, -1, J, D).transpose(0, 1)


def _weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """The probabilities of tiles: q `[G B, t J, D]`, scaled, k `[G B, m, D]`, mask `[B, t, m]` -> `[G B, t J, m]`."""
    scores = torch.bmm(q, k.transpose(1, 2))
    # Adding is several times faster than filling through a broadcast mask.
    bias = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -math.inf)
    B, t, m = mask.shape
    scores.view(-1, B, t, scores.shape[1] // t, m).add_(bias[:, :, None])
    return scores.softmax(dim=-1)
