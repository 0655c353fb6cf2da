"""Linear cross-entropy: F.cross_entropy(hidden @ weight.T, targets), for the rows that a loss asks for.

losses[r] = logsumexp(z[r]) - z[r, targets[r]],   z[r] = weight @ hidden[rows[r]]
loss = sum_r row_weights[r] losses[r]

Shapes: T tokens, C width, V vocab, R loss rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Impl = Literal["auto", "torch", "reference"]

LOGIT_CHUNK_BYTES = 64 << 20
"""Bytes of logits that exist at a time."""
CACHED_BYTES = 4 << 20
"""Bytes of logits that the softmax works on at a time: about what stays in a CPU's caches."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    row_weights: Tensor | None = None,
    logit_chunk_bytes: int = LOGIT_CHUNK_BYTES,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the rows' cross-entropies, and each row's own.

    Args:
        hidden: `[T, C]`, floating.
        weight: `[V, C]`, the head; it has no bias.
        targets: `[R]` int64, the right id of each row.
        rows: `[R]` int64, the token that each row reads its hidden state from; a token may be read by several rows.
            Row r reads token r where it is not given.
        row_weights: `[R]` floating; all 1 where they are not given.
        logit_chunk_bytes: the most bytes of logits that exist at a time (at least one row's).
        impl: `reference` computes the logits of all T tokens, then picks; `torch` picks the rows first, and goes
            through them in chunks whose gradient is computed while their logits are there, so that a token without a
            target costs nothing and the full logits never exist; `auto` is `torch`.

    Returns:
        The sum, a scalar, and the losses `[R]`, both float32 (float64 where the logits are). Gradients flow through
        the sum alone. With no row the sum is 0 and still connected to `hidden` and `weight`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"got hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, expected [T, C] and [V, C]")
    n_rows = hidden.shape[0] if rows is None else rows.numel()
    if targets.shape != (n_rows,) or (row_weights is not None and row_weights.shape != (n_rows,)):
        weights_shape = None if row_weights is None else tuple(row_weights.shape)
        raise ValueError(f"got targets {tuple(targets.shape)}, row_weights {weights_shape}, expected both [{n_rows}]")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if row_weights is None:
        row_weights = torch.ones(n_rows, device=hidden.device)
    row_weights = row_weights.to(torch.promote_types(hidden.dtype, torch.float32))
    if impl == "reference":
        return _reference(hidden, weight, targets, rows, row_weights)
    picked = hidden if rows is None else hidden.index_select(0, rows)
    chunk = max(1, logit_chunk_bytes // (weight.shape[0] * weight.element_size()))
    apply: Callable[..., tuple[Tensor, Tensor]] = _Chunked.apply
    return apply(picked, weight, targets, row_weights, chunk)


def _reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, row_weights: Tensor
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight)  # [T, V]
    logits = logits if rows is None else logits.index_select(0, rows)  # [R, V]
    losses = F.cross_entropy(logits.to(row_weights.dtype), targets, reduction="none")
    return (losses * row_weights).sum(), losses.detach()


class _Chunked(torch.autograd.Function):
    """Forward and backward of a chunk of rows at once, as its logits exist only then. The gradient of the sum is thus
    ready after the forward pass; the backward pass multiplies it by what flows in.

    With p = softmax(z), e the target's unit vector and w the row's weight, the gradient of the sum to the row's logits
    is w (p - e). The weight is applied there, as the reference does, while the logits are in the cache: applied to the
    products of (p - e) it rounds otherwise, and p - e is a cancellation.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        R = hidden.shape[0]
        losses = row_weights.new_empty(R)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = None if R or not needs_weight else torch.zeros_like(weight)
        for begin in range(0, R, chunk):
            rows = slice(begin, begin + chunk)
            logits = F.linear(hidden[rows], weight)  # [rows, V]
            wanted = row_weights[rows] if needs_hidden or needs_weight else None
            _to_gradient(logits, targets[rows], losses[rows], wanted)
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[rows])
            if needs_weight:
                if d_weight is None:
                    d_weight = logits.t() @ hidden[rows]
                else:
                    d_weight.addmm_(logits.t(), hidden[rows])
        ctx.gradients = d_hidden, d_weight
        ctx.mark_non_differentiable(losses)
        return (losses * row_weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Given away, not kept: autograd makes a gradient that nobody else holds the parameter's own, without a copy.
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: its backward pass ran a second time, expected once")
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        scale = grads[0]
        if scale.device.type == "cpu" and scale.item() == 1:  # the usual case; elsewhere looking would wait
            return d_hidden, d_weight, None, None, None
        scaled = (None if d is None else d * scale for d in (d_hidden, d_weight))
        return (*scaled, None, None, None)


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
