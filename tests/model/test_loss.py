"""`fastft.linear_cross_entropy` against `F.cross_entropy` over logits that are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastft
from fastft.common.errors import UserError

T, C, V = 11, 8, 37
FLOAT64 = 1e-12


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, C, generator=random, dtype=dtype, requires_grad=True) for n in (T, V))
    targets = torch.randint(0, V, (T,), generator=random)
    targets[[2, 7]] = -100
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, *, z_loss: float = 0.0, **more: Any) -> Tensor:
    """Over all logits; each row's z-loss beside its cross-entropy."""
    logits = hidden @ weight.T
    losses = F.cross_entropy(logits, targets, reduction="none", **more)
    return (losses + z_loss * logits.logsumexp(-1).square()).masked_fill(targets == more.get("ignore_index", -100), 0)


def results(loss: Tensor, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    flowing = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight], flowing)]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = FLOAT64) -> bool:
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "more", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 1.0, "z_loss": 0.5}], ids=str
)
def test_loss_and_gradients(more: dict[str, float], reduction: str, impl: str) -> None:
    hidden, weight, targets = inputs()
    losses = plain(hidden, weight, targets, **more)
    expected = {"mean": losses.sum() / (targets != -100).sum(), "sum": losses.sum(), "none": losses}[reduction]
    wanted = results(expected, hidden, weight)
    found = fastft.linear_cross_entropy(hidden, weight, targets, reduction=reduction, impl=impl, **more)
    assert same(results(found, hidden, weight), wanted)
    wrong = {**more, "z_loss": more.get("z_loss", 0.0) + 1e-6}
    found = fastft.linear_cross_entropy(hidden, weight, targets, reduction=reduction, impl=impl, **wrong)
    assert not same(results(found, hidden, weight), wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mean_is_torchs(smoothing: float) -> None:
    hidden, weight, targets = inputs()
    expected = F.cross_entropy(hidden @ weight.T, targets, label_smoothing=smoothing)
    found = fastft.linear_cross_entropy(hidden, weight, targets, label_smoothing=smoothing)
    assert same(results(found, hidden, weight), results(expected, hidden, weight))


@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}], ids=str)
def test_rows_weights_and_another_ignored_index(more: dict[str, float]) -> None:
    hidden, weight, _ = inputs()
    rows, targets = torch.tensor([0, 0, 3, 10]), torch.tensor([5, 6, 9, 1])
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    losses = plain(hidden[rows], weight, targets, ignore_index=9, **more) * weights
    found = fastft.linear_cross_entropy(hidden, weight, targets, rows=rows, row_weights=weights, ignore_index=9, **more)
    assert same(results(found, hidden, weight), results(losses.sum() / 6, hidden, weight))


@pytest.mark.parametrize("more", [{}, {"z_loss": 1e-2}], ids=str)
def test_leading_dimensions(more: dict[str, float]) -> None:
    hidden, weight, targets = inputs()
    flat = fastft.linear_cross_entropy(hidden[:10], weight, targets[:10], reduction="none", **more)
    found = fastft.linear_cross_entropy(
        hidden[:10].view(2, 5, C), weight, targets[:10].view(2, 5), reduction="none", **more
    )
    assert torch.equal(found, flat.view(2, 5))


@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}], ids=str)
def test_nothing_asked_is_0(more: dict[str, float]) -> None:
    hidden, weight, targets = inputs()
    found = fastft.linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), **more)
    assert all(not one.any() for one in results(found, hidden, weight))


def test_under_autocast() -> None:
    """What is added is of the values whose products the kernels take."""
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = fastft.linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1, z_loss=1e-2)
    rounded = [x.detach().bfloat16().float().requires_grad_() for x in (hidden, weight)]
    losses = plain(*rounded, targets, label_smoothing=0.1, z_loss=1e-2)
    expected = results(losses.sum() / (targets != -100).sum(), *rounded)
    assert found.dtype == torch.float32
    assert same(results(found, hidden, weight), expected, 2e-2)
    assert abs(found - expected[0] * 1.03) > 2e-2 * expected[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bias": torch.zeros(V)}, "got a bias, expected a head without one"),
        ({"label_smoothing": 1.5}, "label_smoothing = 1.5"),
        ({"label_smoothing": -0.1}, "label_smoothing = -0.1"),
        ({"z_loss": -1.0}, "z_loss = -1.0"),
        ({"z_loss": float("nan")}, "z_loss = nan"),
        ({"impl": "torch"}, "got --impl torch"),
    ],
)
def test_what_it_cannot_do_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fastft.linear_cross_entropy(*inputs(), **wrong)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reduction": "mea"}, "got reduction='mea', expected one of"),
        ({"row_weights": torch.ones(1)}, r"got row_weights \(1,\), expected"),
        ({"targets": torch.zeros(1, dtype=torch.int64)}, r"got targets \(1,\), expected"),
    ],
)
def test_what_would_broadcast_or_fall_through_is_refused(wrong: dict[str, Any], message: str, smoothing: float) -> None:
    hidden, weight, targets = inputs()
    given = {"targets": targets, **wrong}
    with pytest.raises(ValueError, match=message):
        fastft.linear_cross_entropy(hidden, weight, **given, label_smoothing=smoothing)
