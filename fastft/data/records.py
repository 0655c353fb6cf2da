"""Records: what an example is, what decides which ones are read, and how they are split.

A record asks for something and has a reference answer (`instruction`, `input`, `output`), or is a conversation, some
segments, a document, or token ids; `fastft.data.formats` makes it of a row. Two further keys of a row mean something:
`category` (text) has its figures apart, and `choices` (texts) makes a multiple-choice question, whose `output` is one
of them or its letter, A for the first. Others are kept and written back, and counted by the audit
(`fastft.data.audit`).
"""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fastft.common.kinds import kind_of

FIELDS = ("instruction", "input", "output")
KINDLESS_KEYS = ("category", "choices")
"""Keys that mean the same in rows of every format."""
ALIASES = {"context": "input", "response": "output"}
"""Other names of fields, those of databricks-dolly-15k; each is read where its field is missing or empty."""

END_OF_TEXT_MARK = "<|endoftext|>"
"""How GPT-2's end-of-text is written in text, where it is ordinary tokens and ends nothing. Much data holds it, also
where it is another model's that is trained."""

REPEATED_KEY, NOT_A_NUMBER, END_TAKEN = "repeated key", "not a number", "end taken"
"""What a record's `notes` may hold, beside the aliases that it was read by."""
NOT_READ = "not read: "
"""Begins the note of a key within a turn that nothing reads, such as `not read: messages.name`."""

EndOfTextInData = Literal["refuse", "keep"]


Format = Literal["auto", "alpaca", "dolly", "prompt_completion", "messages", "sharegpt", "segments", "text", "tokens"]


@dataclass(frozen=True, slots=True)
class ReadingRules:
    """What decides, beside a file's content, which records are read out of it.

    Attributes:
        end_of_text_in_data: what becomes of the text of an end-of-text in a record. `refuse`: at the very end of an
            output it is taken as the end and removed, elsewhere the record is malformed; `keep`: it is text.
        allow_empty_output: whether a record may ask for a response of nothing.
        end_marks: the texts of end-of-texts.
        format: what a row's keys mean; `auto` tells it by them.
        fields: (own, theirs): by which other name a key of the format is read, as `("instruction", "question")`.
    """

    end_of_text_in_data: EndOfTextInData = "refuse"
    allow_empty_output: bool = False
    end_marks: tuple[str, ...] = (END_OF_TEXT_MARK,)
    format: Format = "auto"
    fields: tuple[tuple[str, str], ...] = ()

    def with_end(self, text: str) -> ReadingRules:
        """The rules with a model's own end-of-text too, by the text of its token; one that is blank is no mark."""
        return replace(self, end_marks=tuple(dict.fromkeys((*self.end_marks, *([text] if text.strip() else [])))))


