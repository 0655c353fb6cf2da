"""Which weights of a model are trained, which a checkpoint holds, and which come from its base."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from fastft.common.errors import UserError
from fastft.common.nearest import did_you_mean
from fastft.model.gpt2 import GPT2

_RANGE = re.compile(r"(\d+)-(\d+)")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What gets a gradient and is updated, by name: optimizers, moments, narrow copies, clipping and exchange between
    ranks take these and no others."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def saved(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a checkpoint holds, and what is loaded from one: what may differ from the base, which is what is trained."""
    return trained(model)


def of_base(model: nn.Module) -> dict[str, nn.Parameter]:
    """What stays as the base has it, and is in no checkpoint; empty in full training."""
    return {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}


def train_only(model: GPT2, named: str) -> None:
    """Freezes all of a model but what is named, in place.

    Args:
        model: any GPT-2.
        named: beginnings of weights' names, by commas, with ranges of layers: `h.20-23,ln_f`.

    Raises:
        UserError: a name is of no weight.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    for one in named.replace(" ", "").split(","):
        found = {name for begin in _expanded(one) for name in _under(names, begin, one)}
        chosen |= found
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in chosen)


def _under(names: Iterable[str], begin: str, said: str) -> list[str]:
    found = [name for name in names if name == begin or name.startswith(f"{begin}.")]
    if found:
        return found
    if begin == "lm_head":
        raise UserError("got --train_only lm_head, which is tied to the embedding: name wte, or add --tie_head false")
    known = sorted({".".join(name.split(".")[:depth]) for name in names for depth in range(1, 5)})
    where = "" if begin == said else f" (of {said})"
    raise UserError(
        f"got --train_only {begin}{where}, expected beginnings of weights' names by commas, such as h.20-23,ln_f"
        f"{did_you_mean(begin, known)}"
    )


def _expanded(named: str) -> list[str]:
    """`h.2-4.attn` -> `h.2.attn`, `h.3.attn`, `h.4.attn`."""
    begins = [""]
    for part in named.split("."):
        found = _RANGE.fullmatch(part)
        choices = [part] if found is None else [str(n) for n in range(int(found[1]), int(found[2]) + 1)]
        if not choices:
            raise UserError(f"got --train_only {named}, expected a range from the lower to the higher layer")
        begins = [f"{begin}.{choice}" if begin else choice for begin in begins for choice in choices]
    return begins


def layers_named(named: str) -> tuple[int, ...] | None:
    """`0,20-23` -> (0, 20, 21, 22, 23); None for `all`.

    Raises:
        UserError: it is neither.
    """
    if named == "all":
        return None
    layers: set[int] = set()
    for part in named.replace(" ", "").split(","):
        found = _RANGE.fullmatch(part)
        if found is None and not part.isdecimal():
            raise UserError(f"got --lora_layers {named}, expected all, or layers and ranges by commas, such as 0,20-23")
        begin, end = (int(part),) * 2 if found is None else (int(found[1]), int(found[2]))
        if end < begin:
            raise UserError(f"got --lora_layers {named}, expected ranges from the lower to the higher layer")
        layers |= set(range(begin, end + 1))
    return tuple(sorted(layers))
