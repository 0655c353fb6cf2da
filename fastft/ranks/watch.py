"""Watching a run of several ranks: a rank that hangs, and one that is slower than the others.

A rank that hangs makes all others wait for it, without a word. `Watchdog` has every rank write where it stands after a
time without progress, and ends the run, so that a scheduler can start it again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch

from fastft.common.errors import EXIT_FAILED
from fastft.ranks.world import World

_GRACE_S = 3.0
"""How long a rank stays when all have written where they stand: the first to leave has a launcher end the others."""
_GRACE_SHARE = 0.1
"""Of the patience, for which the ranks wait for each other: their last beats are up to a batch's time apart."""

LOOK_EVERY = 20
"""Steps between two looks at the ranks' speeds."""
SLOWER = 1.5
"""A rank that takes so many times as long as the fastest, in two looks running, is named."""
_LEAST_SHARE = 0.05
"""Of a step: building batches in less time than that holds nobody up."""
_PROBE = 512


class Watchdog:
    """Ends the process when nothing has been heard for a time, with its stacks in the log and in a file.

    The file is `folder/rank-N.txt`. The first rank names those that have written none: their processes do not run, as
    when they are stopped, or their machine is gone.
    """

    def __init__(self, world: World, folder: Path, seconds: float) -> None:
        self._world = world
        self._folder = folder
        self._seconds = seconds
        self._doing = "starting"
        self._heard = time.monotonic()
        self._over = threading.Event()

    def beat(self, doing: str) -> None:
        """There is progress: the rank is now `doing` something."""
        self._doing = doing
        self._heard = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watches for the length of a block; not at all where there is one rank, or 0 seconds."""
        if self._world.size == 1 or not self._seconds:
            yield self
            return
        self.beat("starting")
        for path in self._folder.glob("rank-*.txt") if self._world.is_first else ():
            path.unlink(missing_ok=True)
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._heard > self._seconds:
                try:
                    self._report()
                finally:  # also where nobody reads standard error any more
                    os._exit(EXIT_FAILED)  # the main thread waits for a rank that will not come

    def _report(self) -> None:
        line = f"rank {self._world.rank} has not got on for {self._seconds:g} s; it was in: {self._doing}"
        self._write(sys.stderr, line)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._path(self._world.rank).open("w", encoding="utf-8") as file:
                self._write(file, line)
        until = time.monotonic() + max(_GRACE_S, _GRACE_SHARE * self._seconds)
        while (silent := self._silent()) and time.monotonic() < until:
            time.sleep(0.1)
        if self._world.is_first:
            where = f"; the stacks are in {self._folder}"
            if silent:
                ranks = ", ".join(map(str, silent))
                where = f"; nothing from rank {ranks}: stopped, or gone with its machine{where}"
            print(f"error: the run hangs{where}; go on with --resume", file=sys.stderr, flush=True)
        else:
            time.sleep(_GRACE_S)

    def _silent(self) -> list[int]:
        """The ranks that have not written where they stand."""
        return [rank for rank in range(self._world.size) if not self._path(rank).is_file()]

    @staticmethod
    def _write(file: TextIO, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
            file.flush()

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.txt"


class Stragglers:
    """Finds a rank that is slower than the others at the same work.

    In a step all ranks wait for each other, so that all take as long. What a rank does alone is measured: building its
    batches, and every `LOOK_EVERY` steps some matrix products that are the same for all.
    """

    def __init__(
        self, world: World, device: torch.device, probe: Callable[[torch.device], float] | None = None
    ) -> None:
        self._world = world
        self._device = device
        self._probe = probe or probe_seconds
        self._building: list[float] = []
        self._suspects: set[tuple[int, str]] = set()

    def built(self, seconds: float) -> None:
        """This rank has built a step's batches."""
        if self._world.size > 1:  # else nobody ever looks
            self._building.append(seconds)

    def look(self, step: int, step_seconds: float) -> list[str]:
        """A line for each rank that was found slow, twice running, when `step` steps are done. All ranks call it."""
        if self._world.size == 1 or step % LOOK_EVERY:
            return []
        building = sum(self._building) / max(1, len(self._building))
        self._building.clear()
        measured = self._world.gather((self._probe(self._device), building))
        products, batches = zip(*measured, strict=True)
        slow = _slow(products, "the same matrix products", at_least=0.0)
        slow |= _slow(batches, "building its batches", at_least=_LEAST_SHARE * step_seconds)
        again = {key: line for key, line in slow.items() if key in self._suspects}
        self._suspects = set(slow)
        return list(again.values())


def _slow(seconds: tuple[float, ...], what: str, *, at_least: float) -> dict[tuple[int, str], str]:
    """The ranks that take longer than `SLOWER` times the fastest, and `at_least` longer."""
    least = min(seconds)
    return {
        (rank, what): f"rank {rank} takes {one / max(least, 1e-9):.1f} times as long as the fastest for {what}"
        for rank, one in enumerate(seconds)
        if one > SLOWER * least and one - least > at_least
    }


def probe_seconds(device: torch.device, repeats: int = 5) -> float:
    """The least time of some square matrix products on a device."""
    x = torch.ones(_PROBE, _PROBE, device=device)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - began)
    return min(times)
