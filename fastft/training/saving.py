"""When a run saves and what, where it goes on from, and what it leaves at its end; how, is in `checkpoint.py`."""

from __future__ import annotations

from typing import Literal

from fastft.common import files
from fastft.common.console import say, warn
from fastft.common.errors import UserError
from fastft.data.chat_template import as_jinja
from fastft.engines.zero import ZeroEngine
from fastft.model.gpt2 import GPT2
from fastft.model.weights import save_hf
from fastft.run.trained import check_same_data
from fastft.training.checkpoint import (
    Shards,
    checkpoint_at,
    load_best,
    load_checkpoint,
    prune,
    resumable,
    save_best,
    save_checkpoint,
)
from fastft.training.job import Job
from fastft.training.lines import Lines
from fastft.training.models import result


class Saving:
    """A run's policy of saving. All ranks make every call."""

    def __init__(self, job: Job, lines: Lines) -> None:
        self._job = job
        self._lines = lines
        engine = job.engine
        self.shards = (
            Shards(job.run.checkpoints, engine, keep=job.options.keep) if isinstance(engine, ZeroEngine) else None
        )

    def due(self, step: int) -> Literal["whole", "shards"] | None:
        """What kind of checkpoint is due when `step` steps are done, if any; `shards` under ZeRO alone."""
        options = self._job.options
        every = options.save_every or self._job.prepared.plan.steps_per_epoch
        if step >= self._job.total_steps or (options.whole_every and step % options.whole_every == 0):
            return "whole"
        return "shards" if step % every == 0 else None

    def where_due(self, *, asked: bool) -> None:
        """Saves where it is due, `asked` for, or the run is over."""
        due = self.due(self._job.progress.step)
        if asked or self._job.is_over or due == "whole":
            self.save(whole=True)
        elif due is not None:
            self.save(whole=False)

    def save(self, *, whole: bool) -> None:
        """Saves; under ZeRO in shards where it need not be `whole`."""
        progress = self._job.progress
        self._job.watchdog.beat(f"saving when {progress.step} steps are done")
        if self.shards is not None and not whole:
            self.shards.begin(progress)
            return
        if self.shards is not None:
            self.shards.finish()
        folder = self._job.run.checkpoints
        save_checkpoint(folder, self._job.engine, progress, keep=self._job.options.keep)
        self._lines.saved(checkpoint_at(folder, progress))

    def before_leaving(self) -> None:
        """Saves first what is quick, then what any number of ranks can go on from."""
        if self.shards is not None:
            self.save(whole=False)
        self.save(whole=True)

    def best(self) -> None:
        """Saves the weights as the best so far."""
        self._job.watchdog.beat("saving the best weights")
        save_best(self._job.run.checkpoints, self._job.engine, self._job.progress)


def resume(job: Job) -> None:
    """Puts the run back to where its newest whole checkpoint stands; where there is none, it starts anew.

    Raises:
        UserError: the checkpoint is of other data, is behind the run's end, or cannot be read.
    """
    with job.world.together():
        if job.world.is_first:
            check_same_data(job.run, job.prepared.data)
    path = resumable(job.run.checkpoints, job.engine)
    if path is None:
        _check_unfinished(job)
        say(f"no checkpoint in {job.run.checkpoints} yet: starting at step 0")
        return
    with job.world.together():
        progress = load_checkpoint(path, job.engine)
        if progress.data_fingerprint != job.progress.data_fingerprint:
            raise UserError(
                f"the examples are not those of {path}: the records of the data file, or their order, have changed "
                "in one of its splits, or the tokenizer or the template's file has; put them back, or start again with "
                "--overwrite"
            )
        if progress.step > job.total_steps:
            raise UserError(
                f"{path} has {progress.step} steps behind it, and the run is to have {job.total_steps}: it "
                "cannot go back; give more --steps or --epochs, or start again with --overwrite"
            )
        job.progress.become(progress)
        if job.world.is_first:
            prune(job.run.checkpoints, progress, keep=job.options.keep)
    say(f"resuming at step {progress.step} of {job.total_steps} ({path})")


def _check_unfinished(job: Job) -> None:
    """Refuses to begin again where a run has come to its end, and has left no checkpoint to go on from."""
    with job.world.together():
        if job.world.is_first and (model := job.run.weights).exists():
            raise UserError(
                f"{job.run.folder} holds a finished run, {model}, and no checkpoint to go on from; --overwrite "
                "trains it again, and another run takes its model by --weights"
            )


def export(job: Job) -> None:
    """Writes the result: the last weights, or the best ones where early stopping was asked for."""
    job.watchdog.beat("writing the model")
    if job.options.patience:
        found, best = load_best(job.run.checkpoints, job.engine, job.progress), job.progress.best_step
        if found and best == 0:
            warn("no evaluation was better than the one before training: exporting the weights it started from")
        else:
            say(f"exporting the weights of step {best}, the best" if found else "exporting the last weights")
    weights = job.engine.whole_weights()
    with job.world.together():
        if weights is not None:
            _write(job, result(job.options, job.engine.model, weights))
    say(f"trained {job.progress.step} steps; the model is in {job.run.model}")


def _write(job: Job, model: GPT2) -> None:
    folder, chat_template = files.make_folder(job.run.model), as_jinja(job.prepared.data.template)
    save_hf(model, folder, chat_template=chat_template)
