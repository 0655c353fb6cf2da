from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastft_kernels import linear_cross_entropy, linear_cross_entropy_with_losses
from torch import Tensor
from torch.nn import functional as F

T, C, V = 12, 24, 131


def inputs(dtype: torch.dtype = torch.float64, R: int | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    n = T if R is None else R
    targets = torch.randint(V, (n,), generator=generator)
    targets[: n // 2 : 2] = -100
    targets[-1:] = V - 1
    made: dict[str, Any] = {
        "hidden": torch.randn(T, C, generator=generator).to(dtype).requires_grad_(),
        "weight": (0.3 * torch.randn(V, C, generator=generator)).to(dtype).requires_grad_(),
        "targets": targets,
        "row_weights": torch.rand(n, generator=generator, dtype=torch.float64) + 0.5,
    }
    if R is not None:
        made["rows"] = torch.randint(T, (R,), generator=generator).sort().values
    return made


def by_hand(made: dict[str, Any], reduction: str) -> Tensor:
    """The loss from all logits, by torch."""
    hidden = made["hidden"] if made.get("rows") is None else made["hidden"][made["rows"]]
    losses = F.cross_entropy(hidden @ made["weight"].T, made["targets"], reduction="none") * made["row_weights"]
    asked = made["targets"] != -100
    total = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / (made["row_weights"] * asked).sum()}
    return total[reduction]


def gradients(loss: Tensor, made: dict[str, Any]) -> tuple[Tensor, ...]:
    flowing = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return torch.autograd.grad((loss * flowing).sum(), (made["hidden"], made["weight"]))


@pytest.mark.parametrize("impl", ["torch", "reference", "auto"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("R", [None, 1, 7, 129])
def test_is_the_cross_entropy_of_the_logits(impl: Any, reduction: Any, R: int | None) -> None:
    made = inputs(R=R)
    for chunk_bytes in (1, 4 * V * 8, 1 << 20):  # a row at a time, several, all
        loss = linear_cross_entropy(**made, reduction=reduction, logit_chunk_bytes=chunk_bytes, impl=impl)
        expected = by_hand(made, reduction)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        for got, right in zip(gradients(loss, made), gradients(expected, made), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("R", [None, 0, 6])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_target_is_zero_with_zero_gradients(impl: Any, R: int | None, reduction: Any) -> None:
    made = inputs(R=R)
    made["targets"].fill_(-100)
    loss = linear_cross_entropy(**made, reduction=reduction, impl=impl)
    assert not loss.any()
    assert not any(x.any() for x in gradients(loss, made))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_trainers_pair(impl: Any) -> None:
    made = inputs(R=7)
    total, losses = linear_cross_entropy_with_losses(**made, impl=impl)
    assert not losses.requires_grad
    assert losses[made["targets"] == -100].eq(0).all()
    torch.testing.assert_close(total, by_hand(made, "sum"))
    torch.testing.assert_close((losses * made["row_weights"]).sum(), total.detach())
    expected = gradients(by_hand(made, "sum"), made)
    for got, right in zip(gradients(total, made), expected, strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_another_ignored_id_and_weights_without_gradient(reduction: Any) -> None:
    made = inputs()
    made["row_weights"].requires_grad_()
    expected = linear_cross_entropy(**made, reduction=reduction)
    unused = min(set(range(V)) - set(made["targets"].tolist()))
    made["targets"] = made["targets"].masked_fill(made["targets"] == -100, unused)
    found = linear_cross_entropy(**made, ignore_index=unused, reduction=reduction)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(found.sum(), made["row_weights"], allow_unused=True) == (None,)


def test_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft_kernels import linear_cross_entropy_torch as in_torch

    given = []
    to_gradient: Callable[..., None] = in_torch._to_gradient

    def watched(logits: Tensor, targets: Tensor, losses: Tensor, row_weights: Tensor | None) -> None:
        given.append(row_weights)
        to_gradient(logits, targets, losses, row_weights)

    monkeypatch.setattr(in_torch, "_to_gradient", watched)
    made = inputs()
    with torch.no_grad():
        for reduction in ("mean", "sum", "none"):
            assert not linear_cross_entropy(**made, reduction=reduction, impl="torch").requires_grad
    assert given
    assert all(weights is None for weights in given)
    linear_cross_entropy(**made, impl="torch")
    assert given[-1] is not None


def test_autocast_makes_the_product_narrow() -> None:
    made = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(**made, impl="torch")
    narrow = {**made, "hidden": made["hidden"].bfloat16(), "weight": made["weight"].bfloat16()}
    assert loss.dtype == torch.float32
    assert torch.equal(loss, linear_cross_entropy(**narrow, impl="torch"))
    assert all(x.dtype == torch.float32 for x in gradients(loss, made))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": torch.zeros(T, C + 1)}, r"got hidden \(12, 25\)"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"got targets \(3,\).*expected both \[12\]"),
        ({"row_weights": torch.zeros(3)}, r"row_weights \(3,\)"),
        ({"weight": torch.zeros(V, C).half()}, "expected one floating dtype"),
        ({"weight": torch.zeros(V, C, device="meta", dtype=torch.float64)}, "on different devices"),
        ({"reduction": "average"}, "got reduction='average'"),
        ({"impl": "cuda"}, "got impl='cuda'"),
        ({"impl": "triton"}, 'got impl="triton", which cannot run here'),
    ],
)
def test_mistakes_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**inputs(), **wrong})
