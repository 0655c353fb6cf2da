"""Interval attention: softmax(q k^T * scale + mask) v, where the mask is one integer for each key.

Key k is visible to query q exactly when `k <= q < visible_until[k]`. That one rule says plain causal attention
(`visible_until = T`), packed documents (each key's document end) and shared prefixes (the end of the group behind
the prefix).

Shapes: T tokens, R queries (T, or the length of `q_rows`), H heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastft_kernels.tiles import TileGroup, plan_tiles

Impl = Literal["auto", "torch", "reference"]

KEPT_PAIRS = 1 << 17
"""Pairs, of all tiles of a call, up to which their probabilities are kept for the backward pass."""


def visible_mask(visible_until: Tensor, q_rows: Tensor | None = None) -> Tensor:
    """`[R, T]` boolean mask of a `[T]` interval: entry (r, k) is True where query `q_rows[r]` sees key k."""
    token = torch.arange(visible_until.numel(), device=visible_until.device)
    query = token if q_rows is None else q_rows
    return (token[None, :] <= query[:, None]) & (query[:, None] < visible_until[None, :])


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The equation, step by step: q `[..., R, D]`, k and v `[..., T, D]`, mask `[R, T]` -> `[..., R, D]`."""
    scores = (q @ k.transpose(-1, -2)) * scale
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ v


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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    *,
    q_rows: Tensor | None = None,
    scale: float | None = None,
    row_length: int | None = None,
    tiles: Sequence[TileGroup] | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of packed tokens over the keys that each one sees.

    Args:
        q: `[T, H, D]`, or `[R, H, D]` with `q_rows`.
        k, v: `[T, H, D]`, in the dtype and on the device of `q`.
        visible_until: `[T]` integers; key k is visible to query q exactly when `k <= q < visible_until[k]`.
        q_rows: `[R]` sorted int64: the tokens that ask, where not all of them do.
        scale: factor of the scores; `1 / sqrt(D)` where it is not given.
        row_length: W where the tokens are `T / W` rows of W tokens each that see only their own row causally
            (`visible_until` says the same): attention then runs on `[T / W, W]`.
        tiles: what `plan_tiles(visible_until, q_rows)` gives; computed here where it is not given, which waits for
            the device.
        impl: `reference` computes the equation above step by step, over all T x T scores; `torch` computes the tiles
            that are needed, or calls torch's fused attention on rows of equal length; `auto` is `torch`.

    Returns:
        `[T, H, D]` (`[R, H, D]` with `q_rows`) in the dtype of `q`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(q, k, v, visible_until, q_rows, row_length)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if row_length is not None and q_rows is None:
        return _rows_of_equal_length(q, k, v, row_length, scale, impl)
    if impl == "reference":
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return _reference(q, k, v, visible_mask(visible_until, q_rows), scale).transpose(0, 1)
    apply: Callable[..., Tensor] = _Tiled.apply
    return apply(q, k, v, plan_tiles(visible_until, q_rows) if tiles is None else tiles, scale)


def _rows_of_equal_length(q: Tensor, k: Tensor, v: Tensor, W: int, scale: float, impl: Impl) -> Tensor:
    T, H, D = q.shape
    q, k, v = (x.view(T // W, W, H, D).transpose(1, 2) for x in (q, k, v))  # [B, H, W, D]
    if impl == "reference":
        out = _reference(q, k, v, torch.ones(W, W, dtype=torch.bool, device=q.device).tril(), scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2).reshape(T, H, D)


def _check(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, q_rows: Tensor | None, row_length: int | None
) -> None:
    queries = k.shape[0] if q_rows is None else q_rows.numel()
    if k.ndim != 3 or k.shape != v.shape or q.shape != (queries, *k.shape[1:]):
        raise ValueError(
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, expected k and v [T, H, D] and q "
            "the same (or [R, H, D] with q_rows [R])"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"got q {q.dtype}, k {k.dtype}, v {v.dtype}, expected one floating dtype")
    if visible_until.shape != k.shape[:1] or visible_until.is_floating_point():
        raise ValueError(
            f"got visible_until {tuple(visible_until.shape)} {visible_until.dtype}, expected [{k.shape[0]}] integers"
        )
    if row_length is not None and (row_length < 1 or k.shape[0] % row_length):
        raise ValueError(f"got row_length {row_length}, expected a divisor of T = {k.shape[0]}")
