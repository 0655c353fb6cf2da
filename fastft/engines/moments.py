"""AdamW's moments: their names, which are torch's, their beginning, and how checkpoints lay them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

MEAN, SQUARE, STEP = "exp_avg", "exp_avg_sq", "step"
"""Of a weight: the running means of its gradient and of the gradient's square, in its shape, and a count of steps."""
MOMENTS = (MEAN, SQUARE)
BYTES_OF_A_WEIGHT = 4 * len(MOMENTS)
"""That its moments take in float32."""

State = Mapping[str, Tensor]
"""A weight's moments and its count of steps, by their names."""
Moments = dict[str, Tensor]
"""Those of all weights as `WEIGHT/exp_avg`, `WEIGHT/exp_avg_sq`, `WEIGHT/step`, whole, in host memory, float32 (float64
with `--dtype fp64`); empty before the first update."""


def begun(like: Tensor) -> dict[str, Tensor]:
    """The state of a weight before its first update."""
    return {STEP: torch.zeros((), device=like.device), **{name: torch.zeros_like(like) for name in MOMENTS}}


def laid_out(states: Iterable[tuple[str, State]], *, copy: bool = False) -> Moments:
    """The states of weights as a checkpoint has them.

    Args:
        states: each weight's name and state.
        copy: also of what lies in host memory already.
    """
    return {
        f"{weight}/{name}": value.detach().to("cpu", copy=copy)
        for weight, state in states
        for name, value in state.items()
    }


def states_of(moments: Moments) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each weight's name and state, of what a checkpoint has."""
    states: dict[str, dict[str, Tensor]] = {}
    for place, value in moments.items():
        weight, _, name = place.rpartition("/")
        states.setdefault(weight, {})[name] = value
    yield from states.items()
