"""Linear cross-entropy by torch's products: rows in chunks, each chunk's gradient computed while its logits are there.
What stands between the products is torch's too, or, on a CPU, compiled.

Letters: R loss rows, C width, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft_kernels.cpu import cross_entropy as rows_in_c
from fastft_kernels.once import differentiable_once

CACHED_BYTES = 4 << 20
"""Bytes of logits that the softmax works on at a time: about what stays in a CPU's caches."""


def weighted_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, logit_chunk_bytes: int, *, compiled: bool
) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses by their weights, and the losses `[R]` without gradient.

    Forward and backward run together, chunk by chunk: three matrix products for each, and each logit is computed once.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _Sum.apply
    chunk = _rows_at_a_time(weight, logit_chunk_bytes)
    # Within `forward` gradients are off, and parameters ask for one even in evaluation: only here is it known.
    return apply(hidden, weight, targets, row_weights, chunk, torch.is_grad_enabled(), compiled)


def every_loss(hidden: Tensor, weight: Tensor, targets: Tensor, logit_chunk_bytes: int, *, compiled: bool) -> Tensor:
    """The losses `[R]`, with gradient: the logits are computed again when it is known what flows in for each row."""
    apply: Callable[..., Tensor] = _Losses.apply
    return apply(hidden, weight, targets, _rows_at_a_time(weight, logit_chunk_bytes), compiled)


def _rows_at_a_time(weight: Tensor, logit_chunk_bytes: int) -> int:
    return max(1, logit_chunk_bytes // (weight.shape[0] * weight.element_size()))


class _Sum(torch.autograd.Function):
    """The gradient of the sum is ready after the forward pass; the backward pass multiplies it by what flows in.

    With p = softmax(z), e the target's unit vector and w the row's weight, the gradient of the sum to the row's logits
    is w (p - e). The weight is applied there, as the reference does, while the logits are in the cache: applied to the
    products of (p - e) it rounds otherwise, and p - e is a cancellation.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, chunk: int, learns: bool,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        needed = ctx.needs_input_grad[:2] if learns else (False, False)
        wanted = row_weights if any(needed) else None
        losses = row_weights.new_empty(hidden.shape[0])
        ctx.gradients = _through_chunks(hidden, weight, targets, losses, wanted, chunk, needed, compiled)
        ctx.mark_non_differentiable(losses)
        return (losses * row_weights).sum(), losses

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Given away, not kept: autograd makes a gradient that nobody else holds the parameter's own, without a copy.
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: its backward pass ran a second time, expected once")
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        scale = grads[0]
        if scale.device.type == "cpu" and scale.item() == 1:  # the usual case; elsewhere looking would wait
            return d_hidden, d_weight, None, None, None, None, None
        scaled = (None if d is None else d * scale for d in (d_hidden, d_weight))
        return (*scaled, None, None, None, None, None)


class _Losses(torch.autograd.Function):
    """Each row's loss with a gradient of its own: two passes through the chunks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, compiled: bool) -> Tensor:
        losses = torch.empty(
            hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device
        )
        _through_chunks(hidden, weight, targets, losses, None, chunk, (False, False), compiled)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk, ctx.compiled = chunk, compiled
        return losses

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        again = torch.empty_like(grads[0])
        upstream = grads[0].to(again.dtype)
        needed = ctx.needs_input_grad
        gradients = _through_chunks(hidden, weight, targets, again, upstream, ctx.chunk, needed, ctx.compiled)
        return (*gradients, None, None, None)


def _through_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    losses: Tensor,
    row_weights: Tensor | None,
    chunk: int,
    needed: tuple[bool, ...],
    compiled: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Fills `losses` `[R]`; where `row_weights` `[R]` are given, returns the needed gradients of hidden and weight."""
    needs_hidden, needs_weight = needed[:2]
    R = hidden.shape[0]
    d_hidden = torch.empty_like(hidden) if needs_hidden else None
    d_weight = None if R or not needs_weight else torch.zeros_like(weight)
    for begin in range(0, R, chunk):
        rows = slice(begin, begin + chunk)
        logits = F.linear(hidden[rows], weight)  # [rows, V]
        to_gradient = _to_gradient_in_c if compiled else _to_gradient
        to_gradient(logits, targets[rows], losses[rows], None if row_weights is None else row_weights[rows])
        if d_hidden is not None:
            torch.mm(logits, weight, out=d_hidden[rows])
        if needs_weight:
            if d_weight is None:
                d_weight = logits.t() @ hidden[rows]
            else:
                d_weight.addmm_(logits.t(), hidden[rows])
    return d_hidden, d_weight


def _to_gradient_in_c(logits: Tensor, targets: Tensor, losses: Tensor, row_weights: Tensor | None) -> None:
    """As `_to_gradient`, in one pass."""
    out = None if row_weights is None else logits
    rows_in_c.of_rows(logits, targets, losses, weights=row_weights, out=out, ignore_index=rows_in_c.NO_TARGET)


def _to_gradient(logits: Tensor, targets: Tensor, losses: Tensor, row_weights: Tensor | None) -> None:
    """Writes each row's loss into `losses` `[R]`, and w (p - e) over the logits `[R, V]` where weights `[R]` are given.

    Some rows at a time, so that all passes but the first find them in the cache; in `losses`' dtype, as sums over V
    need it.
    """
    at_a_time = max(1, CACHED_BYTES // (logits.shape[1] * losses.element_size()))
    for begin in range(0, logits.shape[0], at_a_time):
        rows = slice(begin, begin + at_a_time)
        target = targets[rows, None]
        log_p = logits[rows].to(losses.dtype).log_softmax(dim=-1)
        losses[rows] = -log_p.gather(1, target).squeeze(1)
        if row_weights is not None:
            p = log_p.exp_()
            p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
            logits[rows] = p.mul_(row_weights[rows, None])
