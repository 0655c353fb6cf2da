"""GELU with its bias, and SwiGLU, on a CPU: `activations.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastft_kernels.cpu import given
from fastft_kernels.cpu.library import run
from fastft_kernels.once import differentiable_once


class _Activation(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "other", "dy", "out", "out_other", "sums")),
        *((name, ctypes.c_int64) for name in ("N", "F", "stride_x", "stride_other", "stride_dy")),
        ("is_narrow", ctypes.c_int32), ("other_is_narrow", ctypes.c_int32),
    ]  # fmt: skip


def gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """GELU of `x + bias`, x `[N, F]` with rows in one piece, bias `[F]`: `[N, F]` in the dtype of x."""
    apply: Callable[..., Tensor] = _Gelu.apply
    return apply(x, bias)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, `[N, F]` each, of one dtype, with rows in one piece."""
    apply: Callable[..., Tensor] = _Swiglu.apply
    return apply(gate, up)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, bias)
        y = torch.empty(x.shape, dtype=x.dtype)
        _run("fastft_gelu", x, bias, y)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, bias = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype)
        db = torch.empty(bias.shape) if ctx.needs_input_grad[1] else None
        _run("fastft_gelu_backward", x, bias, dx, dy=_in_rows(grads[0]), sums=db)
        return dx, None if db is None else db.to(bias.dtype)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = torch.empty(gate.shape, dtype=gate.dtype)
        _run("fastft_swiglu", gate, up, y)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(gate.shape, dtype=gate.dtype)
        _run("fastft_swiglu_backward", gate, up, dgate, dy=_in_rows(grads[0]), out_other=dup)
        return dgate, dup


def _in_rows(dy: Tensor) -> Tensor:
    return dy if dy.stride(1) == 1 else dy.contiguous()


def _run(
    name: str,
    x: Tensor,
    other: Tensor | None,
    out: Tensor,
    *,
    dy: Tensor | None = None,
    out_other: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    N, F = x.shape
    of_a_row = other is not None and other.ndim == 1
    places = (
        given.at(x, (N, F)), given.at(other, (F,) if of_a_row else (N, F)),
        *(given.at(t, (N, F)) for t in (dy, out, out_other)), given.at(sums, (F,)),
    )  # fmt: skip
    if any(t is not None and t.dtype != x.dtype for t in (dy, out, out_other, None if of_a_row else other)):
        raise ValueError("got several dtypes, expected one")
    steps = x.stride(0), 0 if of_a_row else given.step(other), given.step(dy)
    arguments = _Activation(*places, N, F, *steps, given.is_narrow(x), given.is_narrow(other))
    run(name, arguments, threads=given.threads(N * F))
