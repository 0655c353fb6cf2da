"""The operations at fastft's heart, usable with torch alone: interval attention and linear cross-entropy.

Every operation has `impl="reference"`: plain PyTorch, written from the equation, which everything faster is held
against.
"""

from fastft_kernels.attention import attention
from fastft_kernels.cross_entropy import linear_cross_entropy
from fastft_kernels.tiles import TileGroup, plan_tiles

__all__ = ["TileGroup", "attention", "linear_cross_entropy", "plan_tiles"]
