"""Interval attention in torch alone: the tiles of `plan_tiles` as batched products, or torch's fused attention where
all rows have one length.

Letters: T tokens, R queries, H heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastft_kernels.tiles import TileGroup

KEPT_PAIRS = 1 << 17
"""Pairs, of all tiles of a call, up to which their probabilities are kept for the backward pass."""


def in_tiles(q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[TileGroup], scale: float) -> Tensor:
    """q `[R, H, D]`, k and v `[T, H, D]` -> `[R, H, D]`, over the tiles of `plan_tiles`."""
    apply: Callable[..., Tensor] = _Tiled.apply
    return apply(q, k, v, tiles, scale)


def in_rows(q: Tensor, k: Tensor, v: Tensor, W: int, scale: float) -> Tensor:
    """`[T, H, D]` each -> `[T, H, D]`: T / W rows of W tokens, each causal by itself."""
    T, H, D = q.shape
    q, k, v = (x.view(T // W, W, H, D).transpose(1, 2) for x in (q, k, v))  # [B, H, W, D]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2).reshape(T, H, D)


class _Tiled(torch.autograd.Function):
    """Attention over the tiles of `plan_tiles`; q `[R, H, D]`, k and v `[T, H, D]` -> `[R, H, D]`.

    Probabilities are kept for the backward pass where they are small, and else computed again, tile by tile: their
    memory would grow with the number of pairs.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[TileGroup], scale: float) -> Tensor:
        R, H, D = q.shape
        whole = sum(group.queries.numel() for group in groups)
        q = F.pad(q * scale, (0, 0, 0, 0, 0, whole - R)).transpose(0, 1)  # [H, whole, D]
        k, v = k.transpose(0, 1), v.transpose(0, 1)  # [H, T, D]
        keep = sum(group.mask.numel() for group in groups) <= KEPT_PAIRS
        out = k.new_empty(whole, H, D)
        kept = []
        for group in groups:
            weights = _weights(_take(q, group.queries), _take(k, group.keys), group.mask)
            _put(out, group, len(groups), torch.bmm(weights, _take(v, group.keys)))
            if keep:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.groups, ctx.scale = groups, scale
        return out[:R]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        grad = grads[0]
        R, (H, whole, D) = grad.shape[0], q.shape
        grad = F.pad(grad, (0, 0, 0, 0, 0, whole - R)).transpose(0, 1)
        wide = torch.promote_types(q.dtype, torch.float32)  # a shared key's gradient is a sum over all that see it
        dq = q.new_empty(whole, H, D)
        dk, dv = (q.new_zeros(k.shape[1], H, D, dtype=wide) for _ in range(2))
        for index, group in enumerate(ctx.groups):
            q_tile, k_tile, v_tile = _take(q, group.queries), _take(k, group.keys), _take(v, group.keys)
            d_out = _take(grad, group.queries)
            weights = kept[index] if kept else _weights(q_tile, k_tile, group.mask)
            d_weights = torch.bmm(d_out, v_tile.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            _put(dq, group, len(ctx.groups), torch.bmm(d_scores, k_tile))
            _add(dk, group, torch.bmm(d_scores.transpose(1, 2), q_tile))
            _add(dv, group, torch.bmm(weights.transpose(1, 2), d_out))
        return dq[:R] * ctx.scale, dk.to(q.dtype), dv.to(q.dtype), None, None


def _take(x: Tensor, indices: Tensor) -> Tensor:
    """The tiles of x `[H, N, D]` at indices `[G, n]`: `[H G, n, D]`."""
    return x.index_select(1, indices.flatten()).view(-1, indices.shape[1], x.shape[2])


def _put(into: Tensor, group: TileGroup, n_groups: int, tiles: Tensor) -> None:
    """Writes tiles `[H G, t, D]` to their queries' places in `[N, H, D]`; a single group has them all, in order."""
    rows = tiles.view(into.shape[1], -1, into.shape[2]).transpose(0, 1)
    if n_groups == 1:
        into.copy_(rows)
    else:
        into.index_copy_(0, group.queries.flatten(), rows)


def _add(into: Tensor, group: TileGroup, tiles: Tensor) -> None:
    """Adds tiles `[H G, m, D]` to their keys' places in `[T, H, D]`."""
    rows = tiles.view(into.shape[1], -1, into.shape[2]).transpose(0, 1)
    into.index_add_(0, group.keys.flatten(), rows.to(into.dtype, memory_format=torch.contiguous_format))


def _weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """The probabilities of tiles: q `[H G, t, D]`, scaled, k `[H G, m, D]`, mask `[G, t, m]` -> `[H G, t, m]`."""
    scores = torch.bmm(q, k.transpose(1, 2))
    # Adding is several times faster than filling through a broadcast mask.
    bias = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -math.inf)
    scores.view(-1, *mask.shape).add_(bias)
    return scores.softmax(dim=-1)
