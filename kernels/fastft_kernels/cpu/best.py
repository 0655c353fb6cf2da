"""The numbers of each row that come close to its largest, in C: `best.c`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastft_kernels import support
from fastft_kernels.cpu import given
from fastft_kernels.cpu.library import run

_MOST = 64
"""Of a row, to begin with."""


class _Best(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "found", "count")),
        *((name, ctypes.c_int64) for name in ("N", "V", "stride", "most")),
        *((name, ctypes.c_float) for name in ("below", "relative")),
        ("is_narrow", ctypes.c_int32),
    ]


def near_best(x: Tensor, *, below: float = 0.0, relative: float = 0.0) -> tuple[Tensor, Tensor]:
    """Where each row has numbers that come close to its largest, in one pass over memory.

    Args:
        x: `[N, V]` float32 or bf16, V at least 1, on the CPU.
        below, relative: close is what is at least `largest - below - relative * |largest|`.

    Returns:
        Rows and columns, int64, in the order of the rows and the columns. None of a row that holds NaN, or whose least
        close number is none.

    Raises:
        ValueError: other dtypes or shapes, or there is no compiled code.
    """
    if x.ndim != 2 or not x.shape[1] or support.why_not_compiled(x) is not None:
        raise ValueError(f"got {tuple(x.shape)} {x.dtype}, expected [N, V] where there is compiled code for it")
    x = given.in_rows(x)
    N, V = x.shape
    most = min(_MOST, V)
    while True:
        found, count = (torch.empty(*shape, dtype=torch.int64) for shape in ((N, most), (N,)))
        arguments = _Best(
            given.at(x, N, V), found.data_ptr(), count.data_ptr(), N, V, x.stride(0), most, below, relative,
            given.is_narrow(x),
        )  # fmt: skip
        run("fastft_best", arguments, threads=given.threads(N * V))
        largest = int(count.max()) if N else 0
        if largest <= most:
            return torch.arange(N).repeat_interleave(count), found[torch.arange(most) < count[:, None]]
        most = largest
