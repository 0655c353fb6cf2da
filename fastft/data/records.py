"""Records: reading, checking and splitting instruction data.

A record is a JSON object with `instruction`, `input` (may be missing or empty) and `output`, all text; `ALIASES` are
read as these. Two further keys mean something: `category` (text) has its figures apart, and `choices` (texts) makes a
multiple-choice question, whose `output` is one of them or its letter, A for the first. Others are kept and written
back, and counted by the audit (`fastft.data.audit`). `fastft.data.json_rows` reads the files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import requests

from fastft.common import files
from fastft.common.errors import UserError
from fastft.common.keywords import is_keyword
from fastft.common.kinds import kind_of
from fastft.data.json_rows import BadRecord, Form, RepeatedKeys, json_rows, named_keys
from fastft.data.sample import sample_records

BOOK_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json"
)
BOOK_SHA256 = "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"

_BAD_RECORDS_SHOWN = 10
_DOWNLOAD_TIMEOUT_S = 30.0
_EXPECTED = "expected an object with `instruction`, `input`, `output`"

FIELDS = ("instruction", "input", "output")
KNOWN_KEYS = (*FIELDS, "category", "choices")
ALIASES = {"context": "input", "response": "output"}
"""Other names of fields, those of databricks-dolly-15k; each is read where its field is missing or empty."""
OF_CHATS = {"system": "a system text", "history": "earlier turns"}
"""Keys that change what a response answers to, and that no prompt template here has a place for."""

END_OF_TEXT_MARK = "<|endoftext|>"
"""How GPT-2's end-of-text is written in text, where it is ordinary tokens and ends nothing. Much data holds it, also
where it is another model's that is trained."""

REPEATED_KEY, NOT_A_NUMBER, END_TAKEN = "repeated key", "not a number", "end taken"
"""What a record's `notes` may hold, beside the aliases that it was read by."""

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
    """

    instruction: str
    input: str = ""
    output: str
    row: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    tokens: Tokens | None = None

    @property
    def asks(self) -> bool:
        """Whether it asks for an answer, which a model can be had to give."""
        return self.tokens is None and not (self.turns and self.turns[-1].role == "raw" and len(self.turns) == 1)

    @property
    def category(self) -> str | None:
        """What its figures are put together by, where it has one."""
        return category_of(self.extra)

    @property
    def choices(self) -> list[str]:
        """The answers of a multiple-choice question, none for other records."""
        return choices_of(self.extra)

    def as_entry(self) -> dict[str, Any]:
        """The record as a JSON object: its fields by their own names, and the turns before a conversation's last
        answer."""
        own: dict[str, Any] = {"instruction": self.instruction, "input": self.input, "output": self.output}
        if self.turns:
            own["messages"] = [{"role": turn.role, "content": turn.text} for turn in self.turns[:-1]]
        return {**own, **self.extra}


@dataclass(frozen=True, slots=True)
class Records:
    """The usable records of a source in file order, and the others."""

    source: str
    good: list[Record]
    bad: list[BadRecord]
    taken_for: str | None = None
    """How the file was read, where its name says something else."""

    def describe_bad(self) -> str:
        """The malformed records in one line."""
        return describe_bad(self.source, len(self.good), self.bad)


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of the training, test and validation records, each int64."""

    train: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]
    val: npt.NDArray[np.int64]


def load_records(source: str, *, skip_bad_records: bool = False, rules: ReadingRules | None = None) -> Records:
    """Reads `source`: a file's path, `sample` (the embedded set) or `book` (the book's file, downloaded once).

    Raises:
        UserError: the file is missing, not JSON, holds no usable record, or holds a malformed one and
            `skip_bad_records` is off; every malformed record is named by file and row.
    """
    path, rules = data_path(source), rules or ReadingRules()
    good: list[Record] = []
    bad: list[BadRecord] = []
    forms: list[Form] = []
    found = (
        checked(enumerate(sample_records(), start=1), rules)
        if path is None
        else stream_records(path, rules, formed=forms.append)
    )
    for record in found:
        if isinstance(record, BadRecord):
            bad.append(record)
        else:
            good.append(record)
    name = source if path is None else str(path)
    check_usable(name, len(good), bad, skip_bad_records=skip_bad_records)
    return Records(name, good, bad, forms[0].unlike_its_name(path) if path is not None else None)


