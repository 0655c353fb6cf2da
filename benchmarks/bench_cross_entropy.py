"""Linear cross-entropy, and cross-entropy of logits, forward and backward on a GPU, beside their peers."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import kernels
from benchmarks.device_clock import CLOCK


@pytest.mark.usefixtures("gpu")
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("name", "by"), kernels.pairs("linear_cross_entropy", "cross_entropy"))
def bench_cross_entropy(benchmark: Any, name: str, by: str) -> None:
    """One operation by one implementation."""
    kernels.measure(benchmark, name, by)
