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
from fastft.data.encode import EncodedSet, EncodingReport, EncodingRules, encode, name_rows
from fastft.data.json_rows import BadRecord
from fastft.data.prompts import Template
from fastft.data.records import (
    ReadingRules,
    Record,
    Split,
    check_usable,
    data_path,
    describe_bad,
    digest_of,
    load_records,
)
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
        taken_for: how it was read, where its name says something else.
    """

    name: str
    records: list[Record] | RecordFile
    bad: list[BadRecord]
    parts: Split
    taken_for: str | None = None

    @property
    def cache(self) -> TokenCache | None:
        """Where what is made of a large file is kept."""
        return self.records.cache if isinstance(self.records, RecordFile) else None

    def describe_bad(self) -> str:
        """The malformed records in one line."""
        return describe_bad(self.name, len(self.records), self.bad)

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

    def encode(self, name: str, template: Template, tokenizer: Tokenizer, rules: EncodingRules) -> EncodedSet:
        """The examples of a part; those of a large file are memory-mapped."""
        if isinstance(self.records, RecordFile):
            indices = getattr(self.parts, name)
            return self.records.encode(indices, template, tokenizer, rules, name=f"{name} examples")
        return encode(self.part(name), template, tokenizer, **asdict(rules))


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
    nothing = np.zeros(0, dtype=np.int64)
    return Source(name, records, found.bad, Split(nothing, nothing, nothing), found.taken_for)


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
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, sources: Sequence[Source]) -> Places:
        """By the files' own names, or by whole paths where two have one name."""
        short = [Path(source.name).name for source in sources]
        return cls(tuple(short if len(set(short)) == len(short) else [source.name for source in sources]))

    @staticmethod
    def of_file(file: int, rows: Iterable[int]) -> list[int]:
        """The places of rows of a file, by its number from 0."""
        return [row + file * _A_FILE for row in rows]

    def files(self, places: Indices) -> Indices:
        """The number of each place's file."""
        return places // _A_FILE

    def called(self, place: int) -> int | str:
        """A place by its row, and where there are several files as `FILE:ROW`."""
        file, row = divmod(place, _A_FILE)
        return row if len(self.names) == 1 else f"{self.names[file]}:{row}"

    def said(self, places: Sequence[int], most: int = 10) -> str:
        """`rows 3, 9`, and where there are several files `a.jsonl rows 3, 9; b.jsonl row 2`: `most` of each."""
        if len(self.names) == 1:
            return name_rows(places, most)
        return "; ".join(f"{name} {name_rows(rows, most)}" for name, rows in self._by_file(places))

    def lines(self, report: EncodingReport, max_length: int) -> list[str]:
        """The lines of a report of places, by file where there are several."""
        if len(self.names) == 1:
            return report.lines(max_length)
        reports = {name: EncodingReport() for name in self.names}
        for one in fields(report):
            for name, rows in self._by_file(getattr(report, one.name)):
                getattr(reports[name], one.name).extend(rows)
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
        return found if len(self.names) == 1 else Findings(**self.called_in(asdict(found)))

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
            file, row = divmod(place, _A_FILE)
            by_name.setdefault(self.names[file], []).append(row)
        yield from by_name.items()


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
