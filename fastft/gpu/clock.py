"""How long a GPU works, and how long the host takes to ask it to: two figures, each by itself.

A kernel of some microseconds is asked for in tens of them, so that two events around a call time the host. Here the GPU
is put to sleep first and everything is asked for meanwhile. Whether it still slept when the host was done is looked at
each time: where it did not, the figure is thrown away and taken again behind a longer sleep, or refused. No figure of
`gpu_times` is the host's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

Run = Callable[[], object]

WARMUP = 5
"""Runs before the timed ones: they compile, load, and take memory."""
_FIRST_SLEEP = 1 << 20
_LONGEST_SLEEP = 1 << 29
"""Cycles, about half a millisecond and a quarter of a second."""
_FLUSHED_CACHES = 4
"""A pass over a buffer of so many times the GPU's last cache leaves nothing of before in it."""
_LEAST_FLUSHED = 256 << 20


class HostNotAhead(RuntimeError):
    """The GPU had begun before the host had asked for everything: what was timed is not the GPU's time alone."""


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of the rounds, rising."""

    milliseconds: tuple[float, ...]

    @classmethod
    def of(cls, milliseconds: Iterable[float]) -> Times:
        """Rounds in whichever order."""
        return cls(tuple(sorted(milliseconds)))

    @property
    def median(self) -> float:
        """What a round takes."""
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The tenth and the ninetieth percentile."""
        tenth = len(self.milliseconds) // 10
        return self.milliseconds[tenth], self.milliseconds[-1 - tenth]


def gpu_times(run: Run, *, rounds: int = 20, cold: bool = True) -> Times:
    """How long the current CUDA device works on what `run` asks for.

    Args:
        run: asks for the work on the current stream, and waits for none of it.
        rounds: figures taken.
        cold: nothing of the round before is in the GPU's caches. Off, whatever fits stays there.

    Raises:
        HostNotAhead: `run` waits for the GPU, or asks for more kernels than the driver's queue holds (about a
            thousand; a CUDA graph is one). Nothing is measured then.
    """
    flushed = torch.empty(_flushed_bytes(), dtype=torch.int8, device="cuda") if cold else None
    for _ in range(WARMUP):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    sleep = _FIRST_SLEEP
    times: list[float] = []
    while len(times) < rounds:
        torch.cuda.synchronize()
        if flushed is not None:
            flushed.zero_()
        torch.cuda._sleep(sleep)
        begin.record()
        run()
        end.record()
        ahead = _still_before(begin)
        torch.cuda.synchronize()
        if ahead:
            times.append(begin.elapsed_time(end))
        elif (sleep := sleep * 2) > _LONGEST_SLEEP:
            raise HostNotAhead(
                "the GPU began before the host had asked for everything: the work waits for the GPU, or is of more "
                "kernels than its queue holds; time it as a CUDA graph"
            )
    return Times.of(times)


def host_times(run: Run, *, rounds: int = 20) -> Times:
    """How long the host takes to ask for the work of `run`; the GPU has nothing else to do."""
    return _clocked(run, rounds, wait=False)


def wall_times(run: Run, *, rounds: int = 20) -> Times:
    """How long it takes until the work of `run` is asked for and done."""
    return _clocked(run, rounds, wait=True)


def captured(run: Run, *, warmup: int = WARMUP) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `run` asks for: `replay()` asks for all of it at once.

    The tensors that `run` reads and writes are kept by whoever calls this, and stay where they are.
    """
    side = torch.cuda.Stream()  # warming up on the capturing kind of stream, as torch asks for
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def peak_bytes(run: Run) -> int:
    """The most memory that `run` holds on the current CUDA device above what was held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _clocked(run: Run, rounds: int, *, wait: bool) -> Times:
    for _ in range(WARMUP):
        run()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if wait:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    return Times.of(times)


def _still_before(event: torch.cuda.Event) -> bool:
    """Whether the GPU has not come to an event yet."""
    return not event.query()


def _flushed_bytes() -> int:
    cache: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(_LEAST_FLUSHED, _FLUSHED_CACHES * cache)
