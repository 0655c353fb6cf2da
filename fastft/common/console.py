"""What a user sees while something runs: rich progress on a terminal, plain lines elsewhere.

Output for people goes to standard error, so that standard output can be piped.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column, Table

_OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tab and newline, DEL, C1 (an 8-bit CSI is one)
    r"\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"  # which way text runs, where lines end, nothing at all
    r"\ud800-\udfff]"  # halves of surrogate pairs
)


def discard(stream: IO[str]) -> None:
    """Points a stream at nothing, so that neither what is left in its buffer nor what comes raises an error."""
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def printable(text: str) -> str:
    """The text with what a terminal would obey, or hide, escaped as in a string of Python's: `\\x1b`, `\\u202e`.

    Data, weights and judges write what they like; line ends and tabs stay, and so do joiners, which scripts need.
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class SafeConsole(Console):
    """A console for text that others have written: control characters come out escaped, rich's own as they are.

    It prints if anybody listens: a launcher that leaves before its ranks must not cost them their last checkpoint.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints; plain text is made printable before rich leaves some of its characters out."""
        super().print(*(printable(one) if isinstance(one, str) else one for one in objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of a renderable, their text printable."""
        for segment in super().render(renderable, options):
            is_plain = segment.control is not None or not _OBEYED.search(segment.text)
            yield segment if is_plain else Segment(printable(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Goes on without a word; rich would end the process."""
        discard(self.file)


console = SafeConsole(stderr=True, highlight=False, soft_wrap=True)

_SECONDS_BETWEEN_PLAIN_LINES = 5.0
_TABLE_WIDTH = 140
_BAR_WIDTH = 12


def say(line: str) -> None:
    """Prints a line above any progress bar, markup characters as they are."""
    console.print(line, markup=False)


def warn(line: str) -> None:
    """Prints a warning line."""
    console.print(f"warning: {line}", markup=False, style="yellow")


def show(table: Table) -> None:
    """Prints a table whole, wider than the terminal where it must be: cut figures are none."""
    if not console.quiet:
        SafeConsole(stderr=True, highlight=False, width=max(console.width, _TABLE_WIDTH)).print(table)


@contextmanager
def silenced(yes: bool) -> Iterator[None]:
    """Says nothing within a block, if `yes`: of several ranks one speaks for all."""
    before, console.quiet = console.quiet, yes or console.quiet
    try:
        yield
    finally:
        console.quiet = before


class Meter:
    """The progress of one task: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, description: str, total: int, done: int, bar: Progress | None) -> None:
        self._description = description
        self._total = total
        self._done = done
        self._bar = bar
        self._task: TaskID | None = None
        self._done_before, self._began = done, time.monotonic()
        self._last_line = self._began
        if bar is not None:
            self._task = bar.add_task(description, total=total, completed=done, note="")

    def advance(self, note: str = "", by: int = 1) -> None:
        """`by` more are done; `note` is shown beside them."""
        self._done += by
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, note=note)
        elif self._done >= self._total or time.monotonic() - self._last_line > _SECONDS_BETWEEN_PLAIN_LINES:
            more = ", ".join(filter(None, (note, self._left())))
            say(f"{self._description} {self._done}/{self._total} {more}".rstrip())
            self._last_line = time.monotonic()

    def _left(self) -> str:
        """The time that what is left will take at the pace so far, such as `0:03:20 left`."""
        left, done = self._total - self._done, self._done - self._done_before
        if left <= 0 or done <= 0:
            return ""
        return f"{timedelta(seconds=round((time.monotonic() - self._began) / done * left))} left"


@contextmanager
def meter(description: str, total: int, *, done: int = 0) -> Iterator[Meter]:
    """A `Meter` for `total` pieces of work, `done` of them before it starts."""
    if not console.is_terminal:
        yield Meter(description, total, done, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=_BAR_WIDTH),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", table_column=Column(ratio=1, overflow="fold")),  # on lines below, if need be
    )
    with Progress(*columns, console=console, expand=True) as bar:
        yield Meter(description, total, done, bar)
