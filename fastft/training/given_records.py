"""Records that are given as objects: a file in the run's folder, which the stages behind read like any other data."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastft.common import files
from fastft.common.errors import UserError
from fastft.run.config import TrainOptions
from fastft.run.folder import Run

RECORDS = "records.jsonl"
"""Their file."""
_FRESH, _BEFORE = f".{RECORDS}.new.tmp", f".{RECORDS}.before.tmp"
"""What is given, until all of it is read; what was there, until the run begins."""


def with_records(options: TrainOptions, run: Run) -> TrainOptions:
    """The options of a run whose records are given as objects.

    Raises:
        UserError: they name data too, or nothing may be written.
    """
    if options.data != TrainOptions.data and options.data != str(run.folder / RECORDS):
        raise UserError(f"got records and data={options.data!r}, expected one of them")
    if options.dry_run:
        raise UserError("got records and dry_run, which writes nothing; expected a file as data")
    return replace(options, data=str(run.folder / RECORDS))


@contextlib.contextmanager
def in_their_place(run: Run, records: Iterable[Mapping[str, Any]], *, resume: bool) -> Iterator[None]:
    """Writes records as JSON lines, all or none. Where the block ends with an error, what was there is put back: a run
    that does not begin changes nothing.

    Raises:
        UserError: one is no JSON; the file cannot be written, is somebody else's, or holds others than the run's that
            is resumed.
    """
    place, fresh, before = (run.folder / name for name in (RECORDS, _FRESH, _BEFORE))
    files.make_folder(run.folder)
    if before.is_file():  # of a process that was killed within the block
        before.replace(place)
    held = place.exists() or place.is_symlink()
    if held and not _is_a_runs(run, place):
        raise UserError(f"{place} is there, and is not the data of a run in this folder; move it, or change --out")
    with contextlib.ExitStack() as undone:
        undone.callback(fresh.unlink, missing_ok=True)
        _write(fresh, records)
        if resume and held and files.identity(fresh) != files.identity(place):
            raise UserError(f"got other records than those of {run.folder}, which have changed since; resume with them")
        if held:
            place.replace(before)
            undone.callback(before.replace, place)
        else:
            undone.callback(place.unlink, missing_ok=True)
        fresh.replace(place)
        yield
        undone.pop_all()
    before.unlink(missing_ok=True)


def _is_a_runs(run: Run, place: Path) -> bool:
    """Whether a run in this folder reads the file as its data."""
    return run.config.is_file() and Path(run.options().files[0]).name == place.name


def _write(place: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with files.replacing(place) as file:
        for number, record in enumerate(records, start=1):
            if not isinstance(record, Mapping):
                raise UserError(f"got record {number} that is {type(record).__name__}, expected a dict, a row of data")
            try:
                file.write(json.dumps(dict(record), ensure_ascii=False).encode() + b"\n")
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"got record {number} that JSON cannot say ({error}), expected texts, numbers, lists"
                ) from error
