"""A model made ready for answering: matrices in the dtype asked for, and laid out for the processor."""

from __future__ import annotations

import torch
from torch import nn

from fastft.model.fixed_norm import FixedNorm, can_fix
from fastft.model.gpt2 import GPT2
from fastft.model.packed_linear import PackedLinear, can_pack


@torch.no_grad()
def prepared(model: GPT2, dtype: torch.dtype, *, rows: int = 64) -> GPT2:
    """The model, changed in place: it can answer (`fastft.decoding.decode`), and no longer be trained or saved.

    Args:
        model: in float32, on its device.
        dtype: of its matrices, and of keys and values with them. Layer norms, positions and the residual stream stay
            as they are.
        rows: how many sequences are going to be answered at a time.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if ".ln_" not in f".{name}" and not name.startswith("wpe."):
            parameter.data = parameter.data.to(dtype)
    if can_pack(model.head):
        model.packed_head = PackedLinear(model.head, None, rows)
        for parent in [*model.h.modules()]:
            for name, layer in parent.named_children():
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, PackedLinear(layer.weight, layer.bias, rows))
    for parent in (model, *model.h):
        for name, layer in [*parent.named_children()]:
            if isinstance(layer, nn.LayerNorm) and can_fix(layer, dtype):
                setattr(parent, name, FixedNorm(layer, dtype))
    return model
