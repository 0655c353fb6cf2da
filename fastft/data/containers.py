"""Containers: a file, a folder or a data set -> rows, and its content as one SHA-256.

The content decides how a file is read, where it can, not its name: gzip, zstd, Parquet and Arrow are known by their
first bytes, JSON by its first character. Of any of them no more is held than a few rows.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastft.common.errors import UserError
from fastft.common.files import LFS_POINTER
from fastft.common.nearest import did_you_mean_path
from fastft.data import arrow_rows
from fastft.data.csv_rows import csv_rows
from fastft.data.json_rows import are_lines, check_utf8, json_array, json_lines

Kind = Literal["array", "lines", "csv", "tsv", "parquet", "arrow", "dataset"]

_NAMES: dict[Kind, str] = {
    "array": "a JSON array",
    "lines": "JSON lines",
    "csv": "CSV",
    "tsv": "TSV",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "dataset": "a data set",
}
_SUFFIXES: dict[str, Kind] = {
    ".json": "array",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
KINDS = ".json, .jsonl, .csv or .tsv, each also as .gz or .zst, .parquet, .arrow or .feather"
_DELIMITERS = {"csv": ",", "tsv": "\t"}

Packed = Literal["gzip", "zstd"]
_PACKED: dict[str, Packed] = {".gz": "gzip", ".zst": "zstd"}
_PACKED_BY: dict[bytes, Packed] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_SAID_PACKED: dict[Packed, str] = {"gzip": "gzipped", "zstd": "compressed by zstd"}
_BINARY: dict[bytes, Kind] = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_TEXT_IN_A_BYTE = {"gzip": 4, "zstd": 4, "parquet": 3}
"""Bytes of JSON text in a byte of a file, roughly."""

_EXPECTED = "--data takes a file, `book` or `sample`"
_READ_BYTES = 1 << 20
_SPLIT_NAME = re.compile(r"(?i)(?:^|/)(train|test|val|valid|validation|dev|eval)(?![a-z])")


@dataclass(frozen=True, slots=True)
class Form:
    """How a file is read."""

    kind: Kind
    packed: Packed | None = None
    """What it is compressed by."""

    @classmethod
    def named(cls, path: Path) -> Form | None:
        """The form that a file's name says, None where it says none."""
        name = path.name.lower()
        packed = next((suffix for suffix in _PACKED if name.endswith(suffix)), "")
        kind = _SUFFIXES.get(Path(name.removesuffix(packed)).suffix)
        return cls(kind, _PACKED.get(packed)) if kind else None

    def unlike_its_name(self, path: Path) -> str | None:
        """What the file was taken for, in one line, where its name says something else."""
        named = Form.named(path)
        if self == named or self.kind == "dataset":
            return None
        packed = f", {_SAID_PACKED[self.packed]}," if self.packed else ""
        if named and named.packed and not self.packed:
            packed = f", not {_SAID_PACKED[named.packed]},"
        return f"{path} is taken for {_NAMES[self.kind]}{packed} by its content, not by its name"


def files_of(path: Path) -> Iterator[tuple[str, Path]]:
    """The files that a source is made of, sorted, each with its name in the folder; of one file, or of a data set,
    itself without a name.

    Raises:
        UserError: a folder holds none, or something that is no data, or files of several splits.
    """
    if not path.is_dir() or arrow_rows.is_dataset(path):
        yield "", path
        return
    try:
        held = sorted(one for one in path.iterdir() if not one.name.startswith((".", "_")))
    except OSError as error:
        raise UserError(f"cannot read the folder {path}: {error.strerror or error}; check the path") from error
    data = [one for one in held if one.is_file() and Form.named(one)]
    others = [one.name for one in held if one.is_file() and not Form.named(one) and not _is_about(one)]
    if not data:
        folders = ", ".join(f"{one.name}/" for one in held if one.is_dir())
        raise UserError(
            f"{path} holds no data file; expected {KINDS}"
            + (f"; name one of its folders: {folders}" if folders else "")
        )
    if others:
        raise UserError(f"{path} holds {others[0]}, which is no data file; expected {KINDS}, and nothing else")
    splits = {match[1].lower() for one in data if (match := _SPLIT_NAME.search(one.name))}
    if len(splits) > 1:
        raise UserError(
            f"{path} holds files of several splits ({', '.join(sorted(splits))}), which would be read as one; "
            f"give one of them: a file of it, or hf:{path}:{'train' if 'train' in splits else min(splits)}"
        )
    yield from ((one.name, one) for one in data)


