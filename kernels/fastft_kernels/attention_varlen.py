"""Attention of packed sequences, with the arguments of flash-attention's `flash_attn_varlen_func`, in their order.

Each key is visible until its sequence ends, so `cu_seqlens` is an interval mask: `attention` does the work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft_kernels.attention import attention
from fastft_kernels.attention_plan import AttentionPlan
from fastft_kernels.support import Impl


def visible_until_of(cu_seqlens: Tensor, T: int) -> Tensor:
    """`[T]` int32 ends of the tokens' sequences, from `[N + 1]` bounds; does not wait for the device.

    Tokens behind the last bound are padding, and see themselves alone.
    """
    token = torch.arange(T, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens.contiguous(), token.to(cu_seqlens.dtype), right=True)
    last = cu_seqlens.numel() - 1
    end = cu_seqlens[sequence.clamp_max(last)]
    return torch.where(sequence <= last, end, token + 1).to(torch.int32)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    plan: AttentionPlan | None = None,
    impl: Impl = "auto",
) -> Any:
    """Causal self-attention of sequences packed end to end.

    Args:
        q, k, v: `[T, H, D]` and, of keys and values, `[T, G, D]` as in `attention`; sequence i is tokens
            `cu_seqlens[i]` to `cu_seqlens[i + 1]`.
        cu_seqlens_q, cu_seqlens_k: `[N + 1]` int32 or int64, rising from 0, and equal: a sequence's queries and keys
            are the same tokens. Tokens behind the last bound see themselves alone.
        max_seqlen_q, max_seqlen_k: taken and not needed.
        dropout_p: 0; there is no dropout.
        softmax_scale: factor of the scores; `1 / sqrt(D)` where it is not given.
        causal: True, which is the default here and not in flash-attention.
        window_size, softcap, alibi_slopes, block_table: only their defaults: they change what is computed.
        deterministic: taken; it always is.
        return_attn_probs: also return the log-sum-exps `[H, T]` float32, and None in place of probabilities that were
            kept by dropout.
        plan: for `triton`, `plan_attention(visible_until_of(cu_seqlens_q, T))`, on the device of q; without it the plan
            is made here, which waits for the device.
        impl: as of `attention`.

    Returns:
        `[T, H, D]` in the dtype of q; with `return_attn_probs` a tuple of it, the log-sum-exps and None.

    Raises:
        ValueError: an option that would compute something else, or shapes, dtypes or devices that do not fit.
    """
    _check_options(dropout_p, causal, window_size, softcap, alibi_slopes, block_table)
    _check_bounds(q, cu_seqlens_q, cu_seqlens_k)
    visible_until = visible_until_of(cu_seqlens_q, q.shape[0])
    found = attention(q, k, v, visible_until, scale=softmax_scale, plan=plan, return_lse=return_attn_probs, impl=impl)
    return (*found, None) if return_attn_probs else found


def _check_options(
    dropout_p: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    block_table: Tensor | None,
) -> None:
    refused = {
        f"dropout_p={dropout_p}, expected 0": dropout_p != 0,
        f"causal={causal}, expected True: keys behind a query are never visible": not causal,
        f"window_size={window_size}, expected (-1, -1)": tuple(window_size) != (-1, -1),
        f"softcap={softcap}, expected 0": softcap != 0,
        "alibi_slopes, expected None": alibi_slopes is not None,
        "a block_table, expected None: attention_decode takes a cache": block_table is not None,
    }
    for what, wrong in refused.items():
        if wrong:
            raise ValueError(f"got {what}")


def _check_bounds(q: Tensor, of_q: Tensor, of_k: Tensor) -> None:
    if of_q.ndim != 1 or of_q.numel() < 1 or of_q.is_floating_point() or of_q.shape != of_k.shape:
        raise ValueError(
            f"got cu_seqlens_q {tuple(of_q.shape)} {of_q.dtype}, cu_seqlens_k {tuple(of_k.shape)}, expected both "
            "[N + 1] integers"
        )
    if of_q.device != q.device:
        raise ValueError(f"got cu_seqlens_q on {of_q.device}, expected it on q's device, {q.device}")
    if of_q.device.type != "cpu" or of_k.device.type != "cpu":
        return  # looking at the values would wait for the device
    if not torch.equal(of_q, of_k):
        raise ValueError("got cu_seqlens_q and cu_seqlens_k that differ, expected them equal: this is self-attention")
    if of_q[0] != 0 or (of_q.diff() < 0).any() or of_q[-1] > q.shape[0]:
        raise ValueError(f"got cu_seqlens_q {of_q.tolist()}, expected bounds that rise from 0 to at most {q.shape[0]}")
