"""The loop: what a run does from its first step to its last."""

from __future__ import annotations

import signal
from collections import deque
from dataclasses import dataclass
from typing import Any

from fastft.batches.plan import Step
from fastft.common.console import Meter, meter
from fastft.ranks.stopping import StopRequest
from fastft.training.evaluation import Evaluations
from fastft.training.job import Job
from fastft.training.lines import Lines
from fastft.training.meeting import Meeting
from fastft.training.saving import Saving
from fastft.training.skips import Skips
from fastft.training.steps import Steps, UnderWay

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Loop:
    """The parts of a run, one after the other, in every step.

    Attributes:
        stop_after: stop when so many steps are done, as SIGTERM would.
    """

    job: Job
    steps: Steps
    lines: Lines
    meeting: Meeting
    skips: Skips
    saving: Saving
    evaluations: Evaluations
    stop_after: int | None = None

    def run(self, stop: StopRequest) -> None:
        """For each step: its batches, forward and backward, update, its line; then save and evaluate, where due.

        On a GPU the line of a step is read when the next one is under way, so that the GPU never waits for the host.
        """
        job, steps = self.job, self.steps
        under_way: deque[UnderWay] = deque()
        self.evaluations.where_due()
        with meter("training", job.total_steps, done=job.progress.step) as shown, steps.built() as batches:
            while not job.is_over and stop.signal is None:
                built = next(batches)
                losses = steps.forward_backward(built)
                under_way.append(steps.update(losses))
                in_flight = 0 if self._something_is_due(built.step) else job.engine.in_flight
                while len(under_way) > in_flight:
                    line = steps.line(under_way.popleft())
                    self._write(line, shown)
                    if self._breaks_off(line, stop):
                        in_flight = 0  # what is under way is ended first: weights and progress are then of one step
                if not under_way:
                    self._save_and_evaluate(stop)
                    steps.begin_anew()
        self.meeting.at_the_end()

    def _something_is_due(self, step: Step) -> bool:
        """Whether something is to be done with the weights as they are behind this step."""
        done = step.index + 1
        is_last = done in (self.stop_after, self.job.total_steps)
        return is_last or self.evaluations.due(done) or self.saving.due(done) is not None

    def _write(self, line: dict[str, Any], shown: Meter) -> None:
        self.lines.append(line)
        shown.advance(_in_short(line))
        self.steps.name_slow_ranks(line)

    def _breaks_off(self, line: dict[str, Any], stop: StopRequest) -> bool:
        """Whether something has come up with this step, on any rank, for which no other step is begun."""
        if self.job.progress.step == self.stop_after:
            stop.asked = signal.SIGTERM
        too_many = self.skips.are_too_many(line)
        return self.meeting.agree(stop) or too_many

    def _save_and_evaluate(self, stop: StopRequest) -> None:
        if error := self.skips.error():
            self.saving.before_leaving()
            raise error
        if self.job.leaves(stop):
            return  # it is saved at once, and evaluated on resuming
        self.saving.where_due(asked=self.meeting.save_is_asked)  # first: neither an evaluation nor a sample can cost it
        self.meeting.save_is_asked = False
        self.evaluations.where_due()
        if self.job.is_out_of_patience:
            self.saving.save(whole=True)


def _in_short(line: dict[str, Any]) -> str:
    """A step's line for people: loss, learning rate, epoch, speeds and memory."""
    seconds = line["seconds"]
    return (
        f"loss {line['loss']:.3f}, lr {line['lr']:.2g}, epoch {line['epoch']}, "
        f"{line['tokens_real'] / seconds:,.0f} tokens/s, {line['examples'] / seconds:,.3g} examples/s, "
        f"{line['memory_bytes'] / _GIB:.1f} GiB"
    )
