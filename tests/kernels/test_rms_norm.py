"""RMS norm outside the interpreter: its torch path beside torch's own and the reference, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastft_kernels import rms_norm
from torch import Tensor
from torch.nn import functional as F


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, residual = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((2, 5, 24), (24,), (2, 5, 24))
    )
    return x, weight, residual


def gradients(y: Tensor, of: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    flowing = torch.linspace(0.5, 1.5, y.numel()).bfloat16().view_as(y)  # the same numbers in each dtype
    return torch.autograd.grad(y, of, flowing.to(y.dtype))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_beside_torchs_own(impl: Any, offset: float) -> None:
    x, weight, residual = inputs()
    y, s = rms_norm(x, weight, eps=1e-3, offset=offset, residual=residual, impl=impl)
    expected = F.rms_norm(x + residual, (24,), weight + offset, 1e-3)
    assert torch.equal(s, x + residual)
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    of = (x, weight, residual)
    for got, right in zip(gradients(y + s, of), gradients(expected + x + residual, of), strict=True):
        assert torch.allclose(got, right, rtol=0, atol=1e-12)
    alone = rms_norm(x, weight, eps=1e-3, offset=offset, impl=impl)
    assert torch.allclose(alone, F.rms_norm(x, (24,), weight + offset, 1e-3), rtol=0, atol=1e-12)
    assert not torch.allclose(alone, F.rms_norm(x, (24,), weight + offset, 1e-2), rtol=0, atol=1e-4)  # another eps


def test_in_16_bits_it_is_rounded_once() -> None:
    x, weight, _ = inputs(torch.bfloat16)
    exact = F.rms_norm(x.double(), (24,), weight.double(), 1e-6)
    found = rms_norm(x, weight, impl="torch")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16))
    assert rms_norm(x, weight, out_dtype=torch.float32, impl="torch").dtype == torch.float32
    d_x, d_weight = gradients(found, (x, weight))
    right = gradients(exact, (x, weight))
    assert torch.allclose(d_x, right[0], rtol=2**-7, atol=1e-2)
    assert torch.allclose(d_weight, right[1], rtol=2**-7, atol=1e-2)


def test_one_axis_and_no_rows() -> None:
    weight = torch.ones(4, requires_grad=True)
    assert torch.allclose(rms_norm(torch.full((4,), 3.0), weight), torch.ones(4))
    (of_weight,) = torch.autograd.grad(rms_norm(torch.full((4,), 3.0), weight).sum(), weight)
    assert torch.allclose(of_weight, torch.ones(4))
    (of_none,) = torch.autograd.grad(rms_norm(torch.empty(0, 4), weight).sum(), weight)
    assert of_none.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, r"got x \(2, 3\) torch.int64"),
        ({"x": torch.zeros(2, 8193), "weight": torch.zeros(8193)}, "with C from 1 to 8192"),
        ({"weight": torch.zeros(4)}, r"got weight \(4,\) torch.float32, expected floating \[3\]"),
        ({"residual": torch.zeros(3, 3)}, r"got residual \(3, 3\) torch.float32, expected floating, in the shape of x"),
        ({"out_dtype": torch.int32}, "got out_dtype=torch.int32"),
        ({"weight": torch.zeros(3, device="meta")}, "got tensors on different devices"),
        ({"impl": "triton"}, 'got impl="triton", which cannot run here'),
    ],
)
def test_errors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(**{"x": torch.zeros(2, 3), "weight": torch.zeros(3), **changed})
