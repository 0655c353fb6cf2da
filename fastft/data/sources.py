"""The files of a run's data: each with its records and their split, and what a row is called where there are several.

A record's row counts in its own file. Where there are several files, a row and its file are one number, a place: so
that the examples of all files can stand in one set. Of the first file, and so of a single one, places are rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastft.common.errors import UserError
from fastft.data.audit import Findings
from fastft.data.chat_template import AnyTemplate
from fastft.data.encode import EncodedSet, EncodingReport, EncodingRules, encoded_set, name_rows, texts_of
from fastft.data.json_rows import BadRecord
from fastft.data.reading import (
    Piece,
    check_usable,
    data_path,
    describe_bad,
    describe_pieces,
    load_records,
    piece_of,
)
from fastft.data.records import ReadingRules, Record, Split, digest_of
from fastft.data.token_cache import RecordFile, TokenCache, cache_for, pick
from fastft.data.tokenizer import Tokenizer

Indices = npt.NDArray[np.int64]

_A_FILE = 1 << 40
"""Places of a file: more than it can have rows."""


@dataclass(frozen=True, slots=True)
class Source:
    """A data file.

    Attributes:
        name: what it was asked for by, or its path.
        records: its usable ones: in memory, or in a large file that is read anew for each use.
        bad: the malformed ones, which are left out.
        parts: which of the records are in which split.
        pieces: the files that it is made of; none of what is embedded.
        taken_for: how it was read, where its name says something else.
    """

    name: str
    records: list[Record] | RecordFile
    bad: list[BadRecord]
    parts: Split
    pieces: tuple[Piece, ...] = ()
    taken_for: str | None = None

    @property
    def cache(self) -> TokenCache | None:
        """Where what is made of a large file is kept."""
        return self.records.cache if isinstance(self.records, RecordFile) else None

    def describe_bad(self) -> str:
        """The malformed records in one line."""
        return describe_bad(self.name, len(self.records), self.bad)

    def describe_pieces(self) -> list[str]:
        """A line for each file: which rows it has where there are several, and what they were read as."""
        return describe_pieces(self.name, self.pieces)

    @property
    def is_written_around(self) -> bool:
        """Whether a template writes around its records, which are all of one format: not around segments, documents and
        token ids."""
        first = next(iter(self.records), None)
        return first is not None and first.tokens is None and not (first.turns and first.turns[-1].role == "raw")

    def digest(self) -> str:
        """SHA-256 over the records: two files with the same one hold the same."""
        return self.records.digest if isinstance(self.records, RecordFile) else digest_of(self.records)

    def content(self) -> str:
        """SHA-256 over all that was read, what was done to it on the way too."""
        if isinstance(self.records, RecordFile):
            return hashlib.sha256(repr((self.records.content, self.records.rules)).encode()).hexdigest()
        notes = [(record.row, record.notes) for record in self.records]
        return hashlib.sha256(repr((self.digest(), notes)).encode()).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 over records and split: another order would put training rows into the test split."""
        digest = hashlib.sha256(self.digest().encode())
        for indices in (self.parts.train, self.parts.test, self.parts.val):
            digest.update(b"split" + indices.tobytes())
        return digest.hexdigest()

    def part(self, name: str, most: int | None = None) -> list[Record]:
        """The records of `train`, `test` or `val`, or the first `most` of them."""
        indices = getattr(self.parts, name)[:most]
        if not len(indices):
            return []
        return self.records.pick(indices) if isinstance(self.records, RecordFile) else pick(self.records, indices)

    def encode(self, name: str, template: AnyTemplate, tokenizer: Tokenizer, rules: EncodingRules) -> EncodedSet:
        """The examples of a part; those of a large file are memory-mapped."""
        if isinstance(self.records, RecordFile):
            indices = getattr(self.parts, name)
            return self.records.encode(indices, template, tokenizer, rules, name=f"{name} examples")
        return encoded_set(texts_of(self.part(name), template, rules.learn), tokenizer, rules)


def read_source(given: str, rules: ReadingRules, *, token_cache: str, skip_bad_records: bool) -> Source:
    """Reads a data file, whose records are in no split yet; those of a large one stay in the file.

    Raises:
        UserError: it cannot be read, has no usable record, or a malformed one that is not to be skipped.
    """
    path = data_path(given)
    cache = cache_for(path, token_cache) if path is not None else None
    found = (
        load_records(given, skip_bad_records=skip_bad_records, rules=rules)
        if path is None or cache is None
        else RecordFile.open(path, cache, rules)
    )
    records, name = (found, str(path)) if isinstance(found, RecordFile) else (found.good, found.source)
    check_usable(name, len(records), found.bad, skip_bad_records=skip_bad_records)
    _check_documents_apart(name, found.pieces)
    nothing = np.zeros(0, dtype=np.int64)
    return Source(name, records, found.bad, Split(nothing, nothing, nothing), tuple(found.pieces), found.taken_for)


def _check_documents_apart(name: str, pieces: Sequence[Piece]) -> None:
    """Refuses a folder of documents and of others: documents are cut into contexts with what stands beside them.

    Raises:
        UserError: it holds both.
    """
    by_format = {piece.format: piece.name for piece in pieces if piece.format is not None}
    if "text" in by_format and len(by_format) > 1:
        other = next(format for format in by_format if format != "text")
        raise UserError(
            f"{name}: got documents ({by_format['text']}) and {other} ({by_format[other]}) in one folder, expected "
            "documents by themselves; give the files one after another: --data A B"
        )


