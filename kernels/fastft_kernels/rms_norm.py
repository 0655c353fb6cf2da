"""RMS norm, with the addition to the residual stream in front of it.

    s = x + residual
    y = s / sqrt(mean(s^2) + eps) * (offset + weight)

The mean is over the last axis (Zhang, Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467). The
offset is 1 in Gemma's models, whose weights begin as zeros, and 0 in all others. With n = s / sqrt(mean(s^2) + eps) and
g = dy * (offset + weight), the gradient is `ds = (g - n * mean(g * n)) / sqrt(mean(s^2) + eps)` plus what flows into s
from elsewhere.

Where x has 16 bits all is computed in float32, and rounded once: Llama's own code rounds n too.

Letters: N rows, C width, P programs of the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastft_kernels import registry, support, tables
from fastft_kernels.cpu import norms
from fastft_kernels.layer_norm import KEPT, WIDEST
from fastft_kernels.once import differentiable_once
from fastft_kernels.sums import rows_of_programs, summed
from fastft_kernels.support import Impl, tl, triton

# As many elements a program, and as many sums, as a layer norm.
tables.TABLE["rms_norm_forward"] = tables.TABLE["layer_norm_forward"]
tables.TABLE["rms_norm_backward"] = {
    **tables.TABLE["layer_norm_backward"],
    "sm_100": {4096: {"num_warps": 4, "num_stages": 1, "programs": 256}},  # 8 and 16 spill
}


def reference(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The equation, step by step, in the dtype of the sum (at least float32)."""
    total = x if residual is None else x + residual
    s = total.to(torch.promote_types(total.dtype, torch.float32))
    normed = s / torch.sqrt(s.square().mean(dim=-1, keepdim=True) + eps)
    y = (normed * (offset + weight.to(s.dtype))).to(out_dtype or x.dtype)
    return y if residual is None else (y, total)


