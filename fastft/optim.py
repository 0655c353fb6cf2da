"""AdamW's parameter groups and the learning rate's course."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastft.config import Schedule


def adamw(model: nn.Module, *, lr: float, weight_decay: float, decay_all: bool) -> torch.optim.AdamW:
    """AdamW with torch's default betas and epsilon, fused.

    Weight matrices decay; biases, layer norms and embeddings do only with `decay_all`.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.startswith(("wte.", "wpe."))
        (decayed if decay_all or is_matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def learning_rate(step: int, *, peak: float, schedule: Schedule, warmup: int, total_steps: int) -> float:
    """The rate of `step` (from 0): a linear climb over `warmup` steps, then constant, or falling to zero.

    The last step's rate is above zero: a rate of exactly zero would be a step for nothing.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total_steps - warmup)
    return peak * (1 - done) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * done))
