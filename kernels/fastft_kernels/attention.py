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
from torch.nn import functional as F

from fastft_kernels.blocks import Block, plan_blocks

Impl = Literal["auto", "torch", "reference"]


def visible_mask(visible_until: Tensor, q_rows: Tensor | None = None) -> Tensor:
    """`[R, T]` boolean mask of a `[T]` interval: entry (r, k) is True where query `q_rows[r]` sees key k."""
    token = torch.arange(visible_until.numel(), device=visible_until.device)
    query = token if q_rows is None else q_rows
    return (token[None, :] <= query[:, None]) & (query[:, None] < visible_until[None, :])


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The equation, step by step: q `[..., R, D]`, k and v `[..., T, D]`, mask `[R, T]` -> `[..., R, D]`."""
    scores = (q @ k.transpose(-1, -2)) * scale
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ v


def _blockwise_forward(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], scale: float) -> tuple[Tensor, Tensor]:
    """Online softmax over the blocks (Milakov and Gimelshein 2018, arXiv:1805.02867).

    Takes q `[H, R, D]`, k and v `[H, T, D]`; gives the output `[H, R, D]` and the log-sum-exp `[H, R]`, both in at
    least float32.
    """
    H, R, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(H, R, D, dtype=wide)
    largest = q.new_full((H, R, 1), -math.inf, dtype=wide)
    total = q.new_zeros(H, R, 1, dtype=wide)
    for block in blocks:
        rows = slice(block.q0, block.q1)
        scores = _scores(q, k, block, scale, wide)
        new_largest = torch.maximum(largest[:, rows], scores.amax(dim=-1, keepdim=True))
        shift = new_largest.clamp_min(torch.finfo(wide).min)  # a row that sees nothing here: exp(-inf - min) is 0
        correction = (largest[:, rows] - shift).exp_()
        weights = scores.sub_(shift).exp_()
        total[:, rows] = total[:, rows] * correction + weights.sum(dim=-1, keepdim=True)
        product = torch.bmm(weights.to(v.dtype), v[:, block.k0 : block.k1])
        out[:, rows] = out[:, rows] * correction + product
        largest[:, rows] = new_largest
    return out / total, (largest + total.log()).squeeze(-1)


def _blockwise_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Sequence[Block], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_blockwise_forward`, with the probabilities computed again from the log-sum-exp (Dao et al. 2022,
    "FlashAttention", algorithm 4, arXiv:2205.14135)."""
    wide = lse.dtype
    dq, dk, dv = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = (grad.to(wide) * out).sum(dim=-1, keepdim=True)
    for block in blocks:
        rows, keys = slice(block.q0, block.q1), slice(block.k0, block.k1)
        weights = _scores(q, k, block, scale, wide).sub_(lse[:, rows, None]).exp_()
        d_weights = torch.bmm(grad[:, rows], v[:, keys].transpose(1, 2)).to(wide)
        d_scores = d_weights.sub_(delta[:, rows]).mul_(weights).mul_(scale).to(q.dtype)
        dv[:, keys] += torch.bmm(weights.to(grad.dtype).transpose(1, 2), grad[:, rows])
        dq[:, rows] += torch.bmm(d_scores, k[:, keys])
        dk[:, keys] += torch.bmm(d_scores.transpose(1, 2), q[:, rows])
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, block: Block, scale: float, wide: torch.dtype) -> Tensor:
    """The scores of a block, `[H, queries, keys]`, minus infinity where a key is not visible."""
    product = torch.bmm(q[:, block.q0 : block.q1], k[:, block.k0 : block.k1].transpose(1, 2))
    scores = product.to(wide).mul_(scale)
    return scores if block.mask is None else scores.masked_fill_(~block.mask, -math.inf)


class _Blockwise(torch.autograd.Function):
    """Blockwise attention on `[R, H, D]` and `[T, H, D]`; saves no probabilities."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [H, R or T, D]
        out, lse = _blockwise_forward(q, k, v, blocks, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out.to(q.dtype).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = grads[0].transpose(0, 1)
        d_qkv = _blockwise_backward(grad, q, k, v, out, lse, ctx.blocks, ctx.scale)
        dq, dk, dv = (d.to(q.dtype).transpose(0, 1) for d in d_qkv)
        return dq, dk, dv, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    *,
    q_rows: Tensor | None = None,
    scale: float | None = None,
    row_length: int | None = None,
    blocks: Sequence[Block] | None = None,
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
        blocks: what `plan_blocks(visible_until, q_rows)` gives; computed here where it is not given, which waits for
            the device.
        impl: `reference` computes the equation above step by step, over all T x T scores; `torch` computes the blocks
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
    if blocks is None:
        blocks = plan_blocks(visible_until.cpu(), None if q_rows is None else q_rows.cpu())
        blocks = [block.to(q.device) for block in blocks]
    apply: Callable[..., Tensor] = _Blockwise.apply
    return apply(q, k, v, blocks, scale)


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
