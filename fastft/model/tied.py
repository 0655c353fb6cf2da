"""One gradient for the two uses of a tied embedding: the lookup of tokens, and the head.

Left to autograd, the lookup makes a dense `[V, C]` gradient of its own, nearly all zeros, and adds it to the head's:
three passes over the largest tensor of a step. Here the head leaves its gradient with the tie, and the lookup, whose
backward pass comes last, adds its few rows to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

AddRows = Callable[[Tensor, Tensor], Tensor]
"""Adds gradients `[T, C]` to the rows of a total `[V, C]` that they belong to, in place."""


class Tie:
    """The uses of a weight `[V, C]` in one forward pass: first `lookup`, then `head`, each once."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.head_gradient: Tensor | None = None
        self.looked_up = False

    def lookup(self, tokens: Tensor, add_rows: AddRows) -> Tensor:
        """Rows `tokens` `[T]` of the weight: `[T, C]`, at least float32; `add_rows` adds up their gradient."""
        apply: Callable[..., Tensor] = _Lookup.apply
        return apply(self.weight, tokens, self, add_rows)

    def head(self) -> Tensor:
        """The weight `[V, C]`, for the head."""
        apply: Callable[..., Tensor] = _Head.apply
        return apply(self.weight, self)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tie: Tie) -> Tensor:
        ctx.tie = tie
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        if ctx.tie.looked_up:  # nobody will take it any more
            return grads[0], None
        ctx.tie.head_gradient = grads[0]
        return None, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, tie: Tie, add_rows: AddRows) -> Tensor:
        ctx.tie, ctx.add_rows = tie, add_rows
        return weight.index_select(0, tokens).to(torch.promote_types(weight.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        tie = ctx.tie
        total, tie.head_gradient, tie.looked_up = tie.head_gradient, None, True
        if total is None:
            total = torch.zeros_like(tie.weight)
        return ctx.add_rows(total, grads[0]), None, None, None
