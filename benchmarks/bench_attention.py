"""Interval attention of a pack, forward and backward, and of decoding, on a GPU, beside their peers."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import kernels
from benchmarks.device_clock import DeviceClock

NAMES = ("attention", "attention_decode")


@pytest.mark.usefixtures("gpu")
@pytest.mark.benchmark(timer=DeviceClock())
@pytest.mark.parametrize(("name", "impl"), [(name, impl) for name in NAMES for impl in kernels.implementations(name)])
def bench_attention(benchmark: Any, name: str, impl: str) -> None:
    """One operation by one implementation."""
    kernels.measure(benchmark, name, impl)
