"""Dropout, which packs that share beginnings cannot have: found, set to 0, refused."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastft.common.errors import UserError


def zero_dropout(model: nn.Module) -> None:
    """Sets every dropout of a model to 0. GPT-2's configuration has 0.1 where it is not told otherwise.

    A shared beginning has one dropout mask for all that share it, so sharing is exact without dropout alone.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _dropouts(module):
            setattr(module, name, 0.0)


def _dropouts(module: nn.Module) -> list[str]:
    """The attributes of a module that are read in place of a module of dropout: `attention_dropout`, `resid_pdrop`."""
    named = ("drop", "jitter")
    return [name for name, value in vars(module).items()
            if isinstance(value, float) and any(part in name for part in named)]  # fmt: skip


def dropout_of(model: nn.Module) -> float:
    """The largest dropout of a model."""
    largest = 0.0
    for module in model.modules():  # once, as a training model is asked in each forward pass
        if isinstance(module, nn.Dropout):
            largest = max(largest, module.p)
        for name in _dropouts(module):
            largest = max(largest, vars(module)[name])
    return float(largest)


def check_dropout(model: nn.Module) -> None:
    """Refuses a model with dropout for packs that share beginnings.

    Raises:
        UserError: it has some.
    """
    if dropout := dropout_of(model):
        raise UserError(
            f"got a model with dropout {dropout:g}, expected 0, as a shared token has one mask for all that share it: "
            "zero_dropout(model), or TreeCollator(model, share=False)"
        )


def check_branches(model: nn.Module, position_ids: Tensor | None) -> None:
    """Refuses dropout in a pack whose examples share a beginning: a branch's positions begin behind 0.

    Args:
        model: in training. Its dropout may have come after the collator was made, as an adapter's does.
        position_ids: `[1, T]`, or None where they are not known.

    Raises:
        UserError: the model has some.
    """
    if position_ids is None or not dropout_of(model):
        return
    begins = position_ids.diff(dim=-1) != 1
    if bool((begins & (position_ids[..., 1:] != 0)).any()):
        check_dropout(model)


def check_noise(model: Any) -> None:
    """Refuses NEFTune for packs: its noise is the weaker, the longer a row is, and a pack is one row.

    Raises:
        UserError: the model's embeddings have some.
    """
    alpha = getattr(model.get_input_embeddings(), "neftune_noise_alpha", None)
    if alpha:
        raise UserError(
            f"got neftune_noise_alpha {alpha:g}, whose noise hangs on the length of a row, expected none in packs: "
            "leave it out, or a collator that pads"
        )
