"""What a run has been trained on, held against what is there now; and the model that came of it."""

from __future__ import annotations

from dataclasses import replace

from fastft.common import files
from fastft.common.errors import UserError
from fastft.data.tokenizer import Tokenizer
from fastft.model.gpt2 import GPT2
from fastft.model.weights import load
from fastft.run.data import Data, load_data
from fastft.run.folder import Run


def data_of(run: Run, moved_to: str | None = None) -> Data:
    """The data that a run was trained on, from the file that it was read from, or that this one is now.

    Raises:
        UserError: it has changed since, or nothing tells whether it has.
    """
    options = run.options()
    data = load_data(options if moved_to is None else replace(options, data=moved_to), run.own_tokenizer())
    if not check_same_data(run, data):
        raise UserError(
            f"{run.data} does not say what {run.folder} was trained on, so that its test split may hold training "
            f"records; write it again with `fastft train --resume --out {run.folder}`"
        )
    return data


def check_same_tokenizer(run: Run, tokenizer: Tokenizer) -> None:
    """Holds a tokenizer against what the run was trained with, as far as the run's folder says it.

    Raises:
        UserError: it is another one: its ids would mean other texts.
    """
    known = files.object_or_empty(run.data).get("tokenizer_sha256")
    if known not in (None, tokenizer.fingerprint()):
        raise UserError(
            f"the tokenizer is not the one that {run.folder} was trained with: its files, or the end-of-text that they "
            f"name, have changed in {run.tokenizer} or {run.model}, or beside the weights; put them back, or train "
            "again with --overwrite"
        )


def check_same_data(run: Run, data: Data) -> bool:
    """Holds data against what the run was trained on; False where the run's folder does not say.

    Raises:
        UserError: it has changed: its split would no longer keep test records out of training.
    """
    known = files.object_or_empty(run.data).get("split_sha256")
    if known is None or known == data.fingerprint():
        return known is not None
    raise UserError(
        f"{data.source} is not what {run.folder} was trained on: its records or their order have changed, so that its "
        "test split may hold training records; put the file back, or train again with --overwrite"
    )


def trained_model(run: Run) -> GPT2:
    """The model that a run has exported, in float32 on the CPU.

    Raises:
        UserError: there is none, or the tokenizer beside it is not the one that the run was trained with.
    """
    model = load(run.model)
    check_same_tokenizer(run, model.config.tokenizer)
    return model
