"""The step under torch.compile: how long it compiles, its time, and whether it gives the same bits twice.

Compiling needs the CPU and not the GPU, so the phase begins with the day and does so beside the others. Then it waits
for the file `go` until the GPU is its own.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.engines import gradients
from fastft.doctor.child_tasks import Found
from fastft.gpu import clock as gpu_clock
from tools.gpu_day import models

GO = "GPU_DAY_GO"
"""The environment variable that names the file."""
_ROUNDS = 12


def tasks() -> list[str]:
    """What is compiled first, then what is timed."""
    return ["compile", *(f"step {n}" for n in models.EXAMPLES), "bits"]


def do(task: str) -> Found:
    """Does one."""
    if task == "compile":
        return _compile()
    while not Path(os.environ[GO]).exists():
        time.sleep(0.2)
    return _bits() if task == "bits" else _step(int(task.split()[1]))


@functools.cache
def _engine() -> Any:
    return models.engine(compile=True, cuda_graphs=False)


def _once(n: int) -> None:
    engine = _engine()
    batch = common.batcher_of(engine)(models.examples(), np.arange(n))
    loss, _ = engine.accumulate(batch, batch.count)
    engine.update(5e-5, loss)()


def _compile() -> Found:
    """Seconds of the first steps: a size, another one, and the first again."""
    found = {}
    for name, n in (("first", 64), ("another_size", 8), ("first_again", 64)):
        began = time.perf_counter()
        _once(n)
        found[f"{name}_s"] = time.perf_counter() - began
    return found


def _step(n: int) -> Found:
    wall = gpu_clock.wall_times(lambda: _once(n), rounds=_ROUNDS)
    return {"n": n, "ms": wall.median, "spread": wall.spread}


def _bits() -> Found:
    """Whether a step's gradients are the same bits twice."""
    engine, found = _engine(), []
    batch = common.batcher_of(engine)(models.examples(), np.arange(64))
    for _ in range(2):
        loss, _ = engine.accumulate(batch, batch.count)
        found.append({name: gradient.clone() for name, gradient in gradients(engine).items()})
        engine.update(0.0, loss)()  # the next pass begins another step, with the same weights
    differing = [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]
    return {"ok": not differing, "differing": differing[:6], "many": len(differing)}
