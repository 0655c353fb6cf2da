from __future__ import annotations

import fastft_kernels
import pytest
import torch
from fastft_kernels.layer_norm import WIDEST
from torch import Tensor
from torch.nn import functional as F

FLOAT64 = torch.float64


def inputs(dtype: torch.dtype = FLOAT64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 24), (24,), (24,), (2, 5, 24))
    x, weight, bias, residual = (torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes)
    return x, weight, bias, residual


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_it_is_torchs(impl: str) -> None:
    x, weight, bias, residual = inputs()
    expected = F.layer_norm(x, (24,), weight, bias, 1e-3)
    assert torch.allclose(fastft_kernels.layer_norm(x, weight, bias, eps=1e-3, impl=impl), expected, atol=1e-12)
    y, s = fastft_kernels.layer_norm(x, weight, bias, residual=residual, impl=impl)
    assert torch.equal(s, x + residual)
    assert torch.allclose(y, F.layer_norm(x + residual, (24,), weight, bias), atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda *given: fastft_kernels.layer_norm(*given[:3], residual=given[3], impl=impl),
        tuple(t[:1, :2] if t.ndim == 3 else t for t in (x, weight, bias, residual)),
    )


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_dtypes_of_a_stream_that_is_wider_than_the_branch(impl: str) -> None:
    x, weight, bias, residual = inputs(torch.float32)
    y, s = fastft_kernels.layer_norm(x.bfloat16(), weight, bias, residual=residual, impl=impl)
    assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    assert not torch.equal(s, s.bfloat16().float())  # nothing rounded it on the way
    y = fastft_kernels.layer_norm(x, weight, bias, out_dtype=torch.bfloat16, impl=impl)
    assert y.dtype == torch.bfloat16


def test_planted_faults_are_seen() -> None:
    """The comparison refuses eps outside the root, and a variance divided by C - 1."""
    x, weight, bias, _ = inputs()
    right = fastft_kernels.layer_norm(x, weight, bias, eps=1e-3, impl="reference")
    centred = x - x.mean(-1, keepdim=True)
    outside = centred / (x.var(-1, keepdim=True, correction=0).sqrt() + 1e-3) * weight + bias
    corrected = centred / (x.var(-1, keepdim=True) + 1e-3).sqrt() * weight + bias
    assert not torch.allclose(outside, right, atol=1e-12)
    assert not torch.allclose(corrected, right, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.ones(3, 24, dtype=torch.int64)}, "expected floating"),
        ({"x": torch.ones(1, WIDEST + 1)}, f"C from 1 to {WIDEST}"),
        ({"x": torch.ones(3, 0)}, "C from 1"),
        ({"x": torch.tensor(1.0)}, "expected floating"),
        ({"weight": torch.ones(23)}, r"got weight \(23,\)"),
        ({"bias": torch.ones(1, 24)}, r"bias \(1, 24\)"),
        ({"bias": torch.ones(24, dtype=torch.int64)}, "expected floating"),
        ({"residual": torch.ones(24)}, r"got residual \(24,\), expected the shape of x"),
        ({"weight": torch.ones(24, device="meta")}, "different devices"),
        ({"out_dtype": torch.int32}, "got out_dtype=torch.int32"),
        ({"impl": "fast"}, "got impl='fast'"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], said: str) -> None:
    given = {"x": torch.ones(3, 24), "weight": torch.ones(24), "bias": torch.ones(24), **change}
    with pytest.raises(ValueError, match=said):
        fastft_kernels.layer_norm(**given)


def test_triton_says_why_it_cannot_run_here() -> None:
    with pytest.raises(ValueError, match='impl="triton", which cannot run here'):
        fastft_kernels.layer_norm(torch.ones(3, 24), torch.ones(24), torch.ones(24), impl="triton")
