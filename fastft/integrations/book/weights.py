"""OpenAI's weights, as the book reads them out of TensorFlow's files, into a `GPTModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastft.common.errors import UserError

Array = npt.NDArray[Any]


@torch.no_grad()
def load_weights_into_gpt(gpt: nn.Module, params: Mapping[str, Any]) -> None:
    """Copies `params` into a model of the book's names, `GPTModel` or the book's own.

    Args:
        gpt: it keeps its parameters, their dtype and device; the head gets the token embedding.
        params: `wte`, `wpe`, `g`, `b`, and for each of `blocks` `attn`, `mlp`, `ln_1` and `ln_2`, as arrays.

    Raises:
        UserError: a shape that differs, another number of blocks, or a model without `qkv_bias`.
    """
    own: Any = gpt
    if len(own.trf_blocks) != len(params["blocks"]):
        raise UserError(f"got {len(params['blocks'])} blocks of weights, expected the model's {len(own.trf_blocks)}")
    _copy("pos_emb.weight", own.pos_emb.weight, params["wpe"])
    _copy("tok_emb.weight", own.tok_emb.weight, params["wte"])
    for number, (block, given) in enumerate(zip(own.trf_blocks, params["blocks"], strict=True)):
        _copy_block(f"trf_blocks.{number}", block, given)
    _copy_norm("final_norm", own.final_norm, params)
    _copy("out_head.weight", own.out_head.weight, params["wte"])


def _copy_block(name: str, block: Any, given: Mapping[str, Any]) -> None:
    of_all = given["attn"]["c_attn"]
    for part, linear in enumerate((block.att.W_query, block.att.W_key, block.att.W_value)):
        w, b = (np.split(of_all[which], 3, axis=-1)[part] for which in ("w", "b"))
        _copy_linear(f"{name}.att.{('W_query', 'W_key', 'W_value')[part]}", linear, {"w": w, "b": b})
    _copy_linear(f"{name}.att.out_proj", block.att.out_proj, given["attn"]["c_proj"])
    _copy_linear(f"{name}.ff.layers.0", block.ff.layers[0], given["mlp"]["c_fc"])
    _copy_linear(f"{name}.ff.layers.2", block.ff.layers[2], given["mlp"]["c_proj"])
    _copy_norm(f"{name}.norm1", block.norm1, given["ln_1"])
    _copy_norm(f"{name}.norm2", block.norm2, given["ln_2"])


def _copy_linear(name: str, linear: nn.Linear, given: Mapping[str, Array]) -> None:
    """OpenAI's layers are `[in, out]`."""
    _copy(f"{name}.weight", linear.weight, given["w"].T)
    _copy(f"{name}.bias", linear.bias, given["b"])


def _copy_norm(name: str, norm: Any, given: Mapping[str, Array]) -> None:
    _copy(f"{name}.scale", norm.scale, given["g"])
    _copy(f"{name}.shift", norm.shift, given["b"])


def _copy(name: str, parameter: Tensor | None, given: Array) -> None:
    if parameter is None:
        raise UserError(f"the model has no {name}, expected qkv_bias True: OpenAI's weights have these biases")
    if parameter.shape != given.shape:
        raise UserError(f"{name}: got weights {list(given.shape)}, expected {list(parameter.shape)}; check the size")
    parameter.copy_(torch.from_numpy(np.array(given)))
