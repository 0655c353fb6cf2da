"""The perplexity of a run's model on reference responses."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastft.batch import Batcher
from fastft.encode import encode
from fastft.engine import evaluate_batch
from fastft.errors import UserError
from fastft.evaluate import TokenMean
from fastft.model import GPT2
from fastft.prompts import TEMPLATES, Template
from fastft.records import Record
from fastft.run import Run
from fastft.tokenizer import gpt2_tokenizer
from fastft.weights import load

_BATCH_SIZE = 16


def response_perplexity(run: Path, entries: Sequence[Mapping[str, Any]]) -> float:
    """exp of the mean loss that the run's model has on the entries' reference responses.

    Every token of a response counts (header, output, end-of-text) and none of its prompt, whatever the run was
    trained on, so that runs with and without a masked prompt compare. Entries that are longer than the context are
    left out.

    Args:
        run: a run's folder with `config.yaml` and `model/`.
        entries: objects with `instruction`, `input`, `output`.

    Raises:
        UserError: the folder lacks a file, or no entry fits the context.
    """
    folder = Run(run)
    model = load(folder.model)
    return _perplexity(model, entries, TEMPLATES[folder.options().template])


def _perplexity(model: GPT2, entries: Sequence[Mapping[str, Any]], template: Template) -> float:
    records = [
        Record(instruction=entry["instruction"], input=entry.get("input", ""), output=entry["output"], row=row)
        for row, entry in enumerate(entries, start=1)
    ]
    encoded = encode(
        records,
        template,
        gpt2_tokenizer(),
        mask_prompt=True,
        max_length=model.config.n_ctx,
        too_long="drop",
    )
    if not len(encoded):
        raise UserError(f"no response fits the model's context of {model.config.n_ctx} tokens")
    losses = TokenMean(encoded, Batcher(), _BATCH_SIZE, every=1).losses(functools.partial(evaluate_batch, model), 0)
    return math.exp(losses["val_loss"])
