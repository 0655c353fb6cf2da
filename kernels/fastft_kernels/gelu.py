"""GELU in its tanh form, with the bias of the product before it.

    y = 0.5 z (1 + tanh(u)),   z = x + bias,   u = sqrt(2 / pi) (z + 0.044715 z^3)

(Hendrycks, Gimpel 2016, "Gaussian Error Linear Units", arXiv:1606.08415.) As 0.5 (1 + tanh u) is the logistic function
of 2 u, one exponential is enough: y = z sigmoid(2 u), dy/dz = sigmoid(2 u) + 2 z u' sigmoid(2 u) sigmoid(-2 u).

Letters: N rows, F width, P programs for each block of columns.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from fastft_kernels import registry, support, tables
from fastft_kernels.cpu import activations
from fastft_kernels.sums import rows_of_programs, summed
from fastft_kernels.support import Impl, tl, triton

SLOPE = tl.constexpr(math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)

tables.TABLE["gelu_forward"] = {"default": {None: {"BN": 4, "BF": 512, "num_warps": 4, "num_stages": 1}}}
tables.TABLE["gelu_backward"] = {
    "default": {None: {"BN": 4, "BF": 256, "programs": 64, "num_warps": 4, "num_stages": 1}}
}


def reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The equation, step by step, in at least float32."""
    z = (x if bias is None else x + bias).to(torch.promote_types(x.dtype, torch.float32))
    u = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    return (0.5 * z * (1 + torch.tanh(u))).to(x.dtype)


@triton.jit
def sigmoid(z):
    """The logistic function, without an exponential that overflows."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def gelu_forward(X, B, Y, N, F, stride_x, BN: tl.constexpr, BF: tl.constexpr, HAS_BIAS: tl.constexpr):
    """One program for a block of rows and columns."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = (n < N)[:, None] & (f < F)[None, :]
    z = tl.load(X + n[:, None] * stride_x + f[None, :], mask=inside, other=0.0).to(tl.float32)  # [BN, BF]
    if HAS_BIAS:
        z += tl.load(B + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    u = SLOPE * (z + CUBIC * z * z * z)
    tl.store(Y + n[:, None] * F + f[None, :], (z * sigmoid(2.0 * u)).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward(
    DY, X, B, DX, PARTIAL, N, F, rows, stride_dy, stride_x,
    BN: tl.constexpr, BF: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One program for `rows` rows and a block of columns: their gradients, and its part of the bias's."""
    program = tl.program_id(1)
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    end = tl.minimum((program + 1) * rows, N)
    db = tl.zeros([BF], tl.float32)
    if HAS_BIAS:
        b = tl.load(B + f, mask=f < F, other=0.0).to(tl.float32)
    for begin in range(program * rows, end, BN):
        n = tl.cast(begin, tl.int64) + tl.arange(0, BN)
        inside = (n < end)[:, None] & (f < F)[None, :]
        z = tl.load(X + n[:, None] * stride_x + f[None, :], mask=inside, other=0.0).to(tl.float32)  # [BN, BF]
        if HAS_BIAS:
            z += b[None, :]
        dy = tl.load(DY + n[:, None] * stride_dy + f[None, :], mask=inside, other=0.0).to(tl.float32)
        u = SLOPE * (z + CUBIC * z * z * z)
        slope = SLOPE * (1.0 + 3.0 * CUBIC * z * z)
        p = sigmoid(2.0 * u)
        dz = dy * (p + 2.0 * z * slope * p * (1.0 - p))
        tl.store(DX + n[:, None] * F + f[None, :], dz.to(DX.dtype.element_ty), mask=inside)
        db += tl.sum(dz, 0)
    if HAS_BIAS:
        tl.store(PARTIAL + program.to(tl.int64) * F + f, db, mask=f < F)


@registry.operation("gelu_forward")
def _forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """`[N, F]` -> `[N, F]`."""
    N, F = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        config = tables.tiles("gelu_forward", support.arch_of(x))
        gelu_forward[(triton.cdiv(N, config["BN"]), triton.cdiv(F, config["BF"]))](
            x, x if bias is None else bias, y, N, F, x.stride(0), HAS_BIAS=bias is not None, **config
        )
    return y


@registry.fake(_forward)
def _(x: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@registry.operation("gelu_backward")
def _backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x `[N, F]` and of the bias `[F]` (empty where there is none)."""
    N, F = x.shape
    dx, db = _backward_outputs(x, bias)
    config = dict(tables.tiles("gelu_backward", support.arch_of(x)))
    programs, rows = rows_of_programs(triton.cdiv(N, config["BN"]), config.pop("programs"))
    partial = torch.empty((programs, F) if bias is not None else (0,), dtype=torch.float32, device=x.device)
    dy = support.in_rows(dy)
    gelu_backward[(triton.cdiv(F, config["BF"]), programs)](
        dy, x, x if bias is None else bias, dx, partial, N, F, rows * config["BN"], dy.stride(0), x.stride(0),
        HAS_BIAS=bias is not None, **config,
    )  # fmt: skip
    return dx, db if bias is None else summed(partial, bias.dtype)


def _backward_outputs(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, x.new_empty(0) if bias is None else torch.empty_like(bias)


@registry.fake(_backward)
def _(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _backward_outputs(x, bias)


def _save(ctx, inputs, output):
    x, bias = inputs
    ctx.save_for_backward(x, bias)


def _differentiate(ctx, dy):
    x, bias = ctx.saved_tensors
    dx, db = _backward(dy, x, bias)
    return dx, None if bias is None else db


registry.differentiable(_forward, save=_save, gradient=_differentiate)


def gelu(x: Tensor, bias: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """GELU of `x + bias`, in its tanh form.

    Args:
        x: `[..., F]`, floating.
        bias: `[F]`, in the dtype of x or float32.
        impl: `reference` computes the equation step by step, `torch` calls `F.gelu`, `triton` and `compiled` the
            kernels; `auto` is `triton` on a supported GPU, `compiled` on a CPU, else `torch`.

    Returns:
        `[..., F]` in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or `triton` or `compiled` where it cannot run.
    """
    _check(x, bias)
    impl = support.choose(impl, x, bias, has_compiled=True)
    if impl == "reference":
        return reference(x, bias)
    if impl == "torch":
        return functional.gelu(x if bias is None else x + bias, approximate="tanh").to(x.dtype)
    bias = None if bias is None else bias.contiguous()
    if impl == "compiled":
        return activations.gelu(support.in_rows(x), bias).view(x.shape)
    support.check_dtype(x, bias)
    y: Tensor = _forward(support.in_rows(x), bias)
    return y.view(x.shape)


def _check(x: Tensor, bias: Tensor | None) -> None:
    if not x.is_floating_point() or x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"got x {tuple(x.shape)} {x.dtype}, expected floating [..., F] with F at least 1")
    if bias is not None and (bias.shape != x.shape[-1:] or bias.device != x.device):
        raise ValueError(
            f"got bias {tuple(bias.shape)} on {bias.device}, expected [{x.shape[-1]}] on x's device, {x.device}"
        )
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"got a bias of {bias.dtype}, expected floating")
