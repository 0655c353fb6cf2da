"""SwiGLU: the product of a gate and what it lets through.

    y = silu(gate) * up,   silu(z) = z sigmoid(z)

(Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202.) Its gradient needs the two inputs alone:
`d up = dy silu(gate)`, `d gate = dy up (p + gate p (1 - p))` with p = sigmoid(gate).

Letters: N rows, F width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastft_kernels import registry, support, tables
from fastft_kernels.cpu import activations
from fastft_kernels.gelu import sigmoid
from fastft_kernels.once import differentiable_once
from fastft_kernels.support import Impl, tl, triton

for _direction in ("forward", "backward"):
    tables.TABLE[f"swiglu_{_direction}"] = {"default": {None: {"BN": 4, "BF": 512, "num_warps": 4, "num_stages": 1}}}


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """The equation, step by step, in at least float32."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    z = gate.to(wide)
    return (z * torch.sigmoid(z) * up.to(wide)).to(gate.dtype)


@triton.jit
def swiglu_forward(GATE, UP, Y, N, F, stride_g, stride_u, BN: tl.constexpr, BF: tl.constexpr):
    """One program for a block of rows and columns."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = (n < N)[:, None] & (f < F)[None, :]
    z = tl.load(GATE + n[:, None] * stride_g + f[None, :], mask=inside, other=0.0).to(tl.float32)  # [BN, BF]
    up = tl.load(UP + n[:, None] * stride_u + f[None, :], mask=inside, other=0.0).to(tl.float32)
    y = z * sigmoid(z) * up
    tl.store(Y + n[:, None] * F + f[None, :], y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(
    DY, GATE, UP, DGATE, DUP, N, F, stride_dy, stride_g, stride_u, BN: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    """One program for a block of rows and columns."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = (n < N)[:, None] & (f < F)[None, :]
    z = tl.load(GATE + n[:, None] * stride_g + f[None, :], mask=inside, other=0.0).to(tl.float32)  # [BN, BF]
    up = tl.load(UP + n[:, None] * stride_u + f[None, :], mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(DY + n[:, None] * stride_dy + f[None, :], mask=inside, other=0.0).to(tl.float32)
    p = sigmoid(z)
    at = n[:, None] * F + f[None, :]
    tl.store(DUP + at, (dy * z * p).to(DUP.dtype.element_ty), mask=inside)
    tl.store(DGATE + at, (dy * up * (p + z * p * (1.0 - p))).to(DGATE.dtype.element_ty), mask=inside)


def _grid(N: int, F: int, config: tables.Config) -> tuple[int, int]:
    return triton.cdiv(N, config["BN"]), triton.cdiv(F, config["BF"])


@registry.operation("swiglu_forward")
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    """`[N, F]` each -> `[N, F]`."""
    N, F = gate.shape
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        config = tables.tiles("swiglu_forward", support.arch_of(gate))
        swiglu_forward[_grid(N, F, config)](gate, up, y, N, F, gate.stride(0), up.stride(0), **config)
    return y


@registry.fake(_forward)
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@registry.operation("swiglu_backward")
def _backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, `[N, F]` each."""
    N, F = gate.shape
    dgate, dup = _backward_outputs(gate)
    if dgate.numel():
        config = tables.tiles("swiglu_backward", support.arch_of(gate))
        dy = support.in_rows(dy)
        swiglu_backward[_grid(N, F, config)](
            dy, gate, up, dgate, dup, N, F, dy.stride(0), gate.stride(0), up.stride(0), **config
        )
    return dgate, dup


def _backward_outputs(gate: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    return dgate, dup


@registry.fake(_backward)
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _backward_outputs(gate)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    return _backward(dy, *ctx.saved_tensors)


registry.differentiable(_forward, save=_save, gradient=_differentiate)


class _InTorch(torch.autograd.Function):
    """`silu(gate) * up` and its gradients by torch's operations, to the bit; silu is computed again, and not kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate) * up

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return dgate, grads[0] * functional.silu(gate)


def swiglu(gate: Tensor, up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """SwiGLU of the two products in front of it.

    Args:
        gate, up: `[..., F]`, floating, of one dtype. They may be the halves of one product: rows are read where they
            lie.
        impl: `reference` computes the equation step by step, `torch` calls `F.silu`, `triton` and `compiled` the
            kernels; `auto` is `triton` on a supported GPU, `compiled` on a CPU, else `torch`. In 16 bits `torch`
            rounds silu(gate) before the product, as plain PyTorch does, and the others do not.

    Returns:
        `[..., F]` in the dtype of gate.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or `triton` or `compiled` where it cannot run.
    """
    _check(gate, up)
    impl = support.choose(impl, gate, up, has_compiled=True)
    if impl == "reference":
        return reference(gate, up)
    if impl == "torch":
        apply: Callable[..., Tensor] = _InTorch.apply
        return apply(gate, up)
    if impl == "compiled":
        return activations.swiglu(support.in_rows(gate), support.in_rows(up)).view(gate.shape)
    support.check_dtype(gate)
    y: Tensor = _forward(support.in_rows(gate), support.in_rows(up))
    return y.view(gate.shape)


def _check(gate: Tensor, up: Tensor) -> None:
    if not gate.is_floating_point() or gate.ndim < 1 or gate.shape[-1] < 1:
        raise ValueError(f"got gate {tuple(gate.shape)} {gate.dtype}, expected floating [..., F] with F at least 1")
    if (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        raise ValueError(
            f"got up {tuple(up.shape)} {up.dtype} on {up.device}, expected it as gate is, {tuple(gate.shape)} "
            f"{gate.dtype} on {gate.device}"
        )
