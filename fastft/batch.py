"""`Batch`: the one type that a model is given, whatever made it.

Letters: `T` tokens, `R` loss rows, `P` supervised targets of single examples; a padded batch has `B` rows of `W`
tokens, `T = B W`, laid end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastft.tokenizer import END_OF_TEXT

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tokens, what each one sees, and which predictions are asked for.

    Attributes:
        tokens: `[T]` int64, token ids.
        positions: `[T]` int64, position of the token in its own example.
        visible_until: `[T]` int32; key `k` is visible to query `q` exactly when `k <= q < visible_until[k]`.
        rows: `[R]` int64, the token that each loss row reads its hidden state from.
        targets: `[R]` int64, the next token that the row is asked for.
        weights: `[R]` float32, how many examples supervise the row.
        pair_rows: `[P]` int64, the row of each supervised target of each example.
        pair_examples: `[P]` int64, the example (its index in the batch) of each supervised target.
        examples: how many examples the batch holds.
        tokens_real: how many tokens belong to an example; the others are padding.
        row_length: `W` where the batch is padded: it lets attention run on `[B, W]`. None elsewhere.
    """

    tokens: Tensor
    positions: Tensor
    visible_until: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor
    pair_rows: Tensor
    pair_examples: Tensor
    examples: int
    tokens_real: int
    row_length: int | None = None

    @property
    def count(self) -> int:
        """`P`: supervised targets, each example's counted by itself."""
        return self.pair_rows.numel()

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def example_losses(self, row_losses: Tensor) -> Tensor:
        """Sums `row_losses` `[R]` over each example's targets: `[examples]`, in the dtype of `row_losses`."""
        sums = row_losses.new_zeros(self.examples)
        return sums.index_add_(0, self.pair_examples, row_losses.index_select(0, self.pair_rows))


def padded_batch(examples: Sequence[npt.NDArray[np.int32]], first_target: Sequence[int]) -> Batch:
    """The book's collate: every example padded at its end to the longest of the batch.

    Args:
        examples: the ids of each example, its end-of-text last; an example of n ids has n - 1 inputs.
        first_target: index within each example of the first supervised id, at least 1.

    Inputs are padded with end-of-text, and targets end at the example's own end-of-text: padding is told by length,
    never by value, so that an id equal to the padding changes nothing.
    """
    lengths = np.array([len(ids) - 1 for ids in examples], dtype=np.int64)
    B, W = len(examples), int(lengths.max())
    inputs = np.full((B, W), END_OF_TEXT, dtype=np.int64)
    labels = np.full((B, W), IGNORE_INDEX, dtype=np.int64)
    for row, (ids, start) in enumerate(zip(examples, first_target, strict=True)):
        inputs[row, : len(ids) - 1] = ids[:-1]
        labels[row, start - 1 : len(ids) - 1] = ids[start:]
    return from_padded(torch.from_numpy(inputs), torch.from_numpy(labels), tokens_real=int(lengths.sum()))


def from_padded(inputs: Tensor, labels: Tensor, *, tokens_real: int | None = None) -> Batch:
    """A `Batch` from what an ordinary collate gives.

    Args:
        inputs: `[B, W]` int64 token ids, padded at the end of each row.
        labels: `[B, W]` int64, the next token of each position, or -100 where none is asked for.
        tokens_real: how many inputs are not padding; all of them where it is not given.

    Raises:
        ValueError: the shapes differ or are not two-dimensional.
    """
    if inputs.ndim != 2 or inputs.shape != labels.shape:
        raise ValueError(
            f"got inputs {tuple(inputs.shape)} and labels {tuple(labels.shape)}, expected the same shape [B, W]"
        )
    B, W = inputs.shape
    rows = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    row_ends = torch.arange(1, B + 1, dtype=torch.int32, device=inputs.device) * W
    return Batch(
        tokens=inputs.flatten(),
        positions=torch.arange(W, device=inputs.device).repeat(B),
        visible_until=row_ends.repeat_interleave(W),
        rows=rows,
        targets=labels.flatten()[rows],
        weights=torch.ones(len(rows), device=inputs.device),
        pair_rows=torch.arange(len(rows), device=inputs.device),
        pair_examples=rows // W,
        examples=B,
        tokens_real=B * W if tokens_real is None else tokens_real,
        row_length=W,
    )
