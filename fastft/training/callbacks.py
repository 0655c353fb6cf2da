"""What a program of one's own hears of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.common.errors import FastftError, UserError

Heard = Callable[[dict[str, Any]], object]


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Functions that are called while a run trains, in the first rank's process, between two steps.

    One that raises ends the training as soon as all ranks have heard of it; checkpoints stay.

    Attributes:
        on_step: hears each step's line, as `metrics.jsonl` has it (`step`, `loss`, `lr`, ...).
        on_evaluate: hears each evaluation's line (`step`, `val_loss`, ...).
        on_save: hears the folder of each checkpoint that any number of ranks can go on from.
    """

    on_step: Heard | None = None
    on_evaluate: Heard | None = None
    on_save: Callable[[Path], object] | None = None

    def __post_init__(self) -> None:
        for name in ("on_step", "on_evaluate", "on_save"):
            if (given := getattr(self, name)) is not None and not callable(given):
                raise UserError(f"got {name}={given!r}, expected a function")

    def heard(self, line: Mapping[str, Any]) -> None:
        """Hands a line of the metrics on; samples are nobody's.

        Raises:
            FastftError: a callback has raised.
        """
        if "val_loss" in line:
            _call("on_evaluate", self.on_evaluate, dict(line))
        elif "loss" in line:
            _call("on_step", self.on_step, dict(line))

    def saved(self, checkpoint: Path) -> None:
        """Tells of a checkpoint.

        Raises:
            FastftError: the callback has raised.
        """
        _call("on_save", self.on_save, checkpoint)


def _call(name: str, callback: Callable[..., object] | None, heard: Any) -> None:
    try:
        if callback is not None:
            callback(heard)
    except Exception as error:  # a user's function may raise whatever it likes
        raise FastftError(
            f"the callback {name} raised {type(error).__name__}: {error}; the run can be resumed"
        ) from error
