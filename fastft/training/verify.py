"""`fastft verify-resume`: proves on the user's machine that a run that is stopped and resumed is the run that is not.

Some steps without a stop, then half of them, a stop, and the other half from the checkpoint: losses, norms, final
weights and moments must be the same, bit for bit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastft.common.console import say
from fastft.common.effects import check_effects
from fastft.common.errors import TrainingError, UserError
from fastft.common.options import Condition, names_checked, option
from fastft.model.precision import choose_device
from fastft.ranks.world import joined, world_of
from fastft.run.config import TrainOptions
from fastft.run.folder import Run
from fastft.run.metrics_file import read_metrics
from fastft.training.checkpoint import MODEL, MOMENTS, load_tensors
from fastft.training.train import train

_STEPS = 10
_OF_THE_CLOCK = {"seconds", "eval_seconds", "memory_bytes"}


@names_checked
@dataclass(frozen=True, kw_only=True)
class VerifyOptions(TrainOptions):
    """The options of `fastft verify-resume`: those of a training run, in the folder `--out` of which both runs lie."""

    out: Path = Path("out/verify-resume")
    """The folder of the two runs, `unbroken` and `resumed`; what an earlier proof left there is replaced."""
    steps: int | None = _STEPS
    """Steps of the unbroken run, at least 2."""
    epochs: int = option(
        2, at_least=1, needs=Condition(lambda *_: False, "another command: this one's runs have --steps")
    )
    """Passes over the training examples, which `fastft train` alone takes."""
    eval_every: int = 0
    """Steps between evaluations on the validation split; 0 for none but the last."""
    samples: int = 0
    """Validation prompts answered at each evaluation."""
    keep_best: bool = False
    """Also keep the weights with the best validation loss."""

    def __post_init__(self) -> None:
        TrainOptions.__post_init__(self)
        if self.steps is not None and self.steps < 2:
            raise UserError(f"got --steps {self.steps}, expected at least 2: half of them come before the stop")
        for name in ("resume", "overwrite", "dry_run"):
            if getattr(self, name):
                raise UserError(f"got --{name} with verify-resume, which stops and resumes its own runs; leave it out")


@dataclass(frozen=True, slots=True)
class Proof:
    """What two runs differ in; in nothing, if resuming works."""

    steps: int
    stopped_at: int
    differences: list[str]


def verify_resume(options: VerifyOptions) -> Proof:
    """Trains twice, once with a stop and a resume in the middle. Under a launcher all ranks call it.

    Raises:
        UserError: what `train` raises.
        TrainingError: the two runs differ.
    """
    check_effects(options)
    steps = options.steps or _STEPS
    device = choose_device(options.device, world_of(os.environ).local_rank)
    with joined(device, timeout_s=options.hang_timeout or 86400.0) as world:
        unbroken, resumed = (
            replace(_train_options(options), out=options.out / name, steps=steps, resume=False, overwrite=True)
            for name in ("unbroken", "resumed")
        )
        train(unbroken)
        train(resumed, stop_after=steps // 2)
        train(replace(resumed, resume=True, overwrite=False))
        with world.together():
            proof = Proof(steps, steps // 2, _differences(Run(unbroken.out), Run(resumed.out), steps))
            if proof.differences:
                raise TrainingError(
                    f"stopped at step {proof.stopped_at} of {steps} and resumed, the run is another: "
                    + "; ".join(proof.differences)
                )
    if world.is_first:
        say(f"{steps} steps, and {steps // 2} with a stop and {steps - steps // 2} after a resume: the same bits")
    return proof


def _train_options(options: VerifyOptions) -> TrainOptions:
    return TrainOptions(**{name: getattr(options, name) for name in TrainOptions.__dataclass_fields__})


def _differences(unbroken: Run, resumed: Run, steps: int) -> list[str]:
    """What the resumed run has that the unbroken one has not."""
    found = []
    for ours, theirs in zip(_lines(resumed), _lines(unbroken), strict=False):
        wrong = [name for name in theirs if ours.get(name) != theirs[name]]
        if wrong:
            values = ", ".join(f"{name} {ours.get(name)} instead of {theirs[name]}" for name in wrong)
            found.append(f"step {theirs['step']}: {values}")
            break
    if len(_lines(resumed)) != len(_lines(unbroken)):
        found.append(f"{len(_lines(resumed))} lines of metrics instead of {len(_lines(unbroken))}")
    for name in (MODEL, MOMENTS):
        ours, theirs = (load_tensors(run.checkpoints / f"step-{steps}" / name) for run in (resumed, unbroken))
        wrong = sorted(key for key in theirs if key not in ours or not torch.equal(ours[key], theirs[key]))
        if wrong:
            found.append(f"{len(wrong)} of {len(theirs)} tensors of {name}, such as {wrong[0]}")
    return found


def _lines(run: Run) -> list[dict[str, Any]]:
    lines = list(read_metrics(run.metrics))
    return [{name: value for name, value in line.items() if name not in _OF_THE_CLOCK} for line in lines]
