"""fastft instruction-tunes GPT-2 exactly as the reference PyTorch path would, and faster."""

from fastft.answers.generation import GenerateOptions, generate
from fastft.batches.batch import Batch, pack
from fastft.common.errors import FastftError, UserError
from fastft.common.version import __version__ as __version__
from fastft.model.gpt2 import GPT2, GPT2Config
from fastft.model.weights import load, save_hf
from fastft.run.config import TrainOptions, recipe_options
from fastft.training.train import train

__all__ = [
    "GPT2",
    "Batch",
    "FastftError",
    "GPT2Config",
    "GenerateOptions",
    "TrainOptions",
    "UserError",
    "generate",
    "load",
    "pack",
    "recipe_options",
    "save_hf",
    "train",
]