def _is_about(file: Path) -> bool:
    """Whether a file tells of data and holds none."""
    return file.suffix.lower() in ("", ".md", ".txt") and bool(re.match(r"(?i)readme|licen[cs]e|notice", file.name))


def rows_of(
    path: Path, *, read: Callable[[int], None] | None = None, formed: Callable[[Form], None] | None = None,
    expected: str = _EXPECTED,
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """Yields (row, value or `BadRecord`) of a data file or a data set; rows count from 1, in a file of lines its blank
    ones too, in a table without its header.

    Args:
        path: the file.
        read: is told the number of bytes after each read of the file.
        formed: is told how the file is read, before its first row.
        expected: what the option takes that names the file, said where there is none.

    Raises:
        UserError: while iterating, where the file cannot be read or is not what it should be.
    """
    read, formed = read or (lambda _: None), formed or (lambda _: None)
    if arrow_rows.is_dataset(path):
        formed(Form("dataset"))
        yield from arrow_rows.dataset_rows(path, read)
        return
    packed: Packed | None = None
    try:
        counted = _Counted(path, read)
        with io.BufferedReader(counted, _READ_BYTES) as plain:
            begin = plain.peek(_READ_BYTES)
            if begin.startswith(LFS_POINTER):
                raise UserError(f"{path} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")
            packed = _packed(begin)
            kind = _binary_kind(begin, path)
            if kind is None:
                counted.begin_telling()
                file = _unpacked(plain, packed, path)
                yield from _text_rows(file, packed, path, formed)
                return
        formed(Form(kind))
        yield from (arrow_rows.parquet_rows if kind == "parquet" else arrow_rows.arrow_rows)(path, read)
    except FileNotFoundError:
        raise _not_found(path, expected) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is not a whole {packed} file: {error}; fetch or compress it again") from error
    except OSError as error:
        raise UserError(f"cannot read the data file {path}: {error.strerror or error}; check the path") from error


def _not_found(path: Path, expected: str = _EXPECTED) -> UserError:
    near = did_you_mean_path(path)
    return UserError(f"data file not found: {path}{near}; {expected}")


def _packed(begin: bytes) -> Packed | None:
    return next((packed for magic, packed in _PACKED_BY.items() if begin.startswith(magic)), None)


def _binary_kind(begin: bytes, path: Path) -> Kind | None:
    """Parquet or Arrow, by the first bytes; None for text."""
    kind = next((kind for magic, kind in _BINARY.items() if begin.startswith(magic)), None)
    named = Form.named(path)
    if begin.startswith(b"FEA1"):
        raise UserError(f"{path} is Feather of version 1, expected version 2; write it again, or as Parquet")
    if kind is None and named and named.kind in ("parquet", "arrow") and not _is_json(begin) and not _packed(begin):
        raise UserError(f"{path} is not {_NAMES[named.kind]}: it does not begin as such a file; fetch it again")
    return kind


def _unpacked(plain: io.BufferedReader[Any], packed: Packed | None, path: Path) -> io.BufferedReader[Any]:
    """The text that a file holds, whatever it is compressed by.

    Raises:
        UserError: it is compressed twice, holds no text, or pyarrow is not there to read zstd.
    """
    if packed is None:
        return plain
    raw: Any = gzip.GzipFile(fileobj=plain) if packed == "gzip" else arrow_rows.Unzstd(plain, path)
    file = io.BufferedReader(raw, _READ_BYTES)
    begin = file.peek(_READ_BYTES)
    if twice := _packed(begin):
        tool = "gunzip" if packed == "gzip" else "unzstd"
        said = "gzipped twice, expected once" if twice == packed == "gzip" else "compressed twice, expected once"
        raise UserError(f"{path} is {said}; `{tool}` it once")
    if kind := next((kind for magic, kind in _BINARY.items() if begin.startswith(magic)), None):
        raise UserError(f"{path} is {_NAMES[kind]} within {packed}, which cannot be read in parts; unpack it")
    return file


def _text_rows(
    file: io.BufferedReader[Any], packed: Packed | None, path: Path, formed: Callable[[Form], None]
) -> Iterator[tuple[int, Any]]:
    """The rows of JSON or of a table."""
    named = Form.named(path)
    begin = file.peek(_READ_BYTES)
    if named and named.kind in ("csv", "tsv") and not _is_json(begin):
        check_utf8(begin, path)
        formed(Form(named.kind, packed))
        yield from csv_rows(file, path, delimiter=_DELIMITERS[named.kind])
        return
    if named is None and not _is_json(begin):
        check_utf8(begin, path)
        raise UserError(f"{path}: unknown kind of file; expected {KINDS}")
    named_lines = named is not None and named.kind == "lines"
    lines = are_lines(begin, path, named_lines=named_lines)
    formed(Form("lines" if lines else "array", packed))
    yield from json_lines(file, path, named_lines=named_lines) if lines else json_array(file, path)


def _is_json(begin: bytes) -> bool:
    """Whether text begins as objects do, or an array of them."""
    return re.match(rb"(?:\xef\xbb\xbf)?\s*(?:\{\s*[\"}]|\[\s*[{\]])", begin) is not None


class _Counted(io.FileIO):
    """A file that tells `read` how many bytes each reading of it gave, as soon as it is asked to."""

    def __init__(self, path: Path, read: Callable[[int], None]) -> None:
        super().__init__(path)
        self._read = read
        self._untold: int | None = 0

    def begin_telling(self) -> None:
        """Tells what was read before, and from now on each reading."""
        untold, self._untold = self._untold or 0, None
        self._read(untold)

    def readinto(self, buffer: Any) -> int | None:
        n = super().readinto(buffer)
        if self._untold is None:
            self._read(n or 0)
        else:
            self._untold += n or 0
        return n


# What a source is as a whole


def content_of(path: Path) -> str:
    """SHA-256 of a file, for a table with the kind that its name says, which nothing in it does; of a folder or a data
    set, of all its files' contents and names.

    Raises:
        UserError: it cannot be read.
    """
    if arrow_rows.is_dataset(path):
        return _digest([("", _sha256(file)) for file in arrow_rows.dataset_files(path)], str(path))
    if not path.is_dir():
        named = Form.named(path)
        is_table = named is not None and named.kind in _DELIMITERS
        return _digest([(named.kind, _sha256(path))], "") if named and is_table else _sha256(path)
    return _digest([(name, _sha256(file)) for name, file in files_of(path)], "")


def _digest(named: list[tuple[str, str]], source: str) -> str:
    return hashlib.sha256(repr((source, named)).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise _not_found(path) from None
    except OSError as error:
        raise UserError(f"cannot read the data file {path}: {error.strerror or error}; check the path") from error


def bytes_of(path: Path) -> int:
    """Bytes of all files of a source."""
    return sum(file.stat().st_size for file in _all_files(path))


def text_bytes_of(path: Path) -> int:
    """How many bytes of JSON text the files of a source hold, roughly, by their sizes and names."""
    total = 0
    for file in _all_files(path):
        named = Form.named(file)
        ratio = _TEXT_IN_A_BYTE.get(str((named.packed or named.kind) if named else None), 1)
        total += ratio * file.stat().st_size
    return total


def _all_files(path: Path) -> list[Path]:
    if arrow_rows.is_dataset(path):
        return arrow_rows.dataset_files(path)
    return [file for _, file in files_of(path)]