@triton.jit
def rms_norm_forward(
    X, RESIDUAL, W, Y, S, RSTD, stride_x, stride_r,
    C: tl.constexpr, eps: tl.constexpr, offset: tl.constexpr, BC: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    inside = c < C
    s = tl.load(X + row * stride_x + c, mask=inside, other=0.0).to(tl.float32)  # [BC]
    if HAS_RESIDUAL:
        s += tl.load(RESIDUAL + row * stride_r + c, mask=inside, other=0.0).to(tl.float32)
        rounded = s.to(S.dtype.element_ty)
        tl.store(S + row * C + c, rounded, mask=inside)
        s = rounded.to(tl.float32)  # what the backward pass will read
    rstd = 1.0 / tl.sqrt(tl.sum(s * s, 0) / C + eps)
    w = offset + tl.load(W + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * C + c, (s * rstd * w).to(Y.dtype.element_ty), mask=inside)
    tl.store(RSTD + row, rstd)


@triton.jit
def rms_norm_backward(
    DY, DS, S, W, RSTD, DSUM, DX, PARTIAL, N, rows, stride_dy, stride_ds, stride_s,
    C: tl.constexpr, offset: tl.constexpr, BC: tl.constexpr, HAS_DS: tl.constexpr, HAS_DX: tl.constexpr,
):  # fmt: skip
    """One program for `rows` rows: their gradients, and its part of the sum over rows."""
    program = tl.program_id(0)
    c = tl.arange(0, BC)
    inside = c < C
    if BC <= KEPT:
        w = offset + tl.load(W + c, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BC], tl.float32)
    for index in range(program * rows, tl.minimum((program + 1) * rows, N)):
        row = tl.cast(index, tl.int64)
        rstd = tl.load(RSTD + row)
        normed = tl.load(S + row * stride_s + c, mask=inside, other=0.0).to(tl.float32) * rstd  # [BC]
        dy = tl.load(DY + row * stride_dy + c, mask=inside, other=0.0).to(tl.float32)
        dw += dy * normed
        if BC > KEPT:
            w = offset + tl.load(W + c, mask=inside, other=0.0).to(tl.float32)
        g = dy * w
        ds = (g - normed * (tl.sum(g * normed, 0) / C)) * rstd
        if HAS_DS:
            ds += tl.load(DS + row * stride_ds + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(DSUM + row * C + c, ds.to(DSUM.dtype.element_ty), mask=inside)
        if HAS_DX:
            tl.store(DX + row * C + c, ds.to(DX.dtype.element_ty), mask=inside)
    tl.store(PARTIAL + program.to(tl.int64) * C + c, dw, mask=inside)


def _config(kernel: str, x: Tensor) -> dict[str, int]:
    BC = max(16, triton.next_power_of_2(x.shape[-1]))
    return {"BC": BC, **tables.tiles(kernel, support.arch_of(x), BC)}


@registry.operation("rms_norm_forward")
def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`[N, C]` -> y `[N, C]`, s `[N, C]` (empty without residual), 1 / sqrt(mean + eps) `[N]` float32."""
    N, C = x.shape
    y, s, rstd = _forward_outputs(x, residual, out_dtype)
    if N:
        given = x if residual is None else residual
        rms_norm_forward[(N,)](
            x, given, weight, y, s, rstd, x.stride(0), given.stride(0),
            C=C, eps=eps, offset=offset, HAS_RESIDUAL=residual is not None, **_config("rms_norm_forward", x),
        )  # fmt: skip
    return y, s, rstd


def _forward_outputs(x: Tensor, residual: Tensor | None, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if residual is None:
        return y, x.new_empty(0), rstd
    return y, torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device), rstd


@registry.fake(_forward)
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_outputs(x, residual, out_dtype)


@registry.operation("rms_norm_backward")
def _backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor, offset: float, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of s `[N, C]` in its dtype, of x where its dtype is another one (else empty), and of weight `[C]`."""
    N, C = s.shape
    config = _config("rms_norm_backward", s)
    programs, rows = rows_of_programs(N, config.pop("programs"))
    dsum, dx, _ = _backward_outputs(s, weight, x_dtype)
    partial = torch.empty(programs, C, dtype=torch.float32, device=s.device)
    dy, ds = support.in_rows(dy), None if ds is None else support.in_rows(ds)
    rms_norm_backward[(programs,)](
        dy, dy if ds is None else ds, s, weight, rstd, dsum, dx, partial, N, rows,
        dy.stride(0), 0 if ds is None else ds.stride(0), s.stride(0),
        C=C, offset=offset, HAS_DS=ds is not None, HAS_DX=x_dtype != s.dtype, **config,
    )  # fmt: skip
    return dsum, dx, summed(partial, weight.dtype)


def _backward_outputs(s: Tensor, weight: Tensor, x_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    dsum = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dx = torch.empty(s.shape if x_dtype != s.dtype else (0,), dtype=x_dtype, device=s.device)
    return dsum, dx, torch.empty(weight.shape, dtype=weight.dtype, device=s.device)


@registry.fake(_backward)
def _(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor, offset: float, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_outputs(s, weight, x_dtype)


def _save(ctx, inputs, output):
    x, residual, weight, _, ctx.offset, _ = inputs
    _, s, rstd = output
    ctx.save_for_backward(x if residual is None else s, weight, rstd)
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, ds, _drstd):
    s, weight, rstd = ctx.saved_tensors
    if ctx.residual_dtype is None:
        ds = None
    if dy is None:
        dy = torch.zeros_like(s)
    dsum, dx, dw = _backward(dy, ds, s, weight, rstd, ctx.offset, ctx.x_dtype)
    d_residual = None if ctx.residual_dtype is None else dsum.to(ctx.residual_dtype)
    return dsum if ctx.x_dtype == s.dtype else dx, d_residual, dw, None, None, None


registry.differentiable(_forward, save=_save, gradient=_differentiate)


class _InTorch(torch.autograd.Function):
    """The same by torch's operations, which keeps s and a number a row for the backward pass, and no more."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, weight: Tensor, eps: float, offset: float, out_dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(s.dtype, torch.float32)
        rstd = s.to(wide).square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(s, weight, rstd)
        ctx.offset = offset
        return (s * rstd).mul_(weight.to(wide) + offset).to(out_dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        s, weight, rstd = ctx.saved_tensors
        normed = s * rstd  # at least float32, as rstd is
        dy = grads[0].to(normed.dtype)
        dw = None
        if ctx.needs_input_grad[1]:  # not of a frozen weight
            dw = ((dy * normed).flatten(0, -2).sum(dim=0) if s.ndim > 1 else dy * normed).to(weight.dtype)
        g = dy * (weight.to(normed.dtype) + ctx.offset)
        mean = (g * normed).mean(dim=-1, keepdim=True)
        ds = g.addcmul_(normed, mean, value=-1).mul_(rstd)
        return ds.to(s.dtype), dw, None, None, None


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm over the last axis, of x or of its sum with the residual stream.

    Args:
        x: `[..., C]`, floating.
        weight: `[C]`, in the dtype of x or float32.
        eps: added to the mean of the squares.
        offset: added to the weight: 1 in Gemma's models.
        residual: `[..., C]`; it may be wider than x, as the stream is in mixed precision.
        out_dtype: of the result; the dtype of x where it is not given.
        impl: `reference` computes the equation step by step, `torch` the same and keeps less for the backward pass,
            `triton` and `compiled` run the kernels; `auto` is `triton` on a supported GPU, `compiled` on a CPU, else
            `torch`.

    Returns:
        y `[..., C]`; with `residual`, y and the sum s, in the wider of the two dtypes.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or `triton` or `compiled` where it cannot run.
    """
    _check(x, weight, residual, out_dtype)
    impl = support.choose(impl, x, residual, weight, out_dtype, has_compiled=True)
    out_dtype = out_dtype or x.dtype
    if impl == "reference":
        return reference(x, weight, eps=eps, offset=offset, residual=residual, out_dtype=out_dtype)
    if impl == "torch":
        s = x if residual is None else x + residual
        apply: Callable[..., Tensor] = _InTorch.apply
        y = apply(s, weight, eps, offset, out_dtype)
        return y if residual is None else (y, s)
    weight = weight.contiguous()
    rows, residual_rows = support.in_rows(x), None if residual is None else support.in_rows(residual)
    if impl == "compiled":
        y, s = norms.rms_norm(rows, weight, eps=eps, offset=offset, residual=residual_rows, out_dtype=out_dtype)
    else:
        support.check_dtype(x, weight, residual)
        y, s, _ = _forward(rows, residual_rows, weight, eps, offset, out_dtype)
    if x.ndim != 2:
        y, s = y.view(x.shape), s if residual is None else s.view(x.shape)
    return y if residual is None else (y, s)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None, out_dtype: torch.dtype | None) -> None:
    if not x.is_floating_point() or x.ndim < 1 or not 1 <= x.shape[-1] <= WIDEST:
        raise ValueError(f"got x {tuple(x.shape)} {x.dtype}, expected floating [..., C] with C from 1 to {WIDEST}")
    if weight.shape != x.shape[-1:] or not weight.is_floating_point():
        raise ValueError(
            f"got weight {tuple(weight.shape)} {weight.dtype}, expected floating [{x.shape[-1]}], x's last axis"
        )
    if residual is not None and (residual.shape != x.shape or not residual.is_floating_point()):
        raise ValueError(
            f"got residual {tuple(residual.shape)} {residual.dtype}, expected floating, in the shape of x, "
            f"{tuple(x.shape)}"
        )
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f"got out_dtype={out_dtype}, expected a floating one")
    if any(t is not None and t.device != x.device for t in (weight, residual)):
        raise ValueError(f"got tensors on different devices, expected all on x's, {x.device}")
