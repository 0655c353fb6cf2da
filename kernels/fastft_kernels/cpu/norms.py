"""Layer norm and RMS norm on a CPU, with the addition in front of them: `norms.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastft_kernels.cpu import given
from fastft_kernels.cpu.library import run
from fastft_kernels.once import differentiable_once

WIDEST = 8192
"""The widest row, as in the source."""
_CHUNKS = 64
"""Into how many chunks, at most, rows are divided, whose sums are added in their order: more than there are threads."""
_LEAST = 8
"""Rows of a chunk, at least."""


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "bias", "dy", "ds")),
        *((name, ctypes.c_void_p) for name in ("y", "s", "dx", "mean", "rstd", "partial")),
        *((name, ctypes.c_int64) for name in ("N", "C", "chunk")),
        *((f"stride_{name}", ctypes.c_int64) for name in ("x", "residual", "dy", "ds")),
        ("eps", ctypes.c_float), ("offset", ctypes.c_float),
        *((f"{name}_is_narrow", ctypes.c_int32)
          for name in ("x", "residual", "weight", "bias", "dy", "ds", "y", "s", "dx")),
    ]  # fmt: skip


class _Columns(ctypes.Structure):
    _fields_ = [
        ("partial", ctypes.c_void_p), ("out", ctypes.c_void_p), ("P", ctypes.c_int64), ("C", ctypes.c_int64),
        ("is_narrow", ctypes.c_int32),
    ]  # fmt: skip


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, residual: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`[N, C]`, rows in one piece -> y, and the sum (x itself without a residual)."""
    return _norm(x, residual, weight, bias, eps, 0.0, True, out_dtype)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, offset: float, residual: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`[N, C]`, rows in one piece -> y, and the sum (x itself without a residual)."""
    return _norm(x, residual, weight, None, eps, offset, False, out_dtype)


def _norm(x: Tensor, residual: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    apply: Callable[..., Any] = _Normed.apply
    found = apply(x, residual, *others)
    return (found, x) if residual is None else found


class _Normed(torch.autograd.Function):
    """What is kept for the backward pass: the sum, and two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        offset: float,
        centres: bool,
        out_dtype: torch.dtype,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y = torch.empty(x.shape, dtype=out_dtype)
        s = None
        if residual is not None:
            s = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
        mean = torch.empty(len(x)) if centres else None
        rstd = torch.empty(len(x))
        _run("fastft_norm", x, weight, mean, rstd, residual=residual, bias=bias, y=y, s=s, eps=eps, offset=offset)
        ctx.save_for_backward(x if s is None else s, weight, mean, rstd)
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype, None if bias is None else bias.dtype)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return y if s is None else (y, s)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        s, weight, mean, rstd = ctx.saved_tensors
        dy, ds = (*grads, None)[:2]
        dy = torch.zeros_like(s) if dy is None else dy
        needed = ctx.needs_input_grad
        x_dtype, residual_dtype, bias_dtype = ctx.dtypes
        dsum = torch.empty(s.shape, dtype=s.dtype)
        dx = torch.empty(s.shape, dtype=x_dtype) if x_dtype != s.dtype and needed[0] else None
        chunk = max(_LEAST, -(-len(s) // _CHUNKS))
        partial = torch.empty(-(-len(s) // chunk), 2, s.shape[1]) if needed[2] or needed[3] else None
        _run(
            "fastft_norm_backward", s, weight, mean, rstd, dy=_in_rows(dy), ds=None if ds is None else _in_rows(ds),
            s=dsum, dx=dx, partial=partial, chunk=chunk, offset=ctx.offset,
        )  # fmt: skip
        dw = db = None
        if partial is not None:
            dw, db = _summed(partial, torch.promote_types(weight.dtype, bias_dtype or weight.dtype))
            dw, db = dw.to(weight.dtype), None if bias_dtype is None else db.to(bias_dtype)
        d_residual = dsum.to(residual_dtype) if needed[1] else None
        return (dsum if dx is None else dx) if needed[0] else None, d_residual, dw, db, None, None, None, None


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _run(
    name: str, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, *, residual: Tensor | None = None,
    bias: Tensor | None = None, dy: Tensor | None = None, ds: Tensor | None = None, y: Tensor | None = None,
    s: Tensor | None = None, dx: Tensor | None = None, partial: Tensor | None = None, chunk: int = 1, eps: float = 0.0,
    offset: float = 0.0,
) -> None:  # fmt: skip
    N, C = x.shape
    if not 1 <= C <= WIDEST:
        raise ValueError(f"got rows of {C}, expected at most {WIDEST}")
    at = given.at
    places = (
        *(at(t, (N, C)) for t in (x, residual)), at(weight, (C,)), at(bias, (C,)),
        *(at(t, (N, C)) for t in (dy, ds, y, s, dx)), at(mean, (N,)), at(rstd, (N,)),
        at(partial, (-(-N // chunk), 2, C)),
    )  # fmt: skip
    narrow = (given.is_narrow(t) for t in (x, residual, weight, bias, dy, ds, y, s, dx))
    steps = (given.step(t) for t in (x, residual, dy, ds))
    run(name, _Norm(*places, N, C, chunk, *steps, eps, offset, *narrow), threads=given.threads(N * C))


def _summed(partial: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Partial sums `[P, 2, C]` float32 -> their sums over P, `[C]` each, in their order."""
    P, _, C = partial.shape
    out = torch.empty(2, C, dtype=dtype)
    arguments = _Columns(partial.data_ptr(), out.data_ptr(), P, 2 * C, dtype == torch.bfloat16)
    run("fastft_sum_rows", arguments, threads=given.threads(P * C))
    return out[0], out[1]