def data_path(source: str) -> Path | None:
    """The file that a source names; None for `sample`, which is embedded.

    Raises:
        UserError: the book's file cannot be downloaded.
    """
    if not is_keyword("data", source):
        return Path(source)
    return book_file() if source == "book" else None


def check_usable(source: str, n_good: int, bad: Sequence[BadRecord], *, skip_bad_records: bool) -> None:
    """Refuses malformed records, unless they are to be skipped, and a source without a usable one.

    Raises:
        UserError: what is wrong, with every malformed record by file and row.
    """
    if bad and not skip_bad_records:
        problem = describe_bad(source, n_good, bad)
        raise UserError(f"{problem}; mend them, or leave them out with --skip_bad_records")
    if not n_good:
        found = f"; {describe_bad(source, n_good, bad)}" if bad else ""
        raise UserError(f"{source}: no usable record; expected objects with `instruction`, `input`, `output`{found}")


def describe_bad(source: str, n_good: int, bad: Sequence[BadRecord]) -> str:
    """`FILE: N of M records are malformed: row 3: ...; row 9: ...` in one line."""
    shown = "; ".join(str(one) for one in bad[:_BAD_RECORDS_SHOWN])
    more = len(bad) - _BAD_RECORDS_SHOWN
    tail = f"; and {more} more" if more > 0 else ""
    return f"{source}: {len(bad)} of {n_good + len(bad)} records are malformed: {shown}{tail}"


def stream_records(
    path: Path,
    rules: ReadingRules,
    *,
    read: Callable[[int], None] | None = None,
    formed: Callable[[Form], None] | None = None,
) -> Iterator[Record | BadRecord]:
    """Yields the records of a data file one by one: memory does not grow with the file.

    Args:
        path: the file.
        rules: what is a record.
        read, formed: see `json_rows`.

    Raises:
        UserError: while iterating, where the file cannot be read or is not JSON.
    """
    return checked(json_rows(path, read=read, formed=formed), rules)


def category_of(entry: Mapping[str, Any]) -> str | None:
    """The `category` of a record's JSON object, as text; none where it is not a number, as pandas writes nothing."""
    category = entry.get("category")
    return None if category is None or _is_not_finite(category) else str(category)


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


def book_file() -> Path:
    """The book's `instruction-data.json` in the cache folder, downloaded and checked where it is not there yet.

    Raises:
        UserError: no network, or the bytes are not the book's (SHA-256).
    """
    folder = files.make_folder(cache_folder(), remedy="choose another with the environment variable FASTFT_CACHE")
    path = folder / "instruction-data.json"
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == BOOK_SHA256:
        return path
    content = _download(BOOK_URL)
    got = hashlib.sha256(content).hexdigest()
    if got != BOOK_SHA256:
        raise UserError(
            f"{BOOK_URL}: got a file with SHA-256 {got}, expected {BOOK_SHA256}; "
            "the published file has changed: download it yourself and pass its path with --data"
        )
    with files.replacing(path) as file:
        file.write(content)
    return path


