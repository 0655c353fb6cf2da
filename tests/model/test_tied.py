"""A tied embedding's gradient is that of both its uses."""

from __future__ import annotations

import pytest
import torch

from fastft.model import ops
from fastft.model.tied import AddRows, Tie

TOKENS = torch.tensor([3, 1, 3, 3, 9])


def adding(tokens: torch.Tensor) -> AddRows:
    return lambda total, grad: ops.add_rows_(total, grad, ops.Rows(tokens), "cpu")


def tied_loss(weight: torch.Tensor, *, lookup: bool = True, head: bool = True) -> torch.Tensor:
    tie = Tie(weight)
    x = tie.lookup(TOKENS, adding(TOKENS)) if lookup else torch.ones(5, 4, dtype=weight.dtype)
    return ((x @ tie.head().t()).sin() if head else x.sin()).sum()


def plain_loss(weight: torch.Tensor, *, lookup: bool = True, head: bool = True) -> torch.Tensor:
    x = torch.nn.functional.embedding(TOKENS, weight) if lookup else torch.ones(5, 4, dtype=weight.dtype)
    return ((x @ weight.t()).sin() if head else x.sin()).sum()


@pytest.mark.parametrize("uses", [{}, {"lookup": False}, {"head": False}], ids=str)
def test_gradient_is_autograds(uses: dict[str, bool]) -> None:
    weight = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    if uses.get("lookup", True):
        (got,) = torch.autograd.grad(tied_loss(weight, **uses), weight)
        (expected,) = torch.autograd.grad(plain_loss(weight, **uses), weight)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    else:  # without a lookup nobody takes the head's gradient: the tie is for a model that has both
        assert torch.autograd.grad(tied_loss(weight, **uses), weight, allow_unused=True) == (None,)


def test_accumulates_over_passes() -> None:
    weight = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        tied_loss(weight).backward()
    (once,) = torch.autograd.grad(plain_loss(weight), weight)
    torch.testing.assert_close(weight.grad, 2 * once, rtol=1e-12, atol=0)


def test_a_frequent_tokens_gradient_is_summed_before_it_is_rounded() -> None:
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    n = 1000  # one by one, bf16 would stop at 256: 256 + 1 rounds to 256
    tokens = torch.zeros(n, dtype=torch.int64)
    Tie(weight).lookup(tokens, adding(tokens)).sum().backward()
    assert weight.grad is not None
    assert weight.grad[0].item() == n
