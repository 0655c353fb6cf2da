"""Records to token ids: one flat array, and for each example the spans of ids that are supervised.

An example of n ids (its text's tokens and an end-of-text) gives n - 1 (input, target) pairs. Which targets count is
said by spans: runs of ids, each from its first one to before its end. An instruction has one, which ends with the
example. Without masking it begins at 1 (everything after the first id); with the prompt masked at the number of prompt
ids, so that the response header, the output and the end-of-text are supervised: exactly the book's
`targets[:L - 1] = -100`.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fastft.common.errors import UserError
from fastft.data.chat_template import AnyTemplate
from fastft.data.documents import contexts
from fastft.data.prompts import END, RESPONSES, Learn, Part, Question, Special, text_of
from fastft.data.records import Record, Tokens
from fastft.data.tokenizer import Tokenizer

TooLong = Literal["raise", "drop", "truncate"]


class Text(NamedTuple):
    """A record as what is encoded.

    Attributes:
        row: its row in the data file.
        parts: what it is made of, in order, and whether each is learned.
        as_transformers: where a token spans the boundary of two parts: see `Template.as_transformers`.
        tokens: its ids, of a record that comes as such; it has no parts then.
        is_document: whether it is cut into contexts with those before and behind it.
    """

    row: int
    parts: tuple[Part, ...]
    as_transformers: bool = False
    tokens: Tokens | None = None
    is_document: bool = False

    @classmethod
    def of_pair(cls, row: int, prompt: str, response: str) -> Text:
        """A prompt, and a response that is learned with the end-of-text behind it."""
        return cls(row, ((prompt, False), (response, True), (END, True)))

    @property
    def characters(self) -> int:
        """Its length."""
        return sum(len(part) for part, _ in self.parts) + (0 if self.tokens is None else len(self.tokens.ids))


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
        learn: which parts are learned.
        max_length: the most inputs that an example may have; more is handled as `too_long` says.
        too_long: `raise`, `drop`, or `truncate` (cut at the end, as the book's collate does).
    """

    learn: Learn
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
                f"{len(self.unsupervised)} examples have no supervised token within {max_length} tokens, as their "
                f"prompt alone fills them, or nothing of them is to be learned: "
                f"{name_rows(sorted(self.unsupervised))}; choose --too_long drop, a larger --max_length, or other "
                "turns by --train_on and --train_roles, or leave these rows out"
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
    template: AnyTemplate,
    tokenizer: Tokenizer,
    *,
    learn: Learn = RESPONSES,
    max_length: int,
    too_long: TooLong = "raise",
) -> EncodedSet:
    """Encodes every record as prompt + response + end-of-text, or as its turns with what is around them.

    Args:
        records: the examples, in order.
        template: gives the texts.
        tokenizer: text to ids.
        learn, max_length, too_long: see `EncodingRules`.

    Raises:
        UserError: an example is too long and `too_long` is `raise`, or an example would have no supervised target
            (its prompt alone fills `max_length`); the rows are named.
    """
    rules = EncodingRules(learn, max_length, too_long)
    return encoded_set(texts_of(records, template, learn), tokenizer, rules)


def encoded_set(texts: Iterable[Text], tokenizer: Tokenizer, rules: EncodingRules) -> EncodedSet:
    """`encode` of texts that no template makes. Documents are cut into contexts in the order of their rows."""
    first, texts = peeked(texts)
    if first is not None and first.is_document:
        (chunk,) = encode_documents(sorted(texts, key=lambda text: text.row), tokenizer, rules, at_once=None)
    else:
        chunk = encode_texts(texts, tokenizer, rules)
    return EncodedSet(
        ids=chunk.ids,
        offsets=np.concatenate([[0], np.cumsum(chunk.lengths)]).astype(np.int64),
        spans=chunk.spans,
        span_offsets=np.concatenate([[0], np.cumsum(chunk.n_spans)]).astype(np.int64),
        rows=chunk.rows,
        report=chunk.happened.checked_report(rules.max_length),
    )


