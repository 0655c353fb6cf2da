"""Residual add and layer norm, and bias and GELU, forward and backward on a GPU, beside their peers."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import kernels
from benchmarks.device_clock import DeviceClock

NAMES = ("layer_norm", "gelu")


@pytest.mark.usefixtures("gpu")
@pytest.mark.benchmark(timer=DeviceClock())
@pytest.mark.parametrize(("name", "impl"), [(name, impl) for name in NAMES for impl in kernels.implementations(name)])
def bench_layer_norm(benchmark: Any, name: str, impl: str) -> None:
    """One operation by one implementation."""
    kernels.measure(benchmark, name, impl)
