"""Layer norm and RMS norm on a CPU, with the addition in front of them: `norms.c`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fastft_kernels import support
from fastft_kernels.cpu import given
from fastft_kernels.cpu.function import applied
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


class FixedLayerNorm:
    """`layer_norm` for answering: of weights that stay where they are, and without gradients.

    What a call looks at and makes is as little as it can be: of one token for each of a hundred sequences, the
    interpreter's part of `layer_norm` takes longer than the work.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, eps: float, out_dtype: torch.dtype) -> None:
        """Args: weight and bias `[C]`, and the dtype of the result.

        Raises:
            ValueError: a dtype or device for which there is no such code.
        """
        self._kept = weight, bias = weight.detach(), bias.detach()
        self._C, self._dtype = _size(weight[None])[1], out_dtype
        if (why := support.why_not_compiled(weight, bias, out_dtype)) is not None:
            raise ValueError(f"got weights of a layer norm in {weight.dtype}: {why}")
        self._of = _Norm(
            weight=given.at(weight, self._C), bias=given.at(bias, self._C), C=self._C, chunk=1, eps=eps,
            weight_is_narrow=given.is_narrow(weight), bias_is_narrow=given.is_narrow(bias),
            y_is_narrow=out_dtype == torch.bfloat16,
        )  # fmt: skip

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """`[N, C]`, rows in one piece -> y, and the sum (x itself without a residual).

        Raises:
            ValueError: other shapes, dtypes or devices.
        """
        N, C = x.shape[0], self._C
        at, narrow, of = given.at, torch.bfloat16, _Norm.from_buffer_copy(self._of)
        y, stats = torch.empty(N, C, dtype=self._dtype), torch.empty(2, N)
        of.x, of.stride_x, of.x_is_narrow, of.y, of.N = at(x, N, C), x.stride(0), x.dtype == narrow, y.data_ptr(), N
        of.mean, of.rstd = _places(stats)
        s = x
        if residual is not None:
            s = torch.empty(N, C, dtype=torch.promote_types(x.dtype, residual.dtype))
            of.residual, of.stride_residual, of.s = at(residual, N, C), residual.stride(0), s.data_ptr()
            of.residual_is_narrow, of.s_is_narrow = residual.dtype == narrow, s.dtype == narrow
        run("fastft_norm", of, threads=given.threads(N * C))
        return y, s


def _norm(x: Tensor, residual: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    found = applied(_Normed, x, residual, *others)
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
        N, C = _size(x)
        y, stats, s = torch.empty(N, C, dtype=out_dtype), torch.empty(2 if centres else 1, N), None
        if residual is not None:
            s = torch.empty(N, C, dtype=torch.promote_types(x.dtype, residual.dtype))
        at, narrow = given.at, given.is_narrow
        arguments = _Norm(
            at(x, N, C), at(residual, N, C), at(weight, C), at(bias, C), 0, 0, at(y, N, C), at(s, N, C), 0,
            *_places(stats), 0, N, C, 1, x.stride(0), given.step(residual), 0, 0, eps, offset,
            narrow(x), narrow(residual), narrow(weight), narrow(bias), False, False, narrow(y), narrow(s), False,
        )  # fmt: skip
        run("fastft_norm", arguments, threads=given.threads(N * C))
        ctx.save_for_backward(x if s is None else s, weight, stats)
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype, None if bias is None else bias.dtype)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return y if s is None else (y, s)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        s, weight, stats = ctx.saved_tensors
        needed, (x_dtype, residual_dtype, bias_dtype) = ctx.needs_input_grad, ctx.dtypes
        N, C = s.shape
        dy = torch.zeros(N, C, dtype=s.dtype) if grads[0] is None else given.in_rows(grads[0])
        ds = None if len(grads) == 1 or grads[1] is None else given.in_rows(grads[1])
        dsum = torch.empty(N, C, dtype=s.dtype)
        dx = torch.empty(N, C, dtype=x_dtype) if x_dtype != s.dtype and needed[0] else None
        chunk = max(_LEAST, -(-N // _CHUNKS))
        partial = torch.empty(-(-N // chunk), 2, C) if needed[2] or needed[3] else None
        at, narrow = given.at, given.is_narrow
        arguments = _Norm(
            at(s, N, C), 0, at(weight, C), 0, at(dy, N, C), at(ds, N, C), 0, at(dsum, N, C), at(dx, N, C),
            *_places(stats), 0 if partial is None else partial.data_ptr(), N, C, chunk,
            s.stride(0), 0, dy.stride(0), given.step(ds), 0.0, ctx.offset,
            narrow(s), False, narrow(weight), False, narrow(dy), narrow(ds), False, narrow(dsum), narrow(dx),
        )  # fmt: skip
        run("fastft_norm_backward", arguments, threads=given.threads(N * C))
        dw = db = None
        if partial is not None:
            dw, db = _learnt(partial, weight.dtype, bias_dtype)
        d_residual = dsum.to(residual_dtype) if needed[1] else None
        return dsum if dx is None else dx, d_residual, dw, db, None, None, None, None


def _size(x: Tensor) -> tuple[int, int]:
    N, C = x.shape
    if not 1 <= C <= WIDEST:
        raise ValueError(f"got rows of {C}, expected 1 to {WIDEST}")
    return N, C


def _places(stats: Tensor) -> tuple[int, int]:
    """Of the means, where there are any, and of 1 / sqrt(variance + eps)."""
    begin = stats.data_ptr()
    return (0, begin) if len(stats) == 1 else (begin, begin + stats.shape[1] * stats.element_size())


def _learnt(partial: Tensor, weight_dtype: torch.dtype, bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Partial sums `[P, 2, C]` float32 -> their sums over P in their order, `[C]`: gradients of weight and bias."""
    P, _, C = partial.shape
    dtype = weight_dtype if bias_dtype is None else torch.promote_types(weight_dtype, bias_dtype)
    out = torch.empty(2, C, dtype=dtype)
    arguments = _Columns(partial.data_ptr(), out.data_ptr(), P, 2 * C, dtype == torch.bfloat16)
    run("fastft_sum_rows", arguments, threads=given.threads(P * C))
    dw, db = out.unbind()
    return dw.to(weight_dtype), None if bias_dtype is None else db.to(bias_dtype)
