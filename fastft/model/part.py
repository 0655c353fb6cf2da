"""A part of a model that is trained while the rest, its base, stays: adapters, or some of the weights by name.

Which weights are trained, which a checkpoint holds, and which come from the base, is read from the model here: in full
training all are trained, all are held, and none are the base's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fastft.common.errors import UserError
from fastft.common.nearest import did_you_mean
from fastft.common.ranges import range_named
from fastft.model.gpt2 import GPT2, GPT2Config
from fastft.model.lora import attach, settle
from fastft.model.lora_spec import LoRA
from fastft.model.new_rows import NewRows


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What of a model is trained, where it is not all.

    Attributes:
        lora: the adapters, or
        train_only: the weights by the beginnings of their names, as `--train_only` has them.
        new_rows: with adapters, the first row of new tokens and how many there are, where a template has added some.
        base_sha256: `sha256_of` of the model that the rest is from, as it was loaded.
    """

    lora: LoRA | None
    train_only: str | None
    new_rows: tuple[int, int] | None
    base_sha256: str

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint's state."""
        return asdict(self)

    @staticmethod
    def of_json(said: Mapping[str, Any]) -> Part:
        """The inverse.

        Raises:
            KeyError, TypeError, ValueError, UserError: it is none.
        """
        lora, rows = said["lora"], said["new_rows"]
        if lora is not None:
            layers = lora["layers"]
            as_tuples = {"targets": tuple(lora["targets"]), "layers": None if layers is None else tuple(layers)}
            lora = LoRA(**{**lora, **as_tuples})
        first_and_count = None if rows is None else (int(rows[0]), int(rows[1]))
        return Part(lora=lora, train_only=said["train_only"], new_rows=first_and_count, base_sha256=said["base_sha256"])

    def in_words(self) -> str:
        """Such as `adapters (rank 16)`."""
        return f"weights of {self.train_only}" if self.lora is None else f"adapters (rank {self.lora.r})"

    def take(self, model: GPT2, generator: torch.Generator | None = None) -> None:
        """Makes a model, in place, one of which this part is trained.

        Args:
            model: the base, with all its rows.
            generator: of adapters' random beginning.

        Raises:
            UserError: the model has no such weights or layers.
        """
        if self.lora is not None:
            attach(model, self.lora, generator)
            if self.new_rows is not None:
                head = None if model.lm_head is None else model.lm_head.weight
                model.new_rows = NewRows(*self.new_rows, model.wte.weight, head)
        elif self.train_only is not None:
            train_only(model, self.train_only)
        model.part = self
        settle(model)


def numbers_of(config: GPT2Config, part: Part | None) -> tuple[int, int]:
    """How many parameters of a model of a shape are trained, and how many it has in all, its adapters among them;
    counted without making it."""
    with torch.device("meta"):
        model = GPT2(config)
        if part is not None:
            part.take(model)
    trains, has = trained(model).values(), model.parameters()
    return sum(weight.numel() for weight in trains), sum(weight.numel() for weight in has)


def sha256_of(model: GPT2) -> str:
    """What tells one model's weights from another's: SHA-256 over their names, shapes and values. A head that equals
    the embedding is not counted, so that a tied model and its copy with a head of its own are the same."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if weight is not model.wte.weight and name == "lm_head.weight" and torch.equal(weight, model.wte.weight):
            continue
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
        found = range_named(part)
        choices = [part] if found is None else [str(n) for n in found]
        if not choices:
            raise UserError(f"got --train_only {named}, expected a range from the lower to the higher layer")
        begins = [f"{begin}.{choice}" if begin else choice for begin in begins for choice in choices]
    return begins
