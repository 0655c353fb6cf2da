"""What devices and dtypes are called in options, which `fastft.model.precision` chooses; and files of weights."""

from __future__ import annotations

from typing import Literal

Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "bf16", "fp16", "fp32", "fp64"]
WEIGHTS = "model.safetensors"
"""The file of a folder of weights, as transformers has it."""
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The files of a folder with an adapter, as PEFT has it."""
STATE = "state.json"
"""The file of a checkpoint that says where the training was, and the model's shape."""
