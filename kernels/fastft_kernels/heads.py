"""Heads that the attention kernels take: their dims, and the power of two that a tile of one has.

Triton's tiles have powers of two. A head dim of 80 is computed in tiles of 128 whose further columns are masked where
they are loaded and stored: zeros in between, which change no sum.
"""

from __future__ import annotations

LARGEST_DIM = 256
STEP = 16
"""Head dims are multiples of it: rows then begin at whole 16 bytes, which loads of that width need."""


def padded(D: int) -> int:
    """The power of two that holds a head dim."""
    return 1 << (D - 1).bit_length()


def why_not_head_dim(D: int) -> str | None:
    """Why the kernels do not take a head dim; None where they do."""
    if D % STEP or not STEP <= D <= LARGEST_DIM:
        return f"got head dim {D}, expected a multiple of {STEP} up to {LARGEST_DIM}"
    return None