def check_different(flags: Sequence[str], sources: Sequence[Source]) -> None:
    """Refuses sources of which two hold the same records.

    Args:
        flags: by which option each is given.
        sources: all of a run.

    Raises:
        UserError: two do.
    """
    seen: dict[str, tuple[str, str]] = {}
    for flag, source in zip(flags, sources, strict=True) if len(sources) > 1 else ():
        digest = source.digest()
        if digest in seen:
            other, name = seen[digest]
            raise UserError(
                f"got --{other} {name} and --{flag} {source.name}, which hold the same records; expected different "
                "files (--mix says how often a file's examples are drawn)"
            )
        seen[digest] = flag, source.name


@dataclass(frozen=True, slots=True)
class Places:
    """The places of the rows of some files, and what they are called.

    Attributes:
        names: of the files, as they are told apart in messages.
        pieces: of each, where it is a folder of several.
    """

    names: tuple[str, ...]
    pieces: tuple[tuple[Piece, ...], ...]

    @classmethod
    def of(cls, sources: Sequence[Source]) -> Places:
        """By the files' own names, or by whole paths where two have one name."""
        short = [Path(source.name).name for source in sources]
        names = short if len(set(short)) == len(short) else [source.name for source in sources]
        return cls(tuple(names), tuple(source.pieces for source in sources))

    @property
    def are_rows(self) -> bool:
        """Whether a row says it all: there is one file."""
        return len(self.names) == 1 and not any(piece.name for piece in self.pieces[0])

    @staticmethod
    def of_file(file: int, rows: Iterable[int]) -> list[int]:
        """The places of rows of a file, by its number from 0."""
        return [row + file * _A_FILE for row in rows]

    def files(self, places: Indices) -> Indices:
        """The number of each place's file."""
        return places // _A_FILE

    def called(self, place: int) -> int | str:
        """A place by its row, and where there are several files as `FILE:ROW`."""
        name, row = self._named(place)
        return row if self.are_rows else f"{name}:{row}"

    def said(self, places: Sequence[int], most: int = 10) -> str:
        """`rows 3, 9`, and where there are several files `a.jsonl rows 3, 9; b.jsonl row 2`: `most` of each."""
        if self.are_rows:
            return name_rows(places, most)
        return "; ".join(f"{name} {name_rows(rows, most)}" for name, rows in self._by_file(places))

    def lines(self, report: EncodingReport, max_length: int) -> list[str]:
        """The lines of a report of places, by file where there are several."""
        if self.are_rows:
            return report.lines(max_length)
        reports: dict[str, EncodingReport] = {}
        for one in fields(report):
            for name, rows in self._by_file(getattr(report, one.name)):
                getattr(reports.setdefault(name, EncodingReport()), one.name).extend(rows)
        return [f"{name}: {line}" for name, own in reports.items() for line in own.lines(max_length)]

    def called_in(self, found: Any) -> Any:
        """What was found of places, with lists of them, also in lists and by name, by what they are called."""
        if isinstance(found, dict):
            return {name: self.called_in(one) for name, one in found.items()}
        if isinstance(found, list):
            return [self.called(one) if isinstance(one, int) else self.called_in(one) for one in found]
        return found

    def findings(self, found: Findings) -> Findings:
        """The findings of an audit by what their rows are called."""
        return found if self.are_rows else Findings(**self.called_in(asdict(found)))

    def placed(self, file: int, encoded: EncodedSet) -> EncodedSet:
        """A file's examples, whose rows are places."""
        if not file:
            return encoded
        moved = {one.name: self.of_file(file, getattr(encoded.report, one.name)) for one in fields(EncodingReport)}
        return replace(encoded, rows=encoded.rows + file * _A_FILE, report=EncodingReport(**moved))

    def records(self, sources: Iterable[Source]) -> Iterator[Record]:
        """All records of the files one after another, whose rows are places."""
        for file, source in enumerate(sources):
            for record in source.records:
                yield replace(record, row=record.row + file * _A_FILE)

    def _by_file(self, places: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
        by_name: dict[str, list[int]] = {}
        for place in places:
            name, row = self._named(place)
            by_name.setdefault(name, []).append(row)
        yield from by_name.items()

    def _named(self, place: int) -> tuple[str, int]:
        """The file of a place, and the row in it."""
        file, row = divmod(place, _A_FILE)
        piece = piece_of(row, self.pieces[file])
        if piece is None or not piece.name:
            return self.names[file], row
        return str(Path(self.names[file], piece.name)) if len(self.names) > 1 else piece.name, row - piece.before


def joined_parts(sources: Sequence[Source]) -> Split:
    """The split of all records of some files, one after another."""
    begins = np.cumsum([0, *(len(source.records) for source in sources)])
    return Split(
        *(
            np.concatenate([getattr(one.parts, name) + begin for one, begin in zip(sources, begins, strict=False)])
            for name in ("train", "test", "val")
        )
    )


def first_of_each(sizes: Sequence[int], most: int) -> list[int]:
    """How many of each file are taken where `most` of all are: as nearly as that goes the same share of each."""
    counts = [0] * len(sizes)
    shares = sorted(((k + 1) / size, file) for file, size in enumerate(sizes) for k in range(min(size, most)))
    for _, file in shares[:most]:
        counts[file] += 1
    return counts
