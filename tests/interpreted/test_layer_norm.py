from __future__ import annotations

import sys

import pytest
import torch
from fastft_kernels import layer_norm as public
from fastft_kernels import sums, tables
from mutants import mutant
from proofs import assert_right, assert_same_bits, drawn, is_wrong, opcheck, results
from torch import Tensor

kernels = sys.modules["fastft_kernels.layer_norm"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward programs that have several rows each at the sizes that the interpreter can do."""
    config = {"num_warps": 4, "num_stages": 1, "programs": 8}
    monkeypatch.setitem(tables.TABLE, "layer_norm_backward", {"default": {None: config}})


def alone(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str) -> Tensor:
    return public(x, weight, bias, impl=impl)


def added(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *, impl: str) -> tuple[Tensor, Tensor]:
    return public(x, weight, bias, residual=residual, impl=impl)


def inputs(
    N: int, C: int, dtype: torch.dtype = torch.float32, residual: torch.dtype | None = None
) -> dict[str, Tensor]:
    made = {"x": drawn(N, C, dtype=dtype), "weight": drawn(C, seed=1), "bias": drawn(C, seed=2)}
    return made if residual is None else {**made, "residual": drawn(N, C, dtype=residual, seed=3)}


@pytest.mark.parametrize(("N", "C"), [(1, 1), (1, 17), (63, 24), (3, 1600)])
@pytest.mark.usefixtures("few_programs")
def test_against_float64(N: int, C: int) -> None:
    for dtype in DTYPES if N == 3 else (torch.float32, torch.bfloat16):
        assert_right(alone, inputs(N, C, dtype))
        assert_right(added, inputs(N, C, dtype, residual=torch.float32))  # the mixed-precision stream
        assert_right(added, inputs(N, C, dtype, residual=dtype))


def test_rows_too_wide_to_keep_their_weights_in_registers() -> None:
    assert_right(added, inputs(2, 5000, torch.bfloat16, residual=torch.float32))


def test_weights_in_the_dtype_of_x() -> None:
    narrow = {name: x.detach().bfloat16().requires_grad_() for name, x in inputs(5, 24).items()}
    assert_right(alone, narrow)
    assert_right(alone, {**narrow, "bias": narrow["bias"].detach().float().requires_grad_()})


def test_the_result_may_be_narrower() -> None:
    x, weight, bias = inputs(5, 24).values()
    got = public(x, weight, bias, out_dtype=torch.bfloat16, impl="triton")
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, public(x, weight, bias, impl="triton").to(torch.bfloat16))


def test_with_the_programs_as_shipped() -> None:
    assert_right(alone, inputs(257, 16))


def test_no_rows() -> None:
    found = results(added, inputs(0, 8, residual=torch.float32), "triton")
    assert found["output 0"].shape == (0, 8)
    assert found["d weight"].tolist() == [0.0] * 8


def test_either_output_alone() -> None:
    made = inputs(7, 24, residual=torch.float32)
    for index in (0, 1):
        assert_right(lambda *x, impl, index=index: added(*x, impl=impl)[index], made)


def test_inputs_that_lie_apart_and_an_expanded_gradient() -> None:
    made = inputs(9, 24)
    rows_apart = torch.stack([made["x"].detach(), made["x"].detach()], dim=1)[:, 0].requires_grad_()
    columns_apart = made["x"].detach().t().contiguous().t().requires_grad_()
    assert not rows_apart.is_contiguous()
    for x in (rows_apart, columns_apart):
        assert_right(alone, {**made, "x": x})
    gradients = [
        torch.autograd.grad(public(*made.values(), impl=impl).sum(), made["bias"])  # a sum's gradient is expanded
        for impl in ("triton", "reference")
    ]
    assert torch.equal(*(g for (g,) in gradients))


def test_inputs_without_a_gradient() -> None:
    made = {name: x.detach() for name, x in inputs(5, 24, residual=torch.float32).items()}
    assert_right(added, made)
    assert_right(added, {**made, "weight": made["weight"].requires_grad_()})


@pytest.mark.usefixtures("few_programs")
def test_the_same_bits_each_time() -> None:
    assert_same_bits(added, inputs(30, 24, torch.bfloat16, residual=torch.float32))


def test_the_registered_operations() -> None:
    x, weight, bias, residual = inputs(3, 8, torch.bfloat16, residual=torch.float32).values()
    opcheck(kernels._forward, x, residual, weight, bias, 1e-5, torch.bfloat16)
    opcheck(kernels._forward, x, None, weight, bias, 1e-5, torch.bfloat16)
    _, s, mean, rstd = kernels._forward(x.detach(), residual.detach(), weight.detach(), bias.detach(), 1e-5, x.dtype)
    opcheck(kernels._backward, x.detach(), s, s, weight.detach(), mean, rstd, x.dtype, torch.float32)


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("layer_norm_forward", "/ C + eps)", "/ C) + eps"),  # eps beside the root
        ("layer_norm_forward", "inside = c < C", "inside = c < C - 1"),
        ("layer_norm_backward", "if HAS_DS:", "if False:"),  # what flows into the sum from elsewhere
        ("layer_norm_backward", "(program + 1) * rows, N)", "(program + 1) * rows, N - 1)"),
        ("sum_rows", "(p < P)", "(p < P - 1)"),
    ],
)
@pytest.mark.usefixtures("few_programs")
def test_planted_faults_fail(kernel: str, old: str, new: str) -> None:
    made = inputs(30, 24, residual=torch.float32)
    made["x"] = (made["x"].detach() * 1e-2).requires_grad_()  # where eps counts
    made["residual"] = (made["residual"].detach() * 1e-2).requires_grad_()
    assert not is_wrong(added, made)
    module = sums if kernel == "sum_rows" else kernels
    with mutant(getattr(module, kernel), old, new):
        assert is_wrong(added, made)
