"""Copies between the host and a GPU that neither of them waits for: they begin or end in pinned memory.

On a CPU they are copies as any other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """`x`, on the host, where `x.to(device, non_blocking=True)` is not waited for."""
    return x.pin_memory() if device.type == "cuda" else x


def on_the_way(x: Tensor) -> Tensor:
    """A copy of `x` in host memory. Its values are there when the device has done all that it was asked for so far."""
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
    return copy.copy_(x, non_blocking=True)


class Reading:
    """A copy of a tensor for the host, on its way from when it is made."""

    def __init__(self, x: Tensor) -> None:
        self._copy = on_the_way(x)
        self._there: torch.cuda.Event | None = None
        if x.device.type == "cuda":
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(x.device))

    def get(self) -> Tensor:
        """The values, in host memory; waits until they are there."""
        if self._there is not None and not self._there.query():
            self._there.synchronize()
        return self._copy
