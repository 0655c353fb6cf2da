from __future__ import annotations

import sys
from typing import Any

import fastft_kernels
import pytest
import torch
from fastft_kernels import tables
from mutants import mutant
from proofs import assert_right, assert_same_bits, drawn, is_wrong, opcheck, random, results
from torch import Tensor

kernels = sys.modules["fastft_kernels.linear_cross_entropy"]
SMALL = {"BM": 16, "BN": 64, "BK": 16, "G": 2, "num_warps": 4, "num_stages": 1}
LARGE = {**SMALL, "BN": 4096}


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tiles that fit the sizes the interpreter can do: several of them, or few wide ones for a real vocabulary."""
    wide = "50257" in request.node.name
    for name in ("lse_tiles", "logit_gradient"):
        monkeypatch.setitem(tables.TABLE, name, {"default": {None: LARGE if wide else SMALL}})
    of_product = {**SMALL, "BM": 1024, "BN": 16, "BK": 1024} if wide else SMALL
    monkeypatch.setitem(tables.TABLE, "product", {"default": {None: of_product}})


def losses(hidden: Tensor, weight: Tensor, targets: Tensor, *rest: Tensor, impl: Any, **options: Any) -> Tensor:
    rows, row_weights = (*rest, None, None)[:2]
    options = {"reduction": "none", "logit_chunk_bytes": 4096, **options}
    return fastft_kernels.linear_cross_entropy(
        hidden, weight, targets, rows=rows, row_weights=row_weights, impl=impl, **options
    )


def inputs(T: int, R: int | None, C: int, V: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """With R, so many rows read sorted tokens, some of them twice; without, each token is a row. Some are ignored."""
    made = {
        "hidden": drawn(T, C, dtype=dtype),
        "weight": (0.3 * drawn(V, C, seed=1).detach()).to(dtype).requires_grad_(),
    }
    n = T if R is None else R
    targets = torch.randint(V, (n,), generator=random(2))
    targets[: n // 2 : 3] = -100
    targets[-1:] = V - 1
    made["targets"] = targets
    if R is not None:
        made["rows"] = torch.randint(T, (R,), generator=random(3)).sort().values
        made["row_weights"] = torch.rand(R, generator=random(4)) + 0.5
    return made


@pytest.mark.parametrize(
    ("T", "R", "C", "V"), [(5, 0, 24, 131), (5, 1, 24, 131), (40, 33, 24, 131), (40, 129, 16, 131), (9, 5, 16, 50257)]
)
def test_rows_against_float64(T: int, R: int, C: int, V: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if R == 33 else (torch.float32, torch.bfloat16):
        assert_right(losses, inputs(T, R, C, V, dtype))


@pytest.mark.parametrize(("T", "C", "V"), [(0, 24, 131), (1, 24, 131), (50, 24, 131), (9, 16, 50257)])
def test_tokens_against_float64(T: int, C: int, V: int) -> None:
    for dtype in (torch.bfloat16,) if V > 131 else (torch.float32, torch.bfloat16):
        assert_right(losses, inputs(T, None, C, V, dtype))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("R", [None, 33])
def test_reductions(reduction: str, R: int | None) -> None:
    made = inputs(40, R, 24, 131)
    assert_right(lambda *x, impl: losses(*x, impl=impl, reduction=reduction), made)
    found = results(lambda *x, impl: losses(*x, impl=impl, reduction=reduction), made, "triton")
    by_torch = results(lambda *x, impl: losses(*x, impl=impl, reduction=reduction), made, "torch")
    assert all(torch.allclose(found[name], by_torch[name], atol=1e-5) for name in found)


@pytest.mark.parametrize("R", [None, 6])
def test_all_ignored_is_zero_and_alive(R: int | None) -> None:
    made = inputs(10, R, 24, 131)
    made["targets"].fill_(-100)
    for impl in ("triton", "torch", "reference"):
        found = results(lambda *x, impl: losses(*x, impl=impl, reduction="mean"), made, impl)
        assert found["output 0"] == 0
        assert not found["d hidden"].any()
        assert not found["d weight"].any()


def test_the_trainers_form() -> None:
    made = inputs(40, 33, 24, 131)

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, row_weights: Tensor, *, impl: Any) -> Tensor:
        return fastft_kernels.linear_cross_entropy_with_losses(
            hidden, weight, targets, rows=rows, row_weights=row_weights, impl=impl
        )[0]

    assert_right(run, made)
    _, alone = fastft_kernels.linear_cross_entropy_with_losses(
        *list(made.values())[:3], rows=made["rows"], impl="triton"
    )
    assert not alone.requires_grad
    assert torch.allclose(alone, losses(*list(made.values())[:4], impl="torch"), atol=1e-5)


def test_one_gradient_alone_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made = inputs(40, 33, 24, 131)
    for frozen in ("hidden", "weight"):
        assert_right(losses, {**made, frozen: made[frozen].detach()})
    monkeypatch.setattr(kernels, "_backward", None)  # evaluation never comes to it
    assert_right(losses, {name: x.detach() for name, x in made.items()})


def test_nothing_of_the_callers_is_overwritten() -> None:
    made = inputs(40, None, 24, 131)
    before = {name: x.detach().clone() for name, x in made.items()}
    results(losses, made, "triton")
    assert all(torch.equal(made[name].detach(), x) for name, x in before.items())


@pytest.mark.parametrize("R", [None, 33])
def test_the_same_bits_each_time(R: int | None) -> None:
    assert_same_bits(losses, inputs(40, R, 24, 131, torch.bfloat16))


def test_the_registered_operations() -> None:
    hidden, weight, targets = (inputs(6, None, 24, 67)[name] for name in ("hidden", "weight", "targets"))
    count = torch.tensor([4], dtype=torch.int32)
    opcheck(kernels._forward, hidden, weight, targets, None, -100, 4096)
    opcheck(kernels._forward, hidden, weight, targets, count, -100, 4096)
    lse = torch.zeros(6)
    rest = (hidden.detach(), weight.detach(), targets, count, lse, -100, 4096, True, True)
    opcheck(kernels._backward, lse, *rest)


@pytest.mark.parametrize(
    ("kernel", "old", "new", "R"),
    [
        ("lse_tiles", "tl.where((v < V)[None, :], z * LOG2E", "tl.where((v < V + 1)[None, :], z * LOG2E", 33),
        ("lse_combine", "range(1, tiles)", "range(1, tiles - 1)", 33),
        ("_logits", "range(0, C, BK)", "range(0, C - BK, BK)", 33),
        ("logit_gradient", "p - 1.0", "p", 33),
        ("logit_gradient", "* flowing[:, None]", "", 33),
        ("logit_gradient", "tl.where(target == IGNORE, 0.0, flowing)", "flowing", 33),
        ("product", "range(0, summands, BK)", "range(0, summands - BK, BK)", None),
        ("product", "    if ADD:", "    if False:", None),
    ],
)
def test_planted_faults_fail(kernel: str, old: str, new: str, R: int | None) -> None:
    made = inputs(40, R, 24, 131)
    with mutant(getattr(kernels, kernel), old, new):
        assert is_wrong(losses, made)
    assert not is_wrong(losses, made)
