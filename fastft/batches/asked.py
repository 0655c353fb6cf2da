"""What is asked of an example: from token ids and labels of any source, whose layout is checked and never guessed.

Labels come in two layouts. Hugging Face's are *not shifted*: the label at a place is the token at that place, and the
token before it is asked for it. A book's or nanoGPT's targets *are shifted*: the label at a place is the token after
it. Taken for each other, they train a model to repeat its input, or to skip a token, without a word. So each label is
held against the ids, which say which of the two it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastft.common.errors import UserError

IGNORE_INDEX = -100

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Asked:
    """An example: its inputs, and what is asked of which of them.

    Attributes:
        inputs: `[n]` integers, token ids.
        at: `[p]` int64, rising: the inputs that are asked for a target.
        targets: `[p]` integers, what each of them is asked for.
    """

    inputs: npt.NDArray[Any]
    at: Ids
    targets: npt.NDArray[Any]

    def trimmed(self) -> Asked:
        """Without the inputs behind the last one that is asked: no loss depends on them."""
        return Asked(self.inputs[: self.at[-1] + 1 if len(self.at) else 0], self.at, self.targets)


def by_first_target(examples: Sequence[npt.NDArray[np.int32]], first_target: Sequence[int]) -> list[Asked]:
    """Examples of n ids, the last one an end-of-text, that have n - 1 inputs.

    Args:
        examples: the ids of each example.
        first_target: index within each example of the first id that is asked for, at least 1.

    Raises:
        UserError: `first_target` is not one whole number for each example.
    """
    starts = np.asarray(first_target)
    if starts.shape != (len(examples),) or not (np.issubdtype(starts.dtype, np.integer) or not len(starts)):
        raise UserError(
            f"pack: got first_target of shape {list(starts.shape)} ({starts.dtype}), expected one index for each of "
            f"{len(examples)} examples; labels are given by name, labels=..."
        )
    return [
        Asked(ids[:-1], np.arange(start - 1, len(ids) - 1), ids[start:])
        for ids, start in zip(examples, starts.tolist(), strict=True)
    ]


def by_spans(ids: npt.NDArray[np.int32], spans: npt.NDArray[np.int64]) -> Asked:
    """An example of n ids that has n - 1 inputs, and `spans` `[m, 2]` of ids that are asked for, each from its first
    one, at least 1, to before its end."""
    wanted = np.concatenate([np.arange(begin, end) for begin, end in spans.tolist()])
    return Asked(ids[:-1], wanted - 1, ids[wanted])


def by_labels(input_ids: Any, labels: Any, attention_mask: Any = None, *, shifted: bool = False) -> list[Asked]:
    """Rows of token ids with labels.

    Args:
        input_ids: `[B, W]` integers, or B sequences of any lengths: a tensor, arrays or lists.
        labels: in the shape of `input_ids`, -100 where nothing is asked.
        attention_mask: in the shape of `input_ids`, 1 for a token and 0 for padding, at either end of a row; without
            it each id is a token. Positions count from a row's first token.
        shifted: a label is the token after its place, not the token at it. The label of a row's first token has no
            token before it which could be asked: not shifted, it is left out, as no loss of Hugging Face's has it.

    Raises:
        UserError: shapes that differ, ids or labels that are no token's, a mask with holes or of padding alone, a label
            on padding, labels in the other layout.
    """
    rows, wanted = _rows("input_ids", input_ids), _rows("labels", labels)
    masks = None if attention_mask is None else _rows("attention_mask", attention_mask)
    for name, others in (("labels", wanted), ("attention_mask", masks)):
        if others is not None and [len(row) for row in others] != [len(row) for row in rows]:
            raise UserError(f"pack: got {name} of other lengths than input_ids, expected the same shape")
    return [
        _row(number, row, wanted[number], None if masks is None else masks[number], shifted)
        for number, row in enumerate(rows)
    ]


def asked_rows(inputs: torch.Tensor, targets: torch.Tensor) -> list[Asked]:
    """Rows of ids and shifted targets, `[B, W]` each, as a collate makes them; any target is taken."""
    pairs = zip(inputs.cpu().numpy(), targets.cpu().numpy(), strict=True)
    return [Asked(row, at := np.flatnonzero(wanted != IGNORE_INDEX), wanted[at]) for row, wanted in pairs]


def _rows(name: str, given: Any) -> list[Ids]:
    """Each row as an array."""
    rows = [np.asarray(row.cpu() if isinstance(row, torch.Tensor) else row) for row in given]
    for number, row in enumerate(rows):
        if row.ndim != 1 or not (np.issubdtype(row.dtype, np.integer) or row.dtype == np.bool_):
            raise UserError(
                f"pack: got {name}[{number}] of shape {list(row.shape)} ({row.dtype}), expected integers, [B, W] or "
                "one sequence for each row"
            )
    return [row.astype(np.int64) for row in rows]


def _row(number: int, ids: Ids, labels: Ids, mask: Ids | None, shifted: bool) -> Asked:
    first, end = (0, len(ids)) if mask is None else _tokens_of(number, mask)
    is_asked = labels != IGNORE_INDEX
    if (is_asked[:first].any() or is_asked[end:].any()) or first == end:
        what = "no token" if first == end else "labels on padding"
        raise UserError(
            f"pack: got row {number} with {what}; padding has the label {IGNORE_INDEX}, and each row a token"
        )
    ids, labels, is_asked = ids[first:end], labels[first:end], is_asked[first:end]
    if (ids < 0).any() or (labels[is_asked] < 0).any():
        raise UserError(f"pack: got a negative id in row {number}, expected token ids, or {IGNORE_INDEX} for no label")
    _check_layout(number, ids, labels, is_asked, shifted)
    at = np.flatnonzero(is_asked)
    if not shifted:
        at = at[at > 0] - 1
        return Asked(ids, at, labels[at + 1])
    return Asked(ids, at, labels[at])


def _tokens_of(number: int, mask: Ids) -> tuple[int, int]:
    """Where the tokens of a row begin and end."""
    at = np.flatnonzero(mask)
    if ((mask != 0) & (mask != 1)).any() or (len(at) and at[-1] - at[0] + 1 != len(at)):
        raise UserError(
            f"pack: got attention_mask[{number}] that is not one run of ones, expected padding at a row's ends alone; "
            "rows of several documents go in one by one"
        )
    return (int(at[0]), int(at[-1]) + 1) if len(at) else (0, 0)


def _check_layout(number: int, ids: Ids, labels: Ids, is_asked: npt.NDArray[np.bool_], shifted: bool) -> None:
    same = labels == ids
    following = np.append(labels[:-1] == ids[1:], True)  # the last label's token is not among the inputs
    right, other = (following, same) if shifted else (same, following)
    if right[is_asked].all():
        return
    place = int(np.flatnonzero(is_asked & ~right)[0])
    expected = f"the token after it, {ids[place + 1]}" if shifted else f"the token at its place, {ids[place]}"
    remedy = f"give shifted={not shifted}" if other[is_asked].all() else "make labels of the ids themselves"
    raise UserError(
        f"pack: got label {labels[place]} at place {place} of row {number}, expected {expected} (shifted={shifted}); "
        f"{remedy}"
    )
