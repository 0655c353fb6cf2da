"""Compiled attention: beside the equation in float64 within what rounding allows, and as the torch path elsewhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fastft_kernels
import numpy as np
import pytest
import torch
from compiled import needs_compiled
from fastft_kernels import plan_tiles, support
from fastft_kernels.attention import visible_mask
from fastft_kernels.cpu import attention as compiled
from fastft_kernels.cpu import library
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastft.batches.batch import pack
from fastft.model.gpt2 import GPT2, config_for

pytestmark = needs_compiled
EPS = torch.finfo(torch.float32).eps
ROUNDINGS = 8
"""Roundings of float32 that a sum of up to 256 terms takes, each at random: half of the root of 256."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked: T tokens, H heads of queries, G of keys, D head dim."""

    T: int
    H: int
    G: int
    D: int
    dtype: torch.dtype
    until: Tensor
    rows: Tensor | None
    layout: str
    seed: int

    def tensors(self) -> list[Tensor]:
        """q, k and v, and the output's gradient."""
        generator = torch.Generator().manual_seed(self.seed)
        R = self.T if self.rows is None else len(self.rows)
        shapes = [(R, self.H), (self.T, self.G), (self.T, self.G), (R, self.H)]
        return [laid(torch.randn(*shape, self.D, generator=generator).to(self.dtype), self.layout) for shape in shapes]


def laid(x: Tensor, layout: str) -> Tensor:
    """x with other strides."""
    N, H, D = x.shape
    if layout == "sliced":
        return x.new_full((N, 3, H, D), math.nan).index_copy_(1, torch.tensor([1]), x[:, None])[:, 1]
    if layout == "by head":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x.repeat_interleave(2, dim=2)[..., ::2] if layout == "apart" else x


@st.composite
def cases(draw: st.DrawFn) -> Case:
    T = draw(st.integers(1, 90))
    kind = draw(st.sampled_from(["causal", "documents", "prefix", "any", "alone"]))
    place = torch.arange(1, T + 1)
    cut = draw(st.integers(1, 30))
    ends = (-(-place // cut) * cut).clamp_max(T)
    until = {
        "causal": torch.full((T,), T),
        "documents": ends,
        "prefix": torch.where(place <= draw(st.integers(0, 30)), T, ends),
        "any": place + torch.tensor([draw(st.integers(0, T)) for _ in range(T)]),
        "alone": place,
    }[kind]
    rows = draw(st.none() | st.lists(st.integers(0, T - 1), max_size=40).map(sorted))
    H, G = draw(st.sampled_from([(1, 1), (3, 3), (4, 2), (3, 1)]))
    return Case(
        T, H, G,
        D=draw(st.sampled_from([1, 8, 16, 20, 40, 64, 100, 256])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        until=until.to(draw(st.sampled_from([torch.int32, torch.int64]))),
        rows=None if rows is None else torch.tensor(rows, dtype=torch.int64),
        layout=draw(st.sampled_from(["whole", "sliced", "by head", "apart"])),
        seed=draw(st.integers(0, 9)),
    )  # fmt: skip


def found(case: Case, impl: Any, until: Tensor | None = None) -> list[Tensor]:
    """The output and the gradients of q, k and v, in float64."""
    *inputs, d_out = case.tensors()
    made = [x.double() if impl == "reference" else x for x in inputs]
    made = [x.detach().requires_grad_() for x in made]
    until = case.until if until is None else until
    out: Any = fastft_kernels.attention(*made, until, q_rows=case.rows, impl=impl)
    assert out.dtype == made[0].dtype
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, made, d_out.to(out.dtype)))]


