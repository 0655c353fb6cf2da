"""The clock on a GPU that is made up: it has a time of its own, beside the host's, as a real one has."""

from __future__ import annotations

import pytest
import torch

from fastft.gpu import clock as gpu_clock

CYCLE = 1e-6
"""Milliseconds of a cycle of the sleeping kernel."""


class MadeUpGpu:
    """Work is done in order; it begins when it has been asked for and what came before is done."""

    def __init__(self) -> None:
        self.host = 0.0
        self.done = 0.0

    def ask(self, milliseconds: float, host: float = 0.0) -> None:
        self.host += host
        self.done = max(self.done, self.host) + milliseconds

    def wait(self) -> None:
        self.host = max(self.host, self.done)


class MadeUpEvent:
    gpu: MadeUpGpu
    at = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = max(self.gpu.done, self.gpu.host)

    def query(self) -> bool:
        return self.at <= self.gpu.host

    def elapsed_time(self, end: MadeUpEvent) -> float:
        return end.at - self.at


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> MadeUpGpu:
    gpu = MadeUpGpu()
    monkeypatch.setattr(MadeUpEvent, "gpu", gpu, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", MadeUpEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.wait)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.ask(cycles * CYCLE))
    return gpu


def test_kernels_that_the_host_is_slow_to_ask_for(gpu: MadeUpGpu) -> None:
    """Events alone would say 5 ms of these 50 kernels of 2 microseconds: what the host takes for them."""

    def run() -> None:
        for _ in range(50):
            gpu.ask(0.002, host=0.1)

    assert gpu_clock.gpu_times(run, cold=False).median == pytest.approx(0.1)


def test_the_sleep_grows_until_the_host_is_ahead(gpu: MadeUpGpu) -> None:
    """The first sleep is about a millisecond: work that takes the host 30 ms to ask for is timed all the same."""
    assert gpu_clock.gpu_times(lambda: gpu.ask(0.5, host=30), rounds=3, cold=False).spread == pytest.approx((0.5, 0.5))


def test_work_that_waits_for_the_gpu_is_refused(gpu: MadeUpGpu) -> None:
    def run() -> None:
        gpu.ask(0.002, host=0.1)
        gpu.wait()

    with pytest.raises(gpu_clock.HostNotAhead, match="waits for the GPU"):
        gpu_clock.gpu_times(run, cold=False)


def test_median_and_spread() -> None:
    times = gpu_clock.Times.of([*range(20, 0, -1), 1000])
    assert times.median == 11
    assert times.spread == (3, 19)
