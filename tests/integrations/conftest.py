from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_norms import in_its_own_dtype

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="pip install 'fastft[transformers]'")

VOCAB = 97
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": VOCAB}
ROTARY = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {**SMALL, **NO_DROPOUT, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    "llama": ROTARY,
    "qwen3": {**ROTARY, "head_dim": 16},
    "mistral": {**ROTARY, "sliding_window": 64},
    "gemma": {**ROTARY, "head_dim": 8},
    "phi3": {**ROTARY, "pad_token_id": 0},
    "granite": {**ROTARY, "logits_scaling": 3.0},
    "gemma2": {**ROTARY, "head_dim": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": None},
}


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """A small random model; every parameter random, as what starts at 0 or 1 hides mistakes."""

    def make(name: str = "gpt2", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **{**CONFIGS[name], **changes})
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.generation_config.pad_token_id = 0
        if dtype == torch.float64:
            for module in model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    in_its_own_dtype(module)
        return model

    return make
