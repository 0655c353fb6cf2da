"""A run's evaluations: the validation loss, the best weights, and answers to a few validation prompts."""

from __future__ import annotations

import itertools
import math
import time

import torch.distributed as dist
from torch import Tensor

from fastft.batches.batch import Batch
from fastft.common.console import say, warn
from fastft.data.encode import prompts_of
from fastft.data.records import END_OF_TEXT_MARK, Record
from fastft.decoding.decode import NO_STOP, greedy
from fastft.training.book import SAMPLE_TOKENS
from fastft.training.job import Job
from fastft.training.lines import Lines
from fastft.training.saving import Saving

_SHOWN = 160
"""Letters of a sample's texts that are said; `metrics.jsonl` has them whole."""


class Evaluations:
    """What is done with the validation split while training. All ranks make every call."""

    def __init__(self, job: Job, lines: Lines, saving: Saving) -> None:
        self._job = job
        self._lines = lines
        self._saving = saving

    def due(self, step: int) -> bool:
        """Whether an evaluation or samples are due when `step` steps are done."""
        evaluation, total = self._job.prepared.evaluation, self._job.total_steps
        return evaluation.due(step, total) or evaluation.sample_due(step, total)

    @property
    def is_done(self) -> bool:
        """Whether the evaluation of the step at which the run stands is behind it."""
        return self._job.progress.evaluated == self._job.progress.step

    def where_due(self) -> None:
        """Validation loss, best weights and samples, where they are due and not yet behind the run."""
        if self.is_done:
            return
        prepared, progress, total = self._job.prepared, self._job.progress, self._job.total_steps
        if len(prepared.val_set) and prepared.evaluation.due(progress.step, total):
            self._evaluate()
        progress.evaluated = progress.step
        if len(prepared.val_set) and prepared.evaluation.sample_due(progress.step, total):
            self._sample()

    def _evaluate(self) -> None:
        step = self._job.progress.step
        began = time.perf_counter()
        losses = self._job.prepared.evaluation.losses(self._evaluate_batch, step)
        self._lines.append({"step": step, **losses, "eval_seconds": time.perf_counter() - began})
        say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
        self._note_best(losses["val_loss"])

    def _evaluate_batch(self, batch: Batch) -> Tensor:
        self._job.watchdog.beat(f"evaluation when {self._job.progress.step} steps are done")
        return self._job.engine.evaluate(batch)

    def _note_best(self, val_loss: float) -> None:
        progress = self._job.progress
        best = math.inf if progress.best_val_loss is None else progress.best_val_loss
        if not val_loss < best:  # a loss that is not a number is no better than any
            progress.evaluations_since_best += progress.step > 0
            return
        progress.best_val_loss, progress.best_step, progress.evaluations_since_best = val_loss, progress.step, 0
        if self._job.options.keep_best:
            self._saving.best()

    def _sample(self) -> None:
        """Writes and says samples. Training does not read these texts: an error of theirs does not end it."""
        step = self._job.progress.step
        self._job.watchdog.beat("answering samples")
        try:
            samples = self._samples()
        except dist.DistError:
            raise  # the ranks' connection is the training's too
        except (RuntimeError, ValueError, LookupError) as error:
            reason = " ".join(str(error).split())[:200]
            warn(f"no samples at step {step} ({type(error).__name__}: {reason}); training goes on")
            return
        for record, response in samples:
            self._lines.append({"step": step, "sample": {**record.as_entry(), "model_response": response}})
            end = END_OF_TEXT_MARK if self._job.options.recipe == "book" else None  # the book's answers go on past it
            say(f"  sample: {_shown(f'{record.instruction} {record.input}')}")
            say(f"    answer:    {_shown(response, end)}")
            say(f"    reference: {_shown(record.output)}")

    def _samples(self) -> list[tuple[Record, str]]:
        """The answers to a few validation prompts; the book answers one at each epoch's end, past any end-of-text.

        With several ranks the answers go on past their end, and are cut: so all run the same number of forwards.
        """
        options, data, engine = self._job.options, self._job.prepared.data, self._job.engine
        book = options.recipe == "book"
        records = data.part("val", min(options.samples, 1) if book else options.samples)
        records = [record for record in records if record.asks]
        if not records:
            return []
        tokenizer = engine.model.config.tokenizer
        prompts = prompts_of(records, data.template, tokenizer)
        room = engine.model.config.n_ctx
        stop = NO_STOP if book or self._job.world.size > 1 else tokenizer.end_of_text
        with engine.answering() as model:
            answers = greedy(
                model,
                [ids[-(room - 1) :] for ids in prompts],
                max_new_tokens=SAMPLE_TOKENS,
                stop=stop,
            )
        if not book:
            answers = [list(itertools.takewhile(lambda id_: id_ != tokenizer.end_of_text, ids)) for ids in answers]
        return [
            (record, data.template.extract(tokenizer.decode(ids))) for record, ids in zip(records, answers, strict=True)
        ]


def _shown(text: str, end: str | None = None) -> str:
    """A text in one line that is not too long, up to its `end`."""
    line = " ".join((text if end is None else text.partition(end)[0]).split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1].rstrip()}…"
