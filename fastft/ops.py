"""The one file of fastft that imports kernels, and chooses which implementation runs.

`reference` has none of the savings: it is what everything else is held against. `cpu` is the torch path with them
(it runs on every device). `auto` is the fastest that runs here.
"""

from __future__ import annotations

import fastft_kernels
from fastft_kernels.attention import Impl as KernelImpl
from torch import Tensor

from fastft.batch import Batch
from fastft.errors import UserError

IMPLS = ("auto", "cpu", "reference")


def kernel_impl(impl: str) -> KernelImpl:
    """What `--impl` means to the kernels.

    Raises:
        UserError: no such implementation.
    """
    if impl not in IMPLS:
        raise UserError(f"got --impl {impl}, expected one of {', '.join(IMPLS)}")
    return "reference" if impl == "reference" else "torch"


def attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, impl: str) -> Tensor:
    """Attention of the batch's tokens, `[T, H, D]` each, over what `batch.visible_until` lets them see."""
    return fastft_kernels.attention(q, k, v, batch.visible_until, row_length=batch.row_length, impl=kernel_impl(impl))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, batch: Batch, impl: str) -> Tensor:
    """The loss of each of the batch's rows, `[R]` float32, from `hidden` `[T, C]` and the head `weight` `[V, C]`."""
    return fastft_kernels.linear_cross_entropy(hidden, weight, batch.targets, rows=batch.rows, impl=kernel_impl(impl))
