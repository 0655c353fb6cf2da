from __future__ import annotations

from typing import Any

import pytest
import torch
from fastft_kernels import RowPlan, add_rows_, plan_rows, take_rows
from torch import Tensor

ROWS = torch.tensor([4, 0, 4, 4, 2, 0, 4])
N, C = 6, 3


def x_of(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, C, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize("plan", [None, plan_rows(ROWS), plan_rows(ROWS, round_sizes=True)])
def test_it_is_an_index_and_its_gradient(impl: Any, plan: RowPlan | None) -> None:
    x = x_of()
    assert torch.equal(take_rows(x, ROWS, plan=plan, impl=impl), x[ROWS])
    assert torch.equal(take_rows(x, ROWS.to(torch.int32), plan=plan, impl=impl), x[ROWS])
    assert torch.autograd.gradcheck(lambda x: take_rows(x, ROWS, plan=plan, impl=impl), (x,))


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_narrow_gradients_are_summed_wide(impl: Any) -> None:
    x = torch.zeros(2, C, dtype=torch.bfloat16, requires_grad=True)
    flowing = torch.ones(257, C)
    flowing[0] = 512
    y = take_rows(x, torch.zeros(257, dtype=torch.int64), out_dtype=torch.float32, impl=impl)
    assert y.dtype == torch.float32
    y.backward(flowing)
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.tolist() == [[768.0] * C, [0.0] * C]


def test_no_gradient_makes_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastft_kernels.rows.plan_rows", None)
    with torch.no_grad():
        assert torch.equal(take_rows(x_of(), ROWS), x_of()[ROWS])
    assert not take_rows(x_of().detach(), ROWS).requires_grad


@pytest.mark.parametrize("round_sizes", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_adding_in_place(round_sizes: bool, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    total, grad = x_of(dtypes[0]).detach(), torch.ones(len(ROWS), C, dtype=dtypes[1])
    expected = total + torch.tensor([2, 0, 1, 0, 4, 0])[:, None]
    found = add_rows_(total, grad, plan_rows(ROWS, round_sizes=round_sizes))
    assert found is total
    assert torch.equal(found, expected.to(dtypes[0]))


def test_sizes_of_a_rounded_plan_depend_on_their_number_alone() -> None:
    plans = [plan_rows(rows, round_sizes=True) for rows in (torch.arange(300), torch.zeros(300, dtype=torch.int32))]
    shapes = [[tuple(x.shape) for x in (p.order, p.starts, p.ids, p.whole)] for p in plans]
    assert shapes[0] == shapes[1] == [(300,), (301,), (300,), (2,)]
    assert (plans[0].whole.tolist(), plans[1].whole.tolist()) == ([0, 0], [1, 1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.ones(N)}, r"got x \(6,\)"),
        ({"x": torch.ones(N, C, dtype=torch.int64)}, "expected floating"),
        ({"rows": torch.ones(2, 2, dtype=torch.int64)}, r"got rows \(2, 2\)"),
        ({"rows": torch.ones(2)}, r"torch.float32, expected \[R\] int64 or int32"),
        ({"rows": torch.ones(2, dtype=torch.int64, device="meta")}, "got rows on meta"),
        ({"out_dtype": torch.int64}, "got out_dtype=torch.int64"),
        ({"plan": plan_rows(ROWS[:3])}, "got a plan of 3 rows, expected 7"),
        ({"plan": plan_rows(ROWS).to("meta")}, "got a plan on meta, expected it on cpu"),
        ({"impl": "fast"}, "got impl='fast'"),
        ({"impl": "triton"}, 'got impl="triton", which cannot run here'),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        take_rows(**{"x": x_of(), "rows": ROWS, **change})


def test_mistakes_of_planning_and_adding_are_named() -> None:
    total, grad, plan = torch.zeros(N, C), torch.zeros(len(ROWS), C), plan_rows(ROWS)
    with pytest.raises(ValueError, match="got row -1, expected none below 0"):
        plan_rows(torch.tensor([3, -1]))
    with pytest.raises(ValueError, match=r"expected \[R\] int64 or int32"):
        plan_rows(torch.zeros(3))
    with pytest.raises(IndexError):
        take_rows(total, torch.tensor([N]))
    for wrong, said in (
        ((total, grad[:, :2], plan), r"got total \(6, 3\), grad \(7, 2\)"),
        ((total.long(), grad, plan), "expected floating ones"),
        ((total.t().contiguous().t(), grad, plan), "expected rows in one piece"),
        ((total, grad.to("meta"), plan), "got grad on meta"),
        ((total, grad[:3], plan), "got a plan of 7 rows, expected 3"),
        ((total, grad, plan, "reference"), 'got impl="reference"'),
        ((total, grad, plan, "triton"), "which cannot run here"),
    ):
        with pytest.raises(ValueError, match=said):
            add_rows_(*wrong)


def test_dtypes_that_the_kernels_do_not_take() -> None:
    from fastft_kernels import support

    with support.offline("sm_80"):
        for x, out_dtype in ((x_of(), None), (x_of(torch.float32), torch.float64)):
            with pytest.raises(ValueError, match=r"got torch\.float64, expected float32"):
                take_rows(x, ROWS, out_dtype=out_dtype, impl="triton")
