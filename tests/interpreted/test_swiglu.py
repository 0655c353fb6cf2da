from __future__ import annotations

import sys

import fastft_kernels
import pytest
import torch
from mutants import mutant
from proofs import assert_right, assert_same_bits, drawn, is_wrong, opcheck, results
from torch import Tensor

kernels = sys.modules["fastft_kernels.swiglu"]


def run(gate: Tensor, up: Tensor, *, impl: str) -> Tensor:
    return fastft_kernels.swiglu(gate, up, impl=impl)


def inputs(N: int, F: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    gate = (3 * drawn(N, F).detach()).to(dtype).requires_grad_()
    return {"gate": gate, "up": drawn(N, F, dtype=dtype, seed=1)}


@pytest.mark.parametrize(("N", "F"), [(1, 1), (63, 24), (257, 17), (2, 1030)])
def test_against_float64(N: int, F: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_right(run, inputs(N, F, dtype))


def test_far_out_the_gate_is_open_or_closed() -> None:
    gate = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4]], requires_grad=True)
    up = torch.full((1, 5), 2.0, requires_grad=True)
    found = results(run, {"gate": gate, "up": up}, "triton")
    assert found["output 0"].tolist() == [[0.0, 0.0, 0.0, 400.0, 2e4]]
    assert torch.allclose(found["d gate"], 2 * torch.linspace(0.5, 1.5, 5) * torch.tensor([0, 0, 0.5, 1, 1]))


def test_no_rows_more_axes_and_halves_of_one_product() -> None:
    assert results(run, inputs(0, 8), "triton")["d up"].shape == (0, 8)
    gate, up = drawn(6, 8), drawn(6, 8, seed=1)
    together = run(gate.view(2, 3, 8), up.view(2, 3, 8), impl="triton")
    assert torch.equal(together, run(gate, up, impl="triton").view(2, 3, 8))
    both = drawn(9, 48)
    halves = dict(zip(("gate", "up"), (x.detach().requires_grad_() for x in both.chunk(2, dim=1)), strict=True))
    assert not halves["up"].is_contiguous()
    assert_right(run, halves)


def test_the_same_bits_each_time() -> None:
    assert_same_bits(run, inputs(70, 24, torch.bfloat16))


def test_the_registered_operations() -> None:
    gate, up = inputs(3, 8).values()
    opcheck(kernels._forward, gate, up)
    opcheck(kernels._backward, gate.detach(), gate.detach(), up.detach())


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("swiglu_forward", "(f < F)[None, :]", "(f < F - 1)[None, :]"),
        ("swiglu_forward", "z * sigmoid(z)", "up * sigmoid(z)"),  # the wrong half is the gate
        ("swiglu_backward", "(1.0 - p)", "(1.0 + p)"),
        ("swiglu_backward", "dy * z * p", "dy * p"),
        ("swiglu_backward", "(n < N)", "(n < N - 1)"),
    ],
)
def test_planted_faults_fail(kernel: str, old: str, new: str) -> None:
    made = inputs(70, 24)
    with mutant(getattr(kernels, kernel), old, new):
        assert is_wrong(run, made)
    assert_right(run, made)
