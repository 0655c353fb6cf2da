"""Records to token ids: one flat array, and for each example where its supervised part begins.

An example of n ids (its text's tokens and an end-of-text) gives n - 1 (input, target) pairs. Which targets count is
one number: `first_target`, the index of the first id that is a target. Without masking that is 1 (everything after
the first id); with the prompt masked it is the number of prompt ids, so that the response header, the output and the
end-of-text are supervised: exactly the book's `targets[:L - 1] = -100`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from fastft.errors import UserError
from fastft.prompts import Template
from fastft.records import Record
from fastft.tokenizer import END_OF_TEXT, Tokenizer

TooLong = Literal["raise", "drop", "truncate"]

_ROWS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class EncodingReport:
    """What encoding did to some rows (row numbers of the data file)."""

    dropped: list[int] = field(default_factory=list)
    """Longer than the limit and left out."""
    truncated: list[int] = field(default_factory=list)
    """Longer than the limit and cut at the end: their end-of-text is not learned."""
    encoded_apart: list[int] = field(default_factory=list)
    """The ids of the full text do not begin with the prompt's ids, so prompt and response were encoded apart."""

    def lines(self, max_length: int) -> list[str]:
        """One line for each thing that happened, with counts and rows."""
        said = [
            (self.dropped, f"longer than {max_length} tokens and dropped"),
            (self.truncated, f"longer than {max_length} tokens and cut: their end-of-text is not learned"),
            (self.encoded_apart, "prompt and response encoded apart (a token would span their boundary)"),
        ]
        return [f"{len(rows)} examples {what}: {name_rows(rows)}" for rows, what in said if rows]


@dataclass(frozen=True, slots=True)
class EncodedSet:
    """Token ids of `n` examples, end to end.

    Attributes:
        ids: `[total]` int32, every example's ids with its end-of-text.
        offsets: `[n + 1]` int64; example i is `ids[offsets[i]:offsets[i + 1]]`.
        first_target: `[n]` int64, index within the example of the first supervised id.
        rows: `[n]` int64, the row of the data file that each example came from.
        report: what happened to some rows on the way.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    first_target: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    report: EncodingReport = field(default_factory=EncodingReport)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """`[n]` int64: inputs of each example, which is its number of ids less one."""
        return np.diff(self.offsets) - 1

    @property
    def supervised(self) -> npt.NDArray[np.int64]:
        """`[n]` int64: supervised targets of each example."""
        return self.lengths + 1 - self.first_target

    def common_prefix(self) -> int:
        """How many inputs all examples begin with alike."""
        if not len(self):
            return 0
        begins = self.offsets[:-1]
        for position in range(int(self.lengths.min())):
            column = self.ids[begins + position]
            if (column != column[0]).any():
                return position
        return int(self.lengths.min())

    def fingerprint(self) -> str:
        """SHA-256 over ids, offsets and masks: two sets with the same fingerprint train the same."""
        digest = hashlib.sha256()
        for array in (self.ids, self.offsets, self.first_target):
            digest.update(array.tobytes())
        return digest.hexdigest()


def encode(
    records: Sequence[Record],
    template: Template,
    tokenizer: Tokenizer,
    *,
    mask_prompt: bool,
    max_length: int,
    too_long: TooLong = "raise",
) -> EncodedSet:
    """Encodes every record as prompt + response + end-of-text.

    Args:
        records: the examples, in order.
        template: gives the prompt's and the response's text.
        tokenizer: text to ids.
        mask_prompt: supervise the response (header, output, end-of-text) alone.
        max_length: the most inputs that an example may have; more is handled as `too_long` says.
        too_long: `raise`, `drop`, or `truncate` (cut at the end, as the book's collate does).

    Raises:
        UserError: an example is too long and `too_long` is `raise`, or an example would have no supervised target
            (its prompt alone fills `max_length`); the rows are named.
    """
    prompts = [template.prompt(record.instruction, record.input) for record in records]
    responses = [template.response(record.output) for record in records]
    prompt_ids = tokenizer.encode_many(prompts)
    full_ids = tokenizer.encode_many([prompt + response for prompt, response in zip(prompts, responses, strict=True)])

    report = EncodingReport()
    kept_ids: list[list[int]] = []
    first_target: list[int] = []
    rows: list[int] = []
    too_long_rows: list[int] = []
    unsupervised_rows: list[int] = []
    for record, prompt, full, response in zip(records, prompt_ids, full_ids, responses, strict=True):
        ids = full
        if full[: len(prompt)] != prompt:
            report.encoded_apart.append(record.row)
            ids = prompt + tokenizer.encode(response)
        ids = [*ids, END_OF_TEXT]
        start = max(1, len(prompt)) if mask_prompt else 1
        if len(ids) - 1 > max_length:
            if too_long == "raise":
                too_long_rows.append(record.row)
                continue
            if too_long == "drop":
                report.dropped.append(record.row)
                continue
            report.truncated.append(record.row)
            ids = ids[: max_length + 1]
        if start >= len(ids):
            unsupervised_rows.append(record.row)
            continue
        kept_ids.append(ids)
        first_target.append(start)
        rows.append(record.row)

    if too_long_rows:
        raise UserError(
            f"{len(too_long_rows)} examples are longer than {max_length} tokens: {name_rows(too_long_rows)}; "
            "choose --too_long drop or --too_long truncate, or a larger --max_length"
        )
    if unsupervised_rows:
        raise UserError(
            f"{len(unsupervised_rows)} examples have no supervised token, as their prompt alone fills {max_length} "
            f"tokens: {name_rows(unsupervised_rows)}; choose --too_long drop, or a larger --max_length"
        )
    lengths = np.array([0, *(len(ids) for ids in kept_ids)], dtype=np.int64)
    return EncodedSet(
        ids=np.array([token for ids in kept_ids for token in ids], dtype=np.int32),
        offsets=np.cumsum(lengths),
        first_target=np.array(first_target, dtype=np.int64),
        rows=np.array(rows, dtype=np.int64),
        report=report,
    )


def name_rows(rows: Sequence[int], most: int = _ROWS_SHOWN) -> str:
    """`rows 3, 9, 12 and 4 more`, for messages; the first `most` by number."""
    shown = ", ".join(str(row) for row in rows[:most])
    more = len(rows) - most
    return f"row{'s' if len(rows) > 1 else ''} {shown}" + (f" and {more} more" if more > 0 else "")
