"""What every call of C looks at before it gives a tensor away: a wrong address is not found out there."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 1 << 14
"""Elements up to which one thread is done before others are awake."""


def at(x: Tensor | None, *shape: int) -> int:
    """Where a tensor lies, whose rows lie in one piece each; 0 for none.

    Raises:
        ValueError: another shape or device, a dtype that there is no code for, or elements of a row that are apart.
    """
    if x is None:
        return 0
    if x.shape != shape or not x.is_cpu or (x.dtype != torch.float32 and x.dtype != torch.bfloat16):
        raise ValueError(f"got {tuple(x.shape)} {x.dtype} on {x.device}, expected {shape} float32 or bfloat16 on a CPU")
    if x.stride(-1) != 1 and shape[-1] > 1 and x.numel():
        raise ValueError(f"got strides {x.stride()}, expected rows in one piece")
    return x.data_ptr()


def is_narrow(x: Tensor | None) -> bool:
    """Whether there is one, in bf16."""
    return x is not None and x.dtype == torch.bfloat16


def step(x: Tensor | None) -> int:
    """From one row of `[N, C]` to the next, in elements; 0 for none."""
    return 0 if x is None else x.stride(0)


def in_rows(x: Tensor) -> Tensor:
    """`[N, C]` with its rows in one piece each."""
    return x if x.stride(1) == 1 else x.contiguous()


def threads(elements: int) -> int | None:
    """How many threads to work with, see `library.run`."""
    return 1 if elements <= SMALL else None
