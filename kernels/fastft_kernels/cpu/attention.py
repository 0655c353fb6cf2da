"""Interval attention and its gradients on a CPU, in one call each: `attention.c`.

Letters: T tokens, R queries, H heads of queries, G heads of keys and values, D head dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft_kernels.cpu import given
from fastft_kernels.cpu.function import applied
from fastft_kernels.cpu.library import run
from fastft_kernels.once import differentiable_once


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("row", ctypes.c_int64), ("head", ctypes.c_int64)]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, _Rows) for name in ("q", "k", "v", "out", "d_out", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "until", "asked")),
        *((name, ctypes.c_int64) for name in ("T", "R", "H", "G", "D")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("is_narrow", "is_narrow_of_keys", "has_failed")),
    ]  # fmt: skip


def attention(
    q: Tensor, k: Tensor, v: Tensor, until: Tensor, rows: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention with gradients, in torch's threads: the same bits for any number of them.

    Args:
        q: `[R, H, D]`; k and v: `[T, G, D]` where G divides H; float32 or bf16 on the CPU, of any strides.
        until: `[T]` integers; key k is visible to query q exactly when `k <= q < until[k]`.
        rows: `[R]` integers, the tokens that the queries are; 0 to T - 1 where they are not given.
        scale: factor of the scores.

    Returns:
        `[R, H, D]` in the dtype of q, no number where a query sees nothing, and the log-sum-exps `[H, R]` float32,
        without gradient.
    """
    asked = None if rows is None else rows.to(torch.int64).contiguous()
    if until.dtype == torch.int64:
        limits = torch.iinfo(torch.int32)
        until = until.clamp(limits.min, limits.max)
    found: tuple[Tensor, Tensor] = applied(
        _Interval, *map(given.in_rows, (q, k, v)), until.to(torch.int32).contiguous(), asked, scale
    )
    return found


def split_heads(product: Tensor, n: int, H: int) -> tuple[Tensor, ...]:
    """A product `[T, n H D]` as n views of heads, `[T, H, D]`: queries, keys and values of a layer, or two of them.

    The gradients that `attention` gives to such views are views of one tensor, which is then the product's: torch's own
    `unbind` copies them into another.
    """
    heads: tuple[Tensor, ...] = applied(_Heads, product, n, H)
    return heads


class _Heads(torch.autograd.Function):
    """See `split_heads`."""

    @staticmethod
    def forward(_: Any, product: Tensor, n: int, H: int) -> tuple[Tensor, ...]:
        heads: Tensor = product.detach().unflatten(1, (n, H, -1))
        return heads.unbind(1)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole = None if torch.is_grad_enabled() else grads[0]._base
        if whole is None or not _are_all_of(whole, grads):
            whole = torch.stack(grads, 1)
        return whole.flatten(1), None, None


def _are_all_of(whole: Tensor, views: Sequence[Tensor]) -> bool:
    """Whether `views` are those of `whole.unbind(1)`."""
    T, *rest = views[0].shape
    return whole.shape == (T, len(views), *rest) and all(
        view._base is whole and view.data_ptr() == part.data_ptr() and view.stride() == part.stride()
        for view, part in zip(views, whole.unbind(1), strict=True)
    )


def _beside(*like: Tensor) -> tuple[Tensor, ...]:
    """New tensors of one shape `[T, H, D]`, side by side in one `[T, n, H, D]`."""
    T, H, D = like[0].shape
    return torch.empty(T, len(like), H, D, dtype=like[0].dtype).unbind(1)


class _Interval(torch.autograd.Function):
    """See `attention`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, until: Tensor, asked: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        _check(q, k, v, until, asked)
        R, H, _ = q.shape
        out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(H, R)
        _run("fastft_attention", _given(q, k, v, out, lse, until, asked, scale), q)
        ctx.save_for_backward(q, k, v, out, lse, until, asked)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, until, asked = ctx.saved_tensors
        (T, G, D), H = k.shape, q.shape[1]
        if not q.numel():
            return *map(torch.zeros_like, (q, k, v)), None, None, None
        d_out = given.in_rows(grads[0])
        given.at(d_out, *q.shape, dtype=q.dtype)
        dq, dk, dv = _beside(q, k, v) if q.shape == k.shape else (torch.empty(q.shape, dtype=q.dtype), *_beside(k, v))
        arguments = _given(q, k, v, out, lse, until, asked, ctx.scale)
        arguments.d_out, arguments.dq = _rows(d_out), _rows(dq)
        # Heads that share keys each write their own sums, which are added up in their order.
        apart = None if G == H else torch.empty(2, T, H, D)
        arguments.dk, arguments.dv = (_rows(x) for x in ((dk, dv) if apart is None else apart))
        arguments.is_narrow_of_keys = apart is None and arguments.is_narrow
        _run("fastft_attention_backward", arguments, q)
        if apart is not None:
            arguments.k, arguments.v, arguments.dk, arguments.dv = (_rows(x) for x in (*apart, dk, dv))
            _run("fastft_attention_sums", arguments, q)
        return dq, dk, dv, None, None, None


def _given(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, until: Tensor, asked: Tensor | None, scale: float
) -> _Attention:
    (R, H, D), (T, G, _) = q.shape, k.shape
    return _Attention(
        q=_rows(q), k=_rows(k), v=_rows(v), out=_rows(out), lse=lse.data_ptr(), until=until.data_ptr(),
        asked=None if asked is None else asked.data_ptr(), T=T, R=R, H=H, G=G, D=D, scale=scale,
        is_narrow=given.is_narrow(q),
    )  # fmt: skip


def _rows(x: Tensor) -> _Rows:
    row, head, _ = x.stride()
    return _Rows(x.data_ptr(), row, head)


def _check(q: Tensor, k: Tensor, v: Tensor, until: Tensor, asked: Tensor | None) -> None:
    """What is looked at once, before the forward pass: the others are made here, but for what flows in."""
    (R, H, D), (T, G, _) = q.shape, k.shape
    given.at(q, R, H, D)
    given.at(k, T, G, D, dtype=q.dtype)
    given.at(v, T, G, D, dtype=q.dtype)
    given.at_integers("visible_until", until, T, torch.int32)
    given.at_integers("rows", asked, R)


def _run(name: str, arguments: _Attention, q: Tensor) -> None:
    run(name, arguments, threads=given.threads(q.numel()))
    if arguments.has_failed:
        raise MemoryError("got no memory for a thread's part of attention, expected a few rows of keys for each thread")
