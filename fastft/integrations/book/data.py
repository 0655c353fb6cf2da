"""The book's instruction data (chapter 7): prompts, token ids, padded batches."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastft.data.prompts import ALPACA

Entry = Mapping[str, str]


def download_and_load_file(file_path: str | Path, url: str) -> Any:
    """The JSON of a file, which is downloaded where it is not there."""
    path = Path(file_path)
    if not path.exists():
        with urllib.request.urlopen(url) as response:
            path.write_text(response.read().decode("utf-8"), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def format_input(entry: Entry) -> str:
    """The prompt of an entry, Alpaca's with one preamble, without the response's header."""
    return ALPACA.prompt(entry["instruction"], entry["input"])


class InstructionDataset(Dataset[list[int]]):
    """Entries as token ids, prompt and response, without an end-of-text."""

    def __init__(self, data: Sequence[Entry], tokenizer: Any) -> None:
        self.data = data
        self.encoded_texts: list[list[int]] = [
            tokenizer.encode(format_input(entry) + ALPACA.response(entry["output"])) for entry in data
        ]

    def __getitem__(self, index: int) -> list[int]:
        return self.encoded_texts[index]

    def __len__(self) -> int:
        return len(self.data)


def custom_collate_fn(
    batch: Sequence[Sequence[int]],
    pad_token_id: int = 50256,
    ignore_index: int = -100,
    allowed_max_length: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, `[B, W]` int64 each: rows padded at their end, of the padding's targets only the first kept.

    The first is found by value, as in the book: a `pad_token_id` inside of a row is taken for it.
    """
    W = max(map(len, batch))
    padded = torch.full((len(batch), W + 1), pad_token_id)
    for row, ids in enumerate(batch):
        padded[row, : len(ids)] = torch.tensor(ids)
    inputs, targets = padded[:, :-1], padded[:, 1:]
    is_padding = targets == pad_token_id
    targets = targets.masked_fill(is_padding & (is_padding.cumsum(dim=1) > 1), ignore_index)
    if allowed_max_length is not None:
        inputs, targets = inputs[:, :allowed_max_length], targets[:, :allowed_max_length]
    return inputs.contiguous().to(device), targets.contiguous().to(device)
