"""Compiled GELU and SwiGLU against float64, and against torch's own."""

from __future__ import annotations

import math

import fastft_kernels
import pytest
import torch
from compiled import needs_compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

pytestmark = needs_compiled
DTYPES = (torch.float32, torch.bfloat16)
EPS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}
"""A few roundings of float32's exponential and products, and one of bf16's."""


def random(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def strided(x: Tensor, kind: str) -> Tensor:
    """The same numbers in rows that are further apart, or in a transposed matrix."""
    if kind == "transposed":
        return x.t().contiguous().t()
    return x if kind == "dense" else torch.cat([x, x], 1)[:, : x.shape[1]]


def exact_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Without the cancellation in 1 + tanh, which is seen in float64 too."""
    z = x.double() if bias is None else x.double() + bias.double()
    return z * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))


def exact_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.double()) * up.double()


def differentiated(y: Tensor, to: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    return (y.detach(), *torch.autograd.grad(y, to, dy.to(y.dtype)))


def is_near(got: Tensor, exact: Tensor, terms: float = 1.0, scale: Tensor | float = 1.0) -> bool:
    """Within `terms` roundings of a value, and of `scale`, which was rounded on the way to it."""
    limit = EPS[got.dtype] * exact.abs() + terms * EPS[torch.float32] * scale + 1e-37
    return bool(((got.double() - exact).abs() <= limit).all())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    N=st.sampled_from([0, 1, 3, 65, 130]),
    F_=st.sampled_from([1, 15, 16, 17, 64, 513, 530]),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from([None, *DTYPES]),
    strides=st.sampled_from(["dense", "apart", "transposed"]),
)
def test_gelu_is_that_of_float64(
    N: int, F_: int, dtype: torch.dtype, bias_dtype: torch.dtype | None, strides: str
) -> None:
    x = strided(random(0, N, F_, scale=3.0).to(dtype), strides).requires_grad_()
    bias = None if bias_dtype is None else random(1, F_).to(bias_dtype).requires_grad_()
    dy = strided(random(2, N, F_).to(dtype), strides)
    to = (x,) if bias is None else (x, bias)
    got = differentiated(fastft_kernels.gelu(x, bias, impl="compiled"), to, dy)
    wide = tuple(t.detach().double().requires_grad_() for t in to)
    exact = differentiated(exact_gelu(*wide), wide, dy)
    assert [t.dtype for t in got] == [dtype, *(t.dtype for t in to)]
    z = x.detach().double() if bias is None else (x + bias).detach().double()
    assert is_near(got[0], exact[0], 1.0, z.abs())
    assert is_near(got[1], exact[1], 4.0, dy.double().abs())
    if bias is not None:
        assert is_near(got[2], exact[2], 4.0, dy.double().abs().sum(0))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    N=st.sampled_from([0, 1, 3, 130]),
    F_=st.sampled_from([1, 15, 16, 17, 530]),
    dtype=st.sampled_from(DTYPES),
    strides=st.sampled_from(["dense", "apart", "transposed"]),
)
def test_swiglu_is_that_of_float64(N: int, F_: int, dtype: torch.dtype, strides: str) -> None:
    gate, up, dy = (strided(random(seed, N, F_, scale=3.0).to(dtype), strides) for seed in range(3))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    got = differentiated(fastft_kernels.swiglu(gate, up, impl="compiled"), (gate, up), dy)
    wide = tuple(t.detach().double().requires_grad_() for t in (gate, up))
    exact = differentiated(exact_swiglu(*wide), wide, dy)
    assert [t.dtype for t in got] == 3 * [dtype]
    assert is_near(got[0], exact[0], 1.0, (gate * up).detach().double().abs())
    assert is_near(got[1], exact[1], 4.0, (dy * up.detach()).double().abs())
    assert is_near(got[2], exact[2], 1.0, (dy * gate.detach()).double().abs())


def test_the_limits_reject_a_wrong_constant() -> None:
    """0.04472 for 0.044715, and a bias that is rounded to bf16 first."""
    x, bias = random(0, 64, 64).double(), random(1, 64)
    wrong = (0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.04472 * x**3)))).float()
    assert not is_near(wrong, exact_gelu(x), 1.0, x.abs())
    rounded = exact_gelu(x, bias.bfloat16()).float()
    assert not is_near(rounded, exact_gelu(x, bias), 1.0, (x + bias).abs())


def test_in_bf16_it_is_no_less_exact_than_torch() -> None:
    x, bias, dy = random(0, 300, 513, scale=2.0).bfloat16(), random(1, 513).bfloat16(), random(2, 300, 513).bfloat16()
    wide = tuple(t.double().requires_grad_() for t in (x, bias))
    exact = differentiated(exact_gelu(*wide), wide, dy)
    away = {}
    for impl in ("torch", "compiled"):
        to = (x.clone().requires_grad_(), bias.clone().requires_grad_())
        got = differentiated(fastft_kernels.gelu(*to, impl=impl), to, dy)
        away[impl] = [float((a.double() - b).square().mean()) for a, b in zip(got, exact, strict=True)]
    assert all(ours <= torchs for ours, torchs in zip(away["compiled"], away["torch"], strict=True)), away


def test_the_exponential_keeps_its_bound_over_all_of_gelus_range() -> None:
    """Relative to the value, where torch's own 1 + tanh has nothing left."""
    x = torch.linspace(-10, 10, 2_000_001)
    z = x.double()
    exact = exact_gelu(x)
    # The exponent is rounded too: |2 u| of it is lost in the exponential.
    limit = (4 + (2 * z.abs() + 0.1 * z.abs() ** 3)) * 2.0**-23 * exact.abs() + 1e-37
    got = fastft_kernels.gelu(x, impl="compiled").double()
    inside = z > -9.9
    assert ((got - exact).abs() <= limit)[inside].all()
    assert (got[~inside].abs() < 1e-35).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_are_torchs(dtype: torch.dtype) -> None:
    values = [0.0, -0.0, 1e-40, -1e-40, 1e4, -1e4, 3e38, -3e38, math.inf, -math.inf, math.nan, 20.0, -20.0]
    x = torch.tensor([values] * 3).to(dtype)
    for ours, torchs in (
        (lambda t: fastft_kernels.gelu(t, impl="compiled"), lambda t: F.gelu(t, approximate="tanh")),
        (
            lambda t: fastft_kernels.swiglu(t, torch.ones_like(t), impl="compiled"),
            lambda t: fastft_kernels.swiglu(t, torch.ones_like(t), impl="torch"),
        ),
    ):
        given_, by_torch = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, expected = ours(given_), torchs(by_torch)
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-37, equal_nan=True)
        (dx,) = torch.autograd.grad(got.sum(), given_)
        (wanted,) = torch.autograd.grad(expected.sum(), by_torch)
        finite = x.isfinite() & (x.abs() < 1e30)  # beyond, torch's slope of gelu is 0 * inf
        assert torch.allclose(dx[finite], wanted[finite], rtol=1e-6, atol=1e-30)
        assert torch.equal(dx.isnan()[x.isnan()], torch.ones(3, dtype=torch.bool))
        large = x.isfinite() & ~finite
        assert torch.equal(dx[large], (x[large] > 0).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    before, found = torch.get_num_threads(), []
    x, bias, dy = random(0, 77, 1100).to(dtype).requires_grad_(), random(1, 1100).requires_grad_(), random(2, 77, 1100)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            of_gelu = differentiated(fastft_kernels.gelu(x, bias, impl="compiled"), (x, bias), dy)
            found.append((*of_gelu, *differentiated(fastft_kernels.swiglu(x, x, impl="compiled"), (x,), dy)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_a_bias_that_is_not_trained_gets_no_gradient() -> None:
    x, bias = random(0, 3, 5).requires_grad_(), random(1, 5)
    fastft_kernels.gelu(x, bias, impl="compiled").sum().backward()
    assert x.grad is not None
    assert bias.grad is None


def test_what_there_is_no_code_for_goes_through_torch_or_is_refused() -> None:
    x = torch.ones(3, 4)
    assert fastft_kernels.gelu(x, torch.ones(4).double()).shape == (3, 4)
    with pytest.raises(ValueError, match=r"torch\.float64, and compiled code takes"):
        fastft_kernels.gelu(x, torch.ones(4).double(), impl="compiled")
    with pytest.raises(ValueError, match=r"torch\.float16, and compiled code takes"):
        fastft_kernels.swiglu(x.half(), x.half(), impl="compiled")
