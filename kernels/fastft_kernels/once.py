"""Gradients that have none themselves, and say so."""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

Backward = Callable[..., Any]


class _HasNoGradient(torch.autograd.Function):
    """Its output is its second input, a gradient; whoever asks for that one's gradient is told that there is none."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG004 # `anchor` alone asks for one
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ARG004 # it has none to give
        raise RuntimeError(
            "got a backward pass through the gradient of a fused operation, which is differentiable once, expected one "
            "backward pass: compute what needs second derivatives with impl='reference', or with the plain model"
        )


def differentiable_once(backward: Backward) -> Backward:
    """Marks the backward pass of an autograd function as one that cannot be differentiated.

    As torch's `once_differentiable`, but it also raises where nothing that flows into the backward pass asks for a
    gradient, as behind a loss that it begins with. There torch's gives plain tensors, and a penalty on gradients that
    is added to another loss has no effect, without a word.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *flowing: Any) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *flowing)
        if not torch.is_grad_enabled():  # it is on in a backward pass with create_graph alone
            return gradients
        if not isinstance(gradients, tuple):
            return _marked(gradients)
        return tuple(_marked(gradient) for gradient in gradients)

    return once


def _marked(gradient: Any) -> Any:
    if not isinstance(gradient, Tensor):
        return gradient
    mark = cast(Callable[..., Tensor], _HasNoGradient.apply)
    return mark(torch.empty(0, device=gradient.device, requires_grad=True), gradient)
