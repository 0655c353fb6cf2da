from __future__ import annotations

import sys
from typing import Any

import fastft_kernels
import pytest
import torch
from budget import assert_within_budget, relative_error
from fastft_kernels import RowPlan, add_rows_, plan_rows
from mutants import mutant
from proofs import assert_right, assert_same_bits, drawn, is_wrong, opcheck, random, results
from sanitizer import random_order
from torch import Tensor

kernels = sys.modules["fastft_kernels.rows"]
CHUNK = 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that the interpreter's sizes fill."""
    monkeypatch.setattr(kernels, "CHUNK", CHUNK)


def taken(x: Tensor, rows: Tensor, *, impl: Any, **options: Any) -> Tensor:
    return fastft_kernels.take_rows(x, rows, impl=impl, **options)


def planned(x: Tensor, rows: Tensor, *, impl: Any) -> Tensor:
    return taken(x, rows, impl=impl, plan=plan_rows(rows))


def inputs(N: int, R: int, C: int, dtype: torch.dtype = torch.float32, often: int = 0) -> dict[str, Tensor]:
    """Rows in no order, and one of them `often` more times: among the others, and at the end as padding is."""
    rows = torch.randint(N, (R,), generator=random(1))
    rows = torch.cat(
        [rows[: R // 3], torch.full((often // 2,), N - 1), rows[R // 3 :], torch.full((often - often // 2,), N - 1)]
    )
    return {"x": drawn(N, C, dtype=dtype), "rows": rows}


@pytest.mark.parametrize(
    ("N", "R", "C", "often"),
    [(5, 0, 24, 0), (1, 1, 1, 0), (9, 1, 17, 0), (300, 63, 24, 0), (7, 65, 300, 0), (40, 60, 24, 150), (1, 64, 16, 0)],
)
def test_against_float64(N: int, R: int, C: int, often: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = inputs(N, R, C, dtype, often)
        assert_right(planned, made)
        assert_right(taken, made)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_may_be_of_another_dtype(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    made = inputs(12, 50, 24, dtype, often=40)
    found = results(lambda x, rows, impl: taken(x, rows, impl=impl, out_dtype=out_dtype), made, "triton")
    assert found["output 0"].dtype == out_dtype
    assert found["d x"].dtype == dtype
    assert_right(
        lambda x, rows, impl: taken(x, rows, impl=impl, out_dtype=None if x.dtype.itemsize == 8 else out_dtype), made
    )


def test_sums_are_not_rounded_on_the_way() -> None:
    """In bf16 the ones would be lost beside the first."""
    rows = torch.zeros(257, dtype=torch.int64)
    x = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    flowing = torch.ones(257, 8, dtype=torch.bfloat16)
    flowing[0] = 512
    taken(x, rows, impl="triton").backward(flowing)
    assert x.grad is not None
    assert x.grad.tolist() == [[768.0] * 8, [0.0] * 8]


@pytest.mark.parametrize("often", [0, 100])
def test_the_plan(often: int) -> None:
    rows = inputs(9, 70, 1, often=often)["rows"]
    R = len(rows)
    for plan in (plan_rows(rows), plan_rows(rows, round_sizes=True)):
        segments = [
            (row, plan.order[begin:end].tolist())
            for row, begin, end in zip(plan.ids.tolist(), plan.starts[:-1], plan.starts[1:], strict=True)
            if begin < end
        ]
        assert segments == [(row, (rows == row).nonzero().flatten().tolist()) for row in sorted(set(rows.tolist()))]
        assert all(x.dtype == torch.int32 for x in (plan.order, plan.starts, plan.ids, plan.whole))
    assert plan.ids.shape == (R,)
    assert plan.starts.shape == (R + 1,)
    assert plan.ids[len(segments) :].eq(-1).all()
    in_order = rows[plan.order.long()]
    assert plan.whole.tolist() == [
        int(in_order[i : i + CHUNK].unique().numel() == 1) for i in range(0, R // CHUNK * CHUNK, CHUNK)
    ]
    assert len(plan_rows(rows).whole) == (R // CHUNK if often else 0)


def test_no_rows() -> None:
    for round_sizes in (False, True):
        plan = plan_rows(torch.zeros(0, dtype=torch.int64), round_sizes=round_sizes)
        assert [len(x) for x in (plan.order, plan.starts, plan.ids, plan.whole)] == [0, 1, 0, 0]
        total = drawn(3, 8, grad=False)
        assert torch.equal(add_rows_(total.clone(), torch.zeros(0, 8), plan, "triton"), total)


def added(total: Tensor, grad: Tensor, plan: RowPlan, impl: Any) -> Tensor:
    return add_rows_(total.clone(), grad, plan, impl)


@pytest.mark.parametrize("of_grad", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_total", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("often", [0, 90])
def test_adding_in_place(of_total: torch.dtype, of_grad: torch.dtype, often: int) -> None:
    rows = inputs(20, 50, 24, often=often)["rows"]
    total, grad = drawn(20, 24, dtype=of_total, grad=False), drawn(len(rows), 24, dtype=of_grad, seed=2, grad=False)
    exact = total.double().index_add(0, rows, grad.double())
    plain = total.float().index_add(0, rows, grad.float()).to(of_total)
    for plan in (plan_rows(rows), plan_rows(rows, round_sizes=True)):
        for impl in ("triton", "torch"):
            assert_within_budget(impl, added(total, grad, plan, impl), plain, exact)
    into = total.clone()
    assert add_rows_(into, grad, plan, "triton") is into


def test_what_is_added_is_rounded_once() -> None:
    """Rounded to bf16 first, the sum is 1 and 257 is halfway: it would become 256."""
    plan = plan_rows(torch.tensor([1, 0, 1]))
    grad = torch.tensor([[1.0], [0.0], [2.0**-8]]).expand(3, 8)
    for impl in ("triton", "torch"):
        total = torch.full((2, 8), 256.0, dtype=torch.bfloat16)
        assert add_rows_(total, grad, plan, impl).tolist() == [[256.0] * 8, [258.0] * 8]


def test_gradients_that_lie_apart() -> None:
    made = inputs(12, 50, 24, often=40)
    grad = drawn(90, 2, 24, grad=False)[:, 1]
    plan = plan_rows(made["rows"])
    expected = torch.zeros(12, 24).index_add(0, made["rows"], grad)
    total = torch.zeros(12, 2, 24)
    torch.testing.assert_close(add_rows_(total[:, 0], grad, plan, "triton"), expected)
    assert not total[:, 1].any()
    torch.testing.assert_close(add_rows_(torch.zeros(12, 24), grad.t().contiguous().t(), plan, "triton"), expected)
    x = made["x"]
    (dx,) = torch.autograd.grad(taken(x, made["rows"], impl="triton").sum(), x)  # one number for all elements
    torch.testing.assert_close(dx, torch.zeros(12, 24).index_add(0, made["rows"], torch.ones(90, 24)))


@pytest.mark.parametrize("run", [taken, planned])
def test_the_same_bits_each_time(run: Any) -> None:
    made = inputs(12, 30, 300, torch.bfloat16, often=60)
    assert_same_bits(run, made)
    grad, plan = drawn(90, 300, grad=False), plan_rows(made["rows"], round_sizes=True)
    first = added(made["x"].detach(), grad, plan, "triton")
    with random_order(1):
        assert torch.equal(added(made["x"].detach(), grad, plan, "triton"), first)


def test_a_rounded_plan_gives_the_same_bits() -> None:
    made = inputs(12, 60, 24, often=100)
    assert torch.equal(results(planned, made, "triton")["d x"], results(taken, made, "triton")["d x"])


def test_in_one_graph() -> None:
    made = inputs(12, 60, 24, often=100)
    plan = plan_rows(made["rows"], round_sizes=True)

    def run(x: Tensor, rows: Tensor, plan: RowPlan) -> Tensor:
        return 2 * taken(x, rows, plan=plan, impl="triton")

    x = made["x"]
    (expected,) = torch.autograd.grad(run(x, made["rows"], plan).sum(), x)
    (found,) = torch.autograd.grad(torch.compile(run, fullgraph=True)(x, made["rows"], plan).sum(), x)
    assert torch.equal(found, expected)


def test_the_registered_operations() -> None:
    rows = inputs(12, 20, 8, often=40)["rows"]
    plan, grad = plan_rows(rows), drawn(60, 8, grad=False)
    tensors = (plan.order, plan.starts, plan.ids, plan.whole)
    for by_triton in (True, False):
        opcheck(kernels._take, drawn(12, 8), rows, *tensors, torch.bfloat16, by_triton)
        opcheck(kernels._gradient, grad, *tensors, 12, torch.bfloat16, by_triton)
        opcheck(kernels._add, drawn(12, 8, grad=False), grad, *tensors, by_triton)


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("_sum_of_places", "range(begin, end, BR)", "range(begin, end - BR, BR)"),
        ("_sum_of_places", "place < end)[:, None]", "place < end + 1)[:, None]"),
        ("rows_chunks", "chunk * CHUNK,", "chunk * CHUNK + 1,"),
        ("rows_sum", "range(from_chunk, to_chunk, BR)", "range(from_chunk + 1, to_chunk, BR)"),
        ("rows_sum", "from_chunk * CHUNK, c", "from_chunk * CHUNK - 1, c"),
        ("rows_sum", "begin = to_chunk * CHUNK", "begin = end"),
        ("rows_sum", "mask=c < C)", "mask=c < C - 1)"),
    ],
)
def test_planted_faults_fail(kernel: str, old: str, new: str) -> None:
    made = inputs(12, 61, 24, often=100)
    with mutant(getattr(kernels, kernel), old, new):
        assert is_wrong(taken, made)
    assert_right(taken, made)


@pytest.mark.parametrize(
    ("old", "new"), [("    if ADD:", "    if False:"), ("total += tl.load(at", "total = tl.load(at")]
)
def test_planted_faults_of_adding_fail(old: str, new: str) -> None:
    rows = inputs(12, 61, 24, often=100)["rows"]
    total, grad, plan = drawn(12, 24, grad=False), drawn(161, 24, seed=1, grad=False), plan_rows(rows)
    exact = total.double().index_add(0, rows, grad.double())
    with mutant(kernels.rows_sum, old, new):
        assert relative_error(added(total, grad, plan, "triton"), exact) > 1e-2
    assert relative_error(added(total, grad, plan, "triton"), exact) < 1e-6
