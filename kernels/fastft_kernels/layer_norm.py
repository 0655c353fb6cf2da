"""Layer norm, with the addition to the residual stream in front of it.

    s = x + residual
    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

Mean and variance are over the last axis, the variance divided by C (Ba, Kiros, Hinton 2016, "Layer Normalization",
arXiv:1607.06450). With n = (s - mean) / sqrt(var + eps) and g = dy * weight, the gradient is
`ds = (g - mean(g) - n * mean(g * n)) / sqrt(var + eps)` plus what flows into s from elsewhere.

Alone a layer norm is bound by launches and memory, and torch's is as good. Fused with the sum, the stream is read and
written once where separate operations do it three times, and its gradient once where they do it twice.

Letters: N rows, C width, P programs of the backward pass.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft_kernels import registry, support, tables
from fastft_kernels.cpu import norms
from fastft_kernels.sums import rows_of_programs, summed
from fastft_kernels.support import Impl, tl, triton

WIDEST = 8192
"""The widest row: a program holds it in registers, and wider ones spill."""
KEPT = tl.constexpr(2048)
"""The widest row whose weights the backward pass keeps in registers too; wider ones read them again for each row."""

_WARPS = {None: 1, 512: 2, 1024: 4, 2048: 8, 4096: 8, 8192: 16}  # loads of 16 bytes from 256 elements a warp on
_BY_WIDTH = {size: {"num_warps": warps, "num_stages": 1} for size, warps in _WARPS.items()}
tables.TABLE["layer_norm_forward"] = {"default": _BY_WIDTH}
tables.TABLE["layer_norm_backward"] = {
    "default": {size: {**config, "programs": 256} for size, config in _BY_WIDTH.items()}
}


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The equation, step by step, in the dtype of the sum (at least float32)."""
    total = x if residual is None else x + residual
    s = total.to(torch.promote_types(total.dtype, torch.float32))
    centred = s - s.mean(dim=-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    y = (normed * weight + bias).to(out_dtype or x.dtype)
    return y if residual is None else (y, total)


@triton.jit
def layer_norm_forward(
    X, RESIDUAL, W, B, Y, S, MEAN, RSTD, stride_x, stride_r,
    C: tl.constexpr, eps: tl.constexpr, BC: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
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
    mean = tl.sum(s, 0) / C
    centred = tl.where(inside, s - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    w = tl.load(W + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * C + c, (centred * rstd * w + b).to(Y.dtype.element_ty), mask=inside)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)


@triton.jit
def layer_norm_backward(
    DY, DS, S, W, MEAN, RSTD, DSUM, DX, PARTIAL, N, rows, stride_dy, stride_ds, stride_s,
    C: tl.constexpr, BC: tl.constexpr, HAS_DS: tl.constexpr, HAS_DX: tl.constexpr,
):  # fmt: skip
    """One program for `rows` rows: their gradients, and its part of the sums over rows."""
    program = tl.program_id(0)
    c = tl.arange(0, BC)
    inside = c < C
    if BC <= KEPT:
        w = tl.load(W + c, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BC], tl.float32)
    db = tl.zeros([BC], tl.float32)
    for index in range(program * rows, tl.minimum((program + 1) * rows, N)):
        row = tl.cast(index, tl.int64)
        s = tl.load(S + row * stride_s + c, mask=inside, other=0.0).to(tl.float32)  # [BC]
        dy = tl.load(DY + row * stride_dy + c, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row)
        normed = tl.where(inside, (s - tl.load(MEAN + row)) * rstd, 0.0)
        dw += dy * normed
        db += dy
        if BC > KEPT:
            w = tl.load(W + c, mask=inside, other=0.0).to(tl.float32)
        g = dy * w
        ds = (g - (tl.sum(g, 0) + normed * tl.sum(g * normed, 0)) / C) * rstd
        if HAS_DS:
            ds += tl.load(DS + row * stride_ds + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(DSUM + row * C + c, ds.to(DSUM.dtype.element_ty), mask=inside)
        if HAS_DX:
            tl.store(DX + row * C + c, ds.to(DX.dtype.element_ty), mask=inside)
    at = program.to(tl.int64) * 2 * C + c  # PARTIAL is [P, 2, C]: one launch adds up both
    tl.store(PARTIAL + at, dw, mask=inside)
    tl.store(PARTIAL + at + C, db, mask=inside)


def _config(kernel: str, x: Tensor) -> dict[str, int]:
    BC = max(16, triton.next_power_of_2(x.shape[-1]))
    return {"BC": BC, **tables.tiles(kernel, support.arch_of(x), BC)}


@registry.operation("layer_norm_forward")
def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`[N, C]` -> y `[N, C]`, s `[N, C]` (empty without residual), mean and 1 / sqrt(var + eps) `[N]` float32."""
    N, C = x.shape
    y, s, mean, rstd = _forward_outputs(x, residual, out_dtype)
    if N:
        given = x if residual is None else residual
        layer_norm_forward[(N,)](
            x, given, weight, bias, y, s, mean, rstd, x.stride(0), given.stride(0),
            C=C, eps=eps, HAS_RESIDUAL=residual is not None, **_config("layer_norm_forward", x),
        )  # fmt: skip
    return y, s, mean, rstd


def _forward_outputs(
    x: Tensor, residual: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    s = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=_sum_dtype(x, residual), device=x.device)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    return y, s, mean, rstd


def _sum_dtype(x: Tensor, residual: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, residual.dtype)


@registry.fake(_forward)
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_outputs(x, residual, out_dtype)


@registry.operation("layer_norm_backward")
def _backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    x_dtype: torch.dtype, learnt_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of s `[N, C]` in its dtype, of x where its dtype is another one (else empty), and of weight and bias
    `[2, C]` in `learnt_dtype`."""
    N, C = s.shape
    config = _config("layer_norm_backward", s)
    programs, rows = rows_of_programs(N, config.pop("programs"))
    dsum, dx, learnt = _backward_outputs(s, x_dtype, learnt_dtype)
    partial = torch.empty(programs, 2 * C, dtype=torch.float32, device=s.device)
    dy, ds = support.in_rows(dy), None if ds is None else support.in_rows(ds)
    layer_norm_backward[(programs,)](
        dy, dy if ds is None else ds, s, weight, mean, rstd, dsum, dx, partial, N, rows,
        dy.stride(0), 0 if ds is None else ds.stride(0), s.stride(0),
        C=C, HAS_DS=ds is not None, HAS_DX=x_dtype != s.dtype, **config,
    )  # fmt: skip
    return dsum, dx, summed(partial, learnt_dtype).view(learnt.shape)


def _backward_outputs(s: Tensor, x_dtype: torch.dtype, learnt_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    dsum = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dx = torch.empty(s.shape if x_dtype != s.dtype else (0,), dtype=x_dtype, device=s.device)
    return dsum, dx, torch.empty((2, s.shape[1]), dtype=learnt_dtype, device=s.device)


@registry.fake(_backward)
def _(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    x_dtype: torch.dtype, learnt_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward_outputs(s, x_dtype, learnt_dtype)


def _save(ctx, inputs, output):
    x, residual, weight, bias, _, _ = inputs
    _, s, mean, rstd = output
    ctx.save_for_backward(x if residual is None else s, weight, mean, rstd)
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, ds, _dmean, _drstd):
    s, weight, mean, rstd = ctx.saved_tensors
    if ctx.residual_dtype is None:
        ds = None
    if dy is None:
        dy = torch.zeros_like(s)
    learnt_dtype = torch.promote_types(weight.dtype, ctx.bias_dtype)
    dsum, dx, learnt = _backward(dy, ds, s, weight, mean, rstd, ctx.x_dtype, learnt_dtype)
    d_residual = None if ctx.residual_dtype is None else dsum.to(ctx.residual_dtype)
    dw, db = learnt.unbind()
    d_x = dsum if ctx.x_dtype == s.dtype else dx
    return d_x, d_residual, dw.to(weight.dtype), db.to(ctx.bias_dtype), None, None


registry.differentiable(_forward, save=_save, gradient=_differentiate)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm over the last axis, of x or of its sum with the residual stream.

    Args:
        x: `[..., C]`, floating.
        weight, bias: `[C]`, in the dtype of x or float32.
        eps: added to the variance.
        residual: `[..., C]`; it may be wider than x, as the stream is in mixed precision.
        out_dtype: of the result; the dtype of x where it is not given.
        impl: `reference` computes the equation step by step, `torch` calls `F.layer_norm`, `triton` and `compiled` the
            kernels; `auto` is `triton` on a supported GPU, `compiled` on a CPU, else `torch`.

    Returns:
        y `[..., C]`; with `residual`, y and the sum s, in the wider of the two dtypes.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or `triton` or `compiled` where it cannot run.
    """
    _check(x, weight, bias, residual, out_dtype)
    impl = support.choose(impl, x, residual, weight, bias, out_dtype, has_compiled=True)
    if impl == "reference":
        return reference(x, weight, bias, eps=eps, residual=residual, out_dtype=out_dtype)
    if impl == "torch":
        s = x if residual is None else x + residual
        # In bf16 torch's CPU kernel sums the gradients of weight and bias over the rows in bf16, which loses the small.
        wide = torch.promote_types(s.dtype, torch.float32)
        y = F.layer_norm(s.to(wide), s.shape[-1:], weight.to(wide), bias.to(wide), eps).to(out_dtype or x.dtype)
        return y if residual is None else (y, s)
    weight, bias = weight.contiguous(), bias.contiguous()
    rows, residual_rows = support.in_rows(x), None if residual is None else support.in_rows(residual)
    if impl == "compiled":
        y, s = norms.layer_norm(rows, weight, bias, eps=eps, residual=residual_rows, out_dtype=out_dtype or x.dtype)
    else:
        support.check_dtype(x, weight, bias, residual)
        y, s, _, _ = _forward(rows, residual_rows, weight, bias, eps, out_dtype or x.dtype)
    if x.ndim != 2:
        y, s = y.view(x.shape), s if residual is None else s.view(x.shape)
    return y if residual is None else (y, s)


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, out_dtype: torch.dtype | None) -> None:
    if not x.is_floating_point() or x.ndim < 1 or not 1 <= x.shape[-1] <= WIDEST:
        raise ValueError(f"got x {tuple(x.shape)} {x.dtype}, expected floating [..., C] with C from 1 to {WIDEST}")
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"got weight {tuple(weight.shape)}, bias {tuple(bias.shape)}, expected both [{x.shape[-1]}], x's last axis"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"got residual {tuple(residual.shape)}, expected the shape of x, {tuple(x.shape)}")
    if not all(t is None or t.is_floating_point() for t in (weight, bias, residual)):
        dtypes = ", ".join(str(t.dtype) for t in (weight, bias, residual) if t is not None)
        raise ValueError(f"got weight, bias and residual in {dtypes}, expected floating ones")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f"got out_dtype={out_dtype}, expected a floating one")
    if any(t is not None and t.device != x.device for t in (weight, bias, residual)):
        raise ValueError(f"got tensors on different devices, expected all on x's, {x.device}")
