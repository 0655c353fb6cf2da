"""The rows of JSON text: an array's elements, or one value a line, read one by one.

What begins with a brace is JSON lines, what begins with a bracket an array, whatever the file's name says. No more than
one row is held, and a row has a largest size: a line of a gigabyte is named, not read.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.common.errors import UserError
from fastft.common.kinds import kind_of

LONGEST_ROW = 16 << 20
"""Bytes of a row's JSON. The text of 1,024 tokens, as many as GPT-2 reads at a time, is at most some 128 KiB."""

_READ_BYTES = 1 << 20
_WHITE_SPACE = " \t\n\r"
_LONGEST_LITERAL = len("-Infinity") + 1
_HOLD_LISTS = {"instruction", "messages", "conversations", "segments", "prompt", "input_ids"}
"""By which an object with arrays is a row, and not one around all rows."""
_OTHER_ENCODINGS = {  # by their byte order marks; one of UTF-32's begins as one of UTF-16's does
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class RepeatedKeys(dict[str, Any]):
    """An object in which a key stands more than once; its last value counts, as in most readers of JSON."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    return value if len(value) == len(pairs) else RepeatedKeys(value)


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used, and why."""

    row: int
    reason: str
    place: str = ""
    """Its file and its row there, where several files are read."""

    def __str__(self) -> str:
        return f"{self.place or f'row {self.row}'}: {self.reason}"


def are_lines(begin: bytes, path: Path, *, named_lines: bool) -> bool:
    """Whether JSON text that begins so is one of lines: by its first character, else by the file's name.

    Raises:
        UserError: it is not UTF-8.
    """
    check_utf8(begin, path)
    text = begin.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"["):
        # A first line that is whole and has others behind it is a bad row of JSON lines, if the name says so too.
        first, _, others = text.partition(b"\n")
        return named_lines and bool(others.strip()) and _is_whole(first)
    return text.startswith(b"{") or named_lines


def check_utf8(begin: bytes, path: Path) -> None:
    """Refuses text that begins with another encoding's byte order mark."""
    for mark, encoding in _OTHER_ENCODINGS.items():
        if begin.startswith(mark):
            raise UserError(f"{path} is not UTF-8 but {encoding}, by its byte order mark; save it as UTF-8")


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def json_lines(file: io.BufferedReader[Any], path: Path, *, named_lines: bool) -> Iterator[tuple[int, Any]]:
    """Yields (row, JSON value or `BadRecord`) of a text of lines; rows count from 1, blank ones too. Of a file that is
    named as an array, the first must be a value by itself.

    Raises:
        UserError: while iterating, where that is not so.
    """
    checked = named_lines
    for row, line in enumerate(lines_of(file), start=1):
        if line is None:
            yield row, BadRecord(row, f"longer than {LONGEST_ROW >> 20} MiB, expected one object a line")
            continue
        if not line.strip():
            continue
        value = _line_value(row, line)
        if not checked:
            _check_first(value, file, path)
            checked = True
        yield row, value


def _line_value(row: int, line: bytes) -> Any:
    try:
        return _DECODER.decode(line.removesuffix(b"\n").decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRecord(row, f"not UTF-8 (byte {error.start} of the line), expected UTF-8 JSON")
    except ValueError as error:
        return BadRecord(row, f"not JSON ({error}), expected one object a line")
    except RecursionError:
        return BadRecord(row, "nested too deeply, expected a flat object")


def _check_first(value: Any, file: io.BufferedReader[Any], path: Path) -> None:
    """Refuses a .json file that is neither an array nor lines: one object over several lines, or one around all."""
    expected = "expected an array of objects, or one object a line"
    if isinstance(value, BadRecord):
        raise UserError(f"{path} is not JSON: it begins with an object that line 1 does not hold whole; {expected}")
    holds_rows = isinstance(value, dict) and any(isinstance(item, list) for item in value.values())
    if holds_rows and not value.keys() & _HOLD_LISTS and not file.peek(1).strip():
        raise UserError(f"{path}: got an object at the top with the keys {named_keys(value)}; {expected}")


def in_one_line(text: str, most: int = 40) -> str:
    """A text of the data as a part of a line, its line ends escaped."""
    return repr(text[:most])[1:-1]


def named_keys(value: dict[str, Any], most: int = 8) -> str:
    """The keys of an object, for messages of one line."""
    shown = ", ".join(f"`{in_one_line(key)}`" for key in list(value)[:most])
    return shown + (f" and {len(value) - most} more" if len(value) > most else "") if value else "none"


def lines_of(file: io.BufferedReader[Any]) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long, of which no more than a part is held."""
    while line := file.readline(LONGEST_ROW + 1):
        if len(line) <= LONGEST_ROW or line.endswith(b"\n"):
            yield line
            continue
        while (part := file.readline(_READ_BYTES)) and not part.endswith(b"\n"):
            pass
        yield None


def json_array(file: io.BufferedIOBase, path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (row, JSON value) of an array's elements; rows count from 1.

    Raises:
        UserError: while iterating, where the text is not JSON, or no array.
    """
    text, row = _Window(file), 0
    try:
        if text.next() != "[":
            if not text.next():
                raise UserError(f"{path} is not JSON: it is empty; expected an array of objects")
            kind = kind_of(text.rest())
            raise UserError(f"{path}: got {kind} at the top, expected an array of objects, or one object a line")
        text.skip()
        separator = text.next()
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
        raise UserError(f"{path}: row {row} is nested too deeply; expected an array of flat objects") from error
    except _TooLong as error:
        raise UserError(
            f"{path}: row {row} is longer than {LONGEST_ROW >> 20} MiB, or a quote is not closed; expected an array of "
            "short objects"
        ) from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; expected an array of objects") from error


class _TooLong(Exception):
    """A value has more than `LONGEST_ROW` characters."""


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
            _TooLong: it has more than `LONGEST_ROW` characters.
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
                if cut and len(self._text) - self._at > LONGEST_ROW:
                    raise _TooLong from None
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
