"""What comes close to the largest of a row."""

from __future__ import annotations

import math

import pytest
import torch
from compiled import needs_compiled
from fastft_kernels.cpu.best import near_best

pytestmark = needs_compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 31, 512, 1030])
def test_it_is_what_a_comparison_finds(dtype: torch.dtype, V: int) -> None:
    """Of all signs, with equals, and of rows of which all are close."""
    generator = torch.Generator().manual_seed(V)
    x = torch.randn(9, V + 3, generator=generator).to(dtype)[:, :V]
    x[1], x[2], x[3] = x[1].abs(), -x[2].abs(), 0.5
    x[4, V // 2 :] = x[4].max()
    x[5] = -math.inf
    x[5, -1] = -3e38
    x[6] = torch.where(torch.arange(V) % 2 == 0, 0.0, -0.0)
    for below, relative in ((0.0, 0.0), (0.3, 0.0), (0.0, 2.0**-4), (1e-4, 0.0)):
        wide = x.float()
        best = wide.amax(dim=1, keepdim=True)
        expected = (wide >= best - below - relative * best.abs()).nonzero(as_tuple=True)
        got = near_best(x, below=below, relative=relative)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_no_numbers_have_none(dtype: torch.dtype) -> None:
    x = torch.zeros(6, 700, dtype=dtype)
    x[0, 3], x[1, 650], x[2, 4], x[3, :2] = math.nan, -math.nan, math.inf, -math.inf
    x[4] = math.nan
    assert near_best(x, below=1e-4)[0].unique().tolist() == [2, 3, 5]  # infinity is the largest
    assert near_best(x, relative=1e-4)[0].unique().tolist() == [3, 5]  # infinity less infinity is no number
    assert near_best(x[:0])[0].tolist() == []


def test_others_are_refused() -> None:
    for x in (torch.zeros(3), torch.zeros(3, 0), torch.zeros(2, 2, dtype=torch.float64)):
        with pytest.raises(ValueError, match="expected"):
            near_best(x)
