"""Reading: a source's name -> its records, those that can be used and the others.

A source is a file, a folder of files, a Hugging Face data set (`hf:ID`, or a folder that `datasets` wrote), or one of
the words `book` and `sample`. `fastft.data.containers` gives the rows, `fastft.data.formats` makes records of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import requests

from fastft.common import files
from fastft.common.errors import UserError
from fastft.common.keywords import is_keyword
from fastft.data.containers import Form, files_of, rows_of
from fastft.data.formats import checked
from fastft.data.json_rows import BadRecord
from fastft.data.records import Format, ReadingRules, Record
from fastft.data.sample import sample_records

BOOK_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json"
)
BOOK_SHA256 = "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"

_BAD_RECORDS_SHOWN = 10
_DOWNLOAD_TIMEOUT_S = 30.0


@dataclass(slots=True)
class Piece:
    """A file of a source, as it was read.

    Attributes:
        name: within the source's folder; empty where the source is this one file.
        before: rows of the source in front of its first one.
        form: how it is read; None until it begins.
        format: what its rows mean; None while none of them has told.
    """

    name: str
    before: int
    form: Form | None = None
    format: Format | None = None

    def unlike_its_name(self, source: Path) -> str | None:
        """What the file was taken for, in one line, where its name says something else."""
        return self.form.unlike_its_name(source / self.name) if self.form else None


def taken_for(source: Path, pieces: Iterable[Piece]) -> str | None:
    """What the files of a source were taken for, where their names say something else."""
    return "; ".join(filter(None, (piece.unlike_its_name(source) for piece in pieces))) or None


def piece_of(row: int, pieces: Sequence[Piece]) -> Piece | None:
    """The file that a row of a source is in; None where there is none. Rows count on from one file to the next."""
    return next((one for one in reversed(pieces) if one.before < row), None)


def describe_pieces(source: str, pieces: Iterable[Piece]) -> list[str]:
    """A line for each file: which rows it has where there are several, and what they were read as."""
    return [
        f"{source}{f': rows from {piece.before + 1}: {piece.name}' if piece.name else ''} is read as {piece.format}"
        for piece in pieces
        if piece.format is not None
    ]


@dataclass(frozen=True, slots=True)
class Records:
    """The usable records of a source in file order, and the others."""

    source: str
    good: list[Record]
    bad: list[BadRecord]
    pieces: list[Piece] = field(default_factory=list)
    """The files that they come from; none of what is embedded."""
    taken_for: str | None = None
    """How a file was read, where its name says something else."""

    def describe_bad(self) -> str:
        """The malformed records in one line."""
        return describe_bad(self.source, len(self.good), self.bad)


def load_records(source: str, *, skip_bad_records: bool = False, rules: ReadingRules | None = None) -> Records:
    """Reads `source`: a path, `hf:ID`, `sample` (the embedded set) or `book` (the book's file, downloaded once).

    Raises:
        UserError: the source is missing, not what it should be, holds no usable record, or holds a malformed one and
            `skip_bad_records` is off; every malformed record is named by file and row.
    """
    path, rules = data_path(source), rules or ReadingRules()
    good: list[Record] = []
    bad: list[BadRecord] = []
    pieces: list[Piece] = []
    found = (
        checked(enumerate(sample_records(), start=1), rules)
        if path is None
        else stream_records(path, rules, begun=pieces.append)
    )
    for record in found:
        if isinstance(record, BadRecord):
            bad.append(record)
        else:
            good.append(record)
    name = source if path is None else str(path)
    check_usable(name, len(good), bad, skip_bad_records=skip_bad_records)
    return Records(name, good, bad, pieces, taken_for(path, pieces) if path is not None else None)


def data_path(source: str) -> Path | None:
    """The file, folder or data set that a source names, as a path; None for `sample`, which is embedded.

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
        expected = "expected objects with `instruction`, `input`, `output`, or of another --format"
        raise UserError(f"{source}: no usable record; {expected}{found}")


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
    begun: Callable[[Piece], None] | None = None,
) -> Iterator[Record | BadRecord]:
    """Yields the records of a source one by one: memory does not grow with it.

    Args:
        path: a file, a folder, or a data set's name as a path.
        rules: what is a record.
        read: is told the number of bytes after each read of a file.
        begun: is told each file when it begins; its `format` is set when a row has told it.

    Raises:
        UserError: while iterating, where a file cannot be read or is not what its kind is.
    """
    before = 0
    for name, file in files_of(path):
        row = 0
        for found in _records_of(file, Piece(name, before), rules, read, begun):
            row = found.row
            yield _placed(found, name, before)
        before += row


def _records_of(
    file: Path,
    piece: Piece,
    rules: ReadingRules,
    read: Callable[[int], None] | None,
    begun: Callable[[Piece], None] | None,
) -> Iterator[Record | BadRecord]:
    """The records of one file, by their rows in it."""

    def formed(form: Form) -> None:
        piece.form = form
        if begun is not None:
            begun(piece)

    def told(format: Format) -> None:
        piece.format = format

    return checked(rows_of(file, read=read, formed=formed), rules, told=told)


def _placed(found: Record | BadRecord, name: str, before: int) -> Record | BadRecord:
    """What was found in one of several files, by its row among those of all."""
    if not name:
        return found
    row = before + found.row
    if isinstance(found, BadRecord):
        return replace(found, row=row, place=f"{name}:{found.row}")
    return replace(found, row=row) if before else found


def book_file() -> Path:
    """The book's `instruction-data.json` in the cache folder, downloaded and checked where it is not there yet.

    Raises:
        UserError: no network, or the bytes are not the book's (SHA-256).
    """
    folder = files.make_folder(files.cache_folder(), remedy="choose another with the environment variable FASTFT_CACHE")
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
