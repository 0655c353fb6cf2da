"""Records: reading, checking and splitting instruction data.

A record is a JSON object with `instruction`, `input` (may be missing or empty) and `output`, all text; further keys
are kept and written back. Files are a JSON array (`.json`) or one object a line (`.jsonl`), either also `.gz`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One instruction with its reference output. `row` counts from 1 in its file, bad records included."""

    instruction: str
    input: str = ""
    output: str
    row: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

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
        """`FILE: N of M records are malformed: row 3: ...; row 9: ...` in one line."""
        shown = "; ".join(str(bad) for bad in self.bad[:_BAD_RECORDS_SHOWN])
        more = len(self.bad) - _BAD_RECORDS_SHOWN
        total = len(self.good) + len(self.bad)
        tail = f"; and {more} more" if more > 0 else ""
        return f"{self.source}: {len(self.bad)} of {total} records are malformed: {shown}{tail}"


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
    if source == "sample":
        rows: Iterator[tuple[int, Any]] = enumerate(sample_records(), start=1)
        records = _check_all("sample", rows)
    else:
        path = book_file() if source == "book" else Path(source)
        records = _check_all(str(path), _rows(path))
    if records.bad and not skip_bad_records:
        raise UserError(f"{records.describe_bad()}; mend them, or leave them out with --skip_bad_records")
    if not records.good:
        raise UserError(f"{records.source}: no usable record; expected objects with `instruction`, `input`, `output`")
    return records


def split(n: int, seed: int | None = None) -> Split:
    """The book's split of `n` records: 85% train, 10% test, the rest validation, in file order.

    With a `seed` the records are shuffled first. Counts are rounded down as in the book: int(0.85 n), int(0.10 n).
    """
    order = np.arange(n, dtype=np.int64) if seed is None else np.random.default_rng(seed).permutation(n)
    n_train, n_test = int(n * 0.85), int(n * 0.10)
    return Split(train=order[:n_train], test=order[n_train : n_train + n_test], val=order[n_train + n_test :])


def book_file() -> Path:
    """The book's `instruction-data.json` in the cache folder, downloaded and checked where it is not there yet.

    The cache is `$FASTFT_CACHE`, else `$XDG_CACHE_HOME/fastft`, else `~/.cache/fastft`.

    Raises:
        UserError: no network, or the bytes are not the book's (SHA-256).
    """
    folder = files.make_folder(_cache_folder(), remedy="choose another with the environment variable FASTFT_CACHE")
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


def _cache_folder() -> Path:
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


def _check_all(source: str, rows: Iterator[tuple[int, Any]]) -> Records:
    good: list[Record] = []
    bad: list[BadRecord] = []
    for row, value in rows:
        reason = value.reason if isinstance(value, BadRecord) else _fault(value)
        if reason is not None:
            bad.append(BadRecord(row, reason))
            continue
        extra = {key: item for key, item in value.items() if key not in ("instruction", "input", "output")}
        good.append(
            Record(
                instruction=value["instruction"],
                input=value.get("input") or "",
                output=value["output"],
                row=row,
                extra=extra,
            )
        )
    return Records(source, good, bad)


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


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (row, JSON value or BadRecord) of a data file; rows count from 1."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        yield from _json_lines(path)
    elif name.endswith(".json"):
        yield from _json_array(path)
    else:
        raise UserError(f"{path}: unknown kind of file; expected .json, .jsonl, .json.gz or .jsonl.gz")


def _json_array(path: Path) -> Iterator[tuple[int, Any]]:
    content = _read(path)
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} cannot be decoded; save it as UTF-8") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply; expected an array of flat objects") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; expected an array of objects") from error
    if not isinstance(value, list):
        raise UserError(f"{path}: got {_kind(value)} at the top, expected an array of objects (or rename it to .jsonl)")
    yield from enumerate(value, start=1)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for row, line in enumerate(_read(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield row, json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            yield row, BadRecord(row, f"not UTF-8 (byte {error.start} of the line), expected UTF-8 JSON")
        except ValueError as error:
            yield row, BadRecord(row, f"not JSON ({error}), expected one object a line")
        except RecursionError:
            yield row, BadRecord(row, "nested too deeply, expected a flat object")


def _read(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                return file.read()
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"data file not found: {path}; --data takes a file, `book` or `sample`") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}; fetch or compress it again") from error
    except OSError as error:
        raise UserError(f"cannot read the data file {path}: {error.strerror or error}; check the path") from error
