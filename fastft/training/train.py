"""Training, from options to a model: `train` puts a run together, `Trainer` takes it from its first step to its last.

Which examples a step takes is in `batches/plan.py`, what it does to the model in the engines, what a step is in
`steps.py`, and what comes after what in `loop.py`. Several ranks run the same code: what depends on one of them, they
tell each other.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastft.common import files
from fastft.common.console import say, silenced, warn
from fastft.common.lock import refuse_if_held, writing
from fastft.engines.choose import make_engine
from fastft.engines.engine import AnyEngine
from fastft.model.precision import choose_device
from fastft.ranks.stopping import stop_requests
from fastft.ranks.watch import Watchdog
from fastft.ranks.world import joined, world_of
from fastft.run.config import TrainOptions
from fastft.run.data import Data, load_data, warn_of_data
from fastft.run.folder import Run
from fastft.run.trained import check_same_tokenizer
from fastft.training.callbacks import Callbacks
from fastft.training.checkpoint import Progress
from fastft.training.dry_run import dry_run
from fastft.training.evaluation import Evaluations
from fastft.training.given_records import in_their_place, with_records
from fastft.training.job import Job
from fastft.training.lines import Lines
from fastft.training.loop import Loop
from fastft.training.meeting import Meeting
from fastft.training.models import initial_model, model_to_go_on, tokenizer_to_be
from fastft.training.prepared import prepare
from fastft.training.preparing import check_folder, set_threads, settled
from fastft.training.saving import Saving, export, resume
from fastft.training.skips import Skips
from fastft.training.steps import Steps

_MEETING_MARGIN_S = 60.0
_FOR_EVER_S = 30 * 86400.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `train` ended."""

    run: Run
    progress: Progress
    interrupted_by: signal.Signals | None = None
    """The signal that asked it to stop before its end; the run can be resumed."""


def train(
    options: TrainOptions,
    *,
    records: Iterable[Mapping[str, Any]] | None = None,
    callbacks: Callbacks | None = None,
    stop_after: int | None = None,
) -> Outcome:
    """Trains as the options say and leaves the run's folder (see `fastft.run.folder.Run`).

    Started by torchrun, deepspeed or srun, every rank calls it: together they train what one process would.

    Args:
        options: of the run.
        records: rows of any format that data files have, in place of `options.data`. They are written to
            `records.jsonl` in the run's folder, which the stages behind read.
        callbacks: hear of steps, evaluations and checkpoints.
        stop_after: stop when so many steps are done, as SIGTERM would; the run can be resumed.

    Raises:
        UserError: an option, the data, the weights or the folder is wrong; nothing in the folder has been changed.
        TrainingError: too many steps had a non-finite loss or gradient; a checkpoint has been saved.
        LostRank: another rank has gone away.
    """
    device = choose_device(options.device, world_of(os.environ).local_rank)
    timeout_s = options.hang_timeout + _MEETING_MARGIN_S if options.hang_timeout else _FOR_EVER_S
    with (
        joined(device, timeout_s=timeout_s) as world, silenced(not world.is_first),
        contextlib.ExitStack() as until_begun,
    ):  # fmt: skip
        set_threads(options.threads, world, device)
        run = Run(options.out)
        with world.together():
            if records is not None:
                options = with_records(options, run)
            options = settled(options, run)
            if world.is_first and not options.dry_run:
                refuse_if_held(run.folder)  # before anything is loaded beside a run that trains; it is taken later
            if records is not None and world.is_first:
                until_begun.enter_context(in_their_place(run, records, resume=options.resume))
        say(f"training {options.weights or options.model} on {' '.join(options.files)}, in {run.folder}")
        with world.together():
            data = load_data(options, tokenizer_to_be(options, run))
            model = model_to_go_on(options, run) or initial_model(options)
            if options.resume:
                check_same_tokenizer(run, model.config.tokenizer)
        if data.has_bad:
            warn(f"left out, and listed in {run.data}: {data.describe_bad()}")
        warn_of_data(options, data)
        if len(data.sources) > 1 or options.split is not None:
            for line in data.describe_parts():
                say(f"records of {line}")
        with Watchdog(world, run.hangs, options.hang_timeout).watching() as watchdog:
            trainer = Trainer(
                run, options, data, make_engine(model, options, world), watchdog=watchdog, callbacks=callbacks
            )
            if options.dry_run:
                trainer.dry_run()
                return Outcome(run, trainer.job.progress)
            until_begun.close()
            return trainer.run_all(stop_after)


class Trainer:
    """A run's parts, put together."""

    def __init__(
        self,
        run: Run,
        options: TrainOptions,
        data: Data,
        engine: AnyEngine,
        *,
        watchdog: Watchdog | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        watchdog = watchdog or Watchdog(engine.world, run.hangs, 0)
        prepared = prepare(options, data, engine)
        self.job = Job(run, options, prepared, engine, watchdog, Progress(data_fingerprint=prepared.fingerprint))
        self.lines = Lines(callbacks)
        self.steps = Steps(self.job, self.lines)
        self.saving = Saving(self.job, self.lines)
        self.evaluations = Evaluations(self.job, self.lines, self.saving)

    def dry_run(self) -> None:
        """Tries the largest batch, and prints what training will take."""
        dry_run(self.job, self.steps)

    def run_all(self, stop_after: int | None = None) -> Outcome:
        """Resumes or begins, trains, and exports the result; stops early when `stop_after` steps are done."""
        job = self.job
        with contextlib.ExitStack() as stack:
            with job.world.together():
                if job.world.is_first:
                    stack.enter_context(writing(files.make_folder(job.run.folder)))
                    self._make_ready()
            if job.options.resume:
                resume(job)
            stop = self._train(stop_after)
            if stop is not None:
                return Outcome(job.run, job.progress, stop)
            export(job)
        return Outcome(job.run, job.progress)

    def _make_ready(self) -> None:
        """Makes the folder ready for this run's files."""
        run, options = self.job.run, self.job.options
        check_folder(run, options)  # again: another process may have been here in the meantime
        if options.overwrite:
            run.clear()
        run.remove_leftovers()
        files.make_folder(run.checkpoints)

    def _train(self, stop_after: int | None) -> signal.Signals | None:
        """Trains to the end, or to a signal that asks to stop, which is given back when all is saved."""
        job, lines = self.job, self.lines
        with contextlib.ExitStack() as stack:
            with job.world.together():
                if job.world.is_first:
                    # An evaluation that is not behind the run is done, and written, again.
                    evaluated = self.evaluations.is_done or not self.evaluations.due(job.progress.step)
                    stack.enter_context(lines.opened(job, evaluated=evaluated))
            job.say_hello()
            stop = stack.enter_context(stop_requests(job.world))
            meeting = Meeting(job, lines, self.saving.shards)
            Loop(job, self.steps, lines, meeting, Skips(job), self.saving, self.evaluations, stop_after).run(stop)
            if stop.signal is None or not job.leaves(stop):
                return None
            self.saving.before_leaving()  # here, where a launcher's second SIGTERM does nothing
            say(f"stopped by {stop.signal.name} at step {job.progress.step}, saved; go on with --resume")
            return stop.signal
