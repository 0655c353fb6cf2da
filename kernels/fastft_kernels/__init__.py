"""The operations at fastft's heart, usable with torch and Triton alone: interval attention, linear cross-entropy, and
the small fusions beside them.

Every operation has `impl="reference"`: plain PyTorch, written from the equation, which everything faster is held
against.
"""

from fastft_kernels.attention import attention
from fastft_kernels.attention_decode import attention_decode
from fastft_kernels.attention_plan import AttentionPlan, plan_attention
from fastft_kernels.attention_varlen import attention_varlen
from fastft_kernels.cross_entropy import cross_entropy
from fastft_kernels.gelu import gelu
from fastft_kernels.layer_norm import layer_norm
from fastft_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with_losses
from fastft_kernels.registry import prepare_compile
from fastft_kernels.rms_norm import rms_norm
from fastft_kernels.rows import RowPlan, add_rows_, plan_rows, take_rows
from fastft_kernels.swiglu import swiglu
from fastft_kernels.tiles import TileGroup, plan_tiles

__all__ = [
    "AttentionPlan",
    "RowPlan",
    "TileGroup",
    "add_rows_",
    "attention",
    "attention_decode",
    "attention_varlen",
    "cross_entropy",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "linear_cross_entropy_with_losses",
    "plan_attention",
    "plan_rows",
    "plan_tiles",
    "prepare_compile",
    "rms_norm",
    "swiglu",
    "take_rows",
]
