"""What the figures of a line of the metrics are called in trackers, which group them by what stands before a stroke."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

Point = tuple[int, bool, dict[str, float]]
"""A step, whether it is an evaluation behind it, and its figures by their names."""

_OF_STEPS = {
    "seconds": "time/step_seconds",
    "memory_bytes": "memory/peak_bytes",
    "tokens_padded": "tokens/padded",
    "tokens_real": "tokens/real",
    "tokens_computed": "tokens/computed",
    "tokens_supervised": "tokens/supervised",
}
"""All others are called `train/` and their name."""
_OF_EVALUATIONS = {"val_loss": "val/loss", "train_loss": "val/train_loss", "eval_seconds": "time/eval_seconds"}


def name_of(key: str, *, evaluation: bool) -> str:
    """What a figure is called: `loss` of a step `train/loss`, `val_loss` of an evaluation `val/loss`."""
    return _OF_EVALUATIONS.get(key, f"val/{key}") if evaluation else _OF_STEPS.get(key, f"train/{key}")


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether a line is an evaluation's, and not a step's."""
    return "val_loss" in line


def points_of(lines: Iterable[Mapping[str, Any]]) -> list[Point]:
    """The figures of lines of the metrics. What is no finite number is left out: the file has null there."""
    return [
        (
            line["step"],
            is_evaluation(line),
            {
                name_of(key, evaluation=is_evaluation(line)): float(value)
                for key, value in line.items()
                if key != "step" and isinstance(value, int | float) and math.isfinite(value)
            },
        )
        for line in lines
    ]