def limits(case: Case) -> list[Tensor]:
    """How far rounding may move each element of `found`: so many roundings of the magnitudes that are summed."""
    q, k, v, d_out = (x.double().transpose(0, 1) for x in case.tensors())
    k, v = (x.repeat_interleave(case.H // case.G, 0) for x in (k, v))
    mask, scale = visible_mask(case.until, case.rows), 1 / math.sqrt(case.D)
    p = (q @ k.mT * scale).masked_fill(~mask, -math.inf).softmax(-1)  # [H, R, T]
    sizes = (q.abs() @ k.abs().mT * scale).masked_fill(~mask, 0)
    off = ROUNDINGS * EPS * (1 + 2 * sizes.amax(-1, keepdim=True))  # of a probability, relative to it
    narrow = torch.finfo(case.dtype).eps if case.dtype == torch.bfloat16 else 0
    out = p @ v
    deltas = (off + narrow) * (out.abs() * d_out.abs()).sum(-1, keepdim=True)
    largest = p * (off * (d_out.abs() @ v.abs().mT + (p * (d_out.abs() @ v.abs().mT)).sum(-1, keepdim=True)) + deltas)
    allowed = [off * (p @ v.abs()), scale * largest @ k.abs(), scale * largest.mT @ q.abs(), (p * off).mT @ d_out.abs()]
    summed = [x if x.shape[0] == heads else x.unflatten(0, (case.G, -1)).sum(1) for x, heads in zip(
        allowed, (case.H, case.H, case.G, case.G), strict=True
    )]  # fmt: skip
    exact = found(case, "reference")
    return [x.transpose(0, 1) + narrow * y.abs() + 1e-30 for x, y in zip(summed, exact, strict=True)]


@settings(max_examples=60, deadline=None)
@given(cases())
def test_it_is_the_equation_within_what_rounding_allows(case: Case) -> None:
    for got, exact, limit in zip(found(case, "compiled"), found(case, "reference"), limits(case), strict=True):
        assert got.shape == exact.shape
        assert ((got - exact).abs() <= limit).all()


def packed_case(dtype: torch.dtype, H: int = 4, G: int = 2, rows: Tensor | None = None, layout: str = "whole") -> Case:
    """A prefix of 20 tokens, documents behind it, and a longer one."""
    ends = [*[150] * 20, *[47] * 27, *[80] * 33, *[150] * 70]
    return Case(150, H, G, 32, dtype, torch.tensor(ends), rows, layout, seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key", "by"), [(25, -1), (46, 1), (0, -1)])
def test_the_limits_reject_a_mask_that_is_off_by_one_query(dtype: torch.dtype, key: int, by: int) -> None:
    case = packed_case(dtype)
    wrong = case.until.clone()
    wrong[key] += by
    for got, exact, limit in zip(found(case, "compiled", wrong), found(case, "reference"), limits(case), strict=True):
        assert ((got - exact).abs() > limit).any()


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 3, 50, 79, 149])])
def test_bf16_is_no_less_exact_than_the_torch_path(rows: Tensor | None) -> None:
    case = packed_case(torch.bfloat16, rows=rows)
    exact, ours, theirs = (found(case, impl) for impl in ("reference", "compiled", "torch"))
    for true, got, other in zip(exact, ours, theirs, strict=True):
        assert (got - true).square().mean() <= (other - true).square().mean()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("H", "G"), [(5, 5), (6, 2)])
