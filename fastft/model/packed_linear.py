"""Linear layers whose weights are laid out once as oneDNN's products read them.

`F.linear` lays a weight out anew at every call, or leaves it to a library that is slower on some processors. For
training that is right: weights change with every step. For answering, where they stay and few rows are computed at a
time, it is up to half of a product's time (`benchmarks/generation.py`).

The operators are those that torch's compiler calls for frozen weights on x86.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastft.batches.batch import near_sizes

_DTYPES = (torch.float32, torch.bfloat16)


def can_pack(weight: Tensor) -> bool:
    """Whether there are such products for a weight here: float32 or bfloat16 on an x86 processor."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in _DTYPES
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    )


class PackedLinear(nn.Module):
    """`x W^T + b`, `[T, in]` -> `[T, out]`, for weights that no longer change."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        """Packs a weight for which `can_pack` holds.

        Args:
            weight: `[out, in]`; it may be freed.
            bias: `[out]`, of the same dtype.
            rows: how many the products are going to have, most of the time.
        """
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.bias = None if bias is None else bias.detach()
        self._is_narrow = weight.dtype == torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        """`[T, in]` -> `[T, out]`."""
        return self.product(x)

    def product(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """`[T, in]` -> `[T, out]`; with `gelu` the GELU of it, in its tanh form, in the same pass over memory."""
        then, form = ("gelu", "tanh") if gelu else ("none", "")
        n = x.shape[0]
        # oneDNN makes machine code for each number of rows: in 16 bits it costs more than the rows that are added here.
        more = near_sizes(n) - n if self._is_narrow and n > 1 else 0
        x = F.pad(x, (0, 0, 0, more)) if more else x.contiguous()
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], form)
        return out[:n] if more else out
