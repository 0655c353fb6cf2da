"""GELU with its bias, and SwiGLU, on a CPU: `activations.c`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fastft_kernels.cpu import given
from fastft_kernels.cpu.function import applied
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
    y: Tensor = applied(_Gelu, x, bias)
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, `[N, F]` each, of one dtype, with rows in one piece."""
    y: Tensor = applied(_Swiglu, gate, up)
    return y


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        N, F = x.shape
        at = given.at
        y = torch.empty(N, F, dtype=x.dtype)
        arguments = _Activation(
            at(x, N, F), at(bias, F), 0, at(y, N, F), 0, 0, N, F, x.stride(0), 0, 0,
            given.is_narrow(x), given.is_narrow(bias),
        )  # fmt: skip
        run("fastft_gelu", arguments, threads=given.threads(N * F))
        ctx.save_for_backward(x, bias)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, bias = ctx.saved_tensors
        N, F = x.shape
        at, dy = given.at, _flowing(grads[0], x)
        dx, db = torch.empty(N, F, dtype=x.dtype), torch.empty(F) if ctx.needs_input_grad[1] else None
        arguments = _Activation(
            at(x, N, F), at(bias, F), at(dy, N, F), at(dx, N, F), 0, at(db, F), N, F, x.stride(0), 0, dy.stride(0),
            given.is_narrow(x), given.is_narrow(bias),
        )  # fmt: skip
        run("fastft_gelu_backward", arguments, threads=given.threads(N * F))
        return dx, None if db is None else db.to(bias.dtype)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        N, F = gate.shape
        at = given.at
        if up.dtype != gate.dtype:
            raise ValueError(f"got {gate.dtype} and {up.dtype}, expected one dtype")
        y = torch.empty(N, F, dtype=gate.dtype)
        arguments = _Activation(
            at(gate, N, F), at(up, N, F), 0, at(y, N, F), 0, 0, N, F, gate.stride(0), up.stride(0), 0,
            given.is_narrow(gate), False,
        )  # fmt: skip
        run("fastft_swiglu", arguments, threads=given.threads(N * F))
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        N, F = gate.shape
        at, dy = given.at, _flowing(grads[0], gate)
        dgate, dup = (torch.empty(N, F, dtype=gate.dtype) for _ in range(2))
        arguments = _Activation(
            at(gate, N, F), at(up, N, F), at(dy, N, F), at(dgate, N, F), at(dup, N, F), 0, N, F,
            gate.stride(0), up.stride(0), dy.stride(0), given.is_narrow(gate), False,
        )  # fmt: skip
        run("fastft_swiglu_backward", arguments, threads=given.threads(N * F))
        return dgate, dup


def _flowing(dy: Tensor, x: Tensor) -> Tensor:
    """What flows in, as the code takes it: rows in one piece, in the dtype of x (autograd sees to that)."""
    if dy.dtype != x.dtype:
        raise ValueError(f"got a gradient in {dy.dtype}, expected {x.dtype}")
    return given.in_rows(dy)
