"""Cross-entropy of logits, with torch's signature: F.cross_entropy(logits, targets).

    losses[n] = logsumexp(logits[n]) - logits[n, targets[n]]
    d logits[n] = (softmax(logits[n]) - e[targets[n]]) * d losses[n],   e the targets' unit vectors

A row that is ignored costs one look at its target: its logits are not read, and its gradient is written as zeros.

Letters: N rows, V vocab; a program goes through a row by BV columns.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft_kernels import registry, support, tables
from fastft_kernels.cpu import cross_entropy as rows_in_c
from fastft_kernels.support import Impl, tl, triton

Reduction = Literal["mean", "sum", "none"]

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)
"""Below every logit, and finite: the difference of two infinities is no number."""
ALIGNED = 64
"""Elements that a row of the gradient is a multiple of: whole 16-byte stores at any vocabulary."""

_ROWS = {"BV": 4096, "num_warps": 8, "num_stages": 1}
tables.TABLE["cross_entropy_forward"] = {"default": {None: _ROWS}}
tables.TABLE["cross_entropy_backward"] = {"default": {None: _ROWS}}


def reference(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """The equation, in at least float32: losses `[N]`, 0 where ignored."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = targets == ignore_index
    own = z.gather(1, targets.masked_fill(ignored, 0)[:, None]).squeeze(1)
    return (z.logsumexp(dim=1) - own).masked_fill(ignored, 0)


@triton.jit
def cross_entropy_forward(LOGITS, TARGETS, LOSSES, LSE, V, stride, IGNORE: tl.constexpr, BV: tl.constexpr):
    """One program a row: its loss, and its log-sum-exp to base 2."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    loss = 0.0
    lse = 0.0
    if target != IGNORE:
        largest = tl.full([BV], LOWEST, tl.float32)
        total = tl.zeros([BV], tl.float32)
        for begin in range(0, V, BV):  # each of the BV lanes by itself: one reduction at the end
            v = begin + tl.arange(0, BV)
            z = tl.load(LOGITS + row * stride + v, mask=v < V, other=0.0).to(tl.float32) * LOG2E
            z = tl.where(v < V, z, LOWEST)
            both = tl.maximum(largest, z)
            total = total * tl.exp2(largest - both) + tl.exp2(z - both)
            largest = both
        top = tl.max(largest, 0)
        lse = top + tl.log2(tl.sum(total * tl.exp2(largest - top), 0))
        loss = lse / LOG2E - tl.load(LOGITS + row * stride + target).to(tl.float32)
    tl.store(LOSSES + row, loss)
    tl.store(LSE + row, lse)


@triton.jit
def cross_entropy_backward(
    FLOWING, LOGITS, TARGETS, LSE, OUT, V, stride, stride_out, IGNORE: tl.constexpr, BV: tl.constexpr
):
    """One program for BV columns of a row; OUT's rows are wider than V, and what is beyond becomes 0."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    target = tl.load(TARGETS + row)
    gradient = tl.zeros([BV], tl.float32)
    if target != IGNORE:
        z = tl.load(LOGITS + row * stride + v, mask=v < V, other=0.0).to(tl.float32)
        p = tl.exp2(tl.where(v < V, z * LOG2E - tl.load(LSE + row), LOWEST))
        gradient = tl.where(v == target, p - 1.0, p) * tl.load(FLOWING + row)
    tl.store(OUT + row * stride_out + v, gradient.to(OUT.dtype.element_ty), mask=v < stride_out)


@registry.operation("cross_entropy_forward")
def _forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """`[N, V]` and `[N]` -> losses and log-sum-exps (to base 2), `[N]` float32, 0 where ignored."""
    N, V = logits.shape
    losses, lse = (torch.empty(N, dtype=torch.float32, device=logits.device) for _ in range(2))
    if N:
        config = tables.tiles("cross_entropy_forward", support.arch_of(logits))
        cross_entropy_forward[(N,)](logits, targets, losses, lse, V, logits.stride(0), IGNORE=ignore_index, **config)
    return losses, lse


