"""What the suites share. Their size and threads come from the environment: BENCH_SUITE_SIZE, BENCH_THREADS."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from benchmarks import common


@pytest.fixture(scope="session")
def size() -> str:
    """The model's size: nano where BENCH_SUITE_SIZE names no other."""
    return os.environ.get("BENCH_SUITE_SIZE", "nano")


@pytest.fixture(scope="session")
def device() -> str:
    """CUDA where it is, else the CPU, with the threads that BENCH_THREADS names (2)."""
    common.begin(int(os.environ.get("BENCH_THREADS", "2")))
    return common.chosen_device("auto")


@pytest.fixture
def gpu() -> None:
    """Skips where torch finds no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU here: the kernels' speeds are measured on one alone")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """The machine without its name, in place of pytest-benchmark's own description."""
    return {"node": "", "data": common.data_name(), "threads": torch.get_num_threads(), **common.machine()}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    """Nothing: a result is committed after it was measured."""
    return {}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Leaves every single timing out of the file: its statistics stay."""
    for result in output_json["benchmarks"]:
        result["stats"].pop("data", None)
