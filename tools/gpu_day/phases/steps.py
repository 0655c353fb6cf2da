"""An optimizer step of the book's examples: by fastft, eagerly and as a CUDA graph, and by its peers.

To time another kind of step, add it to `_STEPS`: a function of the number of examples that makes a function which does
one step and waits for nothing that the trainer would not wait for.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fastft_kernels import roofline
from fastft_kernels.roofline import card_named
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from fastft.batches.batch import Batch
from fastft.doctor.child_tasks import Found
from fastft.engines.engine import Update
from fastft.engines.optim import adamw
from fastft.gpu import clock as gpu_clock
from fastft.scaling.predict import EFFICIENCY, packed_batch, step_costs
from tools.gpu_day import models

RATE = 5e-5
_ROUNDS = 12
_PROFILED = 3
_TOP = 25
Step = Callable[[], object]


def tasks() -> list[str]:
    """Ours, then the peers' of the same examples; last what compiles for a minute."""
    ours, peers = ([f"step {name}" for name in _STEPS if name.startswith("fastft") == first] for first in (True, False))
    of_examples = [f"{kind} {n}" for kind in (*ours, "parts", *peers) for n in models.EXAMPLES]
    return ["adamw", *sorted(of_examples, key=lambda task: "compiled" in task), "trl 8"]


def do(task: str) -> Found:
    """Does one."""
    kind, *rest = task.split()
    match kind:
        case "step":
            return _timed(_STEPS[" ".join(rest[:-1])](int(rest[-1])), int(rest[-1]))
        case "parts":
            return _parts(int(rest[0]))
        case "adamw":
            return _adamw()
        case "trl":
            return _trl(int(rest[0]))
    raise ValueError(task)


def _timed(step: Step, n: int) -> Found:
    """Its wall time as a training loop sees it, the part of it in which the GPU worked, and its peak memory."""
    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    wall = gpu_clock.wall_times(step, rounds=_ROUNDS)
    peak = torch.cuda.max_memory_allocated() / 2**30
    predicted = _predicted_ms(n)
    return {
        "n": n,
        "ms": wall.median,
        "spread": wall.spread,
        "peak_gib": peak,
        "predicted_ms": predicted,
        **_busy(step),
    }


def _busy(step: Step) -> Found:
    """Milliseconds that kernels ran in a step, by torch's profiler, how many were launched, and the longest of them."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(_PROFILED):
            step()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    rows = [row for row in rows if row.self_device_time_total > 0]
    if not rows:
        return {"busy_ms": None}  # the profiler does not see the GPU
    longest = {row.key[:60]: round(row.self_device_time_total / _PROFILED / 1e3, 3) for row in rows[:_TOP]}
    return {
        "busy_ms": sum(row.self_device_time_total for row in rows) / _PROFILED / 1e3,
        "launches": sum(row.count for row in rows) // _PROFILED,
        "longest": longest,
    }


# fastft's


@functools.lru_cache(maxsize=1)
def _engine(**options: Any) -> Any:
    torch.cuda.empty_cache()
    return models.engine(**options)


def _fastft(n: int, **options: Any) -> Step:
    """As the trainer steps: a new batch, forward and backward, update; the figures of the step before are read."""
    engine = _engine(**options)
    batcher = common.batcher_of(engine)
    begun: deque[Callable[[], Update]] = deque()

    def step() -> None:
        batch = batcher(models.examples(), np.arange(n))
        loss, _ = engine.accumulate(batch, batch.count)
        begun.append(engine.update(RATE, loss))
        if len(begun) > engine.in_flight:
            begun.popleft()()

    return step


def _parts(n: int) -> Found:
    """Host milliseconds of a captured step's parts, and what the host then waits for the GPU."""
    engine = _engine()
    batcher = common.batcher_of(engine)
    batch: list[Batch] = []
    losses: list[Tensor] = []

    def make() -> None:
        batch[:] = [batcher(models.examples(), np.arange(n))]

    def accumulate() -> None:
        losses[:] = [engine.accumulate(batch[0], batch[0].count)[0]]

    parts = {"batch": make, "accumulate": accumulate, "update": lambda: engine.update(RATE, losses[0])}
    found = {}
    for name, run in parts.items():
        found[f"{name}_host_ms"] = gpu_clock.host_times(run, rounds=_ROUNDS).median
        found[f"{name}_wall_ms"] = gpu_clock.wall_times(run, rounds=_ROUNDS).median
    return {"n": n, "T": batch[0].tokens.numel(), "R": batch[0].rows.numel(), **found}


def _predicted_ms(n: int) -> float | None:
    """What the roofline predicts for this card; None for a card that it does not know."""
    card = card_named(torch.cuda.get_device_name())
    if card is None:
        return None
    costs = step_costs(models.config(), packed_batch(models.examples(), n)).values()
    return 1e3 * sum(roofline.predicted_seconds(cost, card, efficiency=EFFICIENCY) for cost in costs)


def _adamw() -> Found:
    """AdamW alone: it reads and writes 28 bytes for each parameter."""
    model = models.gpt2()
    optimizer = adamw(model, lr=RATE, weight_decay=0.1, decay_all=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    times = gpu_clock.gpu_times(optimizer.step, rounds=5)
    card = card_named(torch.cuda.get_device_name())
    moved = 28 * sum(parameter.numel() for parameter in model.parameters())
    return {"gpu_ms": times.median, "predicted_ms": None if card is None else 1e3 * moved / card.bandwidth / EFFICIENCY}


# The peers'


@functools.lru_cache(maxsize=1)
def _transformers_model(*, compiled: bool) -> Any:
    from transformers import GPT2LMHeadModel

    from benchmarks.peers import hf

    torch.cuda.empty_cache()
    with torch.device("cuda"):
        model = GPT2LMHeadModel._from_config(hf.hf_config(models.config()), attn_implementation="sdpa").train()
    if compiled:
        model.compile(dynamic=True)
    return model, torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, fused=True)


def _transformers(n: int, *, kind: str, compiled: bool = False) -> Step:
    """An ordinary loop, clipping as transformers' Trainer and TRL do."""
    from benchmarks.peers import hf

    model, optimizer = _transformers_model(compiled=compiled)
    encoded = models.examples()
    examples = [(encoded[i].tolist(), int(encoded.first_target[i])) for i in range(n)]

    def step() -> None:
        batch = {key: value.to("cuda") for key, value in hf.collate(kind, examples).items()}
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def _trl(n: int) -> Found:
    """TRL's trainer in a process of its own, where it is installed."""
    if importlib.util.find_spec("trl") is None:
        return {"skipped": "TRL is not installed"}
    options = ("--size", models.SIZE, "--device", "cuda", "--batch_size", n, "--steps", 5)
    result = common.run_worker("benchmarks.peers.trl_sft", *options, threads=4)
    speeds = common.spread(result["examples_per_second"])
    return {"n": n, "ms": 1e3 * n / speeds["median"], "peak_gib": result["peak_bytes"] / 2**30}


_STEPS: dict[str, Callable[[int], Step]] = {
    "fastft captured": _fastft,
    "fastft eager": functools.partial(_fastft, cuda_graphs=False),
    "transformers padded": functools.partial(_transformers, kind="padded"),
    "transformers flat": functools.partial(_transformers, kind="flat"),
}
if not models.PRETENDED:  # there it would compile for a minute, and say nothing of ours
    _STEPS["transformers compiled"] = functools.partial(_transformers, kind="padded", compiled=True)
