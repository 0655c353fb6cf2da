"""A GPT-2 as a GGUF file, which llama.cpp and Ollama run; written tensor by tensor.

Names and metadata are those of llama.cpp's architecture `gpt2` (src/llama-arch.cpp; gguf-py's constants.py). Matrices
are `[out, in]` there as they are here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastft.common import files
from fastft.common.errors import UserError
from fastft.common.optional import need
from fastft.export.vocabulary import vocabulary_of
from fastft.model.gpt2 import GPT2
from fastft.model.weights import check_range

Quantize = Literal["f32", "f16", "bf16", "q8_0"]
"""How matrices are stored; vectors and positions are float32 in each, as llama.cpp's own converter has them."""

_FILE_TYPES: dict[Quantize, str] = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0",
}  # fmt: skip
_Q8_BLOCK = 32
_NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
_NAMES_IN_BLOCKS = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
_GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


def write_gguf(model: GPT2, path: Path, *, quantize: Quantize, chat_template: str, name: str) -> None:
    """Writes a model with its tokenizer and chat template.

    Args:
        model: on the CPU, in float32.
        path: of the file.
        quantize: how matrices are stored.
        chat_template: a Jinja program; transformers' marks of what is learned are taken out of it.
        name: of the model.

    Raises:
        UserError: the package gguf is not installed; the tokenizer is not GPT-2's kind; a weight is beyond the dtype;
            the width does not suit it; the file cannot be written.
    """
    gguf = need("gguf", extra="gguf")
    _check(model, quantize)
    with files.replacing(path) as file:
        # The package opens the file by its name; what it writes is the same file, which is put in its place at the end.
        writer = gguf.GGUFWriter(file.name, "gpt2")
        _describe(writer, gguf, model, quantize, name)
        _add_tokenizer(writer, model, chat_template)
        kinds = {}
        for stored, tensor in _tensors(model):
            kind = kinds[stored] = _kind(gguf, stored, tensor, quantize)
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
            # As rows of bytes, which the package counts back into numbers of the kind.
            writer.add_tensor_info(stored, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for stored, tensor in _tensors(model):
            writer.write_tensor_data(gguf.quants.quantize(tensor.numpy(), kinds[stored]))
        writer.close()


def without_marks(chat_template: str) -> str:
    """A Jinja program without `{% generation %}` and `{% endgeneration %}`, which transformers alone knows."""
    return _GENERATION.sub(r"{#\1 \2#}", chat_template)


def _check(model: GPT2, quantize: Quantize) -> None:
    C = model.config.n_embd
    if quantize == "q8_0" and C % _Q8_BLOCK:
        raise UserError(f"got --quantize q8_0 and a model of width {C}, expected a multiple of {_Q8_BLOCK}; use f16")
    half = torch.float16 if quantize in ("f16", "q8_0") else torch.bfloat16  # a block of q8_0 has a half's scale
    check_range(model, torch.float32 if quantize == "f32" else half)


def _describe(writer: Any, gguf: Any, model: GPT2, quantize: Quantize, name: str) -> None:
    config = model.config
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[quantize]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _add_tokenizer(writer: Any, model: GPT2, chat_template: str) -> None:
    found = vocabulary_of(model.config.tokenizer, model.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(found.tokens)
    writer.add_token_types([int(kind) for kind in found.types])
    writer.add_token_merges(found.merges)
    writer.add_bos_token_id(found.begin)
    writer.add_eos_token_id(found.end)
    writer.add_pad_token_id(found.pad)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(without_marks(chat_template))


def _tensors(model: GPT2) -> Iterator[tuple[str, Tensor]]:
    """Each parameter by its name in GGUF; a tied head is left out, as llama.cpp reads the embedding for it then."""
    for name, parameter in model.named_parameters():
        yield name_in_gguf(name), parameter.detach().float().contiguous()


def name_in_gguf(name: str) -> str:
    """What llama.cpp calls a parameter."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("h."):
        return f"{_NAMES[stem]}.{kind}"
    _, layer, rest = stem.split(".", 2)
    return f"blk.{layer}.{_NAMES_IN_BLOCKS[rest]}.{kind}"


def _kind(gguf: Any, name: str, tensor: Tensor, quantize: Quantize) -> Any:
    is_wide = tensor.ndim < 2 or name == "position_embd.weight"
    return getattr(gguf.GGMLQuantizationType, "F32" if is_wide else quantize.upper())
