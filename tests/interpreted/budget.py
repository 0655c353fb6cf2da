"""Error budgets: a kernel may err as plain PyTorch does in the same dtype, and a little more."""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""What rounding in another order may add: a few float32 units, half a unit of the last place of the narrow dtypes."""


def relative_error(got: Tensor, exact: Tensor) -> float:
    """`max|a - b| / max|b|` over the whole tensor; `max|a|` where b is 0 throughout."""
    difference, largest = (got.double() - exact.double()).abs(), exact.double().abs()
    if not difference.numel():
        return 0.0
    return float(difference.max() / (largest.max() if largest.max() > 0 else 1))


def assert_within_budget(name: str, got: Tensor, plain: Tensor, exact: Tensor, slack: float | None = None) -> None:
    """Holds a kernel's result against float64.

    Args:
        name: what it is, for the message.
        got: the kernel's.
        plain: plain PyTorch's in the same dtype.
        exact: float64's on the same inputs.
        slack: what the kernel's error may exceed plain PyTorch's by; `SLACK` of its dtype where it is not given.
    """
    assert got.shape == exact.shape, f"{name}: got {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == plain.dtype, f"{name}: got {got.dtype}, expected {plain.dtype}"
    error, allowed = relative_error(got, exact), relative_error(plain, exact)
    allowed += SLACK[got.dtype] if slack is None else slack
    if not error <= allowed:  # NaN is not
        worst = int((got.double() - exact.double()).abs().nan_to_num(nan=torch.inf).argmax())
        values = f"{got.flatten()[worst].item()} for {exact.flatten()[worst].item()}"
        raise AssertionError(f"{name}: error {error:.2e}, allowed {allowed:.2e}; the worst element {worst} is {values}")
