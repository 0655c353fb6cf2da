"""Residual add and layer norm, and bias and GELU, forward and backward on a GPU, beside their peers."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import kernels
from benchmarks.device_clock import CLOCK


@pytest.mark.usefixtures("gpu")
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("name", "by"), kernels.pairs("layer_norm", "gelu"))
def bench_layer_norm(benchmark: Any, name: str, by: str) -> None:
    """One operation by one implementation."""
    kernels.measure(benchmark, name, by)
