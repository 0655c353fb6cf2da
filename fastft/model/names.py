"""What devices and dtypes are called in options; `fastft.model.precision` chooses them."""

from __future__ import annotations

from typing import Literal

Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "bf16", "fp16", "fp32", "fp64"]
