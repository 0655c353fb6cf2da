"""pytest-benchmark's timer, for work of a GPU: it goes on by what the GPU's clock says, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable

from fastft.gpu import clock as gpu_clock


class DeviceClock:
    """Seconds that the GPU has worked on what `timed` was given: `pytest.mark.benchmark(timer=CLOCK)`.

    pytest-benchmark reads its timer before and after a call, on the host. The function that `timed` makes has its work
    timed by `fastft.gpu.clock` and sets the clock forward by the outcome, so that the difference is the GPU's time.
    """

    def __init__(self) -> None:
        self._seconds = 0.0

    def __call__(self) -> float:
        """What the timer shows."""
        return self._seconds

    def timed(self, run: gpu_clock.Run) -> Callable[[], None]:
        """The function to benchmark in place of `run`, once a round."""

        def once() -> None:
            self._seconds += gpu_clock.gpu_times(run, rounds=1).median / 1e3

        return once


CLOCK = DeviceClock()
"""The one that the suites' marks and `benchmarks.kernels` share."""
