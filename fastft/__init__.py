"""fastft instruction-tunes GPT-2 exactly as the reference PyTorch path would, and faster.

The names below are read from their files when they are asked for: `import fastft` takes no time, and no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastft.common.version import __version__ as __version__

if TYPE_CHECKING:
    from fastft.answers.asking import answer
    from fastft.answers.generation import generate
    from fastft.answers.options import GenerateOptions
    from fastft.batches.batch import Batch, pack
    from fastft.common.errors import FastftError, UserError
    from fastft.model.gpt2 import GPT2, GPT2Config
    from fastft.model.loss import linear_cross_entropy
    from fastft.model.weights import load, save_hf
    from fastft.reports.report import ReportOptions, report
    from fastft.run.config import TrainOptions, recipe_options
    from fastft.scores.compare import CompareOptions, compare
    from fastft.scores.score import ScoreOptions, score
    from fastft.training.callbacks import Callbacks
    from fastft.training.train import train

_HOMES = {
    "GPT2": "model.gpt2",
    "Batch": "batches.batch",
    "Callbacks": "training.callbacks",
    "CompareOptions": "scores.compare",
    "FastftError": "common.errors",
    "GPT2Config": "model.gpt2",
    "GenerateOptions": "answers.options",
    "ReportOptions": "reports.report",
    "ScoreOptions": "scores.score",
    "TrainOptions": "run.config",
    "UserError": "common.errors",
    "answer": "answers.asking",
    "compare": "scores.compare",
    "generate": "answers.generation",
    "linear_cross_entropy": "model.loss",
    "load": "model.weights",
    "pack": "batches.batch",
    "recipe_options": "run.config",
    "report": "reports.report",
    "save_hf": "model.weights",
    "score": "scores.score",
    "train": "training.train",
}

__all__ = [
    "GPT2",
    "Batch",
    "Callbacks",
    "CompareOptions",
    "FastftError",
    "GPT2Config",
    "GenerateOptions",
    "ReportOptions",
    "ScoreOptions",
    "TrainOptions",
    "UserError",
    "answer",
    "compare",
    "generate",
    "linear_cross_entropy",
    "load",
    "pack",
    "recipe_options",
    "report",
    "save_hf",
    "score",
    "train",
]


if not TYPE_CHECKING:  # which would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'fastft' has no attribute {name!r}")
        return getattr(importlib.import_module(f"fastft.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
