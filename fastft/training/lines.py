"""What a run writes down while it trains: its settings and its data at the start, then the lines of `metrics.jsonl`
and `ledger.jsonl`, of which callbacks and trackers hear."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastft.common import files
from fastft.common.console import silenced
from fastft.common.errors import FastftError, UserError
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.model.weights import files_of, write_tokenizer
from fastft.run.config import TrainOptions, settings_of, to_yaml
from fastft.run.given import weights_of
from fastft.run.metrics_file import MetricsFile, read_metrics
from fastft.training.callbacks import Callbacks
from fastft.training.checkpoint import shape_of
from fastft.training.job import Job
from fastft.training.trackers.tracker import Start
from fastft.training.trackers.tracking import tracked


class Lines:
    """The files of lines, which the first rank has open; on the others a line goes nowhere."""

    def __init__(self, callbacks: Callbacks | None = None) -> None:
        self._callbacks = [callbacks or Callbacks()]
        self._metrics: MetricsFile | None = None
        self._ledger: MetricsFile | None = None
        self.trouble: FastftError | None = None
        """The first line that could not be written, or callback that raised: it waits until all ranks hear of it."""

    @contextmanager
    def opened(self, job: Job, *, evaluated: bool) -> Iterator[None]:
        """Describes the run, and opens its files and its trackers for the length of a block.

        Args:
            job: the run; lines behind the step at which it stands are removed, and will be computed again.
            evaluated: whether the evaluation of that step is not done again.
        """
        run, step, trackers = job.run, job.progress.step, job.options.trackers()
        _describe(job)
        before = list(read_metrics(run.metrics)) if trackers else []
        with contextlib.ExitStack() as stack:
            self._metrics = stack.enter_context(closing(MetricsFile(run.metrics, resume_at=step, evaluated=evaluated)))
            if job.options.ledger:
                self._ledger = stack.enter_context(closing(MetricsFile(run.ledger, resume_at=step)))
            if trackers:
                kept = list(read_metrics(run.metrics))
                start = Start(run.folder, settings_of(_as_computed(job)), step)
                self._callbacks += stack.enter_context(
                    tracked(trackers, start, run.trackers, before=before, kept=kept, is_over=lambda: job.is_over)
                )
            yield

    @property
    def has_ledger(self) -> bool:
        """Whether this rank writes the ledger."""
        return self._ledger is not None

    def append(self, line: dict[str, Any]) -> None:
        """Writes a line of the metrics, and tells who listens."""
        self._append(self._metrics, line)
        if self._metrics is not None:
            self._tell(lambda callbacks: callbacks.heard(line))

    def saved(self, checkpoint: Path) -> None:
        """Tells who listens of a checkpoint."""
        if self._metrics is not None:
            self._tell(lambda callbacks: callbacks.saved(checkpoint))

    def _tell(self, tell: Callable[[Callbacks], None]) -> None:
        for callbacks in self._callbacks:
            try:
                tell(callbacks)
            except FastftError as error:
                self.trouble = self.trouble or error

    def append_to_ledger(self, line: dict[str, Any]) -> None:
        """Writes a line of the ledger."""
        self._append(self._ledger, line)

    def _append(self, file: MetricsFile | None, line: dict[str, Any]) -> None:
        try:
            if file is not None:
                file.append(line)
        except UserError as error:
            self.trouble = self.trouble or error


def _describe(job: Job) -> None:
    """Writes the run's settings, what its data is, and its tokenizer where it is not GPT-2's."""
    files.write_text(job.run.config, to_yaml(_as_computed(job)))
    files.write_json(job.run.data, {**job.prepared.as_json(), "began_with": _began_with(job)})
    if job.engine.model.config.tokenizer is not gpt2_tokenizer():
        write_tokenizer(job.engine.model.config, job.run.tokenizer)


def _as_computed(job: Job) -> TrainOptions:
    """The run's options, with the arithmetic that was found for them."""
    return replace(job.options, dtype=job.engine.dtype)


def _began_with(job: Job) -> dict[str, str] | None:
    """SHA-256 by file name of the weights that the run started from: the files may have others when it goes on. None of
    random weights, nor where an earlier version began."""
    if job.options.resume and shape_of(job.run.checkpoints) is not None:
        known = files.object_or_empty(job.run.data).get("began_with")
        return known if isinstance(known, dict) else None
    source = weights_of(job.options)
    with silenced(True):  # what is odd about them was said where they were loaded
        found = [] if source is None else files_of(source)
    return {path.name: str(files.identity(path)["sha256"]) for path in found} or None
