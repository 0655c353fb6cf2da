"""Cross-entropy behind a head, for a loop of one's own: the kernels' with what other trainers' losses have beside it.

With `z` the logits of a row, `t` its target, `e` the label smoothing and `V` the vocabulary,

    loss = (1 - e) (lse - z[t]) + e (lse - mean(z)) + z_loss lse^2,   lse = logsumexp(z)

The kernels give `lse - z[t]`. The target's logit and the mean of all are single products, of the hidden state with a
row of the head and with the mean of its rows, and from them follows the rest: the logits need not be there.

Letters: T tokens, R loss rows, C width, V vocab.
"""

from __future__ import annotations

from typing import get_args

import fastft_kernels
import torch
from fastft_kernels.linear_cross_entropy import Reduction
from torch import Tensor
from torch.nn import functional as F

from fastft.common.errors import UserError
from fastft.model import ops


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: None = None,
    rows: Tensor | None = None,
    row_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """`F.cross_entropy(hidden @ weight.T, targets)`, whose logits never exist as a whole; ignored rows cost no product.

    Args:
        hidden: `[T, C]`, or `[..., C]` with targets `[...]`.
        weight: `[V, C]`, the head, in the dtype of `hidden` (any under autocast).
        bias: of the head; only None, as GPT-2's has none.
        targets: int64, the right ids: `[R]` with `rows`, else one for each token.
        rows: `[R]` int64, the token that each row reads; a token may be read by several rows.
        row_weights: floating, 0 or more, in the shape of `targets`; all 1 where they are not given. They get no
            gradient.
        ignore_index: target of a row that has none.
        reduction: `mean` divides the sum by the weights of the rows that are not ignored, and is 0 where all are (torch
            gives NaN); `sum`; `none`, in the shape of `targets`, 0 where ignored.
        label_smoothing: as in `F.cross_entropy`, from 0 to 1.
        z_loss: factor of the squared log-sum-exp (Chowdhery et al. 2022, "PaLM", arXiv:2204.02311).
        impl: see `fastft.model.ops`.

    Returns:
        Float32 (float64 where `hidden` is).

    Raises:
        UserError: a bias, or a factor out of its range.
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if bias is not None:
        raise UserError("linear_cross_entropy: got a bias, expected a head without one; F.cross_entropy takes logits")
    if not 0 <= label_smoothing <= 1 or not z_loss >= 0:
        raise UserError(
            f"linear_cross_entropy: got label_smoothing = {label_smoothing}, z_loss = {z_loss}; expected 0 to 1, and 0 "
            "or more"
        )
    _check(hidden, targets, rows, row_weights, reduction)
    shape = targets.shape
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    row_weights = None if row_weights is None else row_weights.detach().flatten()
    kernel = ops.kernel_impl(ops.resolve(impl, hidden.device), hidden.device)
    if not label_smoothing and not z_loss:
        loss = fastft_kernels.linear_cross_entropy(
            hidden,
            weight,
            targets,
            rows=rows,
            row_weights=row_weights,
            ignore_index=ignore_index,
            reduction=reduction,
            impl=kernel,
        )
        return loss.view(shape) if reduction == "none" else loss
    nll = fastft_kernels.linear_cross_entropy(
        hidden, weight, targets, rows=rows, ignore_index=ignore_index, reduction="none", impl=kernel
    )
    picked = hidden if rows is None else hidden.index_select(0, rows)
    losses = _with_more(nll, picked, weight, targets, ignore_index, label_smoothing, z_loss)
    return _reduced(losses, targets != ignore_index, row_weights, reduction).view(shape if reduction == "none" else ())


def _check(hidden: Tensor, targets: Tensor, rows: Tensor | None, row_weights: Tensor | None, reduction: str) -> None:
    """What the kernels do not see of what they are given flat."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"got reduction={reduction!r}, expected one of {', '.join(get_args(Reduction))}")
    if rows is None and targets.shape != hidden.shape[:-1]:
        raise ValueError(f"got targets {tuple(targets.shape)}, expected {tuple(hidden.shape[:-1])}, one a token")
    if row_weights is not None and row_weights.shape != targets.shape:
        raise ValueError(f"got row_weights {tuple(row_weights.shape)}, expected {tuple(targets.shape)}, as targets")


def _with_more(
    nll: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, smoothing: float, z_loss: float
) -> Tensor:
    """The rows' losses `[R]` with label smoothing and z-loss, from `lse - z[t]` `[R]`; 0 where ignored."""
    if torch.is_autocast_enabled(hidden.device.type):  # the values whose products the kernels take
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    ignored = targets == ignore_index
    with torch.autocast(hidden.device.type, enabled=False):
        wide = hidden.to(nll.dtype)
        own = (wide * F.embedding(targets.masked_fill(ignored, 0), weight)).sum(dim=-1)
        lse = nll + own
        losses = nll
        if smoothing:
            mean = wide @ weight.mean(dim=0, dtype=nll.dtype)
            losses = (1 - smoothing) * nll + smoothing * (lse - mean)
        return (losses + z_loss * lse.square()).masked_fill(ignored, 0)


def _reduced(losses: Tensor, asked: Tensor, row_weights: Tensor | None, reduction: Reduction) -> Tensor:
    weights = asked.to(losses.dtype) if row_weights is None else row_weights.to(losses.dtype) * asked
    losses = losses * weights
    if reduction == "none":
        return losses
    total = weights.sum()
    return losses.sum() / torch.where(total > 0, total, 1.0) if reduction == "mean" else losses.sum()
