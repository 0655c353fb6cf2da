from __future__ import annotations

import sys

import fastft_kernels
import pytest
import torch
from mutants import mutant
from proofs import assert_right, assert_same_bits, drawn, is_wrong, opcheck, results
from torch import Tensor

kernels = sys.modules["fastft_kernels.gelu"]


def plain(x: Tensor, *, impl: str) -> Tensor:
    return fastft_kernels.gelu(x, impl=impl)


def biased(x: Tensor, bias: Tensor, *, impl: str) -> Tensor:
    return fastft_kernels.gelu(x, bias, impl=impl)


def inputs(N: int, F: int, dtype: torch.dtype = torch.float32, bias: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"x": (3 * drawn(N, F).detach()).to(dtype).requires_grad_(), "bias": drawn(F, dtype=bias, seed=1)}


@pytest.mark.parametrize(("N", "F"), [(1, 1), (63, 24), (257, 17), (2, 1030)])
def test_against_float64(N: int, F: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # float32's budget: one exponential in place of a tanh, 0.5e-6 in the gradient
        assert_right(biased, inputs(N, F, dtype), slack=1.5e-6 if dtype == torch.float32 else None)
    assert_right(biased, inputs(N, F, torch.bfloat16, torch.bfloat16))
    assert_right(plain, {"x": inputs(N, F)["x"]}, slack=1.5e-6)


def test_far_out_it_is_the_identity_or_nothing() -> None:
    x = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], requires_grad=True)
    found = results(plain, {"x": x}, "triton")
    assert found["output 0"].tolist() == [[0.0, 0.0, 0.0, 100.0, 1e4]]
    assert torch.allclose(found["d x"], torch.linspace(0.5, 1.5, 5) * torch.tensor([0, 0, 0.5, 1, 1]))


def test_no_rows_and_more_axes() -> None:
    found = results(biased, inputs(0, 8), "triton")
    assert found["d bias"].tolist() == [0.0] * 8
    x = drawn(2, 3, 8)
    assert torch.equal(fastft_kernels.gelu(x, impl="triton"), plain(x.view(6, 8), impl="triton").view(2, 3, 8))


def test_inputs_that_lie_apart_or_have_no_gradient() -> None:
    made = inputs(9, 24)
    apart = torch.stack([made["x"].detach()] * 2, dim=1)[:, 0].requires_grad_()
    assert_right(biased, {**made, "x": apart}, slack=1.5e-6)
    assert_right(biased, {**made, "x": made["x"].detach()}, slack=1.5e-6)


def test_the_same_bits_each_time() -> None:
    assert_same_bits(biased, inputs(300, 24, torch.bfloat16))


def test_the_registered_operations() -> None:
    x, bias = inputs(3, 8).values()
    opcheck(kernels._forward, x, bias)
    opcheck(kernels._forward, x, None)
    opcheck(kernels._backward, x.detach(), x.detach(), bias.detach())


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("gelu_forward", "(f < F)[None, :]", "(f < F - 1)[None, :]"),
        ("gelu_forward", "if HAS_BIAS:", "if False:"),
        ("gelu_backward", "1.0 + 3.0 * CUBIC", "1.0 + CUBIC"),
        (
            "gelu_backward",
            "for begin in range(program * rows, end, BN):",
            "for begin in range(program * rows, end - BN, BN):",
        ),
    ],
)
def test_planted_faults_fail(kernel: str, old: str, new: str) -> None:
    made = inputs(70, 24)
    with mutant(getattr(kernels, kernel), old, new):
        assert is_wrong(biased, made)
    assert_right(biased, made, slack=1.5e-6)
