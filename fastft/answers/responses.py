"""`responses.json` and what lies beside it: answers as they end, and what they were made from.

While answers are made, each goes to the end of `responses.journal.jsonl` as it ends, behind a first line that says what
all of them are made from: weights, prompts, options. From time to time, and at the end, those that are there are
written to `responses.json` in the order of the records, with `responses.made-from.json`. Answers that were decoded in
one way are not replaced by those of another unless that is said.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastft.common import files
from fastft.common.errors import UserError
from fastft.common.jsonl import JsonLines
from fastft.decoding.answers import Answer
from fastft.run.decodings import differing, made_from, settings_in

_SECONDS_BETWEEN_WRITES = 2.0

_OF_A_LINE = {"index", "response", "tokens", "seconds"}


Line = Mapping[str, Any]
"""An answer: its `index`, `response`, `tokens`, `seconds`; perhaps `near_ties`, or `left_out`, the reason why there is
none."""


class Responses:
    """Answers on the disk."""

    def __init__(
        self,
        path: Path,
        entries: Callable[[Mapping[int, Line]], list[dict[str, Any]]],
        made_from: Mapping[str, Any],
        rows: Sequence[int | str],
        *,
        overwrite: bool = False,
    ) -> None:
        """Takes up what an earlier call has answered from the same; `begin` forgets what was made from something else.

        Args:
            path: of `responses.json`.
            entries: what stands in it, of the answers that are there by their indices.
            made_from: of what answers depend on, digests and options, as JSON can say it.
            rows: what the rows of what is asked are called, by index.
            overwrite: whether answers that were decoded otherwise may be replaced.

        Raises:
            UserError: a file cannot be read or written, or there are answers that were decoded otherwise.
        """
        self._path = path
        self._entries = entries
        self._rows = rows
        self._made_from = dict(made_from)
        self._journal = JsonLines(path.with_suffix(".journal.jsonl"), what="the responses' journal")
        self._lines: dict[int, dict[str, Any]] = {}
        self._clock = self._written = time.perf_counter()
        _check_place(path)
        before = self._read()
        if not overwrite:
            self._check_settings(before)

    @property
    def made_from(self) -> Path:
        """The file that says what the responses are made from."""
        return made_from(self._path)

    def missing(self, most: int) -> list[int]:
        """Which of the first `most` questions, from 0, have no answer yet."""
        return [index for index in range(most) if index not in self._lines]

    def line(self, index: int) -> Line | None:
        """The answer to question `index`; None where there is none yet."""
        return self._lines.get(index)

    def begin(self) -> None:
        """Answers are made from now on: starts the clock, and a journal where there is none."""
        self._clock = self._written = time.perf_counter()
        if not self._lines:
            # A full disk leaves the old journal, which says what the old answers are made from.
            files.write_text(self._journal.path, json.dumps({"made_from": self._made_from}) + "\n")

    def add(self, index: int, answer: Answer, response: str) -> None:
        """Writes down the answer to question `index` and the response that it holds.

        Raises:
            UserError: the disk is full, or the folder cannot be written; what is there is kept.
        """
        now = time.perf_counter()
        line = {"index": index, "response": response, "tokens": len(answer.ids), "seconds": now - self._clock}
        if answer.near_ties:
            line["near_ties"] = [asdict(tie) for tie in answer.near_ties]
        self._journal.append(line)
        self._lines[index] = line
        self._clock = now
        if now - self._written > _SECONDS_BETWEEN_WRITES:
            self._written = now
            self.write()

    def leave_out(self, index: int, reason: str) -> None:
        """Keeps the entry of question `index` with an empty response and the reason why there is none."""
        line = {"index": index, "response": "", "tokens": 0, "seconds": 0.0, "left_out": reason}
        if index not in self._lines:
            self._journal.append(line)
            self._lines[index] = line

    def write(self) -> list[dict[str, Any]]:
        """Writes the answers that are there, in the order of the questions, with what they are made from; returns them.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        entries = self._entries(self._lines)
        self._forget_others()
        files.write_json(self._path, entries)
        lines = self._lines.values()
        files.write_json(
            self.made_from,
            {
                **self._made_from,
                "seconds": sum(line["seconds"] for line in lines),
                "tokens": sum(line["tokens"] for line in lines),
                "near_ties": self.near_ties(),
                "n_answered": len(lines),
                "n_asked": len(self._rows),
            },
        )
        return entries

    def _forget_others(self) -> None:
        """Removes what other answers were made from, as late as these take their place: a kill leaves neither answers
        beside what others were made from, nor old ones of which nothing says that they are old."""
        known: dict[str, Any] = {}
        with contextlib.suppress(UserError):
            known = files.object_or_empty(self.made_from)
        if known | self._made_from != known:
            self.made_from.unlink(missing_ok=True)

    def near_ties(self) -> list[dict[str, Any]]:
        """The places where a greedy choice was a close one, by the records' rows in the data."""
        return [
            {"row": self._rows[index], **tie}
            for index in sorted(self._lines)
            for tie in self._lines[index].get("near_ties", [])
        ]

    def _read(self) -> Line:
        """Takes up the answers that were made from the same. Else what is there is kept until the first answer is to
        come; what that is made from."""
        first, *rest = [*self._journal.read()] or [{}]
        if first.get("made_from") == self._made_from:
            self._lines = {line["index"]: line for line in rest if line.keys() >= _OF_A_LINE}
        is_answered = self._path.exists() or any(line.keys() >= _OF_A_LINE for line in rest)
        before = first.get("made_from") or files.object_or_empty(self.made_from)
        return before if is_answered and isinstance(before, dict) else {}

    def _check_settings(self, before: Line) -> None:
        """Refuses to replace answers that were decoded in another way.

        Raises:
            UserError: there are some.
        """
        changed = differing(settings_in(before), self._made_from)
        if changed:
            said = ", ".join(f"{name} {one} there and {other} now" for name, (one, other) in changed.items())
            raise UserError(
                f"{self._path} was made with other settings ({said}): a --name of its own, such as greedy, keeps both; "
                "--overwrite replaces it"
            )


def _check_place(path: Path) -> None:
    """Refuses to write over something that is no file of responses."""
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; move it away")
    if path.exists() and not isinstance(files.read_json(path, what="the responses"), list):
        raise UserError(f"{path} is not a list of responses; move it away to answer again")
