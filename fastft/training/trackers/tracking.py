"""A run's trackers: each hears of it by `Callbacks`, as a program of one's own does, and works in a thread of its own.

So neither an error of a tracker's, nor a network that never answers, is the training's: it costs one warning. What a
tracker has had, the next call of a resumed run does not tell it again, and what it has missed is made up for.
"""

from __future__ import annotations

import contextlib
import importlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastft.common import files
from fastft.common.console import say, warn
from fastft.common.errors import UserError
from fastft.training.callbacks import Callbacks
from fastft.training.trackers.figures import is_evaluation, points_of
from fastft.training.trackers.tracker import End, Start, Tracker

_ADAPTERS = {"tensorboard": "TensorBoard", "wandb": "Wandb", "mlflow": "MLflow", "trackio": "Trackio"}
_PATIENCE_S = 30.0
"""Seconds that the end of a training waits for its trackers, all together."""

_MOST_WORDS = 200
"""Letters of an error that are said."""

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Told:
    """The last step, and the last evaluation, that a tracker has been told of."""

    step: int = -1
    evaluation: int = -1

    def has(self, line: Mapping[str, Any]) -> bool:
        """Whether a line is among what it was told."""
        return bool(line["step"] <= (self.evaluation if is_evaluation(line) else self.step))

    def after(self, lines: Iterable[Mapping[str, Any]]) -> Told:
        """What it has been told when it was told these lines too."""
        step, evaluation = self.step, self.evaluation
        for line in lines:
            if is_evaluation(line):
                evaluation = max(evaluation, line["step"])
            else:
                step = max(step, line["step"])
        return Told(step, evaluation)


class Memory:
    """The file of a run's folder that says by which id each tracker knows it, and what one has had that missed some or
    whose call has ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, Any] = {}
        with contextlib.suppress(UserError):  # it cannot be read: then they begin anew
            self._known = files.object_or_empty(path)

    def of(self, name: str) -> tuple[str, Told | None] | None:
        """The id of a tracker's run, and what it was told, which is not known where its call was killed (it is then
        taken to have had all); None of one that is new."""
        match self._known.get(name):
            case {"id": str(id_), "told": {"step": int(step), "evaluation": int(evaluation)}}:
                return id_, Told(step, evaluation)
            case {"id": str(id_)}:
                return id_, None
        return None

    def keep(self, name: str, id_: str, missed_after: Told | None = None) -> None:
        """Writes down what is known of a tracker."""
        entry: dict[str, Any] = {"id": id_}
        if missed_after is not None:
            entry["told"] = {"step": missed_after.step, "evaluation": missed_after.evaluation}
        with self._lock:
            if self._known.get(name) != entry:
                self._known[name] = entry
                files.write_json(self._path, self._known)


class Tracked:
    """A tracker at work."""

    def __init__(
        self, name: str, start: Start, memory: Memory, *, before: Sequence[Line], kept: Sequence[Line]
    ) -> None:
        """Begins.

        Args:
            name: of the tracker.
            start: the run.
            memory: what is known of it.
            before: the metrics as this call found them.
            kept: what it has left of them: what is behind the step at which the run goes on comes again.
        """
        self.name = name
        self.callbacks = Callbacks(on_step=self._hear, on_evaluate=self._hear)
        self._start, self._memory = start, memory
        self._before, self._kept = _figures(before), _figures(kept)
        self._queue: queue.SimpleQueue[Line | End] = queue.SimpleQueue()
        self._id: str | None = None
        self._told = Told()
        """What it has taken; it is not told that again."""
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def close(self, end: End) -> None:
        """Tells it the end, without waiting."""
        self._queue.put(end)

    def join(self, until: float) -> None:
        """Waits for it as long as there is time on the clock of `time.monotonic`; then it is left to itself."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._fail("it has not taken everything in time")

    def _hear(self, line: Line) -> None:
        if not self._has_failed:
            self._queue.put(line)

    def _work(self) -> None:
        try:
            tracker = self._opened()
            end: End | None = None
            while end is None:
                lines, end = self._heard()
                self._take(tracker, lines)
            tracker.close(end)
            # What other calls do without it, the next one with it makes up for.
            self._memory.keep(self.name, tracker.id, self._told)
        except ImportError as error:
            self._fail(f"{error} (pip install 'fastft[{self.name}]')")
        except Exception as error:  # others' code, on others' machines
            self._fail(f"{type(error).__name__}: {' '.join(str(error).split())[:_MOST_WORDS]}")

    def _opened(self) -> Tracker:
        """The tracker, which has been told all that it has missed."""
        module = importlib.import_module(f"fastft.training.trackers.{self.name}")
        of: type[Any] = getattr(module, _ADAPTERS[self.name])
        step = self._start.step
        if (known := self._memory.of(self.name)) is not None:
            self._id, missed_after = known
            self._told = missed_after or Told().after(self._before)
            if of.forgets:
                self._told = Told(min(self._told.step, step), min(self._told.evaluation, step))
        tracker: Tracker = of(replace(self._start, id=self._id))
        self._id = tracker.id
        self._memory.keep(self.name, tracker.id, self._told)
        say(f"tracked by {self.name}: {tracker.place}")
        self._take(tracker, self._kept)
        self._memory.keep(self.name, tracker.id)  # from now on it has all that the metrics have
        return tracker

    def _take(self, tracker: Tracker, lines: Sequence[Line]) -> None:
        """Hands on those of the lines that it has not had."""
        new = [line for line in lines if not self._told.has(line)]
        if new:
            tracker.log(points_of(new))
            self._told = self._told.after(new)

    def _heard(self) -> tuple[list[Line], End | None]:
        """What has been heard since the last time, one thing at least; and the end, where that is among it."""
        lines: list[Line] = []
        heard = self._queue.get()
        while not isinstance(heard, str):
            lines.append(heard)
            if self._queue.empty():
                return lines, None
            heard = self._queue.get()
        return lines, heard

    def _fail(self, why: str) -> None:
        """Says so, once; and writes down what it has missed."""
        if self._has_failed:
            return
        self._has_failed = True
        warn(f"{self.name} does not track this run any more: {why}; training goes on, and metrics.jsonl has all of it")
        if self._id is not None:
            with contextlib.suppress(Exception):  # a full disk may be why it failed
                self._memory.keep(self.name, self._id, self._told)


def _figures(lines: Iterable[Line]) -> list[Line]:
    """The lines that trackers are told of: those that callbacks hear."""
    return [line for line in lines if "loss" in line or is_evaluation(line)]


@contextmanager
def tracked(
    names: Sequence[str],
    start: Start,
    memory: Path,
    *,
    before: Sequence[Line],
    kept: Sequence[Line],
    is_over: Callable[[], bool],
) -> Iterator[list[Callbacks]]:
    """Has a run tracked for the length of a block.

    Args:
        names: of trackers.
        start: the run.
        memory: the file for the ids of its trackers; that of another run has been removed.
        before, kept: see `Tracked`.
        is_over: whether the run is at its end, asked when the block has ended without an error.

    Yields:
        What is to hear of the run. Nothing of it raises.
    """
    known = Memory(memory)
    trackers = [Tracked(name, start, known, before=before, kept=kept) for name in names]
    end: End = "failed"
    try:
        yield [one.callbacks for one in trackers]
        end = "finished" if is_over() else "stopped"
    finally:
        for one in trackers:
            one.close(end)
        until = time.monotonic() + _PATIENCE_S
        for one in trackers:
            one.join(until)
