"""What every call of C looks at before it gives a tensor away: a wrong address is not found out there."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 1 << 14
"""Elements up to which one thread is done before others are awake."""


def at(x: Tensor | None, *shape: int, dtype: torch.dtype | None = None, name: str = "a tensor") -> int:
    """Where a tensor lies, whose rows, along its last axis, lie in one piece each; 0 for none.

    Raises:
        ValueError: another shape, device or dtype (of the two that there is code for), or elements of a row that are
            apart.
    """
    if x is None:
        return 0
    if (
        x.shape != shape
        or not x.is_cpu
        or (x.dtype != torch.float32 and x.dtype != torch.bfloat16)
        or (dtype is not None and x.dtype != dtype)
    ):
        expected = "float32 or bfloat16" if dtype is None else dtype
        raise ValueError(f"got {name} {tuple(x.shape)} {x.dtype} on {x.device}, expected {shape} {expected} on the CPU")
    if x.is_neg():  # what torch negates when it reads it, as it does parts of complex numbers
        raise ValueError(f"got {name} whose numbers are not those at its address, expected x.resolve_neg()")
    if x.stride(-1) != 1 and shape[-1] > 1 and x.numel():
        raise ValueError(f"got {name} with strides {x.stride()}, expected rows in one piece")
    return x.data_ptr()


def at_integers(name: str, x: Tensor | None, count: int, dtype: torch.dtype = torch.int64) -> int:
    """Where `[count]` integers lie, one beside the other; 0 for none.

    Raises:
        ValueError: another shape, dtype or device, or integers that are apart.
    """
    if x is None:
        return 0
    if x.shape != (count,) or x.dtype != dtype or not x.is_cpu or not x.is_contiguous():
        raise ValueError(
            f"got {name} {tuple(x.shape)} {x.dtype} on {x.device}, expected [{count}] {dtype}, contiguous, on the CPU"
        )
    return x.data_ptr()


def extremes(name: str, x: Tensor, most: int) -> tuple[int, int]:
    """The least and the largest of integers from 0 to `most`; 0 of none.

    Raises:
        ValueError: one that is less or more.
    """
    if not x.numel():
        return 0, 0
    least, largest = (int(value) for value in x.aminmax())
    if least < 0 or largest > most:
        raise ValueError(f"got {name} from {least} to {largest}, expected 0 to {most}")
    return least, largest


def is_narrow(x: Tensor | None) -> bool:
    """Whether there is one, in bf16."""
    return x is not None and x.dtype == torch.bfloat16


def step(x: Tensor | None) -> int:
    """From one row of `[N, C]` to the next, in elements; 0 for none."""
    return 0 if x is None else x.stride(0)


def in_rows(x: Tensor) -> Tensor:
    """x with its rows, along its last axis, in one piece each."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def threads(elements: int) -> int | None:
    """How many threads to work with, see `library.run`."""
    return 1 if elements <= SMALL else None
