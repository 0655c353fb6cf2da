"""Records to token ids: one flat array, and for each example where its supervised part begins.

An example of n ids (its text's tokens and an end-of-text) gives n - 1 (input, target) pairs. Which targets count is
one number: `first_target`, the index of the first id that is a target. Without masking that is 1 (everything after
the first id); with the prompt masked it is the number of prompt ids, so that the response header, the output and the
end-of-text are supervised: exactly the book's `targets[:L - 1] = -100`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from fastft.common.errors import UserError
from fastft.data.prompts import Template
from fastft.data.records import Record
from fastft.data.tokenizer import Tokenizer

TooLong = Literal["raise", "drop", "truncate"]

Text = tuple[int, str, str]
"""A record as text: its row in the data file, its prompt, its response."""

_ROWS_SHOWN = 10
_EXAMPLES_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class EncodingReport:
    """What encoding did to some rows (row numbers of the data file, rising)."""

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
        known_fingerprint, known_common_prefix: what the methods give, where it was found when the arrays were made:
            finding it again would read all ids.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    first_target: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    report: EncodingReport = field(default_factory=EncodingReport)
    known_fingerprint: str | None = None
    known_common_prefix: int | None = None

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
        if self.known_common_prefix is not None:
            return self.known_common_prefix
        beginning = self[0][: int(self.lengths.min())]
        for begin in range(0, len(self), _EXAMPLES_AT_ONCE):  # by parts: the ids may be a file larger than memory
            begins = self.offsets[:-1][begin : begin + _EXAMPLES_AT_ONCE]
            beginning = beginning[: agreeing(self.ids, begins, beginning)]
        return len(beginning)

    def fingerprint(self) -> str:
        """SHA-256 over ids, offsets and masks: two sets with the same fingerprint train the same."""
        if self.known_fingerprint is not None:
            return self.known_fingerprint
        digest = hashlib.sha256()
        for part in (self.ids, self.offsets, self.first_target):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


def agreeing(ids: npt.NDArray[np.int32], begins: npt.NDArray[np.int64], beginning: npt.NDArray[np.int32]) -> int:
    """How many of the ids `beginning` `[k]` all examples, which begin at `begins` in `ids`, begin with."""
    for position, expected in enumerate(beginning):
        if (ids[begins + position] != expected).any():
            return position
    return len(beginning)


@dataclass(frozen=True, slots=True)
class EncodingRules:
    """What decides, beside text and tokenizer, which ids and targets an example has.

    Attributes:
        mask_prompt: supervise the response (header, output, end-of-text) alone.
        max_length: the most inputs that an example may have; more is handled as `too_long` says.
        too_long: `raise`, `drop`, or `truncate` (cut at the end, as the book's collate does).
    """

    mask_prompt: bool
    max_length: int
    too_long: TooLong = "raise"


@dataclass(frozen=True, slots=True)
class Happened:
    """The rows that something happened to while they were encoded: what is reported, and what is refused."""

    report: EncodingReport = field(default_factory=EncodingReport)
    too_long: list[int] = field(default_factory=list)
    unsupervised: list[int] = field(default_factory=list)

    def add(self, other: Happened) -> None:
        """Takes over the rows of further records."""
        self.report.dropped.extend(other.report.dropped)
        self.report.truncated.extend(other.report.truncated)
        self.report.encoded_apart.extend(other.report.encoded_apart)
        self.too_long.extend(other.too_long)
        self.unsupervised.extend(other.unsupervised)

    def checked_report(self, max_length: int) -> EncodingReport:
        """The report, its rows rising.

        Raises:
            UserError: some rows cannot be trained on; they are named.
        """
        if self.too_long:
            raise UserError(
                f"{len(self.too_long)} examples are longer than {max_length} tokens: "
                f"{name_rows(sorted(self.too_long))}; "
                "choose --too_long drop or --too_long truncate, or a larger --max_length (at most the model's context)"
            )
        if self.unsupervised:
            raise UserError(
                f"{len(self.unsupervised)} examples have no supervised token, as their prompt alone fills {max_length} "
                f"tokens: {name_rows(sorted(self.unsupervised))}; choose --too_long drop, or a larger --max_length"
            )
        report = self.report
        return EncodingReport(sorted(report.dropped), sorted(report.truncated), sorted(report.encoded_apart))


@dataclass(frozen=True, slots=True)
class Chunk:
    """The examples that some records became.

    Attributes:
        ids: `[total]` int32, every example's ids with its end-of-text, end to end.
        lengths: `[n]` int64, ids of each example.
        first_target: `[n]` int64, index within the example of the first supervised id.
        rows: `[n]` int64, the row of the data file that each example came from.
        kept: `[records]` bool, which of the records became an example.
        happened: the rows that something happened to.
    """

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    first_target: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    kept: npt.NDArray[np.bool_]
    happened: Happened


def encode(
    records: Iterable[Record],
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
        mask_prompt, max_length, too_long: see `EncodingRules`.

    Raises:
        UserError: an example is too long and `too_long` is `raise`, or an example would have no supervised target
            (its prompt alone fills `max_length`); the rows are named.
    """
    return encoded_set(texts_of(records, template), tokenizer, EncodingRules(mask_prompt, max_length, too_long))


def encoded_set(texts: Iterable[Text], tokenizer: Tokenizer, rules: EncodingRules) -> EncodedSet:
    """`encode` of texts that no template makes: each a row, what precedes, and what is asked for."""
    chunk = encode_texts(texts, tokenizer, rules)
    return EncodedSet(
        ids=chunk.ids,
        offsets=np.concatenate([[0], np.cumsum(chunk.lengths)]).astype(np.int64),
        first_target=chunk.first_target,
        rows=chunk.rows,
        report=chunk.happened.checked_report(rules.max_length),
    )


def texts_of(records: Iterable[Record], template: Template) -> Iterator[Text]:
    """The records as the text that a template makes of them."""
    for record in records:
        yield record.row, template.prompt_of(record), template.response(record.output)


def encode_texts(texts: Iterable[Text], tokenizer: Tokenizer, rules: EncodingRules) -> Chunk:
    """Encodes texts one after the other; rows that must be refused are noted, not raised."""
    all_ids = array("i")
    lengths, first_target, rows, kept = array("q"), array("q"), array("q"), bytearray()
    happened = Happened()
    for row, prompt, response in texts:
        # One text a call: tiktoken's batches, a thread pool each, take three times as long on texts of this size.
        prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + response)
        if ids[: len(prompt_ids)] != prompt_ids:
            happened.report.encoded_apart.append(row)
            ids = prompt_ids + tokenizer.encode(response)
        ids.append(tokenizer.end_of_text)
        start = max(1, len(prompt_ids)) if rules.mask_prompt else 1
        keeps = _keeps(row, ids, start, rules, happened)
        kept.append(keeps)
        if keeps:
            all_ids.fromlist(ids)
            lengths.append(len(ids))
            first_target.append(start)
            rows.append(row)
    return Chunk(
        ids=np.frombuffer(all_ids, dtype=np.intc).astype(np.int32, copy=False),
        lengths=np.frombuffer(lengths, dtype=np.int64),
        first_target=np.frombuffer(first_target, dtype=np.int64),
        rows=np.frombuffer(rows, dtype=np.int64),
        kept=np.frombuffer(kept, dtype=np.bool_),
        happened=happened,
    )


def _keeps(row: int, ids: list[int], start: int, rules: EncodingRules, happened: Happened) -> bool:
    """Whether the ids make an example, cut to length where the rules say so; notes what happened to the row."""
    if len(ids) - 1 > rules.max_length:
        rows = {
            "raise": happened.too_long,
            "drop": happened.report.dropped,
            "truncate": happened.report.truncated,
        }[rules.too_long]
        rows.append(row)
        if rules.too_long != "truncate":
            return False
        del ids[rules.max_length + 1 :]
    if start >= len(ids):
        happened.unsupervised.append(row)
        return False
    return True


def name_rows(rows: Sequence[int], most: int = _ROWS_SHOWN) -> str:
    """`rows 3, 9, 12 and 4 more`, for messages; the first `most` by number."""
    shown = ", ".join(str(row) for row in rows[:most])
    more = len(rows) - most
    return f"row{'s' if len(rows) > 1 else ''} {shown}" + (f" and {more} more" if more > 0 else "")
