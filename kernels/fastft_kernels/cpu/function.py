"""Compiled operations with autograd's graph, and without it where nobody asks for gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad


class _Unkept:
    """In place of a graph's node: what is given to it is forgotten."""

    def save_for_backward(self, *_: Tensor | None) -> None:
        """Nothing is saved."""

    def mark_non_differentiable(self, *_: Tensor) -> None:
        """Nothing is differentiable."""

    def set_materialize_grads(self, _: bool) -> None:
        """There are none."""


def applied(function: type[Function], *given: Any) -> Any:
    """`function.apply`, or its forward pass alone: a node of the graph takes longer than the work of a few rows."""
    learns = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)
    if learns or forward_ad._current_level >= 0:  # which is refused there
        return function.apply(*given)
    return function.forward(_Unkept(), *given)
