"""Compiled layer norm and RMS norm against float64, and against torch's own."""

from __future__ import annotations

from collections.abc import Sequence

import fastft_kernels
import pytest
import torch
from compiled import needs_compiled
from fastft_kernels.cpu.norms import FixedLayerNorm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytestmark = needs_compiled
DTYPES = (torch.float32, torch.bfloat16)
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
NORMS = ("layer", "rms")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(N: int, C: int, x: torch.dtype, residual: torch.dtype | None, weight: torch.dtype) -> list[Tensor | None]:
    """x and the residual in rows that are apart, weight and bias."""
    made: list[Tensor | None] = [torch.cat([random(0, N, C).to(x)] * 2, 1)[:, :C], None]
    if residual is not None:
        made[1] = (torch.cat([random(1, N, C)] * 2, 1)[:, :C] * 3 + 2).to(residual)
    return [*made, 1 + random(2, C).to(weight), random(3, C)]


def normed(norm: str, given_: Sequence[Tensor | None], out: torch.dtype, impl: str, eps: float = 1e-5) -> list[Tensor]:
    x, residual, weight, bias = given_
    assert x is not None
    assert weight is not None
    assert bias is not None
    if norm == "layer":
        made = fastft_kernels.layer_norm(x, weight, bias, eps=eps, residual=residual, out_dtype=out, impl=impl)
    else:
        made = fastft_kernels.rms_norm(x, weight, eps=eps, offset=1.0, residual=residual, out_dtype=out, impl=impl)
    return list(made) if isinstance(made, tuple) else [made]


def differentiated(
    norm: str, given_: Sequence[Tensor | None], out: torch.dtype, impl: str, *, wide: bool = False
) -> list[Tensor]:
    leaves = [None if t is None else (t.double() if wide else t).detach().requires_grad_() for t in given_]
    made = normed(norm, leaves, torch.float64 if wide else out, impl)
    flowing = [random(9 + i, *t.shape).to(out if i == 0 else torch.bfloat16).to(t.dtype) for i, t in enumerate(made)]
    to = [t for t in (leaves if norm == "layer" else leaves[:3]) if t is not None]
    return [t.detach() for t in (*made, *torch.autograd.grad(made, to, flowing))]


def is_near(got: Tensor, exact: Tensor, terms: float) -> bool:
    """Within a rounding of the value, and `terms` float32 roundings of the largest of its row or column."""
    scale = exact.abs().amax() if exact.numel() else exact
    return bool(
        ((got.double() - exact).abs() <= EPS[got.dtype] * exact.abs() + terms * EPS[torch.float32] * scale).all()
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    norm=st.sampled_from(NORMS),
    N=st.sampled_from([0, 1, 3, 8, 65, 130, 600]),
    C=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 200]),
    x=st.sampled_from(DTYPES),
    residual=st.sampled_from([None, *DTYPES]),
    weight=st.sampled_from(DTYPES),
    out=st.sampled_from(DTYPES),
)
def test_it_is_that_of_float64(
    norm: str, N: int, C: int, x: torch.dtype, residual: torch.dtype | None, weight: torch.dtype, out: torch.dtype
) -> None:
    made = inputs(N, C, x, residual, weight)
    got, exact = differentiated(norm, made, out, "compiled"), differentiated(norm, made, out, "reference", wide=True)
    wide = torch.promote_types(x, residual or x)
    sums = [] if residual is None else [wide]
    inputs_ = [t.dtype for t in (made if norm == "layer" else made[:3]) if t is not None]
    assert [t.dtype for t in got] == [out, *sums, *inputs_]
    if wide == torch.bfloat16 and residual is not None:
        return  # the sum is rounded, and its norm that of other numbers: torch's own, below
    tight = C > 2  # of two numbers the variance may be next to nothing
    for one, true in zip(got, exact, strict=True):
        assert one.isfinite().all()
        assert not tight or is_near(one, true, 64)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtypes", [(x, r, w) for x in DTYPES for r in (None, *DTYPES) for w in DTYPES])
def test_it_is_no_less_exact_than_torch(norm: str, dtypes: tuple[torch.dtype, torch.dtype | None, torch.dtype]) -> None:
    """Compared where both have rounded the sum, by the root of the mean square."""
    x, residual, weight = dtypes
    made = inputs(130, 200, x, residual, weight)
    ours, torchs = (differentiated(norm, made, x, impl) for impl in ("compiled", "torch"))
    if residual is not None:  # the sum is the same, bit for bit
        assert torch.equal(ours[1], torchs[1])
        made = [ours[1].double() - made[1].double(), made[1].double(), *made[2:]]
    exact = differentiated(norm, made, x, "reference", wide=True)
    for one, other, true in zip(ours, torchs, exact, strict=True):
        away, torchs_away = ((t.double() - true).square().mean().sqrt() for t in (one, other))
        assert away <= 1.1 * torchs_away + 1e-7 * true.abs().max()


