from __future__ import annotations

import sys
from typing import Any

import fastft_kernels
import pytest
import torch
from mutants import mutant
from proofs import assert_right, assert_same_bits, drawn, is_wrong, opcheck, random, results
from torch import Tensor

kernels = sys.modules["fastft_kernels.cross_entropy"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(logits: Tensor, targets: Tensor, *, impl: Any, reduction: Any = "none") -> Tensor:
    return fastft_kernels.cross_entropy(logits, targets, reduction=reduction, impl=impl)


def inputs(N: int, V: int, dtype: torch.dtype = torch.float32, *, every: int = 3) -> dict[str, Tensor]:
    """Rows of logits; every so many are ignored, and one asks for the last id."""
    targets = torch.randint(V, (N,), generator=random(1))
    targets[: N // 2 : every] = -100
    targets[-1:] = V - 1
    return {"logits": (5 * drawn(N, V).detach()).to(dtype).requires_grad_(), "targets": targets}


@pytest.mark.parametrize(("N", "V"), [(0, 5), (1, 1), (1, 131), (9, 131), (129, 17), (3, 50257)])
def test_against_float64(N: int, V: int) -> None:
    for dtype in DTYPES if N == 9 else DTYPES[:2]:
        assert_right(run, inputs(N, V, dtype))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction: str) -> None:
    assert_right(lambda *x, impl: run(*x, impl=impl, reduction=reduction), inputs(9, 131))


def test_all_ignored_is_zero_and_alive() -> None:
    made = inputs(4, 11)
    made["targets"].fill_(-100)
    for impl in ("triton", "torch", "reference"):
        found = results(lambda *x, impl: run(*x, impl=impl, reduction="mean"), made, impl)
        assert found["output 0"] == 0
        assert torch.equal(found["d logits"], torch.zeros(4, 11))


def test_ignored_rows_are_not_read() -> None:
    made = inputs(8, 131)
    ignored = made["targets"] == -100
    spoilt = made["logits"].detach().clone()
    spoilt[ignored] = torch.nan
    found = results(run, {**made, "logits": spoilt.requires_grad_()}, "triton")
    expected = results(run, made, "triton")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_callers_logits_stay() -> None:
    made = inputs(4, 131)
    before = made["logits"].detach().clone()
    results(run, made, "triton")
    assert torch.equal(made["logits"].detach(), before)


def test_large_logits_and_rows_that_lie_apart() -> None:
    logits = torch.full((3, 131), -3e4)
    logits[:, 7] = 3e4
    apart = torch.stack([logits, logits], dim=1)[:, 0].requires_grad_()
    assert_right(run, {"logits": apart, "targets": torch.tensor([7, 7, 7])})
    columns = drawn(131, 3).detach().t().requires_grad_()
    assert_right(run, {"logits": columns, "targets": torch.tensor([1, 2, 130])})


def test_without_a_gradient() -> None:
    made = inputs(4, 131)
    assert_right(run, {**made, "logits": made["logits"].detach()})


def test_the_same_bits_each_time() -> None:
    assert_same_bits(run, inputs(9, 131, torch.bfloat16))


def test_the_registered_operations() -> None:
    made = inputs(3, 11)
    opcheck(kernels._forward, made["logits"], made["targets"], -100)
    lse = torch.zeros(3)
    opcheck(kernels._backward, lse, made["logits"].detach(), made["targets"], lse, -100)


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("cross_entropy_forward", "range(0, V, BV)", "range(0, V - 1, BV)"),  # the last tile, where it holds one column
        ("cross_entropy_forward", "tl.where(v < V, z, LOWEST)", "z"),
        ("cross_entropy_backward", "p - 1.0", "p"),
        ("cross_entropy_backward", "* tl.load(FLOWING + row)", ""),
        ("cross_entropy_backward", "if target != IGNORE:", "if True:"),
    ],
)
def test_planted_faults_fail(kernel: str, old: str, new: str) -> None:
    made = inputs(6, 4097, every=2)
    made["logits"] = (made["logits"].detach() * 0.1).requires_grad_()  # each column counts
    with mutant(getattr(kernels, kernel), old, new):
        assert is_wrong(run, made)
    assert not is_wrong(run, made)
