"""Records to token ids: one flat array, and for each example the spans of ids that are supervised.

An example of n ids (its text's tokens and an end-of-text) gives n - 1 (input, target) pairs. Which targets count is
said by spans: runs of ids, each from its first one to before its end. An instruction has one, which ends with the
example. Without masking it begins at 1 (everything after the first id); with the prompt masked at the number of prompt
ids, so that the response header, the output and the end-of-text are supervised: exactly the book's
`targets[:L - 1] = -100`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fastft.common.errors import UserError
from fastft.data.prompts import Template
from fastft.data.records import Record
from fastft.data.tokenizer import Tokenizer

TooLong = Literal["raise", "drop", "truncate"]


class Text(NamedTuple):
    """A record as text.

    Attributes:
        row: its row in the data file.
        parts: what it is made of, in order, and whether each is learned; no two neighbours alike. The last one has the
            end-of-text.
    """

    row: int
    parts: tuple[tuple[str, bool], ...]

    @classmethod
    def of_pair(cls, row: int, prompt: str, response: str) -> Text:
        """A prompt, and a response that is learned."""
        return cls(row, ((prompt, False), (response, True)))

    @property
    def characters(self) -> int:
        """Its length."""
        return sum(len(part) for part, _ in self.parts)


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
        spans: `[m, 2]` int64, where each run of supervised ids begins and ends within its example: at least at 1, as
            nothing comes before an example's first id; none empty, and one behind another.
        span_offsets: `[n + 1]` int64; example i has `spans[span_offsets[i]:span_offsets[i + 1]]`, at least one.
        rows: `[n]` int64, the row of the data file that each example came from.
        report: what happened to some rows on the way.
        known_fingerprint, known_common_prefix: what the methods give, where it was found when the arrays were made:
            finding it again would read all ids.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64]
    span_offsets: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    report: EncodingReport = field(default_factory=EncodingReport)
    known_fingerprint: str | None = None
    known_common_prefix: int | None = None

    @classmethod
    def of_suffixes(
        cls,
        ids: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int64],
        first_target: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
    ) -> EncodedSet:
        """Examples that are each supervised from the id at `first_target` `[n]` to their last one."""
        spans = np.stack([first_target, np.diff(offsets)], axis=1)
        return cls(ids=ids, offsets=offsets, spans=spans, span_offsets=np.arange(len(spans) + 1), rows=rows)

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
        ends = np.concatenate([[0], np.cumsum(self.spans[:, 1] - self.spans[:, 0])])
        counts: npt.NDArray[np.int64] = ends[self.span_offsets[1:]] - ends[self.span_offsets[:-1]]
        return counts

    def spans_of(self, index: int) -> npt.NDArray[np.int64]:
        """`[spans, 2]` of one example."""
        return self.spans[self.span_offsets[index] : self.span_offsets[index + 1]]

    @property
    def are_suffixes(self) -> bool:
        """Whether each example is supervised from some id to its last one, and nowhere else."""
        return len(self.spans) == len(self) and bool((self.spans[:, 1] == np.diff(self.offsets)).all())

    @property
    def first_target(self) -> npt.NDArray[np.int64]:
        """`[n]` int64, index within the example of the first supervised id, from which on all are.

        Raises:
            ValueError: some example has more than one supervised span, or ids behind it.
        """
        if not self.are_suffixes:
            raise ValueError("got examples with several supervised spans, which no first target tells: ask for spans")
        return self.spans[:, 0]

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
        # Of suffixes their beginnings alone: what runs have noted whose examples had no other form.
        masks = (self.first_target,) if self.are_suffixes else (self.spans, self.span_offsets)
        for part in (self.ids, self.offsets, *masks):
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
        spans: `[m, 2]` int64, the supervised spans of all examples, as in an `EncodedSet`.
        n_spans: `[n]` int64, how many of them each example has.
        rows: `[n]` int64, the row of the data file that each example came from.
        kept: `[records]` bool, which of the records became an example.
        happened: the rows that something happened to.
    """

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64]
    n_spans: npt.NDArray[np.int64]
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
    """`encode` of texts that no template makes."""
    chunk = encode_texts(texts, tokenizer, rules)
    return EncodedSet(
        ids=chunk.ids,
        offsets=np.concatenate([[0], np.cumsum(chunk.lengths)]).astype(np.int64),
        spans=chunk.spans,
        span_offsets=np.concatenate([[0], np.cumsum(chunk.n_spans)]).astype(np.int64),
        rows=chunk.rows,
        report=chunk.happened.checked_report(rules.max_length),
    )