def test_the_limits_reject_wrong_constants() -> None:
    """A variance divided by C - 1, and an eps that is 1% too large."""
    made = inputs(65, 200, torch.float32, torch.float32, torch.float32)
    x, residual, weight, bias = (t.double() for t in made if t is not None)
    s = x + residual
    right = normed("layer", [x, residual, weight, bias], torch.float64, "reference")[0]
    for variance in (s.var(-1, keepdim=True) + 1e-5, s.var(-1, keepdim=True, correction=0) + 1.05e-3):
        wrong = (s - s.mean(-1, keepdim=True)) / variance.sqrt() * weight + bias
        assert not is_near(wrong.float(), right, 64)


@pytest.mark.parametrize("norm", NORMS)
def test_a_large_mean_loses_nothing(norm: str) -> None:
    """The variance is that of what is left without the mean: E[s^2] - E[s]^2 would be lost."""
    x = 1e4 + random(0, 5, 768)
    made = [x, None, torch.ones(768), torch.zeros(768)]
    (got,) = normed(norm, made, torch.float32, "compiled")
    (exact,) = normed(norm, [None if t is None else t.double() for t in made], torch.float64, "reference")
    assert torch.allclose(got.double(), exact, atol=2e-3)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e30, 0.0, 1e-40])
@pytest.mark.parametrize("norm", NORMS)
def test_extreme_values_are_torchs(norm: str, value: float) -> None:
    x = random(0, 4, 40)
    x[1, 7] = value
    x[2] = 0 if value == 1e30 else value  # of equal large numbers, what a mean has rounded is all that is left
    made = [x, torch.zeros(4, 40), torch.ones(40), torch.zeros(40)]
    ours, torchs = (normed(norm, made, torch.float32, impl) for impl in ("compiled", "torch"))
    for one, other in zip(ours, torchs, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("norm", NORMS)
def test_any_number_of_threads_gives_the_same_bits(norm: str) -> None:
    before, found = torch.get_num_threads(), []
    made = inputs(257, 200, torch.bfloat16, torch.float32, torch.float32)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(differentiated(norm, made, torch.bfloat16, "compiled"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_that_are_not_asked_for_or_do_not_arrive(norm: str) -> None:
    x, residual, weight, bias = inputs(9, 40, torch.bfloat16, torch.float32, torch.float32)
    assert x is not None
    assert residual is not None
    frozen = differentiated(norm, [x, residual, weight, bias], torch.bfloat16, "compiled")
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    y, s = normed(norm, [x, residual, weight, bias], torch.bfloat16, "compiled")
    flowing = [random(9, 9, 40).bfloat16(), random(10, 9, 40).bfloat16().float()]
    alone = torch.autograd.grad((y, s), (x, residual), flowing, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, frozen[2:4], strict=True))
    of_sum = torch.autograd.grad(s, (x, residual), flowing[1], retain_graph=True)
    assert torch.equal(of_sum[1], flowing[1])
    of_norm = torch.autograd.grad(y, residual, flowing[0])[0]
    assert torch.allclose(of_norm + flowing[1], alone[1], atol=1e-6)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    x = random(0, 3, 8).requires_grad_()
    y = fastft_kernels.layer_norm(x, torch.ones(8), torch.zeros(8), impl="compiled")
    assert isinstance(y, Tensor)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [0, 1, 5, 300])
def test_one_of_fixed_weights_has_the_same_bits(N: int, residual: torch.dtype | None, dtype: torch.dtype) -> None:
    x, other, weight, bias = inputs(N, 48, dtype, residual, torch.float32)
    assert x is not None
    assert weight is not None
    assert bias is not None
    fixed = FixedLayerNorm(weight, bias, eps=1e-5, out_dtype=dtype)
    for _ in range(2):  # nothing is left from the first call
        y, s = fixed(x, other)
        wanted = normed("layer", (x, other, weight, bias), dtype, "compiled")
        assert torch.equal(y, wanted[0])
        assert y.dtype == dtype
        assert torch.equal(s, x if other is None else wanted[1])


def test_one_of_fixed_weights_refuses_what_it_would_misread() -> None:
    weight, bias = torch.ones(8), torch.zeros(8)
    fixed = FixedLayerNorm(weight, bias, eps=1e-5, out_dtype=torch.float32)
    x = torch.zeros(3, 8)
    for wrong in ((torch.zeros(3, 7), None), (x.double(), None), (x, torch.zeros(2, 8)), (torch.zeros(8, 3).t(), None)):
        with pytest.raises(ValueError, match="got a tensor"):
            fixed(*wrong)
    with pytest.raises(ValueError, match=r"got weights of a layer norm in torch\.float64"):
        FixedLayerNorm(weight.double(), bias, eps=1e-5, out_dtype=torch.float32)


@pytest.mark.parametrize("learns", [True, False])
def test_derivatives_forward_are_refused(learns: bool) -> None:
    x, weight, bias = random(0, 3, 8).requires_grad_(learns), torch.ones(8), torch.zeros(8)
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(learns):
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones(3, 8))
        # torch's own refusal: without a node of the graph the derivative would be lost, and nobody told.
        with pytest.raises(NotImplementedError, match="must implement the jvp function"):
            fastft_kernels.layer_norm(dual, weight, bias, impl="compiled")
