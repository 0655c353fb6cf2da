"""Cross-entropy of rows of logits on a CPU: `cross_entropy.c`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fastft_kernels.cpu import given
from fastft_kernels.cpu.function import applied
from fastft_kernels.cpu.library import run
from fastft_kernels.once import differentiable_once

NO_TARGET = torch.iinfo(torch.int64).min
"""An `ignore_index` where none is ignored."""


class _CrossEntropy(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "targets", "weights", "losses", "out")),
        *((name, ctypes.c_int64) for name in ("N", "V", "stride", "stride_out", "ignore_index", "wrong")),
        ("is_narrow", ctypes.c_int32), ("has_wrong", ctypes.c_int32),
    ]  # fmt: skip


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Losses `[N]` float32 of logits `[N, V]`, rows in one piece; 0 where ignored. They alone are kept."""
    losses: Tensor = applied(_Losses, logits, targets, ignore_index)
    return losses


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        losses = torch.empty(len(logits))
        of_rows(logits, targets, losses, ignore_index=ignore_index)
        ctx.save_for_backward(logits, targets)
        ctx.ignore_index = ignore_index
        return losses

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        out = torch.empty(logits.shape, dtype=logits.dtype)
        again = torch.empty(len(logits))
        of_rows(logits, targets, again, weights=grads[0].contiguous(), out=out, ignore_index=ctx.ignore_index)
        return out, None, None


def of_rows(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    *,
    weights: Tensor | None = None,
    out: Tensor | None = None,
    ignore_index: int = -100,
) -> None:
    """Writes each row's loss, and its gradient where weights are given.

    Args:
        logits: `[N, V]` float32 or bf16, rows in one piece.
        targets: `[N]` int64.
        losses: `[N]` float32, contiguous.
        weights: `[N]` float32, contiguous: of the rows' gradients, which are not computed without them.
        out: `[N, V]` in the logits' dtype, rows in one piece, for the gradients; it may be the logits.
        ignore_index: target of a row whose loss and gradient are 0.

    Raises:
        IndexError: a target that there are no logits for.
        ValueError: tensors that there is no code for.
    """
    N, V = logits.shape
    if any(t is not None and t.dtype != torch.float32 for t in (losses, weights)) or (
        weights is not None and (out is None or out.dtype != logits.dtype)
    ):
        raise ValueError(
            "got dtypes that there is no code for, expected float32, and the gradient in the logits' dtype"
        )
    targets = targets.contiguous()
    arguments = _CrossEntropy(
        given.at(logits, N, V), given.at_integers("targets", targets, N), given.at(weights, N), given.at(losses, N),
        given.at(out, N, V), N, V, logits.stride(0), given.step(out), ignore_index, 0, given.is_narrow(logits), False,
    )  # fmt: skip
    run("fastft_cross_entropy", arguments, threads=given.threads(N * V))
    if arguments.has_wrong:
        raise IndexError(f"got target {arguments.wrong}, expected one from 0 to {V - 1}")
