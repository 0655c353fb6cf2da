"""The GPU's time of each kernel, forward and backward, beside torch, flex-attention, varlen attention, Liger and
inductor: what `fastft doctor` measures too."""

from __future__ import annotations

from dataclasses import asdict

import torch

from fastft.doctor import kernel_speeds
from fastft.doctor.child_tasks import Found
from fastft.doctor.kernel_checks import CASES, GPU_SIZES


def tasks() -> list[str]:
    """Ours of every kernel first, then the peers."""
    pairs = [(case.name, by) for case in CASES for by in kernel_speeds.implementations(case.name)]
    pairs.sort(key=lambda pair: pair[1] != kernel_speeds.OURS)
    return [f"{name} {by}" for name, by in pairs]


def do(task: str) -> Found:
    """Does one."""
    name, _, by = task.partition(" ")
    return asdict(kernel_speeds.measure(name, by, GPU_SIZES, torch.bfloat16))
