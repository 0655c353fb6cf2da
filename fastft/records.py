"""Records: reading, checking and splitting instruction data.

A record is a JSON object with `instruction`, `input` (may be missing or empty) and `output`, all text; further keys
are kept and written back. Two of them mean something: `category` (text) has its figures apart, and `choices` (texts)
makes a multiple-choice question, whose `output` is one of them or its letter, A for the first. Files are a JSON array
(`.json`) or one object a line (`.jsonl`), either also `.gz`.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import os
import string
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import requests

from fastft import files
from fastft.errors import UserError
from fastft.sample import sample_records

BOOK_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json"
)
BOOK_SHA256 = "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"

_BAD_RECORDS_SHOWN = 10
_DOWNLOAD_TIMEOUT_S = 30.0
_READ_BYTES = 1 << 20
_WHITE_SPACE = " \t\n\r"
_LONGEST_LITERAL = len("-Infinity") + 1
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One instruction with its reference output. `row` counts from 1 in its file, bad records included."""

    instruction: str
    input: str = ""
    output: str
    row: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def category(self) -> str | None:
        """What its figures are put together by, where it has one."""
        return category_of(self.extra)

    @property
    def choices(self) -> list[str]:
        """The answers of a multiple-choice question, none for other records."""
        return choices_of(self.extra)

    def as_entry(self) -> dict[str, Any]:
        """The record as the JSON object that it came from."""
        return {"instruction": self.instruction, "input": self.input, "output": self.output, **self.extra}


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used, and why."""

    row: int
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Records:
    """The usable records of a source in file order, and the others."""

    source: str
    good: list[Record]
    bad: list[BadRecord]

    def describe_bad(self) -> str:
        """The malformed records in one line."""
        return describe_bad(self.source, len(self.good), self.bad)


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of the training, test and validation records, each int64."""

    train: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]
    val: npt.NDArray[np.int64]


def load_records(source: str, *, skip_bad_records: bool = False) -> Records:
    """Reads `source`: a file's path, `sample` (the embedded set) or `book` (the book's file, downloaded once).

    Raises:
        UserError: the file is missing, not JSON, holds no usable record, or holds a malformed one and
            `skip_bad_records` is off; every malformed record is named by file and row.
    """
    path = data_path(source)
    found = checked(enumerate(sample_records(), start=1)) if path is None else stream_records(path)
    records = Records(source if path is None else str(path), [], [])
    for record in found:
        if isinstance(record, BadRecord):
            records.bad.append(record)
        else:
            records.good.append(record)
    check_usable(records.source, len(records.good), records.bad, skip_bad_records=skip_bad_records)
    return records


def data_path(source: str) -> Path | None:
    """The file that a source names; None for `sample`, which is embedded.

    Raises:
        UserError: the book's file cannot be downloaded.
    """
    if source == "sample":
        return None
    return book_file() if source == "book" else Path(source)


def check_usable(source: str, n_good: int, bad: Sequence[BadRecord], *, skip_bad_records: bool) -> None:
    """Refuses malformed records, unless they are to be skipped, and a source without a usable one.

    Raises:
        UserError: what is wrong, with every malformed record by file and row.
    """
    if bad and not skip_bad_records:
        problem = describe_bad(source, n_good, bad)
        raise UserError(f"{problem}; mend them, or leave them out with --skip_bad_records")
    if not n_good:
        raise UserError(f"{source}: no usable record; expected objects with `instruction`, `input`, `output`")


def describe_bad(source: str, n_good: int, bad: Sequence[BadRecord]) -> str:
    """`FILE: N of M records are malformed: row 3: ...; row 9: ...` in one line."""
    shown = "; ".join(str(one) for one in bad[:_BAD_RECORDS_SHOWN])
    more = len(bad) - _BAD_RECORDS_SHOWN
    tail = f"; and {more} more" if more > 0 else ""
    return f"{source}: {len(bad)} of {n_good + len(bad)} records are malformed: {shown}{tail}"


def stream_records(path: Path, read: Callable[[int], None] | None = None) -> Iterator[Record | BadRecord]:
    """Yields the records of a data file one by one: memory does not grow with the file.

    Args:
        path: the file.
        read: is told the number of bytes after each read of the file.

    Raises:
        UserError: while iterating, where the file cannot be read or is not JSON.
    """
    return checked(_rows(path, read or (lambda _: None)))


