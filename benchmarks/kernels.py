"""One operation, forward and backward, by one implementation: what the kernels' suites measure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.device_clock import CLOCK
from fastft.doctor.kernel_checks import GPU_SIZES
from fastft.doctor.kernel_speeds import OURS, implementations, work_of
from fastft.gpu import clock as gpu_clock

ROUNDS = 20


def pairs(*names: str) -> list[tuple[str, str]]:
    """Each operation with each of its implementations."""
    return [(name, by) for name in names for by in implementations(name)]


def measure(benchmark: Any, name: str, by: str) -> None:
    """Times forward and backward in bf16 by the GPU's clock, and notes the memory that they add.

    What has no time of the GPU's alone is skipped with the reason, and so is a peer that does not run here.
    """
    try:
        once = work_of(name, by, GPU_SIZES, torch.bfloat16).both_ways()
        gpu_clock.gpu_times(once, rounds=1)
    except Exception as error:
        if by == OURS and not isinstance(error, gpu_clock.HostNotAhead):
            raise
        pytest.skip(f"{by}: {error}")
    gpu = torch.cuda.get_device_name()
    benchmark.extra_info.update(by=by, peak_bytes=gpu_clock.peak_bytes(once), gpu=gpu, cache="cold")
    benchmark.pedantic(CLOCK.timed(once), rounds=ROUNDS)