def texts_of(records: Iterable[Record], template: AnyTemplate, learn: Learn) -> Iterator[Text]:
    """The records as the text that a template makes of them."""
    for record in records:
        if record.tokens is not None:
            yield Text(record.row, (), tokens=record.tokens)
        else:
            try:
                parts = template.parts(record, learn)
            except UserError as error:
                raise UserError(f"row {record.row}: {error}") from error
            yield Text(record.row, parts, template.as_transformers, is_document=record.is_document)


def prompts_of(questions: Iterable[Question], template: AnyTemplate, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of the prompts that a template makes of questions: those that training has before their answers."""
    made = [template.prompt_parts(question) for question in questions]
    if template.as_transformers:
        return [_before_an_answer(parts, template.response_header, tokenizer) for parts in made]
    if all(len(parts) == 1 and not isinstance(parts[0][0], Special) for parts in made):
        return tokenizer.encode_many([text_of(parts) for parts in made])  # on several threads
    return [[token for run in _runs(parts) for token in _ids_as_trained(run, tokenizer)] for parts in made]


def _ids_as_trained(run: Sequence[Part], tokenizer: Tokenizer) -> list[int]:
    return _ids_of_run(run, tokenizer) if len(run) == 1 else _apart_where_needed(run, tokenizer)[0]


def _before_an_answer(parts: Sequence[Part], header: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt, of which a last piece of white space may be encoded in another way where a letter follows it
    than at an end (GPT-2's has one token for two line ends, and cuts them apart before a word)."""
    *before, last = _runs(parts)
    ids = [token for run in before for token in _ids_of_run(run, tokenizer)]
    if isinstance(last[0][0], Special):
        return [*ids, *_ids_of_run(last, tokenizer)]
    text = text_of(last)
    own, starts = tokenizer.encode_with_starts(f"{text}{header}a")
    end = bisect.bisect_left(starts, len(text))
    is_cut = end < len(starts) and starts[end] == len(text)
    return [*ids, *(own[:end] if is_cut else tokenizer.encode(text))]


def encode_texts(texts: Iterable[Text], tokenizer: Tokenizer, rules: EncodingRules) -> Chunk:
    """Encodes texts one after the other; rows that must be refused are noted, not raised."""
    all_ids = array("i")
    lengths, spans, n_spans, rows, kept = array("q"), array("q"), array("q"), array("q"), bytearray()
    happened = Happened()
    for text in texts:
        ids, learned = _ids_and_spans(text, tokenizer, happened)
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


def peeked(texts: Iterable[Text]) -> tuple[Text | None, Iterator[Text]]:
    """The first text, None without any, and all of them again."""
    rest = iter(texts)
    first = next(rest, None)
    return first, rest if first is None else itertools.chain([first], rest)


def encode_documents(
    texts: Iterable[Text], tokenizer: Tokenizer, rules: EncodingRules, *, at_once: int | None = _EXAMPLES_AT_ONCE
) -> Iterator[Chunk]:
    """Encodes documents, end to end, as examples of `rules.max_length` inputs (see `fastft.data.documents`).

    Args:
        texts: the documents, in the order in which they are laid out.
        tokenizer: text to ids.
        rules: their limit is an example's length.
        at_once: examples of a chunk; all of them where it is None.
    """
    ids = ((text.row, tokenizer.encode(text_of(text.parts))) for text in texts)
    made = contexts(ids, end_of_text=tokenizer.end_of_text, max_length=rules.max_length)
    while some := list(itertools.islice(made, at_once)):
        lengths = np.array([len(context.ids) for context in some], dtype=np.int64)
        yield Chunk(
            ids=np.array([token for context in some for token in context.ids], dtype=np.int32),
            lengths=lengths,
            spans=np.stack([np.ones_like(lengths), lengths], axis=1),
            n_spans=np.ones_like(lengths),
            rows=np.array([context.row for context in some], dtype=np.int64),
            kept=np.ones(len(some), dtype=np.bool_),
            happened=Happened(),
        )


def _ids_and_spans(text: Text, tokenizer: Tokenizer, happened: Happened) -> tuple[list[int], list[tuple[int, int]]]:
    """A text's ids, and the spans of them that are learned: none empty, one behind another, from 1 on."""
    if text.tokens is not None:
        ids = list(text.tokens.ids)
        if max(ids) >= tokenizer.size():
            raise UserError(
                f"row {text.row}: got the token id {max(ids)}, expected ids of the model's tokenizer, which has "
                f"{tokenizer.size()}"
            )
        return ids, _joined((at, at + 1) for at, label in enumerate(text.tokens.labels) if label != _IGNORED)
    ids, some_apart = [], False
    learned: list[tuple[int, int]] = []
    for run in _runs(text.parts):
        if isinstance(run[0][0], Special):
            bounds = [(0, 1)]
            own = _ids_of_run(run, tokenizer)
        elif text.as_transformers:
            own, bounds = _as_transformers(run, tokenizer)
        else:
            own, bounds, is_apart = _apart_where_needed(run, tokenizer)
            some_apart |= is_apart
        before = len(ids)
        ids += own
        learned += [
            (before + begin, before + end) for (_, wanted), (begin, end) in zip(run, bounds, strict=True) if wanted
        ]
    if some_apart:
        happened.report.encoded_apart.append(text.row)
    return ids, _joined(learned)


_IGNORED = -100
Bounds = list[tuple[int, int]]


def _runs(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts that are encoded together: special tokens stand by themselves."""
    for is_special, some in itertools.groupby(parts, key=lambda part: isinstance(part[0], Special)):
        if is_special:
            yield from ([part] for part in some)
        else:
            yield list(some)


def _ids_of_run(run: Sequence[Part], tokenizer: Tokenizer) -> list[int]:
    text = run[0][0]
    return [tokenizer.special(text)] if isinstance(text, Special) else tokenizer.encode(text_of(run))


def _apart_where_needed(run: Sequence[Part], tokenizer: Tokenizer) -> tuple[list[int], Bounds, bool]:
    """The ids of parts as one text, and the bounds of each; all parts apart, and True, where the ids of a beginning of
    them are no beginning of the ids."""
    # One text a call: tiktoken's batches, a thread pool each, take three times as long on texts of this size.
    parts = [part for part, _ in run]
    ids = tokenizer.encode("".join(parts))
    begins = [0]
    for k in range(1, len(parts)):
        before = tokenizer.encode("".join(parts[:k]))
        if ids[: len(before)] != before:
            apart = [tokenizer.encode(part) for part in parts]
            return [token for one in apart for token in one], _bounds(itertools.accumulate(map(len, apart))), True
        begins.append(len(before))
    return ids, _bounds([*begins[1:], len(ids)]), False


def _bounds(ends: Iterable[int]) -> Bounds:
    """Of parts that lie end to end from 0 on."""
    return list(itertools.pairwise([0, *ends]))


def _as_transformers(run: Sequence[Part], tokenizer: Tokenizer) -> tuple[list[int], Bounds]:
    """The ids of parts as one text, and the bounds of each: from the token that holds its first character to the one
    that holds its last."""
    ids, starts = tokenizer.encode_with_starts(text_of(run))
    ends = list(itertools.accumulate(len(part) for part, _ in run))
    bounds = []
    for begin, end in itertools.pairwise([0, *ends]):
        first = bisect.bisect_left(starts, begin)
        holds = first < len(starts) and starts[first] == begin
        bounds.append((first if holds else max(0, first - 1), bisect.bisect_left(starts, end)))
    return ids, bounds


def _joined(spans: Iterable[tuple[int, int]]) -> Bounds:
    """Rising spans without those that touch; none begins at 0, as nothing is before an example's first id."""
    joined: Bounds = []
    for begin, end in spans:
        begin = max(1, begin, joined[-1][1] if joined else 1)
        if joined and begin == joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, begin))
        elif begin < end:
            joined.append((begin, end))
    return joined


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
