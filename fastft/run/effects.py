"""Which options have an effect when: an option that is given where it has none is refused, or it is said.

`CONDITIONS` has for each command an entry for each option that needs something else; all others always have their
effect. A dry run takes the options of the run that it plans, though it does nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from fastft.common.console import warn
from fastft.common.errors import UserError
from fastft.run.config import RECIPES, TrainOptions


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

    holds: Callable[[Any, Facts], bool]
    needs: str
    refused: bool = True


Table = dict[str, tuple[Condition, ...]]
"""Options to what they need."""


def _packs(options: Any, _: Facts) -> bool:
    return bool(options.batching == "packed")


def _validates(options: Any, facts: Facts) -> bool:
    return bool(options.eval_every > 0 and facts.val_examples != 0)


def _has_validation(_: Any, facts: Facts) -> bool:
    return facts.val_examples != 0


def _draws(options: Any, _: Facts) -> bool:
    return bool(options.temperature > 0)


_TEMPERATURE = "a --temperature above 0: else the most likely token is taken"
_VALIDATION = "a validation split that is not empty"
_TRAIN: Table = {
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
    "eval_every": (
        Condition(lambda o, facts: o.eval_every == 0 or _has_validation(o, facts), _VALIDATION, refused=False),
    ),
    "eval_examples": (
        Condition(lambda o, _: o.recipe != "book", "another run than the book's, which reads its first 5 batches"),
        Condition(_has_validation, _VALIDATION, refused=False),
    ),
    "samples": (
        Condition(lambda o, _: o.recipe != "book" or o.samples < 1, "another run than the book's, which answers one"),
        Condition(lambda o, facts: o.samples == 0 or _has_validation(o, facts), _VALIDATION, refused=False),
    ),
    "patience": (
        Condition(lambda o, _: o.keep_best, "--keep_best true: early stopping exports the best"),
        Condition(_validates, "evaluations: --eval_every of at least 1, and a validation split that is not empty"),
    ),
}

_ANSWER: Table = {
    "temperature": (
        Condition(
            lambda o, _: o.top_k != 1, "more than the one most likely token to draw from: another --top_k than 1"
        ),
    ),
    "top_k": (Condition(_draws, _TEMPERATURE),),
    "top_p": (Condition(_draws, _TEMPERATURE),),
    "seed": (Condition(_draws, _TEMPERATURE),),
}
_MADE_ALREADY = Condition(lambda o, _: not o.import_, "a page to make: ratings that are imported say it themselves")

CONDITIONS: dict[str, Table] = {
    "train": _TRAIN,
    "verify-resume": {"epochs": (Condition(lambda *_: False, "another command: this one's runs have --steps"),)},
    "generate": _ANSWER,
    "chat": _ANSWER,
    "inspect": {
        "model": (Condition(lambda o, _: o.weights in (None, "none"), "no --weights, which have a size of their own"),),
    },
    "ab": dict.fromkeys(("seed", "limit", "reference"), (_MADE_ALREADY,)),
    "doctor": {
        "speed": (
            Condition(
                lambda _, facts: facts.device in (None, "cuda"), "a CUDA GPU: speeds are measured there", refused=False
            ),
        ),
    },
}
"""By command, options to what they need; commands that are not there have no such option, or see to it themselves
(`fastft.judging.options`)."""


def check_effects(command: str, options: Any, facts: Facts | None = None) -> None:
    """Refuses options of a command that are not at their defaults and can have no effect, or warns of them.

    Raises:
        UserError: one has none.
    """
    for condition, line in _without_effect(command, options, facts or Facts()):
        if condition.refused:
            raise UserError(f"{line}; leave it out, or see to what it needs")
        if facts is not None:
            warn(line)


def _without_effect(command: str, options: Any, facts: Facts) -> Iterator[tuple[Condition, str]]:
    defaults = {one.name: one.default for one in fields(options)}
    if isinstance(options, TrainOptions):
        defaults |= RECIPES.get(options.recipe or "", {})
    for name, conditions in CONDITIONS[command].items():
        value = getattr(options, name)
        for condition in conditions:
            if value != defaults[name] and not condition.holds(options, facts):
                said = str(value).lower() if isinstance(value, bool) else value
                yield condition, f"got --{name} {said}, which has no effect here: it needs {condition.needs}"
