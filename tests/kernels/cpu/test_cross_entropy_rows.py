"""Compiled cross-entropy of rows against float64, alone and between the products of the linear one."""

from __future__ import annotations

import math
from typing import Any

import fastft_kernels
import pytest
import torch
from compiled import needs_compiled
from fastft_kernels.cpu import cross_entropy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

pytestmark = needs_compiled
DTYPES = (torch.float32, torch.bfloat16)
EPS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(N: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in rows that are apart, targets of which some are ignored, and weights."""
    logits = torch.cat([4 * random(0, N, V).to(dtype)] * 2, 1)[:, :V]
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    targets[1::5] = -100
    return logits, targets, random(2, N)


def exact(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(z, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses, z, weights.double())[0]


def is_near(got: Tensor, true: Tensor, scale: Tensor | float) -> bool:
    """Within a rounding of the value, and three float32 roundings of the logits that it is a difference of."""
    return bool(((got.double() - true).abs() <= EPS[got.dtype] * true.abs() + 3 * EPS[torch.float32] * scale).all())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    N=st.sampled_from([0, 1, 3, 20]),
    V=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 1024, 1100, 2050]),
    dtype=st.sampled_from(DTYPES),
    in_place=st.booleans(),
)
def test_rows_are_those_of_float64(N: int, V: int, dtype: torch.dtype, in_place: bool) -> None:
    logits, targets, weights = made(N, V, dtype)
    losses, (true, gradient) = torch.empty(N), exact(logits, targets, weights)
    out = logits.clone() if in_place else torch.empty(N, V, dtype=dtype)
    cross_entropy.of_rows(out if in_place else logits, targets, losses, weights=weights, out=out)
    assert is_near(losses, true, 20.0)
    # The target's is a difference of 1; every other one is as exact as its exponential.
    assert is_near(out, gradient, weights.double().abs()[:, None])
    again = torch.empty(N)
    cross_entropy.of_rows(logits, targets, again)
    assert torch.equal(again, losses)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operation_is_torchs(dtype: torch.dtype) -> None:
    logits, targets, weights = made(20, 2050, dtype)
    found = {}
    for impl in ("compiled", "torch"):
        z = logits.detach().requires_grad_()
        losses = fastft_kernels.cross_entropy(z, targets, reduction="none", impl=impl)
        found[impl] = (losses.detach(), torch.autograd.grad(losses, z, weights)[0])
        assert found[impl][0].dtype == torch.float32
    true = exact(logits, targets, weights)
    for ours, torchs, value in zip(found["compiled"], found["torch"], true, strict=True):
        assert (ours.double() - value).square().mean() <= 1.01 * (torchs.double() - value).square().mean() + 1e-14


def test_small_probabilities_keep_their_digits() -> None:
    """Each gradient is within some roundings of itself: torch's in float32 loses what the log-softmax has rounded."""
    logits, targets, weights = made(20, 50_257, torch.float32)
    out, losses = torch.empty(20, 50_257), torch.empty(20)
    cross_entropy.of_rows(logits, targets, losses, weights=weights, out=out)
    losses64, gradient = exact(logits, targets, weights)
    others = torch.ones_like(out, dtype=torch.bool).scatter_(1, targets.clamp_min(0)[:, None], False)
    limit = 20 * 2.0**-23 * gradient.abs()
    assert ((out.double() - gradient).abs() <= limit)[others].all()
    assert is_near(losses, losses64, 5.0)
    wrong = (losses64 + math.log(50_257 / 50_256)).float()  # a column too many
    assert not is_near(wrong, losses64, 5.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits_are_torchs(dtype: torch.dtype) -> None:
    rows = [
        [0.0, math.inf, 1.0, 2.0],
        [0.0, -math.inf, 1.0, 2.0],
        [0.0, math.nan, 1.0, 2.0],
        [-math.inf] * 4,
        [1e4, -1e4, 0.0, 3e4],
        [1e-40, -1e-40, 0.0, 0.0],
        [-3e38, 3e38, 0.0, 0.0],
    ]
    logits = torch.tensor([row * 5 for row in rows]).to(dtype)
    targets = torch.tensor([1, 1, 0, 2, 3, 0, 1])
    weights = torch.ones(7)
    found = []
    for impl in ("compiled", "torch"):
        z = logits.clone().requires_grad_()
        losses = fastft_kernels.cross_entropy(z, targets, reduction="none", impl=impl)
        found.append((losses.detach(), torch.autograd.grad(losses, z, weights)[0]))
    for ours, torchs in zip(*found, strict=True):
        assert torch.allclose(ours, torchs, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    before, found = torch.get_num_threads(), []
    logits, targets, weights = made(20, 2050, torch.bfloat16)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out, losses = logits.clone(), torch.empty(20)
            cross_entropy.of_rows(out, targets, losses, weights=weights, out=out)
            found.append((out, losses))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("wrong", [4, -1, -(1 << 40), 1 << 40])
def test_a_target_without_logits_is_refused(wrong: int) -> None:
    logits, targets = random(0, 3, 4), torch.tensor([1, wrong, 2])
    with pytest.raises(IndexError, match=f"got target {wrong}, expected one from 0 to 3"):
        fastft_kernels.cross_entropy(logits, targets, impl="compiled")
    hidden, weight = random(1, 3, 8).requires_grad_(), random(2, 4, 8)
    for reduction in ("mean", "none"):
        with pytest.raises(IndexError, match=f"got target {wrong}"):
            fastft_kernels.linear_cross_entropy(hidden, weight, targets, reduction=reduction, impl="compiled")


def test_what_there_is_no_code_for_is_refused() -> None:
    logits, targets, losses = random(0, 3, 4), torch.tensor([1, 2, 3]), torch.empty(3)
    right: dict[str, Any] = {"logits": logits, "targets": targets, "losses": losses}
    for change in (
        {"logits": logits.double()},
        {"logits": random(0, 4, 3).t()},
        {"targets": targets.int()},
        {"targets": targets[:2]},
        {"losses": losses.double()},
        {"losses": torch.empty(6)[::2]},
        {"weights": torch.ones(3)},
        {"weights": torch.ones(3), "out": torch.empty(3, 4).bfloat16()},
        {"weights": torch.ones(3).bfloat16(), "out": torch.empty(3, 4)},
    ):
        with pytest.raises(ValueError, match="expected"):
            cross_entropy.of_rows(**{**right, **change})


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_linear_one_is_torchs(dtype: torch.dtype, chunk_bytes: int, reduction: Any) -> None:
    targets, weights = made(20, 60, dtype)[1:]
    found = {}
    for impl in ("compiled", "torch"):
        hidden, weight = (random(seed, n, 24).to(dtype).requires_grad_() for seed, n in ((3, 20), (4, 60)))
        loss = fastft_kernels.linear_cross_entropy(
            hidden, weight, targets, row_weights=weights.abs(), reduction=reduction, logit_chunk_bytes=chunk_bytes,
            impl=impl,
        )  # fmt: skip
        found[impl] = (loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight)))
    rtol, atol = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2**-7, 0.05)}[dtype]
    for ours, torchs in zip(found["compiled"], found["torch"], strict=True):
        assert torch.allclose(ours, torchs, rtol=rtol, atol=atol)
