"""Layer norms whose weights stay, of a model that answers on a CPU with compiled code.

Between the products of one token for each of many sequences the interpreter is what takes time, not arithmetic.
"""

from __future__ import annotations

import torch
from fastft_kernels.cpu.norms import WIDEST, FixedLayerNorm
from fastft_kernels.support import why_not_compiled
from torch import Tensor, nn


def can_fix(norm: nn.LayerNorm, dtype: torch.dtype) -> bool:
    """Whether there is compiled code for a norm, whose results are going to be of a dtype."""
    return norm.weight.numel() <= WIDEST and why_not_compiled(norm.weight, norm.bias, dtype) is None


class FixedNorm(nn.LayerNorm):
    """A layer norm for which `can_fix` holds; it takes over the tensors of `norm`."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        """Args: the norm, and the dtype of the product that reads its rows."""
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self._fixed = FixedLayerNorm(norm.weight, norm.bias, eps=norm.eps, out_dtype=dtype)

    def added(self, stream: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stream and what is added to it, `[T, C]` each -> the normalised rows, and the sum."""
        return self._fixed(stream, None) if branch is None else self._fixed(branch, stream)
