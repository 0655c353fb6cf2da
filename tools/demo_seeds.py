"""What the demo reaches, seed by seed, and how its setting was chosen: the tables of docs/demo.md.

    python tools/demo_seeds.py settings --out FOLDER [--page docs/demo.md]
    python tools/demo_seeds.py seeds    --out FOLDER [--page docs/demo.md]

`settings` trains each of `SETTINGS` as `CHOOSING` says and looks at nothing but validation losses: the test split is
never answered. Its choice is written into `fastft.demo.demo_run` by hand. `seeds` runs the whole demo, as `fastft demo`
does, for each of `SEEDS` in each of `ARITHMETICS`. All seeds stand here before anything is run.

Each finished run is a line of FOLDER/runs.jsonl; a killed call goes on behind the last one, and a changed setting, or
another processor, begins anew. With `--examples N` each run sees only about so many training examples, for a look at
whether all works; `--only N` stops after so many runs. The tables go to the standard output, and into `--page`.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from fastft.common import files
from fastft.common.console import say
from fastft.common.jsonl import JsonLines
from fastft.common.memory import keep_freed_memory
from fastft.common.version import __version__
from fastft.demo import DemoOptions, demo, demo_run
from fastft.doctor.doctor import environment
from fastft.run.config import TrainOptions
from fastft.run.folder import Run
from fastft.run.metrics_file import read_metrics
from fastft.training.train import train

SEEDS = (1, 2, 3, 4, 5)
"""Of the demos that are measured."""
ARITHMETICS: tuple[Literal["fp32", "bf16"], ...] = ("bf16", "fp32")
CHOOSING: tuple[tuple[int, Literal["fp32", "bf16"]], ...] = ((101, "fp32"), (102, "bf16"))
"""Seed and arithmetic of the runs by whose validation loss a setting is chosen, the same for each setting: none of
`SEEDS`, so that these have had no part in it."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is chosen: the rest of the demo's options is as it is."""

    lr: float
    epochs: int
    batch_size: int
    schedule: Literal["constant", "cosine", "linear"] = "cosine"

    @classmethod
    def of(cls, options: TrainOptions) -> Setting:
        """Of a run's options."""
        return cls(options.lr, options.epochs, options.batch_size, options.schedule)

    def __str__(self) -> str:
        return f"rate {self.lr:g}, {self.schedule}, {self.epochs} epochs, batches of {self.batch_size}"