def test_any_number_of_threads_gives_the_same_bits(
    H: int, G: int, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastft_kernels.cpu.given.SMALL", 0)
    case, results = packed_case(torch.float32, H, G), []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        results.append(found(case, "compiled"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_probabilities_are_exponentials_within_four_roundings() -> None:
    """Scores from 0 down to -80, a key for each, and values that show one probability each."""
    T = 256
    scores = -torch.linspace(0, math.sqrt(80), T).square()
    k, v, q = scores[:, None, None].expand(T, 1, T), torch.eye(T)[:, None], torch.zeros(1, 1, T)
    q[0, 0, 0] = 1
    last, until = torch.tensor([T - 1]), torch.full((T,), T)
    shown: Any = fastft_kernels.attention(q, k, v, until, q_rows=last, scale=1.0, impl="compiled")
    exact = scores.double().softmax(0)
    assert ((shown[0, 0] - exact).abs() <= 4 * EPS * exact).all()
    far: Any = fastft_kernels.attention(q, 2 * k, v, until, q_rows=last, scale=1.0, impl="compiled")
    assert far[0, 0, -1] == 0  # below every normal number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_sum_exps(dtype: torch.dtype) -> None:
    case = packed_case(dtype)
    q, k, v, _ = case.tensors()
    out, lse = fastft_kernels.attention(q.requires_grad_(), k, v, case.until, return_lse=True, impl="compiled")
    wide = [x.detach().double() for x in (q, k, v)]
    _, exact = fastft_kernels.attention(*wide, case.until, return_lse=True, impl="reference")
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    assert torch.allclose(lse.double(), exact, rtol=0, atol=1e-6)
    assert torch.equal(out, fastft_kernels.attention(q, k, v, case.until, impl="compiled"))


def test_a_query_that_sees_nothing_gets_no_number() -> None:
    """As by the equation; the others are what they are without it."""
    q, k, v = torch.randn(3, 40, 2, 8).unbind(0)
    until = torch.arange(1, 41)
    until[:30] = 30
    until[30] = 30  # nobody sees it, and 30 sees nobody
    out, lse = fastft_kernels.attention(q, k, v, until, return_lse=True, impl="compiled")
    exact, exact_lse = fastft_kernels.attention(q, k, v, until, return_lse=True, impl="reference")
    assert torch.equal(out.isnan(), exact.isnan())
    assert out[30].isnan().all()
    assert torch.equal(lse[:, 30], exact_lse[:, 30])
    assert torch.allclose(out.nan_to_num(), exact.nan_to_num(), atol=1e-6)


@pytest.mark.parametrize("what", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_not_lost(what: str, value: float) -> None:
    made = dict(zip("qkv", torch.randn(3, 40, 1, 8).unbind(0), strict=True))
    made[what][12, 0, 0] = value
    until = torch.full((40,), 40)
    got, exact = (fastft_kernels.attention(*made.values(), until, impl=impl) for impl in ("compiled", "reference"))
    seen_by = slice(12, 13) if what == "q" else slice(12, 40)
    assert torch.equal(got[seen_by].isfinite(), exact[seen_by].isfinite())
    assert not exact[seen_by].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 8), (4, 2, 0)])
def test_of_nothing(shape: tuple[int, ...]) -> None:
    made = [torch.zeros(shape, requires_grad=True) for _ in range(3)]
    out: Any = fastft_kernels.attention(*made, torch.arange(1, shape[0] + 1), scale=1.0, impl="compiled")
    assert out.shape == shape
    assert all(x.shape == shape for x in torch.autograd.grad(out.sum(), made))


def test_keys_whom_nobody_asks_have_no_gradient() -> None:
    k, v = (torch.randn(4, 1, 8, requires_grad=True) for _ in range(2))
    q, nobody = torch.zeros(0, 2, 8, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    out: Any = fastft_kernels.attention(q, k, v, torch.full((4,), 4), q_rows=nobody, impl="compiled")
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_ends_beyond_every_integer_of_c() -> None:
    made = torch.randn(3, 20, 1, 8).unbind(0)
    far = torch.full((20,), torch.iinfo(torch.int64).max)
    out, expected = (fastft_kernels.attention(*made, until, impl="compiled") for until in (far, torch.full((20,), 20)))
    assert torch.equal(out, expected)


def test_it_is_differentiable_once() -> None:
    q, k, v = (torch.randn(4, 1, 8, requires_grad=True) for _ in range(3))
    out: Any = fastft_kernels.attention(q, k, v, torch.full((4,), 4), impl="compiled")
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes_that_there_is_no_code_for(dtype: torch.dtype) -> None:
    made = [torch.zeros(2, 1, 8, dtype=dtype) for _ in range(3)]
    with pytest.raises(ValueError, match="compiled code takes float32 and bfloat16"):
        fastft_kernels.attention(*made, torch.full((2,), 2), impl="compiled")
    assert fastft_kernels.attention(*made, torch.full((2,), 2)).dtype == dtype


def test_switched_off_it_is_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    case = packed_case(torch.float32)
    tiles = plan_tiles(case.until)
    made = case.tensors()[:3]
    on = fastft_kernels.attention(*made, case.until, tiles=tiles)
    assert torch.equal(on, fastft_kernels.attention(*made, case.until, impl="compiled"))
    monkeypatch.setattr(library, "why_not", lambda: "FASTFT_COMPILED is 0")
    off = fastft_kernels.attention(*made, case.until, tiles=tiles)
    assert torch.equal(off, fastft_kernels.attention(*made, case.until, tiles=tiles, impl="torch"))
    assert not torch.equal(on, off)
    with pytest.raises(ValueError, match="FASTFT_COMPILED is 0"):
        fastft_kernels.attention(*made, case.until, impl="compiled")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"k": torch.zeros(3, 2, 8, dtype=torch.bfloat16)}, "expected .* torch.float32"),
        ({"v": torch.zeros(2, 2, 8)}, r"got a tensor \(2, 2, 8\)"),
        ({"q": torch.zeros(3, 2, 8, dtype=torch.float64)}, "got a tensor .* torch.float64"),
        ({"until": torch.full((2,), 3)}, r"got visible_until \(2,\)"),
        ({"rows": torch.zeros(2, dtype=torch.int64)}, r"got rows \(2,\)"),
    ],
)
def test_what_would_be_read_outside_is_refused(changed: dict[str, Tensor], said: str) -> None:
    """A wrong address is not found out by C."""
    right: dict[str, Any] = dict.fromkeys("qkv", torch.zeros(3, 2, 8)) | {"until": torch.full((3,), 3), "rows": None}
    compiled.attention(**right, scale=1.0)
    with pytest.raises(ValueError, match=said):
        compiled.attention(**{**right, **changed}, scale=1.0)


