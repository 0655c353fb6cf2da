"""The rows of a table as text: CSV and TSV, whose first line names the columns."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastft.common.errors import UserError
from fastft.data.json_rows import LONGEST_ROW, BadRecord, in_one_line, lines_of
from fastft.data.records import KINDLESS_KEYS

_OTHERS = {",": "\t;", "\t": ",;"}
"""What separates the columns where the delimiter that the name says separates none."""


def csv_rows(file: io.BufferedReader[Any], path: Path, *, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Yields (row, object of texts or `BadRecord`) of a table; rows count from 1 behind the header.

    A text in quotes may hold the delimiter, ends of lines, and quotes, which are doubled. An empty cell is an empty
    text, in the columns `category` and `choices` nothing.

    Raises:
        UserError: while iterating, where there is no header, a quote is not closed, or the text is not UTF-8.
    """
    csv.field_size_limit(LONGEST_ROW)
    lines = _Lines(file, path)
    row = 0
    try:
        first = next(lines, "")
        header = next(csv.reader(_quoted(first, lines), delimiter=delimiter, strict=True), [])
        if len(header) == 1 and (other := next((one for one in _OTHERS[delimiter] if one in first), None)):
            delimiter = other
            header = next(csv.reader([first], delimiter=delimiter, strict=True), [])
        _check_header(header, path)
        for cells in csv.reader(lines, delimiter=delimiter, strict=True):
            if cells:  # a blank line is no row
                row += 1
                yield row, _object(row, header, cells, lines.number)
    except csv.Error as error:
        where = f"row {row + 1}, which ends in line {lines.number}" if row or lines.number > 1 else "the header"
        raise UserError(
            f"{path}: {where}, is not CSV: {error}; expected texts that hold a delimiter, a quote or an end of line in "
            "quotes, and quotes in them doubled"
        ) from error


def _quoted(first: str, lines: Iterator[str]) -> Iterator[str]:
    """The first line, and those behind it, should a quote in it not be closed."""
    yield first
    yield from lines


class _Lines(Iterator[str]):
    """The lines of a file as text, counted."""

    def __init__(self, file: io.BufferedReader[Any], path: Path) -> None:
        self.number = 0
        self._lines = lines_of(file)
        self._path = path

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        if line is None:
            raise UserError(f"{self._path}: line {self.number} is longer than {LONGEST_ROW >> 20} MiB")
        try:
            return (line.removeprefix(codecs.BOM_UTF8) if self.number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._path} is not UTF-8: byte {error.start} of line {self.number} cannot be decoded; save it as "
                "UTF-8"
            ) from error


def _check_header(header: list[str], path: Path) -> None:
    if not any(header):
        raise UserError(f"{path} has no header; expected the names of the columns in its first line")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two columns have the name `{in_one_line(twice)}`, expected different names")


def _object(row: int, header: list[str], cells: list[str], line: int) -> dict[str, Any] | BadRecord:
    if len(cells) != len(header):
        many = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
        return BadRecord(row, f"has {many}, expected {len(header)}, as the header (it ends in line {line})")
    value: dict[str, Any] = dict(zip(header, cells, strict=True))
    for key in KINDLESS_KEYS:
        if value.get(key) == "":
            value[key] = None
    return value
