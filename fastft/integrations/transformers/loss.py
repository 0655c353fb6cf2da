"""A loss that never makes the logits of rows without a label, within the forward of any causal language model.

No model's code is copied. Where a loss is asked for and nothing else, the model's own forward runs, and finds a head
that gives, in place of the logits, `HeadInput`: what it would have multiplied. The model hands it to its loss function,
which computes the loss from it. Should a model do anything else with its logits (scale them, cap them), that fails at
once, as a `HeadInput` can do nothing; `accelerate` finds out before it leaves the loss to this.

Letters: B rows of T tokens, C width, V vocab.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastft.common.errors import UserError
from fastft.integrations.transformers import ops
from fastft.integrations.transformers.dropout import check_branches, check_noise
from fastft.integrations.transformers.replaced import is_listened_to, is_plain
from fastft.integrations.transformers.swap import Swapped, own_class, swap

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True, eq=False)
class HeadInput:
    """In place of logits `[B, T, V]`: the hidden states `[B, T, C]` and the head's weight `[V, C]`."""

    hidden: Tensor
    weight: Tensor


_asked: ContextVar[nn.Module | None] = ContextVar("_asked", default=None)
"""The head that gives a `HeadInput` now."""


@contextmanager
def _without_logits(head: nn.Module) -> Iterator[None]:
    """While it is open, the head gives a `HeadInput`."""
    token = _asked.set(head)
    try:
        yield
    finally:
        _asked.reset(token)


class Head(Swapped, nn.Module):
    """The head `nn.Linear` of an accelerated model."""

    def forward(self, x: Tensor) -> Any:
        """`[B, T, C]` -> the logits `[B, T, V]`, or what a loss is computed from without them."""
        if _asked.get() is self:
            return HeadInput(x, cast(Tensor, self.weight))
        return super().forward(x)


class CausalLM(Swapped, nn.Module):
    """An accelerated causal language model.

    Its `facts`: `attention`, the attention implementations that it had; `loss`, whether its head is one that can do
    without logits; `skip_logits`, whether that is for evaluation too.
    """

    @classmethod
    def members(cls, original: type) -> dict[str, Any]:
        """A forward with the original's signature."""
        return {"forward": _forward_of(original)}

    @property
    def loss_function(self) -> Any:
        """The model's own, or what computes the same from a `HeadInput`."""
        own = super().loss_function  # type: ignore[misc] # of PreTrainedModel, which stands behind this class
        return functools.partial(causal_lm_loss, own)

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        # What was read here may be set back, and is the model's own then, which `restore` leaves.
        ours = isinstance(value, functools.partial) and value.func is causal_lm_loss
        self._loss_function = value.args[0] if ours else value


def _forward_of(original: Any) -> Callable[..., Any]:
    own = original.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check_pack(self, kwargs)
        head = _head_without_logits(self, args, kwargs)
        if head is None:
            return own(self, *args, **kwargs)
        with _without_logits(head):
            outputs = own(self, *args, **kwargs)
        return type(outputs)(**{name: value for name, value in outputs.items() if name != "logits"})

    return forward


def _check_pack(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuses what came to a model since the collator tried it out, in training."""
    if model.training and kwargs.get("visible_until") is not None and not ops.is_recorded():
        check_branches(model, kwargs.get("position_ids"))
        check_noise(model)


def _head_without_logits(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module | None:
    """The head, where a call asks for a loss and nothing stands against computing it without logits; else None.

    The model may have got its own class back meanwhile: accelerate keeps a forward that it has wrapped.
    """
    facts = model.facts if isinstance(model, CausalLM) else {"loss": False}
    if not facts["loss"] or ops.is_recorded():
        return None
    if args:
        kwargs = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        kwargs = {**kwargs, **kwargs.get("kwargs", {})}
    if kwargs.get("labels") is None or not (model.training or facts["skip_logits"]):
        return None
    whole = kwargs.get("return_dict")
    if not (model.config.return_dict if whole is None else whole):  # a tuple without logits has other places
        return None
    head = model.get_output_embeddings()
    if why_not(model, head) is not None:
        return None
    if not isinstance(head, Head):  # another one since, as of an embedding that was given more rows
        swap(head, Head)
    return cast(nn.Module, head)


def head_input(model: Any, head: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The outputs of an accelerated model for a call without labels, a `HeadInput` in place of their logits."""
    _check_pack(model, kwargs)
    with _without_logits(head):
        return type(model).original.forward(model, *args, **kwargs)


def why_not(model: Any, head: Any) -> str | None:
    """Why the loss cannot be computed without logits; None where it can."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    function = model.loss_function
    own = function.args[0] if isinstance(function, functools.partial) else function
    if own is not ForCausalLMLoss:
        return f"its loss is {getattr(own, '__name__', own)}"
    if own_class(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}"
    if head.bias is not None:
        return "its head has a bias"
    if is_listened_to(head) or "forward" in vars(head):
        return "something listens to its head"
    if not is_plain(head.weight):
        return "its head is cut into parts"
    return None


def causal_lm_loss(
    own: Callable[..., Tensor],
    logits: Tensor | HeadInput,
    labels: Tensor,
    vocab_size: int,
    **kwargs: Any,
) -> Tensor:
    """A model's loss: its own of logits, or `ForCausalLMLoss` of what they would have been made of.

    Args:
        own: what computes it from logits; it is given what the model gives, and no more.
        logits: `[B, T, V]`, or a `HeadInput`.
        labels, vocab_size, kwargs: see `loss_without_logits`.
    """
    if isinstance(logits, HeadInput):
        return loss_without_logits(logits, labels, vocab_size, **kwargs)
    ops.note("loss_of_logits")
    return own(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)


def loss_without_logits(
    states: HeadInput,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' `ForCausalLMLoss`, of what the logits would have been made of.

    Args:
        states: in their place.
        labels: `[B, T]`; the loss of a token is that of the next one's label.
        vocab_size: V.
        num_items_in_batch: what the sum is divided by, one number; the targets of this call where it is not given.
        ignore_index: label of a token that is not asked for.
        shift_labels: `[B, T]`, the label of the next token already.

    Returns:
        A scalar, of the shape of `num_items_in_batch` where that is a tensor; float32 (float64 where the hidden states
        are). Where no token has a label it is 0, and connected to the model, where a mean of nothing is NaN.
    """
    hidden, weight = states.hidden, states.weight
    targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    if weight.shape[0] != vocab_size or targets.shape != hidden.shape[:-1]:
        raise UserError(
            f"got labels for {tuple(targets.shape)} tokens of {vocab_size} kinds, expected "
            f"{tuple(hidden.shape[:-1])} of {weight.shape[0]}, as the model gives"
        )
    if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() != 1:
        raise UserError(f"got num_items_in_batch {tuple(num_items_in_batch.shape)}, expected one number")
    targets = targets.to(hidden.device).flatten()
    shape: torch.Size | tuple[int, ...] = ()
    if num_items_in_batch is None:
        count: Tensor | int = (targets != ignore_index).sum().clamp(min=1)
    elif isinstance(num_items_in_batch, Tensor):
        count, shape = num_items_in_batch.reshape(()), num_items_in_batch.shape  # a quotient has the divisor's
    else:
        count = num_items_in_batch
    return ops.linear_cross_entropy(hidden.flatten(0, -2), weight, targets, ignore_index, count).view(shape)