def test_no_memory_is_said() -> None:
    too_many = compiled._Attention(T=1, R=1, H=1, G=1, D=1 << 50)
    with pytest.raises(MemoryError):
        compiled._run("fastft_attention", too_many, torch.zeros(1))


@pytest.mark.parametrize(("dtype", "learns", "ours"), [
    (torch.float32, False, True), (torch.bfloat16, True, True), (torch.bfloat16, False, False),
])  # fmt: skip
def test_rows_of_equal_length(dtype: torch.dtype, learns: bool, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's fused attention is not faster: it is in bf16, but for its gradients."""
    made = [torch.randn(12, 2, 8).to(dtype).requires_grad_(learns) for _ in range(3)]
    until, calls = torch.arange(4, 13, 4).repeat_interleave(4), []
    monkeypatch.setattr(compiled, "attention", lambda *a, real=compiled.attention: calls.append(1) or real(*a))
    out: Any = fastft_kernels.attention(*made, until, row_length=4)
    assert bool(calls) == ours
    exact: Any = fastft_kernels.attention(*(x.double() for x in made), until, impl="reference")
    assert torch.allclose(out.double(), exact, atol=1e-5 if dtype == torch.float32 else 0.02)


def heads_as_torch_splits(product: Tensor, n: int, H: int) -> tuple[Tensor, ...]:
    return product.unflatten(1, (n, H, -1)).unbind(1)


@pytest.mark.parametrize("n", [3, 2])
def test_gradients_of_one_product_are_one_tensor(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits are those of torch's own views, whose gradients are copied together."""
    q, until, found = torch.randn(12, 4, 8), torch.full((20,), 20), []
    asked = torch.arange(8, 20)
    x = torch.randn(20, n * 2 * 8, requires_grad=True)
    copied, real = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda *a: copied.append(1) or real(*a))
    for split in (compiled.split_heads, heads_as_torch_splits):
        heads = split(x, n, 2)
        made, rows = (heads, None) if n == 3 else ((q, *heads), asked)
        out: Any = fastft_kernels.attention(*made, until, q_rows=rows, impl="compiled")
        found.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert torch.equal(*found)
    assert not copied


@pytest.mark.parametrize("used", [1, 2])
def test_other_gradients_are_put_together(used: int) -> None:
    """Views that are used once more, and some that are not used at all."""
    x, until = torch.randn(20, 3 * 2 * 8, requires_grad=True), torch.full((20,), 20)
    found = []
    for split in (compiled.split_heads, heads_as_torch_splits):
        q, k, v = split(x, 3, 2)
        out: Any = fastft_kernels.attention(q, k, v, until, impl="compiled") if used == 2 else q * k
        found.append(torch.autograd.grad((out * (1 + q)).sum(), x)[0])
    assert torch.equal(*found)


def test_a_gradient_of_heads_that_has_none_itself_says_so() -> None:
    x = torch.randn(20, 3 * 2 * 8, requires_grad=True)
    out: Any = fastft_kernels.attention(*compiled.split_heads(x, 3, 2), torch.full((20,), 20), impl="compiled")
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


def test_the_model_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each layer, and the gradients of its weights are those of the torch path."""
    torch.manual_seed(0)
    model, calls, gradients = GPT2(config_for("pico")), [], []
    shared = list(range(10, 30))
    batch = pack([np.array([*shared, 5 * n, 3, 7 + n]) for n in range(6)], [20] * 6)
    monkeypatch.setattr(compiled, "attention", lambda *a, real=compiled.attention: calls.append(1) or real(*a))
    for is_on in (True, False):
        if not is_on:
            monkeypatch.setattr(support, "why_not_compiled", lambda *_: "it is off")
        model.zero_grad()
        model(batch, impl="cpu")[0].backward()
        gradients.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    assert len(calls) == model.config.n_layer
    for a, b in itertools.zip_longest(*gradients):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
