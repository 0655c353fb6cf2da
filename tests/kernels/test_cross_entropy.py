from __future__ import annotations

from typing import Any

import pytest
import torch
from fastft_kernels import cross_entropy
from torch.nn import functional as F

N, V = 9, 131


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(V, (N,), generator=generator)
    targets[::3], targets[-1] = -100, V - 1
    return torch.randn(N, V, generator=generator).to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("impl", ["torch", "reference", "auto"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_is_torchs(impl: Any, reduction: Any) -> None:
    logits, targets = inputs()
    loss = cross_entropy(logits, targets, reduction=reduction, impl=impl)
    expected = F.cross_entropy(logits, targets, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    flowing = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    torch.testing.assert_close(*(torch.autograd.grad((x * flowing).sum(), logits)[0] for x in (loss, expected)))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_no_target_is_zero_where_torchs_mean_is_nan(impl: Any) -> None:
    logits, targets = inputs()
    loss = cross_entropy(logits, targets.fill_(-100), impl=impl)
    assert loss == 0
    assert not torch.autograd.grad(loss, logits)[0].any()
    assert F.cross_entropy(logits, targets).isnan()


def test_the_order_of_torchs_arguments() -> None:
    logits, targets = inputs()
    kept = targets.masked_fill(targets == -100, V - 1)
    torch.testing.assert_close(
        cross_entropy(logits, kept, None, None, V - 1, None, "sum", 0.0),
        F.cross_entropy(logits, kept, None, None, V - 1, None, "sum", 0.0),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_give_a_wide_loss(dtype: torch.dtype) -> None:
    logits, targets = inputs(dtype)
    for impl in ("torch", "reference"):
        loss = cross_entropy(logits, targets, impl=impl)
        assert loss.dtype == torch.float32
        assert torch.autograd.grad(loss, logits)[0].dtype == dtype


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input": torch.zeros(N, V, 1)}, r"got input \(9, 131, 1\)"),
        ({"input": torch.zeros(N, V, dtype=torch.int64)}, "expected floating"),
        ({"target": torch.zeros(N + 1, dtype=torch.int64)}, r"target \(10,\)"),
        ({"weight": torch.ones(V)}, "expected their defaults"),
        ({"label_smoothing": 0.1}, "expected their defaults"),
        ({"size_average": True}, "expected their defaults"),
        ({"reduction": "average"}, "got reduction='average'"),
        ({"impl": "triton"}, 'got impl="triton", which cannot run here'),
    ],
)
def test_mistakes_are_named(wrong: dict[str, Any], message: str) -> None:
    logits, targets = inputs()
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{"input": logits, "target": targets, **wrong})
