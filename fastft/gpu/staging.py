"""Batches on their way to a GPU: one copy each, out of pinned memory, which nothing waits for.

A batch and its plans are two dozen small tensors. Copied one by one out of ordinary memory, each copy waits for the
GPU. Here they are laid out in one pinned piece of memory, that is copied while the host goes on, and are found again as
parts of one tensor on the GPU. For batches of equal sizes it is the same tensor each time, so that a captured CUDA
graph finds them where it has them from.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastft.batches.batch import Batch, with_tensors

_ALIGNED = 256
"""Bytes: where each tensor begins is a multiple, as torch's allocator has it; kernels are compiled for 16."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A batch on the device.

    Attributes:
        batch: its tensors are on the device; `pair_rows` and `pair_examples` are left out, as the model does not read
            them.
        sizes: equal for two batches only if the same kernels compute both.
    """

    batch: Batch
    sizes: Hashable


class Staging:
    """Puts batches on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[Hashable, tuple[Tensor, Batch]] = {}  # by sizes: the bytes, and the batch that they are

    def put(self, batch: Batch, stays: Callable[[Hashable], bool] = lambda _: False) -> Staged:
        """The batch on the device.

        Args:
            batch: on the host.
            stays: whether batches of these sizes are to lie at one place from now on, each overwriting the one before.
                Its memory is then never given back: nothing for sizes that come once.
        """
        batch = replace(batch, pair_rows=batch.pair_rows[:0], pair_examples=batch.pair_examples[:0])
        tensors = batch.tensors()
        begins, length = _layout(tensors)
        packed = torch.empty(length, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        for tensor, begin in zip(tensors, begins, strict=True):
            _part(packed, tensor, begin).copy_(tensor)
        sizes = batch.sizes()
        place, there = self._kept.get(sizes, (None, None))
        if place is None:
            place = torch.empty(length, dtype=torch.uint8, device=self._device)
        place.copy_(packed, non_blocking=True)
        if there is None:
            parts = iter([_part(place, tensor, begin) for tensor, begin in zip(tensors, begins, strict=True)])
            there = with_tensors(batch, lambda _: next(parts))
            if stays(sizes):
                self._kept[sizes] = place, there
        return Staged(there, sizes)


def _layout(tensors: list[Tensor]) -> tuple[list[int], int]:
    """At which byte each tensor begins, and the bytes of all."""
    begins, end = [], 0
    for tensor in tensors:
        begins.append(end)
        end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    return begins, end


def _part(packed: Tensor, like: Tensor, begin: int) -> Tensor:
    """The part of the bytes `packed` that holds a tensor such as `like`."""
    return packed[begin : begin + like.nbytes].view(like.dtype).view(like.shape)
