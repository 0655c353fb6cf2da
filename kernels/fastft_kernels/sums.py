"""Column sums in a fixed order: what the gradients of biases and layer-norm weights end in.

Each program of a backward kernel sums the rows of its own; here their partial sums `[P, C]` are added, from the first
program's to the last one's, so that the result is the same each time.
"""

import torch
from torch import Tensor

from fastft_kernels import support, tables
from fastft_kernels.support import tl, triton

tables.TABLE["sum_rows"] = {"default": {None: {"BC": 64, "BP": 32, "num_warps": 4, "num_stages": 1}}}


@triton.jit
def sum_rows(PARTIAL, OUT, P, C, BP: tl.constexpr, BC: tl.constexpr):
    """OUT[c] = sum over p of PARTIAL[p, c]; one program for BC columns."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([BC], tl.float32)
    for begin in range(0, P, BP):
        p = begin + tl.arange(0, BP)
        inside = (p < P)[:, None] & (c < C)[None, :]
        total += tl.sum(tl.load(PARTIAL + p[:, None] * C + c[None, :], mask=inside, other=0.0), 0)
    tl.store(OUT + c, total.to(OUT.dtype.element_ty), mask=c < C)


def summed(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums over the first axis of `[P, C]` float32: `[C]` in `dtype`."""
    P, C = partial.shape
    out = torch.empty(C, dtype=dtype, device=partial.device)
    config = tables.tiles("sum_rows", support.arch_of(partial))
    sum_rows[(triton.cdiv(C, config["BC"]),)](partial, out, P, C, **config)
    return out


def rows_of_programs(rows: int, programs: int) -> tuple[int, int]:
    """How many programs share `rows`, and how many rows each of them takes: at most `programs`, none without rows."""
    each = max(1, -(-rows // programs))
    return max(1, -(-rows // each)), each
