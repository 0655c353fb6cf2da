"""What several phases work on: the book's examples, and models of the size that GPU_DAY_SIZE names."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from fastft.data.encode import EncodedSet
from fastft.engines.choose import make_engine
from fastft.engines.engine import AnyEngine
from fastft.model.gpt2 import GPT2, GPT2Config, config_for
from fastft.ranks.world import ALONE
from fastft.run.config import TrainOptions
from fastft.scaling.predict import training_set

PRETENDED = bool(os.environ.get("PRETENDED"))
"""A dry run: see `tools.gpu_day.pretended`."""
SIZE = os.environ.get("GPU_DAY_SIZE") or ("nano" if PRETENDED else "gpt2-medium")
EXAMPLES = (64, 8)
"""Examples of the steps that are timed."""


def config(size: str = SIZE) -> GPT2Config:
    """The size's shape."""
    return config_for(size)


def gpt2(size: str = SIZE) -> GPT2:
    """A model with random weights, made on the GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        return GPT2(config(size))


def engine(size: str = SIZE, **options: Any) -> AnyEngine:
    """The trainer's engine over such a model."""
    return make_engine(gpt2(size), TrainOptions(**{"dtype": "bf16", "device": "cuda", **options}), ALONE)


@functools.cache
def examples() -> EncodedSet:
    """The training split of the book's data, or of the embedded sample."""
    return training_set(os.environ.get("FASTFT_BOOK_DATA") or "sample")
