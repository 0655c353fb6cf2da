"""The tools of these tests, held against planted faults: a checker that sees nothing would pass everything."""

from __future__ import annotations

from typing import Any

import pytest
import sanitizer
import torch
import toy_kernels
from budget import assert_within_budget, relative_error
from interpreted_bf16 import narrow, widen
from mutants import mutant
from sanitizer import Violation, random_order

N, BS = 50, 16
GRID = (-(-N // BS),)


def launched(kernel: Any) -> torch.Tensor:
    x, y = torch.arange(N, dtype=torch.float32), torch.zeros(N)
    kernel[GRID](x, y, N, BS)
    return y


def test_a_sound_kernel_passes() -> None:
    assert launched(toy_kernels.scale).tolist() == [2.0 * i for i in range(N)]


@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        (toy_kernels.read_too_far, "out of bounds"),
        (toy_kernels.write_too_far, "out of bounds"),
        (toy_kernels.lost_update, "race"),
        (toy_kernels.overlapping_stores, "race"),
        (toy_kernels.wrong_slot, "race"),
        (toy_kernels.twice_in_one_store, "race"),
    ],
)
def test_planted_faults_are_caught(kernel: Any, found: str) -> None:
    with pytest.raises(Violation, match=found):
        launched(kernel)


@pytest.mark.adds_atomically
def test_float_atomics_are_counted() -> None:
    before = sanitizer.statistics.float_atomics
    launched(toy_kernels.atomic_sum)
    assert sanitizer.statistics.float_atomics == before + GRID[0]


@pytest.mark.adds_atomically
def test_what_is_added_atomically_is_touched_by_nothing_else() -> None:
    with pytest.raises(Violation, match="race"):
        launched(toy_kernels.atomic_sum_read_at_once)


@pytest.mark.filterwarnings("default")
def test_random_order_visits_every_program_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "_check", lambda *_: None)  # this kernel's whole point is to depend on the order
    seen = []
    for seed in (None, 1, 2):
        counter, order = torch.zeros(1, dtype=torch.int32), torch.zeros(20, dtype=torch.int32)
        if seed is None:
            toy_kernels.order_of_programs[(20,)](counter, order, 20)
        else:
            with random_order(seed):
                toy_kernels.order_of_programs[(20,)](counter, order, 20)
        seen.append(order.tolist())
    assert seen[0] == list(range(20))
    assert sorted(seen[1]) == sorted(seen[2]) == seen[0]
    assert seen[1] not in (seen[0], seen[2])


def test_new_tensors_are_poisoned() -> None:
    x = torch.zeros(3)
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(x).isnan().all()
    assert x.new_empty(3).isnan().all()
    assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2


def test_bf16_rounds_as_torch_does() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(4096, generator=random) * torch.logspace(-40, 38, 4096)
    values[:4] = torch.tensor([0.0, -0.0, torch.inf, 1e-40])
    ours = torch.from_numpy(widen(narrow(values.numpy())))
    assert torch.equal(ours, values.to(torch.bfloat16).float())


def test_bf16_arithmetic_is_torchs() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=random).to(torch.bfloat16) for _ in range(2))
    total, product = torch.empty_like(a), torch.empty_like(a)
    dot = torch.empty(16, 16)
    toy_kernels.bf16_arithmetic[(1,)](a, b, total, product, dot, 16)
    assert torch.equal(total, a + b)
    assert torch.equal(product, a * b)
    assert relative_error(dot, a.double() @ b.double()) < 1e-6


@pytest.mark.parametrize("kernel", [toy_kernels.bf16_sum, toy_kernels.bf16_fma])
def test_bf16_that_is_not_made_right_raises(kernel: Any) -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="convert"):
        kernel[(1,)](x, torch.zeros(16, dtype=torch.bfloat16), 16)


def test_bf16_scalars_and_integers() -> None:
    x = torch.linspace(-3, 3, 16).to(torch.bfloat16)
    y = torch.empty_like(x)
    toy_kernels.bf16_scalars[(1,)](x, y, 16)
    assert torch.equal(y, x * 2.5 + torch.arange(16).to(torch.bfloat16))


def test_views_of_one_tensor_may_be_read_and_written() -> None:
    both = torch.arange(2 * N, dtype=torch.float32).view(N, 2)
    toy_kernels.scale_column[GRID](both[:, 0], both[:, 1], N, 2, BS)
    assert both[:, 1].tolist() == [4.0 * i for i in range(N)]


def test_a_mutant_replaces_a_kernel_and_goes_again() -> None:
    with mutant(toy_kernels.scale, "x * 2.0", "x * 3.0"):
        assert launched(toy_kernels.scale)[1] == 3
    assert launched(toy_kernels.scale)[1] == 2
    with mutant(toy_kernels.doubled, "x * 2.0", "x * 3.0"):
        assert launched(toy_kernels.scale_by_helper)[1] == 3
    assert launched(toy_kernels.scale_by_helper)[1] == 2
    with pytest.raises(AssertionError, match="has no"), mutant(toy_kernels.scale, "x * 7.0", "x"):
        pass


def test_the_budget_refuses_what_is_worse_than_plain() -> None:
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    plain = exact.to(torch.bfloat16)
    assert_within_budget("same", plain, plain, exact)
    with pytest.raises(AssertionError, match="worst element"):
        assert_within_budget("off", plain * 1.02, plain, exact)
    with pytest.raises(AssertionError, match="allowed"):
        assert_within_budget("nan", plain * torch.nan, plain, exact)
    with pytest.raises(AssertionError, match=r"expected torch\.bfloat16"):
        assert_within_budget("wide", exact, plain, exact)
