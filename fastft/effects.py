"""Which options have an effect when: an option that is given where it has none is refused, or it is said.

`CONDITIONS` has an entry for each option that needs something else; all others always have their effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from fastft.config import RECIPES, TrainOptions
from fastft.console import warn
from fastft.errors import UserError


@dataclass(frozen=True, slots=True)
class Facts:
    """What options alone do not tell, where it is known already."""

    steps: int | None = None
    """Optimizer steps of the whole run."""
    val_examples: int | None = None
    ranks: int | None = None
    device: str | None = None
    """`cpu`, `cuda` or `mps`."""


@dataclass(frozen=True, slots=True)
class Condition:
    """Under which an option has an effect.

    Attributes:
        holds: whether it is so; what is not known yet (None) is no reason against.
        needs: the condition in words, behind `needs`.
        refused: whether the option is refused where it does not hold. It is said where a file of options may serve
            several machines and data sets.
    """

    holds: Callable[[TrainOptions, Facts], bool]
    needs: str
    refused: bool = True


def _packs(options: TrainOptions, _: Facts) -> bool:
    return options.batching == "packed"


def _validates(options: TrainOptions, facts: Facts) -> bool:
    return options.eval_every > 0 and facts.val_examples != 0


def _has_validation(_: TrainOptions, facts: Facts) -> bool:
    return facts.val_examples != 0


CONDITIONS: dict[str, tuple[Condition, ...]] = {
    "token_cache": (Condition(lambda o, _: o.data != "sample", "a data file: the embedded records have no cache"),),
    "share_prefix": (Condition(_packs, "--batching packed"),),
    "pack_tokens": (Condition(_packs, "--batching packed"),),
    "accumulate": (
        Condition(
            lambda o, _: o.accumulate <= o.batch_size, "as many examples in a step (--batch_size), at least one a pass"
        ),
    ),
    "epochs": (Condition(lambda o, _: o.steps is None, "a run without --steps, which overrides it"),),
    "warmup": (
        Condition(
            lambda o, facts: facts.steps is None or o.warmup < facts.steps,
            "more steps than it has: the rate would never reach --lr",
        ),
    ),
    "decay_all": (Condition(lambda o, _: o.weight_decay > 0, "a --weight_decay above 0"),),
    "tf32": (Condition(lambda _, facts: facts.device in (None, "cuda"), "a CUDA GPU", refused=False),),
    "hang_timeout": (Condition(lambda _, facts: facts.ranks != 1, "several ranks", refused=False),),
    "eval_every": (Condition(_has_validation, "a validation split that is not empty", refused=False),),
    "eval_examples": (
        Condition(lambda o, _: o.recipe != "book", "another run than the book's, which reads its first 5 batches"),
        Condition(_has_validation, "a validation split that is not empty", refused=False),
    ),
    "samples": (
        Condition(lambda o, _: o.recipe != "book" or o.samples < 1, "another run than the book's, which answers one"),
        Condition(_has_validation, "a validation split that is not empty", refused=False),
    ),
    "patience": (
        Condition(lambda o, _: o.keep_best, "--keep_best true: early stopping exports the best"),
        Condition(_validates, "evaluations: --eval_every of at least 1, and a validation split that is not empty"),
    ),
}
"""Options to what they need."""


def check_effects(options: TrainOptions, facts: Facts | None = None) -> None:
    """Refuses options that are not at their defaults and can have no effect, or warns of them.

    Raises:
        UserError: one has none.
    """
    for condition, line in _without_effect(options, facts or Facts()):
        if condition.refused:
            raise UserError(f"{line}; leave it out, or see to what it needs")
        if facts is not None:
            warn(line)


def _without_effect(options: TrainOptions, facts: Facts) -> Iterator[tuple[Condition, str]]:
    defaults = {one.name: one.default for one in fields(TrainOptions)} | RECIPES.get(options.recipe or "", {})
    for name, conditions in CONDITIONS.items():
        value = getattr(options, name)
        for condition in conditions:
            if value != defaults[name] and not condition.holds(options, facts):
                said = str(value).lower() if isinstance(value, bool) else value
                yield condition, f"got --{name} {said}, which has no effect here: it needs {condition.needs}"
