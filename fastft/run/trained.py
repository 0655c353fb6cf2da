"""What a run has been trained on, held against what is there now; and the model that came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastft.common import files
from fastft.common.errors import UserError
from fastft.common.keywords import is_keyword
from fastft.common.shell import command
from fastft.data.tokenizer import Tokenizer
from fastft.model.gpt2 import GPT2
from fastft.model.weights import load
from fastft.run.config import TrainOptions
from fastft.run.data import Data, load_data
from fastft.run.folder import Run


def data_of(run: Run, moved_to: str | Sequence[str] | None = None) -> Data:
    """The data that a run was trained on, from the files that it was read from, or that these are now.

    Args:
        run: its folder.
        moved_to: the files of `--data`, in their order; those of `--val_data` and `--test_data` may come after them.

    Raises:
        UserError: it has changed since, or nothing tells whether it has.
    """
    options = run.options()
    if moved_to is not None:
        options = _moved(options, [moved_to] if isinstance(moved_to, str) else list(moved_to))
    data = load_data(options, run.own_tokenizer(), run.template())
    if not check_same_data(run, data):
        raise UserError(
            f"{run.data} does not say what {run.folder} was trained on, so that its test split may hold training "
            f"records; write it again with `{command('train', resume=True, out=run.folder)}`"
        )
    return data


def _moved(options: TrainOptions, files: list[str]) -> TrainOptions:
    inputs, n = options.inputs(), len(options.files)
    if len(files) not in (n, len(inputs)):
        was = ", ".join(f"--{flag} {file}" for flag, file in inputs)
        more = "" if len(inputs) == n else f", or all {len(inputs)} in this order"
        raise UserError(f"got --data with {len(files)} files, of a run with {was}; expected {n}{more}")
    gone = [file for flag, file in inputs[n:] if not is_keyword(flag, file) and not Path(file).exists()]
    if len(files) == n and gone:
        raise UserError(
            f"the run's {gone[0]} is not there any more either; give --data all {len(inputs)} files, in the order of "
            "--data, --val_data and --test_data"
        )
    found: dict[str, Any] = {flag: file for (flag, _), file in zip(inputs[n:], files[n:], strict=False)}
    return replace(options, data=files[:n], **found)


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