@registry.fake(_forward)
def _(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    losses, lse = (torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(2))
    return losses, lse


@registry.operation("cross_entropy_backward")
def _backward(flowing: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    """What flows into the losses, `[N]` -> the gradient of the logits, `[N, V]` in their dtype."""
    N, V = logits.shape
    out = _padded(logits)
    if N:
        config = tables.tiles("cross_entropy_backward", support.arch_of(logits))
        cross_entropy_backward[(N, triton.cdiv(out.stride(0), config["BV"]))](
            flowing, logits, targets, lse, out, V, logits.stride(0), out.stride(0), IGNORE=ignore_index, **config
        )
    return out[:, :V]


def _padded(logits: Tensor) -> Tensor:
    """Room for a gradient of `[N, V]`, its rows a multiple of `ALIGNED` wide."""
    N, V = logits.shape
    return torch.empty(N, -(-V // ALIGNED) * ALIGNED, dtype=logits.dtype, device=logits.device)


@registry.fake(_backward)
def _(flowing: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    return _padded(logits)[:, : logits.shape[1]]


def _save(ctx, inputs, output):
    logits, targets, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, flowing, _):
    logits, targets, lse = ctx.saved_tensors
    return _backward(flowing.contiguous(), logits, targets, lse, ctx.ignore_index), None, None


registry.differentiable(_forward, save=_save, gradient=_differentiate)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Cross-entropy of logits: `torch.nn.functional.cross_entropy` for `[N, V]`, ignored rows at no cost.

    It differs from torch's in two points: sums and losses are float32 for narrow logits, and the mean over no row is 0
    (torch: NaN), with zero gradients.

    Args:
        input: `[N, V]` logits, floating; they are not overwritten.
        target: `[N]` int64.
        weight, size_average, reduce, label_smoothing: as in torch's signature; only their defaults are supported.
        ignore_index: target of a row that counts nothing.
        reduction: `mean` over the rows that are not ignored, `sum`, or `none`.
        impl: `reference` computes the equation, `torch` calls torch's own, `triton` and `compiled` the kernels; `auto`
            is `triton` on a supported GPU, `compiled` on a CPU, else `torch`.

    Returns:
        A scalar, or losses `[N]` with `none`; float32 (float64 where the logits are).

    Raises:
        ValueError: shapes or options that do not fit, or `triton` or `compiled` where it cannot run.
        IndexError: on a CPU, a target that there are no logits for.
    """
    _check(input, target, reduction)
    if weight is not None or label_smoothing or size_average is not None or reduce is not None:
        raise ValueError(
            "got weight, label_smoothing, size_average or reduce, expected their defaults; "
            "torch.nn.functional.cross_entropy takes them"
        )
    losses = _losses(input, target, ignore_index, support.choose(impl, input, has_compiled=True))
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum().clamp_min(1)


def _losses(logits: Tensor, target: Tensor, ignore_index: int, impl: Impl) -> Tensor:
    """`[N]`, of each row; 0 where it is ignored."""
    if impl == "reference":
        return reference(logits, target, ignore_index=ignore_index)
    if impl == "torch":
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, target, ignore_index=ignore_index, reduction="none")
    support.check_dtype(logits)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if impl == "compiled":
        return rows_in_c.cross_entropy(logits, target, ignore_index)
    losses: Tensor = _forward(logits, target.contiguous(), ignore_index)[0]
    return losses


def _check(logits: Tensor, targets: Tensor, reduction: str) -> None:
    if logits.ndim != 2 or not logits.is_floating_point() or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"got input {tuple(logits.shape)} {logits.dtype}, target {tuple(targets.shape)}, expected floating [N, V] "
            "and [N]; flatten other axes first"
        )
    if targets.device != logits.device:
        raise ValueError(f"got target on {targets.device}, expected input's device, {logits.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"got reduction={reduction!r}, expected mean, sum or none")