Role = Literal["system", "user", "assistant", "raw"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
"""Of a conversation's turns. `raw` is what no template writes around: a segment, a document."""


class Turn(NamedTuple):
    """A part of what an example says."""

    role: Role
    text: str
    learned: bool | None = None
    """What the data says of it (`train`, `weight`, `label`); None where that is left to the run's options."""


class Tokens(NamedTuple):
    """An example that comes as token ids."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    """As many: each its own id where it is learned, else -100. The first one is never asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """An example: something that is asked, and a reference output. `row` counts from 1 in its file, bad records
    included.

    Attributes:
        instruction, input: what is asked; of a conversation its last question. Empty where nothing is, as of a
            document.
        output: the reference answer; of a conversation its last one, of a document the whole.
        row: in its file.
        extra: what else its object holds.
        notes: what was done to it while it was read.
        turns: what it is made of where it is no pair of instruction and output: a conversation, which ends with the
            assistant's turn `output`; segments or a document, all of them `raw`.
        tokens: what it is made of where it comes as ids; it has no text then.
        is_document: whether it is a document, which is learned as a whole and cut into contexts with others.
    """

    instruction: str
    input: str = ""
    output: str
    row: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    tokens: Tokens | None = None
    is_document: bool = False

    @property
    def asks(self) -> bool:
        """Whether it asks for an answer, which a model can be had to give."""
        if self.tokens is not None:
            return False
        # Of segments the last one is the answer, where it is learned and not all there is.
        is_raw = bool(self.turns) and self.turns[-1].role == "raw"
        return not is_raw or (len(self.turns) > 1 and self.turns[-1].learned is True)

    @property
    def category(self) -> str | None:
        """What its figures are put together by, where it has one."""
        return category_of(self.extra)

    @property
    def choices(self) -> list[str]:
        """The answers of a multiple-choice question, none for other records."""
        return choices_of(self.extra)

    def as_entry(self) -> dict[str, Any]:
        """The record as a JSON object: its fields by their own names; of a conversation the turns before its last
        answer under `messages`, and those before its last question as the input."""
        own: dict[str, Any] = {"instruction": self.instruction, "input": self.input, "output": self.output}
        if self.turns:
            # For whoever shows or judges an entry: the question alone would be another one.
            asked = self.turns[:-2] if self.turns[-1].role == "assistant" else ()
            own["input"] = "\n\n".join(f"{turn.role}: {turn.text}" for turn in asked)
            own["messages"] = [{"role": turn.role, "content": turn.text} for turn in self.turns[:-1]]
        return {**own, **{key: item for key, item in self.extra.items() if key not in own}}


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of the training, test and validation records, each int64."""

    train: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]
    val: npt.NDArray[np.int64]


def category_of(entry: Mapping[str, Any]) -> str | None:
    """The `category` of a record's JSON object, as text; none where it is not a number, as pandas writes nothing."""
    category = entry.get("category")
    return None if category is None or is_not_finite(category) else str(category)


def is_not_finite(value: Any) -> bool:
    """Whether a value is NaN or an infinity, which standard JSON cannot say."""
    return isinstance(value, float) and not math.isfinite(value)


def choices_of(entry: Mapping[str, Any]) -> list[str]:
    """The `choices` of a record's JSON object; none where it is no multiple-choice question."""
    return list(entry.get("choices") or [])


def left_out(entry: Mapping[str, Any]) -> str | None:
    """Why `fastft generate` left an entry without a response; None of one that it has answered.

    Only an entry without a response can be so: data may have a key of this name of their own.
    """
    reason = entry.get("left_out")
    return reason if isinstance(reason, str) and reason and not entry["model_response"] else None


def right_choice(output: str, choices: Sequence[str]) -> int | None:
    """Which of the choices a reference output is: by its text, else by its letter; None if by neither."""
    said = output.strip()
    texts = [choice.strip() for choice in choices]
    if said in texts:
        return texts.index(said)
    letters = string.ascii_uppercase[: len(choices)]
    return letters.index(said) if len(said) == 1 and said in letters else None


def letter_names_another(record: Record) -> bool:
    """Whether a question's output is the text of one choice and, read as a letter, another one."""
    said, choices = record.output.strip(), record.choices
    letters = string.ascii_uppercase[: len(choices)]
    return len(said) == 1 and said in letters and right_choice(said, choices) != letters.index(said)


def answers_of(record: Record) -> list[str]:
    """What each of a question's choices is as an output, said as its own output says the right one: text or letter."""
    said = record.output.strip()
    texts = [choice.strip() for choice in record.choices]
    before, after = record.output.split(said, 1) if said else ("", "")
    return [before + one + after for one in (texts if said in texts else string.ascii_uppercase[: len(texts)])]


def digest_of(records: Iterable[Record]) -> str:
    """SHA-256 over records in their order."""
    digest = hashlib.sha256()
    for record in records:
        more: dict[str, Any] = {"turns": record.turns} if record.turns else {}
        more |= {"tokens": record.tokens} if record.tokens else {}
        digest.update(json.dumps({**record.as_entry(), **more}, sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def split(n: int, seed: int | None = None) -> Split:
    """The book's split of `n` records: 85% train, 10% test, the rest validation, in file order.

    With a `seed` the records are shuffled first. Counts are rounded down as in the book: int(0.85 n), int(0.10 n).
    """
    order = np.arange(n, dtype=np.int64) if seed is None else np.random.default_rng(seed).permutation(n)
    n_train, n_test = int(n * 0.85), int(n * 0.10)
    return Split(train=order[:n_train], test=order[n_train : n_train + n_test], val=order[n_train + n_test :])


def fault_of_category(category: Any) -> str | None:
    """What is wrong with a `category`, None with a good one. A number does for text."""
    if category is None or (isinstance(category, str | int | float) and not isinstance(category, bool)):
        return None
    return f"`category` is {kind_of(category)}, expected text; give the key another name if it means something else"


def fault_of_choices(choices: Any, output: str) -> str | None:
    """What is wrong with the `choices` of a multiple-choice question, None with good ones or none."""
    if choices is None:
        return None
    remedy = "give the key another name if it means something else"
    if not isinstance(choices, list):
        return f"`choices` is {kind_of(choices)}, expected an array of texts; {remedy}"
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        return f"`choices` has {len(choices)} entries, expected 2 to {len(string.ascii_uppercase)}; {remedy}"
    for number, choice in enumerate(choices, start=1):
        if not isinstance(choice, str) or not choice.strip() or not is_encodable(choice):
            got = kind_of(choice) if not isinstance(choice, str) else repr(choice[:40])
            return f"`choices` number {number} is {got}, expected text; {remedy}"
    if len({choice.strip() for choice in choices}) < len(choices):
        return "`choices` holds the same text twice, expected different ones"
    if right_choice(output, choices) is None:
        letters = f"A to {string.ascii_uppercase[len(choices) - 1]}"
        return f"`output` is none of `choices`, expected one of their texts, or a letter ({letters})"
    return None


def is_encodable(text: str) -> bool:
    """Whether a text holds no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
