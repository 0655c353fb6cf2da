"""A clock of events on the GPU, for pytest-benchmark."""

from __future__ import annotations

import torch


class DeviceClock:
    """Seconds on the device since the first reading: `pytest.mark.benchmark(timer=DeviceClock())`.

    Each reading is an event in the current stream, so that the difference of two is the time of the work between
    them, without what the host did before the device began.
    """

    def __init__(self) -> None:
        self._origin: torch.cuda.Event | None = None

    def __call__(self) -> float:
        """Waits for the device, and says how long it has been at work."""
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        if self._origin is None:
            self._origin = now
        return self._origin.elapsed_time(now) / 1e3