def cache_folder() -> Path:
    """`$FASTFT_CACHE`, else `$XDG_CACHE_HOME/fastft`, else `~/.cache/fastft`."""
    if own := os.environ.get("FASTFT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastft"


def _download(url: str) -> bytes:
    try:
        reply = requests.get(url, timeout=_DOWNLOAD_TIMEOUT_S)
        reply.raise_for_status()
    except requests.RequestException as error:
        raise UserError(
            f"cannot download {url} ({type(error).__name__}); "
            "with no network, fetch the file elsewhere and pass its path with --data"
        ) from error
    return reply.content


def checked(rows: Iterable[tuple[int, Any]], rules: ReadingRules) -> Iterator[Record | BadRecord]:
    """Turns (row, JSON value or BadRecord) into records, or says what is wrong with them."""
    for row, value in rows:
        if isinstance(value, BadRecord):
            yield value
            continue
        try:
            yield _record(row, value, rules)
        except RecursionError:
            yield BadRecord(row, "nested too deeply, expected a flat object")


def _record(row: int, value: Any, rules: ReadingRules) -> Record | BadRecord:
    if not isinstance(value, dict):
        return BadRecord(row, f"got {kind_of(value)}, {_EXPECTED}")
    notes: list[str] = []
    fields = {key: item if type(item) is str else _plain(item, notes) for key, item in value.items()}
    _name(fields, notes)
    if isinstance(value, RepeatedKeys):
        notes.append(REPEATED_KEY)
    if rules.end_of_text_in_data == "refuse" and isinstance(fields.get("output"), str):
        fields["output"] = _without_end(fields["output"], rules.end_marks, notes)
    fault = _fault(fields) or _fault_of_end(fields, rules) or _fault_of_empty(fields["output"], rules)
    if fault is not None:
        return BadRecord(row, fault)
    return Record(
        instruction=fields["instruction"],
        input=fields.get("input") or "",
        output=fields["output"],
        row=row,
        extra={key: item for key, item in fields.items() if key not in FIELDS},
        notes=tuple(dict.fromkeys(notes)) if notes else (),
    )


def _plain(value: Any, notes: list[str]) -> Any:
    """A value as standard JSON can say it: null where it is not a number, no key twice; notes what was otherwise."""
    if _is_not_finite(value):
        notes.append(NOT_A_NUMBER)
        return None
    if isinstance(value, dict):
        if isinstance(value, RepeatedKeys):
            notes.append(REPEATED_KEY)
        return {key: _plain(item, notes) for key, item in value.items()}
    return [_plain(item, notes) for item in value] if isinstance(value, list) else value


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _name(fields: dict[str, Any], notes: list[str]) -> None:
    """Puts the fields under their own names: an alias is read where its field is not there, or holds nothing."""
    for alias, name in ALIASES.items():
        held, own = fields.get(alias), fields.get(name)
        if held is not None and (own is None or (own == "" and held != "")):
            fields[name] = fields.pop(alias)
            notes.append(alias)


def _without_end(output: str, marks: Sequence[str], notes: list[str]) -> str:
    """An output without an end-of-text's text at its very end: every example ends with the token itself."""
    while end_mark_in(output, marks) is not None:
        rest = output.rstrip()
        mark = next((one for one in marks if rest.endswith(one)), None)
        if mark is None:
            break
        output = rest.removesuffix(mark)
        notes.append(END_TAKEN)
    return output


def end_mark_in(text: str, marks: Sequence[str]) -> str | None:
    """The first of the marks that a text holds."""
    return next((mark for mark in marks if mark in text), None)


def _fault(value: dict[str, Any]) -> str | None:
    """What is wrong with a record: what was got and what was expected; None for a good one."""
    for key in ("instruction", "output"):
        if key not in value:
            return f"`{key}` is missing, expected text; got the keys {named_keys(value)}"
    for key in FIELDS:
        item = value.get(key)
        if item is None and key == "input":
            continue
        if not isinstance(item, str):
            return f"`{key}` is {kind_of(item)}, expected text"
        if not _encodable(item):
            return f"`{key}` holds half of a surrogate pair, expected valid Unicode text"
    for key, what in OF_CHATS.items():
        if value.get(key) and not (isinstance(value[key], str) and not value[key].strip()):
            return f"`{key}` ({what}) is not read beside `instruction`; use the chat format, whose `messages` hold it"
    if not value["instruction"].strip():
        return "`instruction` is blank, expected text"
    return fault_of_category(value.get("category")) or fault_of_choices(value.get("choices"), value["output"])


def _fault_of_end(value: dict[str, Any], rules: ReadingRules) -> str | None:
    """Where a record's text holds the end-of-text's, which a model would learn to write and never to end with."""
    if rules.end_of_text_in_data == "keep":
        return None
    for key in (*FIELDS, "choices"):
        held = value.get(key) or ""
        mark = end_mark_in(held if isinstance(held, str) else "\n".join(held), rules.end_marks)
        if mark is not None:
            return (
                f"`{key}` holds {mark}, which would be learned as text; expected none but at the very end "
                "of an output; --end_of_text_in_data keep takes it as text"
            )
    return None


def _fault_of_empty(output: str, rules: ReadingRules) -> str | None:
    if output.strip() or rules.allow_empty_output:
        return None
    return "`output` is empty, expected text; --allow_empty_output takes it as a response of nothing"


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
        if not isinstance(choice, str) or not choice.strip() or not _encodable(choice):
            got = kind_of(choice) if not isinstance(choice, str) else repr(choice[:40])
            return f"`choices` number {number} is {got}, expected text; {remedy}"
    if len({choice.strip() for choice in choices}) < len(choices):
        return "`choices` holds the same text twice, expected different ones"
    if right_choice(output, choices) is None:
        letters = f"A to {string.ascii_uppercase[len(choices) - 1]}"
        return f"`output` is none of `choices`, expected one of their texts, or a letter ({letters})"
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
