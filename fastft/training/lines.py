"""What a run writes down while it trains: its settings and its data at the start, then the lines of `metrics.jsonl`
and `ledger.jsonl`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastft.common import files
from fastft.common.console import silenced
from fastft.common.errors import FastftError, UserError
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.model.weights import files_of, write_tokenizer
from fastft.run.config import to_yaml
from fastft.run.given import weights_of
from fastft.run.log import Log, writers
from fastft.run.metrics_file import MetricsFile
from fastft.training.callbacks import Callbacks
from fastft.training.checkpoint import shape_of
from fastft.training.job import Job


class Lines:
    """The files of lines, which the first rank has open; on the others a line goes nowhere."""

    def __init__(self, callbacks: Callbacks | None = None) -> None:
        self._callbacks = callbacks or Callbacks()
        self._metrics: Log | None = None
        self._ledger: MetricsFile | None = None
        self.trouble: FastftError | None = None
        """The first line that could not be written, or callback that raised: it waits until all ranks hear of it."""

    @contextmanager
    def opened(self, job: Job, *, evaluated: bool) -> Iterator[None]:
        """Describes the run, and opens its files for the length of a block.

        Args:
            job: the run; lines behind the step at which it stands are removed, and will be computed again.
            evaluated: whether the evaluation of that step is not done again.
        """
        run, step = job.run, job.progress.step
        _describe(job)
        metrics = MetricsFile(run.metrics, resume_at=step, evaluated=evaluated)
        if job.options.ledger:
            self._ledger = MetricsFile(run.ledger, resume_at=step)
        with writers(run, metrics, tensorboard=job.options.tensorboard) as self._metrics:
            yield

    @property
    def has_ledger(self) -> bool:
        """Whether this rank writes the ledger."""
        return self._ledger is not None

    def append(self, line: dict[str, Any]) -> None:
        """Writes a line of the metrics, and tells who listens."""
        self._append(self._metrics, line)
        if self._metrics is not None:
            self._tell(lambda: self._callbacks.heard(line))

    def saved(self, checkpoint: Path) -> None:
        """Tells who listens of a checkpoint."""
        if self._metrics is not None:
            self._tell(lambda: self._callbacks.saved(checkpoint))

    def _tell(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except FastftError as error:
            self.trouble = self.trouble or error

    def append_to_ledger(self, line: dict[str, Any]) -> None:
        """Writes a line of the ledger."""
        self._append(self._ledger, line)

    def _append(self, file: Log | MetricsFile | None, line: dict[str, Any]) -> None:
        try:
            if file is not None:
                file.append(line)
        except UserError as error:
            self.trouble = self.trouble or error


def _describe(job: Job) -> None:
    """Writes the run's settings, what its data is, and its tokenizer where it is not GPT-2's."""
    files.write_text(job.run.config, to_yaml(replace(job.options, dtype=job.engine.dtype)))
    files.write_json(job.run.data, {**job.prepared.as_json(), "began_with": _began_with(job)})
    if job.engine.model.config.tokenizer is not gpt2_tokenizer():
        write_tokenizer(job.engine.model.config, job.run.tokenizer)


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