def texts_of(records: Iterable[Record], template: Template) -> Iterator[Text]:
    """The records as the text that a template makes of them."""
    for record in records:
        yield Text.of_pair(record.row, template.prompt_of(record), template.response(record.output))


def encode_texts(texts: Iterable[Text], tokenizer: Tokenizer, rules: EncodingRules) -> Chunk:
    """Encodes texts one after the other; rows that must be refused are noted, not raised."""
    all_ids = array("i")
    lengths, spans, n_spans, rows, kept = array("q"), array("q"), array("q"), array("q"), bytearray()
    happened = Happened()
    for text in texts:
        ids, learned = _ids_and_spans(text, tokenizer, rules, happened)
        learned = _that_fit(text.row, ids, learned, rules, happened)
        kept.append(bool(learned))
        if learned:
            all_ids.fromlist(ids)
            lengths.append(len(ids))
            n_spans.append(len(learned))
            rows.append(text.row)
            for span in learned:
                spans.extend(span)
    return Chunk(
        ids=np.frombuffer(all_ids, dtype=np.intc).astype(np.int32, copy=False),
        lengths=np.frombuffer(lengths, dtype=np.int64),
        spans=np.frombuffer(spans, dtype=np.int64).reshape(-1, 2),
        n_spans=np.frombuffer(n_spans, dtype=np.int64),
        rows=np.frombuffer(rows, dtype=np.int64),
        kept=np.frombuffer(kept, dtype=np.bool_),
        happened=happened,
    )


def _ids_and_spans(
    text: Text, tokenizer: Tokenizer, rules: EncodingRules, happened: Happened
) -> tuple[list[int], list[tuple[int, int]]]:
    """A text's ids with its end-of-text, which belongs to the last part, and the spans that are learned."""
    # One text a call: tiktoken's batches, a thread pool each, take three times as long on texts of this size.
    parts = [part for part, _ in text.parts]
    ids = tokenizer.encode("".join(parts))
    begins = [0]
    for k in range(1, len(parts)):
        before = tokenizer.encode("".join(parts[:k]))
        if ids[: len(before)] != before:
            happened.report.encoded_apart.append(text.row)
            apart = [tokenizer.encode(part) for part in parts]
            ids, begins = [token for one in apart for token in one], [0, *np.cumsum([*map(len, apart)])[:-1].tolist()]
            break
        begins.append(len(before))
    ids.append(tokenizer.end_of_text)
    if not rules.mask_prompt:
        return ids, [(1, len(ids))]
    ends = [*begins[1:], len(ids)]
    return ids, [
        (max(1, begin), end) for (_, is_learned), begin, end in zip(text.parts, begins, ends, strict=True) if is_learned
    ]


def _that_fit(
    row: int, ids: list[int], spans: list[tuple[int, int]], rules: EncodingRules, happened: Happened
) -> list[tuple[int, int]]:
    """The spans of an example's ids, which are cut to length where the rules say so, and behind the last span, as no
    loss depends on what is there; none where they make no example. Notes what happened to the row."""
    if len(ids) - 1 > rules.max_length:
        rows = {
            "raise": happened.too_long,
            "drop": happened.report.dropped,
            "truncate": happened.report.truncated,
        }[rules.too_long]
        rows.append(row)
        if rules.too_long != "truncate":
            return []
        del ids[rules.max_length + 1 :]
    fitting = [(begin, min(end, len(ids))) for begin, end in spans if begin < min(end, len(ids))]
    if not fitting:
        happened.unsupervised.append(row)
    else:
        del ids[fitting[-1][1] :]
    return fitting


def name_rows(rows: Sequence[int], most: int = _ROWS_SHOWN) -> str:
    """`rows 3, 9, 12 and 4 more`, for messages; the first `most` by number."""
    shown = ", ".join(str(row) for row in rows[:most])
    more = len(rows) - most
    return f"row{'s' if len(rows) > 1 else ''} {shown}" + (f" and {more} more" if more > 0 else "")
