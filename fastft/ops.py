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
    return fastft_kernels.attention(
        q,
        k,
        v,
        batch.visible_until,
        row_length=batch.row_length,
        tiles=batch.tiles,
        impl=kernel_impl(impl),
    )


def attention_of_rows(q: Tensor, k: Tensor, v: Tensor, batch: Batch, impl: str) -> Tensor:
    """The same for the queries of the loss rows alone: q is `[R, H, D]`, of the tokens `batch.rows`."""
    return fastft_kernels.attention(
        q, k, v, batch.visible_until, q_rows=batch.rows, tiles=batch.row_tiles, impl=kernel_impl(impl)
    )


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, batch: Batch, row_weights: Tensor, impl: str, *, rows_only: bool
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the batch's row losses, and each row's, from the head `weight` `[V, C]`.

    `hidden` is `[T, C]`, or `[R, C]` of the loss rows with `rows_only`.
    """
    return fastft_kernels.linear_cross_entropy(
        hidden,
        weight,
        batch.targets,
        rows=None if rows_only else batch.rows,
        row_weights=row_weights,
        impl=kernel_impl(impl),
    )
