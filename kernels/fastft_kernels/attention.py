"""Interval attention: softmax(q k^T * scale + mask) v, where the mask is one integer for each key.

Key k is visible to query q exactly when `k <= q < visible_until[k]`. That one rule says plain causal attention
(`visible_until = T`), packed documents (each key's document end) and shared prefixes (the end of the group behind
the prefix).

Shapes: T tokens, H heads, D head dim.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Impl = Literal["auto", "torch", "reference"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    *,
    scale: float | None = None,
    row_length: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of packed tokens over the keys that each one sees.

    Args:
        q, k, v: `[T, H, D]`, one floating dtype, one device.
        visible_until: `[T]` integers; key k is visible to query q exactly when `k <= q < visible_until[k]`.
        scale: factor of the scores; `1 / sqrt(D)` where it is not given.
        row_length: W where the tokens are `T / W` rows of W tokens each that see only their own row causally
            (`visible_until` says the same): attention then runs on `[T / W, W]`.
        impl: `reference` computes the equation above step by step; `torch` calls torch's fused attention; `auto` is
            `torch`.

    Returns:
        `[T, H, D]` in the dtype of `q`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(q, k, v, visible_until, row_length)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    attend = _reference if impl == "reference" else _torch
    return attend(q, k, v, visible_until, scale, row_length)


def visible_mask(visible_until: Tensor) -> Tensor:
    """`[T, T]` boolean mask of a `[T]` interval: entry (q, k) is True where query q sees key k."""
    token = torch.arange(visible_until.numel(), device=visible_until.device)
    return (token[None, :] <= token[:, None]) & (token[:, None] < visible_until[None, :])


def _reference(q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, scale: float, row_length: int | None) -> Tensor:
    T, H, D = q.shape
    W = row_length or T
    if row_length is None:
        mask = visible_mask(visible_until)
    else:
        mask = torch.ones(W, W, dtype=torch.bool, device=q.device).tril()
    q, k, v = (x.view(T // W, W, H, D).transpose(1, 2) for x in (q, k, v))  # [B, H, W, D]
    scores = (q @ k.transpose(-1, -2)) * scale  # [B, H, W, W]
    probabilities = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return (probabilities @ v).transpose(1, 2).reshape(T, H, D)


def _torch(q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, scale: float, row_length: int | None) -> Tensor:
    T, H, D = q.shape
    W = row_length or T
    q, k, v = (x.view(T // W, W, H, D).transpose(1, 2) for x in (q, k, v))  # [B, H, W, D]
    if row_length is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_mask(visible_until), scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2).reshape(T, H, D)


def _check(q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, row_length: int | None) -> None:
    if q.ndim != 3 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, expected the same shape [T, H, D]"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"got q {q.dtype}, k {k.dtype}, v {v.dtype}, expected one floating dtype")
    if visible_until.shape != q.shape[:1] or visible_until.is_floating_point():
        raise ValueError(
            f"got visible_until {tuple(visible_until.shape)} {visible_until.dtype}, expected [{q.shape[0]}] integers"
        )
    if row_length is not None and (row_length < 1 or q.shape[0] % row_length):
        raise ValueError(f"got row_length {row_length}, expected a divisor of T = {q.shape[0]}")
