"""What the machine reaches: ceilings of memory and products, and what the host needs to ask a GPU for something."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable

import torch
from fastft_kernels.roofline import card_named
from torch import Tensor

from fastft.doctor.child_tasks import Found
from fastft.gpu import clock as gpu_clock
from tools.gpu_day import models

_COPIED = 1 << 30
_CALLS = 200
"""Calls that the host's time of one is taken from."""


def tasks() -> list[str]:
    """The card first: what all figures are of."""
    products = [f"product {n}" for n in (8192, 2048)]
    launches = [f"graph {n}" for n in (1, 100, 1000)]
    return ["card", "copy", *products, *launches, *(f"host {name}" for name in _HOST), "norm foreach", "norm fastft"]


def do(task: str) -> Found:
    """Does one."""
    match task.split():
        case ["card"]:
            return _card()
        case ["copy"]:
            return _copy()
        case ["product", n]:
            return _product(int(n))
        case ["graph", kernels]:
            return _graph(int(kernels))
        case ["host", name]:
            return _host(name)
        case ["norm", by]:
            return _norm(by)
    raise ValueError(task)


def _card() -> Found:
    import triton

    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "multiprocessors": about.multi_processor_count,
        "gib": round(about.total_memory / 2**30, 1),
        "capability": f"{about.major}.{about.minor}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "driver": _asked_of_the_driver(),
        "pretended": models.PRETENDED,
    }


def _asked_of_the_driver() -> str | None:
    """Driver, clocks and power limit, as nvidia-smi says them; nothing is set."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    query = "driver_version,clocks.sm,clocks.mem,power.limit"
    command = [tool, f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip() or None


def _copy() -> Found:
    a, b = (torch.empty(_COPIED, dtype=torch.int8, device="cuda") for _ in range(2))
    ms = gpu_clock.gpu_times(lambda: b.copy_(a)).median
    card = card_named(torch.cuda.get_device_name())
    peak = None if card is None else card.bandwidth / 1e12
    return {"tb_per_s": 2 * _COPIED / ms / 1e9, "peak": peak}


def _product(n: int) -> Found:
    x, y = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ms = gpu_clock.gpu_times(lambda: x @ y).median
    card = card_named(torch.cuda.get_device_name())
    peak = None if card is None else card.matrix_flops / 1e12
    return {"tflops": 2 * n**3 / ms / 1e9, "peak": peak}


def _graph(kernels: int) -> Found:
    """What a CUDA graph of so many tiny kernels costs: the host to ask for it, and the GPU from kernel to kernel."""
    x = torch.zeros(64, device="cuda")

    def run() -> None:
        for _ in range(kernels):
            x.add_(1)

    graph = gpu_clock.captured(run)
    return {
        "host_us": 1e3 * gpu_clock.host_times(graph.replay).median,
        "wall_us": 1e3 * gpu_clock.wall_times(graph.replay).median,
        "gpu_us": 1e3 * gpu_clock.gpu_times(graph.replay, cold=False).median,
        "host_us_without_graph": 1e3 * gpu_clock.host_times(run, rounds=5).median,
    }


def _host(name: str) -> Found:
    """Microseconds of the host for one call."""
    run = _HOST[name]()

    def many() -> None:
        for _ in range(_CALLS):
            run()

    return {"us": 1e3 * gpu_clock.host_times(many, rounds=5).median / _CALLS}


def _torch_call() -> Callable[[], object]:
    x = torch.zeros(64, 4096, device="cuda", dtype=torch.bfloat16)
    return lambda: x.add_(1)


def _fastft_call() -> Callable[[], object]:
    import fastft_kernels

    x = torch.zeros(64, 4096, device="cuda", dtype=torch.bfloat16)
    bias = torch.zeros(4096, device="cuda")
    return lambda: fastft_kernels.gelu(x, bias, impl="triton")


def _copied_up(*, pinned: bool) -> Callable[[], object]:
    x = torch.zeros(1024, dtype=torch.int64)
    x = x.pin_memory() if pinned else x
    return lambda: x.to("cuda", non_blocking=True)


def _item() -> Callable[[], object]:
    x = torch.zeros((), device="cuda")
    return x.item


_HOST: dict[str, Callable[[], Callable[[], object]]] = {
    "torch.add_": _torch_call,
    "fastft_kernels.gelu": _fastft_call,
    "copy_up_pageable": functools.partial(_copied_up, pinned=False),
    "copy_up_pinned": functools.partial(_copied_up, pinned=True),
    "item": _item,
}


def _norm(by: str) -> Found:
    """The norm of a model's gradients, which each step waits for."""
    from fastft.model.precision import total_norm

    gradients = [torch.zeros_like(p) for p in models.gpt2().parameters()]
    norm: Callable[[list[Tensor]], object] = {"foreach": torch._foreach_norm, "fastft": total_norm}[by]
    host, wall = (clock(lambda: norm(gradients), rounds=5) for clock in (gpu_clock.host_times, gpu_clock.wall_times))
    return {"host_ms": host.median, "wall_ms": wall.median}
