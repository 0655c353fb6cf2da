"""Norms of transformers' models in the dtype of what they are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def in_its_own_dtype(norm: Any) -> None:
    """transformers' RMS norms compute in float32 always, which rounds away what float64 is to show."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))

    norm.forward = forward


@contextmanager
def exact_norms(model: torch.nn.Module) -> Iterator[None]:
    """While it is open, a model's RMS norms are not rounded to float32."""
    norms: list[Any] = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    for norm in norms:
        in_its_own_dtype(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
