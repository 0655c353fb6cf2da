from __future__ import annotations

import sys

import pytest
import torch
from fastft_kernels import rms_norm as public
from fastft_kernels import tables
from mutants import mutant
from proofs import assert_right, assert_same_bits, drawn, is_wrong, opcheck, results
from torch import Tensor

kernels = sys.modules["fastft_kernels.rms_norm"]


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward programs that have several rows each at the sizes that the interpreter can do."""
    config = {"num_warps": 4, "num_stages": 1, "programs": 8}
    monkeypatch.setitem(tables.TABLE, "rms_norm_backward", {"default": {None: config}})


def alone(x: Tensor, weight: Tensor, *, impl: str) -> Tensor:
    return public(x, weight, impl=impl)


def gemma(x: Tensor, weight: Tensor, *, impl: str) -> Tensor:
    return public(x, weight, offset=1.0, eps=1e-3, impl=impl)


def added(x: Tensor, weight: Tensor, residual: Tensor, *, impl: str) -> tuple[Tensor, Tensor]:
    return public(x, weight, residual=residual, impl=impl)


def inputs(
    N: int, C: int, dtype: torch.dtype = torch.float32, residual: torch.dtype | None = None
) -> dict[str, Tensor]:
    made = {"x": drawn(N, C, dtype=dtype), "weight": drawn(C, seed=1)}
    return made if residual is None else {**made, "residual": drawn(N, C, dtype=residual, seed=3)}


@pytest.mark.parametrize(("N", "C"), [(1, 3), (1, 17), (63, 24), (3, 576)])
@pytest.mark.usefixtures("few_programs")
def test_against_float64(N: int, C: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_right(alone, inputs(N, C, dtype))
        assert_right(gemma, inputs(N, C, dtype))
        assert_right(added, inputs(N, C, dtype, residual=torch.float32))  # the mixed-precision stream
        assert_right(added, inputs(N, C, dtype, residual=dtype))


def test_rows_too_wide_to_keep_their_weights_in_registers() -> None:
    assert_right(added, inputs(2, 5000, torch.bfloat16, residual=torch.float32))


def test_with_the_programs_as_shipped_and_weights_in_the_dtype_of_x() -> None:
    made = {name: x.detach().bfloat16().requires_grad_() for name, x in inputs(257, 16).items()}
    assert_right(alone, made)


def test_no_rows_either_output_alone_and_inputs_that_lie_apart() -> None:
    found = results(added, inputs(0, 8, residual=torch.float32), "triton")
    assert found["output 0"].shape == (0, 8)
    assert found["d weight"].tolist() == [0.0] * 8
    made = inputs(7, 24, residual=torch.float32)
    for index in (0, 1):
        assert_right(lambda *x, impl, index=index: added(*x, impl=impl)[index], made)
    rows_apart = torch.stack([made["x"].detach()] * 2, dim=1)[:, 0].requires_grad_()
    columns_apart = made["x"].detach().t().contiguous().t().requires_grad_()
    for x in (rows_apart, columns_apart):
        assert_right(alone, {"x": x, "weight": made["weight"]})


@pytest.mark.usefixtures("few_programs")
def test_the_same_bits_each_time() -> None:
    assert_same_bits(added, inputs(30, 24, torch.bfloat16, residual=torch.float32))


def test_the_registered_operations() -> None:
    x, weight, residual = inputs(3, 8, torch.bfloat16, residual=torch.float32).values()
    opcheck(kernels._forward, x, residual, weight, 1e-5, 0.0, torch.bfloat16)
    opcheck(kernels._forward, x, None, weight, 1e-5, 1.0, torch.bfloat16)
    _, s, rstd = kernels._forward(x.detach(), residual.detach(), weight.detach(), 1e-5, 0.0, x.dtype)
    opcheck(kernels._backward, x.detach(), s, s, weight.detach(), rstd, 0.0, x.dtype)


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("rms_norm_forward", "/ C + eps)", "/ C) + eps"),  # eps beside the root
        ("rms_norm_forward", "inside = c < C", "inside = c < C - 1"),
        ("rms_norm_forward", "w = offset +", "w ="),
        ("rms_norm_backward", "w = offset +", "w ="),
        ("rms_norm_backward", "tl.sum(g * normed, 0)", "tl.sum(dy * normed, 0)"),
        ("rms_norm_backward", "(program + 1) * rows, N)", "(program + 1) * rows, N - 1)"),
    ],
)
@pytest.mark.usefixtures("few_programs")
def test_planted_faults_fail(kernel: str, old: str, new: str) -> None:
    made = inputs(30, 24)
    made["x"] = (made["x"].detach() * 1e-2).requires_grad_()  # where eps counts
    assert not is_wrong(gemma, made)
    with mutant(getattr(kernels, kernel), old, new):
        assert is_wrong(gemma, made)


def test_a_forgotten_stream_gradient_fails() -> None:
    made = inputs(30, 24, residual=torch.float32)
    with mutant(kernels.rms_norm_backward, "if HAS_DS:", "if False:"):
        assert is_wrong(added, made)