SETTINGS = tuple(
    Setting(lr, epochs, batch_size)
    for batch_size, epochs, rates in ((16, 9, (1e-3, 1.4e-3)), (32, 14, (1.4e-3, 2e-3)))
    for lr in rates
)
"""Those that are tried, each short enough for a demo of about a minute where bf16 is fast."""

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not there yet, and writes the table."""
    parser = argparse.ArgumentParser(description="What the demo reaches, and how its setting was chosen.")
    parser.add_argument("what", choices=("settings", "seeds"))
    parser.add_argument("--out", type=Path, required=True, help="the folder of the runs and of runs.jsonl")
    parser.add_argument("--page", type=Path, help="the page into which the table goes, between its marks")
    parser.add_argument("--examples", type=int, help="see only about so many training examples in each run")
    parser.add_argument("--only", type=int, help="stop after so many runs")
    given = parser.parse_args(argv)
    keep_freed_memory()
    rows = finished_rows(given.what, files.make_folder(given.out), given.examples, given.only)
    table = TABLES[given.what](rows) if rows else "Nothing is measured yet."
    print(table)
    if given.page is not None:
        files.write_text(given.page, between_marks(given.page.read_text(encoding="utf-8"), given.what, table))


def finished_rows(what: str, out: Path, examples: int | None, only: int | None = None) -> list[Row]:
    """The rows of all runs in their order, those that were there and those that were run now.

    Raises:
        SystemExit: a run was interrupted; its row is not there.
    """
    lines = JsonLines(out / "runs.jsonl", what="the finished runs")
    known = list(lines.read())
    found = []
    for asked, run in RUNS[what](out, examples):
        key = {"what": what, **asked, "examples": examples, **_machine()}
        row = next((line for line in known if all(line.get(name) == value for name, value in key.items())), None)
        if row is None:
            if only == 0:
                break
            only = None if only is None else only - 1
            say(f"{what}: {Setting(**asked['setting'])}; seed {asked['seed']}, {asked['dtype']}")
            row = {**key, "fastft": __version__, **run()}
            lines.append(row)
        found.append(row)
    return found


Runs = Iterator[tuple[Row, Callable[[], Row]]]


def _settings(out: Path, examples: int | None) -> Runs:
    for setting in SETTINGS:
        for seed, dtype in CHOOSING:
            key = {"setting": asdict(setting), "seed": seed, "dtype": dtype}
            yield key, partial(_losses_of, out / "setting", setting, seed, dtype, examples)


def _losses_of(folder: Path, setting: Setting, seed: int, dtype: Any, examples: int | None) -> Row:
    steps = _steps(examples, setting.batch_size)
    options = demo_run(DemoOptions(out=folder, seed=seed, dtype=dtype, steps=steps))
    length = {} if steps is None else {"epochs": options.epochs}  # which would have no effect beside steps
    began = time.perf_counter()
    outcome = train(replace(options, **{**asdict(setting), **length}))
    if outcome.interrupted_by is not None:
        raise SystemExit(130)
    return {**_losses(outcome.run), "seconds": time.perf_counter() - began}


def _seeds(out: Path, examples: int | None) -> Runs:
    setting = Setting.of(demo_run(DemoOptions()))
    for dtype in ARITHMETICS:
        for seed in SEEDS:
            steps = _steps(examples, setting.batch_size)
            options = DemoOptions(out=out / f"seed-{seed}-{dtype}", seed=seed, dtype=dtype, judge=False, steps=steps)
            yield {"setting": asdict(setting), "seed": seed, "dtype": dtype}, partial(_demo_of, options)


def _demo_of(options: DemoOptions) -> Row:
    began = time.perf_counter()
    outcome = demo(options)
    if outcome.interrupted_by is not None:
        raise SystemExit(130)
    seconds = time.perf_counter() - began
    summary = files.read_json(outcome.run.scores(), what="the scores")["summary"]
    return {"exact_match": summary["exact_match"], "n": summary["n"], **_losses(outcome.run), "seconds": seconds}


def _steps(examples: int | None, batch_size: int) -> int | None:
    return None if examples is None else max(1, examples // batch_size)


def _losses(run: Run) -> Row:
    losses = [line["val_loss"] for line in read_metrics(run.metrics) if "val_loss" in line]
    return {"best_val_loss": min(losses), "last_val_loss": losses[-1]}


def _machine() -> Row:
    """What the figures depend on beside the code."""
    return {"processor": environment(torch.device("cpu"))["CPU"], "threads": torch.get_num_threads()}


RUNS: dict[str, Callable[[Path, int | None], Runs]] = {"settings": _settings, "seeds": _seeds}


def seeds_table(rows: Sequence[Row]) -> str:
    """The demos, one a line, and what of each arithmetic the median and the spread are."""
    lines = [
        "| Arithmetic | Seed | Exact match, % | Best validation loss | Last | Seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        losses = f"{row['best_val_loss']:.4f} | {row['last_val_loss']:.4f}"
        lines.append(f"| {row['dtype']} | {row['seed']} | {row['exact_match']:.1f} | {losses} | {row['seconds']:.0f} |")
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        figures = ("exact_match", "best_val_loss", "last_val_loss", "seconds")
        said = [_spread([row[name] for row in own], digits) for name, digits in zip(figures, (1, 4, 4, 0), strict=True)]
        lines.append(f"| **{dtype}** | median of {len(own)} (least to most) | {' | '.join(said)} |")
    return "\n".join([*lines, "", _said_of(rows, len(SEEDS) * len(ARITHMETICS))])


def settings_table(rows: Sequence[Row]) -> str:
    """The settings, one a line, the one with the least validation loss in bold."""
    held: dict[Setting, list[Row]] = {}
    for row in rows:
        held.setdefault(Setting(**row["setting"]), []).append(row)
    best = chosen(rows)
    lines = ["| Setting | Validation loss at the end, mean (least to most) | Best on the way |", "|---|---|---|"]
    for setting, own in held.items():
        last, least = ([row[name] for row in own] for name in ("last_val_loss", "best_val_loss"))
        name = f"**{setting}**" if setting == best else str(setting)
        said = f"{statistics.fmean(last):.4f} ({min(last):.4f} to {max(last):.4f}) | {statistics.fmean(least):.4f}"
        lines.append(f"| {name} | {said} |")
    return "\n".join([*lines, "", _said_of(rows, len(SETTINGS) * len(CHOOSING))])


TABLES = {"settings": settings_table, "seeds": seeds_table}


def chosen(rows: Sequence[Row]) -> Setting | None:
    """The setting with the least validation loss at the end, in the mean of its runs, of those that were run for every
    of `CHOOSING`; None where there is none."""
    held: dict[Setting, list[Row]] = {}
    for row in rows:
        held.setdefault(Setting(**row["setting"]), []).append(row)
    whole = {
        setting: statistics.fmean(row["last_val_loss"] for row in own)
        for setting, own in held.items()
        if len(own) == len(CHOOSING)
    }
    return min(whole, key=lambda setting: whole[setting]) if whole else None


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _said_of(rows: Sequence[Row], of: int) -> str:
    """Where and with what the rows came about."""
    unfinished = "" if len(rows) == of else f"{len(rows)} of {of} runs so far. "
    short = "" if rows[0]["examples"] is None else f"**Of about {rows[0]['examples']} training examples only.** "
    one = rows[0]
    setting = f"{Setting(**one['setting'])}; " if "exact_match" in one else ""
    return (
        f"{short}{unfinished}{setting}{one['processor']}, {one['threads']} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, fastft {one['fastft']}."
    )


def between_marks(page: str, what: str, table: str) -> str:
    """A page with another table between its marks `<!-- WHAT: ... -->` and `<!-- end of WHAT -->`.

    Raises:
        ValueError: the page has no such marks.
    """
    begins, ends = f"<!-- {what} -->\n", f"<!-- end of {what} -->"
    before, found, rest = page.partition(begins)
    _, end, after = rest.partition(ends)
    if not (found and end):
        raise ValueError(f"the page has no {begins.strip()} ... {ends}")
    return f"{before}{begins}\n{table}\n\n{ends}{after}"


if __name__ == "__main__":
    main()
