"""An adapter as PEFT has it, written: `adapter_model.safetensors`, `adapter_config.json`, the tokenizer, the template.

The names of its tensors are in `fastft.model.peft_reading`, which reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from fastft.common import files
from fastft.common.keywords import is_keyword
from fastft.model.gpt2 import GPT2
from fastft.model.lora import adapters
from fastft.model.lora_spec import LoRA
from fastft.model.names import ADAPTER, ADAPTER_CONFIG
from fastft.model.peft_reading import BASE_SHA256, PREFIX, ROWS, TRANSFORMER
from fastft.model.tensor_files import write_safetensors
from fastft.model.weights import folder_of, write_chat_template, write_tokenizer

_PUBLISHED = "openai-community/"


def save_adapter(model: GPT2, folder: Path, *, base_source: str, chat_template: str | None = None) -> None:
    """Writes a model's adapters and new rows as a folder that PEFT and `fastft.model.weights.load` read.

    Args:
        model: with adapters (`fastft.model.part.Part.take`); its other weights are not read.
        folder: where to.
        base_source: the base, as `load` takes it. What lies on the disk is named by its whole path.
        chat_template: the Jinja program that writes its conversations, where it has been trained on some template.

    Raises:
        UserError: the folder or a file cannot be written; the vocabulary is smaller than the tokenizer's.
        ValueError: the model has no adapters, or its new rows end before its vocabulary does, so that nobody would know
            the others.
    """
    part, config = model.part, model.config
    if part is None or part.lora is None:
        raise ValueError("got a model without adapters, expected one with them")
    if part.new_rows is not None and sum(part.new_rows) != config.vocab_size:
        raise ValueError(f"got new rows {part.new_rows}, expected all up to {config.vocab_size}")
    config.tokenizer.check_fits(config.vocab_size, f"cannot write {folder}")
    files.make_folder(folder)
    files.write_json(folder / ADAPTER_CONFIG, _described(model, part.lora, base_source))
    write_tokenizer(config, folder)
    if chat_template is not None:
        write_chat_template(folder, chat_template)
    # Last, as by this file a run is known to have a result.
    write_safetensors(folder / ADAPTER, dict(_tensors(model)), metadata={BASE_SHA256: part.base_sha256})


def _tensors(model: GPT2) -> Iterator[tuple[str, Tensor]]:
    for name, module in adapters(model):
        before = f"{PREFIX}{TRANSFORMER}{name}"
        yield f"{before}.lora_A.weight", module.lora_A
        yield f"{before}.lora_B.weight", module.lora_B
        if module.lora_magnitude_vector is not None:
            yield f"{before}.lora_magnitude_vector", module.lora_magnitude_vector
    if model.new_rows is not None:
        yield f"{PREFIX}{TRANSFORMER}wte.{ROWS}", model.new_rows.wte
        if model.new_rows.lm_head is not None:
            yield f"{PREFIX}lm_head.{ROWS}", model.new_rows.lm_head


def _described(model: GPT2, lora: LoRA, base_source: str) -> dict[str, Any]:
    """What PEFT's `LoraConfig` needs to know; what it is silent of has PEFT's defaults."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _named(base_source),
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "target_modules": list(lora.targets),
        "layers_to_transform": None if lora.layers is None else list(lora.layers),
        "layers_pattern": None if lora.layers is None else "h",
        "trainable_token_indices": _rows(model),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": True,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _rows(model: GPT2) -> list[int] | dict[str, list[int]] | None:
    new = model.new_rows
    if new is None:
        return None
    rows = list(range(new.first, new.first + new.n))
    return rows if new.lm_head is None else {"wte": rows, "lm_head": rows}


def _named(source: str) -> str:
    """The base for whoever reads it from elsewhere: an id, or a whole path."""
    if is_keyword("weights", source):
        return f"{_PUBLISHED}{source}"
    path = Path(source).expanduser()
    return str(folder_of(path.resolve())) if path.exists() else source
