"""fastft instruction-tunes GPT-2 exactly as the reference PyTorch path would, and faster."""

__version__ = "0.1.0"  # before the imports: the modules read it

from fastft.batch import Batch, pack
from fastft.config import TrainOptions, recipe_options
from fastft.errors import FastftError, UserError
from fastft.generation import GenerateOptions, generate
from fastft.model import GPT2, GPT2Config
from fastft.trainer import train
from fastft.weights import load, save_hf

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