def category_of(entry: Mapping[str, Any]) -> str | None:
    """The `category` of a record's JSON object, as text."""
    category = entry.get("category")
    return None if category is None else str(category)


def choices_of(entry: Mapping[str, Any]) -> list[str]:
    """The `choices` of a record's JSON object; none where it is no multiple-choice question."""
    return list(entry.get("choices") or [])


def right_choice(output: str, choices: Sequence[str]) -> int | None:
    """Which of the choices a reference output is: by its text, else by its letter; None if by neither."""
    said = output.strip()
    texts = [choice.strip() for choice in choices]
    if said in texts:
        return texts.index(said)
    letters = string.ascii_uppercase[: len(choices)]
    return letters.index(said) if len(said) == 1 and said in letters else None


def digest_of(records: Iterable[Record]) -> str:
    """SHA-256 over records in their order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record.as_entry(), sort_keys=True).encode())
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


def checked(rows: Iterable[tuple[int, Any]]) -> Iterator[Record | BadRecord]:
    """Turns (row, JSON value or BadRecord) into records, or says what is wrong with them."""
    for row, value in rows:
        reason = value.reason if isinstance(value, BadRecord) else _fault(value)
        if reason is not None:
            yield BadRecord(row, reason)
            continue
        yield Record(
            instruction=value["instruction"],
            input=value.get("input") or "",
            output=value["output"],
            row=row,
            extra={key: item for key, item in value.items() if key not in ("instruction", "input", "output")},
        )


def _fault(value: Any) -> str | None:
    """What is wrong with a record: what was got and what was expected; None for a good one."""
    if not isinstance(value, dict):
        return f"got {_kind(value)}, expected an object with `instruction`, `input`, `output`"
    for key in ("instruction", "output"):
        if key not in value:
            return f"`{key}` is missing, expected text"
    for key in ("instruction", "input", "output"):
        item = value.get(key)
        if item is None and key == "input":
            continue
        if not isinstance(item, str):
            return f"`{key}` is {_kind(item)}, expected text"
        if not _encodable(item):
            return f"`{key}` holds half of a surrogate pair, expected valid Unicode text"
    if not value["instruction"].strip():
        return "`instruction` is blank, expected text"
    return fault_of_category(value.get("category")) or fault_of_choices(value.get("choices"), value["output"])


def fault_of_category(category: Any) -> str | None:
    """What is wrong with a `category`, None with a good one. A number does for text."""
    if category is None or (isinstance(category, str | int | float) and not isinstance(category, bool)):
        return None
    return f"`category` is {_kind(category)}, expected text; give the key another name if it means something else"


def fault_of_choices(choices: Any, output: str) -> str | None:
    """What is wrong with the `choices` of a multiple-choice question, None with good ones or none."""
    if choices is None:
        return None
    remedy = "give the key another name if it means something else"
    if not isinstance(choices, list):
        return f"`choices` is {_kind(choices)}, expected an array of texts; {remedy}"
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        return f"`choices` has {len(choices)} entries, expected 2 to {len(string.ascii_uppercase)}; {remedy}"
    for number, choice in enumerate(choices, start=1):
        if not isinstance(choice, str) or not choice.strip() or not _encodable(choice):
            got = _kind(choice) if not isinstance(choice, str) else repr(choice)
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


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _rows(path: Path, read: Callable[[int], None]) -> Iterator[tuple[int, Any]]:
    """Yields (row, JSON value or BadRecord) of a data file; rows count from 1."""
    name = path.name.removesuffix(".gz")
    if not name.endswith((".json", ".jsonl")):
        raise UserError(f"{path}: unknown kind of file; expected .json, .jsonl, .json.gz or .jsonl.gz")
    try:
        with io.BufferedReader(_Counted(path, read), _READ_BYTES) as plain:
            file = gzip.GzipFile(fileobj=plain) if path.suffix == ".gz" else plain
            yield from _json_lines(file) if name.endswith(".jsonl") else _json_array(_Window(file), path)
    except FileNotFoundError:
        raise UserError(f"data file not found: {path}; --data takes a file, `book` or `sample`") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}; fetch or compress it again") from error
    except OSError as error:
        raise UserError(f"cannot read the data file {path}: {error.strerror or error}; check the path") from error


class _Counted(io.FileIO):
    """A file that tells `read` how many bytes each reading of it gave."""

    def __init__(self, path: Path, read: Callable[[int], None]) -> None:
        super().__init__(path)
        self._read = read

    def readinto(self, buffer: Any) -> int | None:
        n = super().readinto(buffer)
        self._read(n or 0)
        return n


def _json_lines(file: io.BufferedIOBase) -> Iterator[tuple[int, Any]]:
    for row, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield row, json.loads(line.removesuffix(b"\n").decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            yield row, BadRecord(row, f"not UTF-8 (byte {error.start} of the line), expected UTF-8 JSON")
        except ValueError as error:
            yield row, BadRecord(row, f"not JSON ({error}), expected one object a line")
        except RecursionError:
            yield row, BadRecord(row, "nested too deeply, expected a flat object")


def _json_array(text: _Window, path: Path) -> Iterator[tuple[int, Any]]:
    """Parses the elements of an array one by one."""
    try:
        if text.next() != "[":
            kind = _kind(text.rest())
            raise UserError(f"{path}: got {kind} at the top, expected an array of objects (or rename it to .jsonl)")
        text.skip()
        row, separator = 0, text.next()
        if separator == "]":
            text.skip()
        while separator != "]":
            row += 1
            value = text.value()
            separator = text.next()
            if separator not in (",", "]"):
                raise text.error("Expecting ',' delimiter")
            text.skip()
            yield row, value
        if text.next():
            raise text.error("Extra data")
    except UnicodeDecodeError as error:
        byte = text.bytes_before + error.start
        raise UserError(f"{path} is not UTF-8: byte {byte} cannot be decoded; save it as UTF-8") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply; expected an array of flat objects") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; expected an array of objects") from error


class _Window:
    """The part of a JSON text that is being parsed, moving forward through a file."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self.bytes_before = 0
        """Bytes of the file before those that are being decoded."""
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._ended = False
        self._chars_before = 0
        self._lines_before = 0
        self._line_begin = 0
        """Where in the whole text the line began that the window begins in."""

    def next(self) -> str:
        """The next character that is not white space, "" at the end; it is not consumed."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _WHITE_SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_READ_BYTES):
                return ""

    def skip(self) -> None:
        """Consumes one character."""
        self._at += 1

    def value(self) -> Any:
        """Consumes one JSON value.

        Raises:
            ValueError: it is not JSON; line, column and character are those of the whole text.
        """
        self.next()
        size = _READ_BYTES
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                # At the window's end a number may go on (`1|.5e-3`) in what has not been read.
                if end < len(self._text) - _LONGEST_LITERAL or not self._more(size):
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                # The window cuts the value there; a fault elsewhere is the text's own.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST_LITERAL
                if not (cut and self._more(size)):
                    raise self.error(error.msg, error.pos) from None
            size *= 2  # so that a value of n characters is not parsed n times

    def rest(self) -> Any:
        """The one value that the text is."""
        value = self.value()
        if self.next():
            raise self.error("Extra data")
        return value

    def error(self, message: str, at: int | None = None) -> ValueError:
        """What `json` would say of a fault at a character of the window, the current one where it is not given."""
        end = self._at if at is None else at
        lines = self._text.count("\n", 0, end)
        begin = self._chars_before + self._text.rfind("\n", 0, end) + 1 if lines else self._line_begin
        char = self._chars_before + end
        return ValueError(f"{message}: line {self._lines_before + lines + 1} column {char - begin + 1} (char {char})")

    def _more(self, size: int) -> bool:
        """Drops what is consumed and reads on; whether there was anything more."""
        if self._ended:
            return False
        content = self._file.read(size)
        self._ended = not content
        pending = len(self._decoder.getstate()[0])
        self.bytes_before -= pending  # those are decoded with the new ones
        more = self._decoder.decode(content, final=self._ended)
        self.bytes_before += pending + len(content)
        if not more:
            return not self._ended
        lines = self._text.count("\n", 0, self._at)
        if lines:
            self._lines_before += lines
            self._line_begin = self._chars_before + self._text.rfind("\n", 0, self._at) + 1
        self._chars_before += self._at
        self._text = self._text[self._at :] + more
        self._at = 0
        return True
