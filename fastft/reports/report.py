"""The stage RUN -> RUN/report.html and RUN/report.json: one page that needs nothing but itself, and its numbers.

Every file of the run may be missing: its section then names the command that makes it. All text is escaped by jinja2;
only the charts, drawn from numbers, go in as markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastft.common.errors import UserError
from fastft.common.files import write_json
from fastft.common.lock import writing
from fastft.common.options import check_values, option
from fastft.pages.charts import Curve, chart
from fastft.pages.render import write_page
from fastft.reports.figures import (
    TOKEN_KINDS,
    Answer,
    RunFigures,
    by_question,
    differing_settings,
    farthest_apart,
    read_run,
    side_by_side,
)
from fastft.run.decodings import check_name
from fastft.run.folder import REPORT, REPORT_NUMBERS, names_of
from fastft.scores.score import rungs_in_words

_WIDE, _NARROW = (10.4, 3.4), (5.1, 2.3)
_TITLES = {"loss": "training loss", "val_loss": "validation loss", "lr": "learning rate", "grad_norm": "gradient norm"}
_BEST, _LEAST = max, min
# Label, path into report.json's figures of a run, digits, which is best (None: neither).
_COMPARED: tuple[tuple[str, tuple[str, ...], int, Any], ...] = (
    ("Judge's mean, 0 to 100", ("scores", "judge_mean"), 2, _BEST),
    ("Conversations, judge's mean", ("conversations", "judge_mean"), 2, _BEST),
    ("Exact match, %", ("scores", "exact_match"), 2, _BEST),
    ("BLEU, %", ("scores", "bleu"), 2, _BEST),
    ("chrF, %", ("scores", "chrf"), 2, _BEST),
    ("ROUGE-1 F1, %", ("scores", "rouge_1"), 2, _BEST),
    ("ROUGE-2 F1, %", ("scores", "rouge_2"), 2, _BEST),
    ("ROUGE-L F1, %", ("scores", "rouge_l"), 2, _BEST),
    ("Responses", ("scores", "n"), 0, None),
    ("Words of a response", ("scores", "words"), 1, None),
    ("Responses that loop, %", ("scores", "looping"), 2, _LEAST),
    ("Perplexity of the references", ("scores", "perplexity"), 2, _LEAST),
    ("Best validation loss", ("training", "best_val_loss"), 4, _LEAST),
    ("Last training loss", ("training", "last_loss"), 4, None),
    ("Steps", ("training", "steps"), 0, None),
    ("Seconds of training", ("seconds", "train"), 1, None),
    ("Real tokens a second", ("training", "real_tokens_per_second"), 0, _BEST),
    ("Tokens computed", ("tokens", "computed"), 0, None),
)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The runs that are shown."""

    run: Path
    """Folder of the run; report.html and report.json are written into it."""
    against: list[Path] = option([])
    """Folders of other runs to show beside it."""
    name: str | None = None
    """What the responses are called, where they have a name, in all of the runs."""

    def __post_init__(self) -> None:
        check_values(self)
        check_name(self.name)


def report(options: ReportOptions) -> Path:
    """Writes RUN/report.html and RUN/report.json, and returns the page's path.

    Raises:
        UserError: a folder does not exist, holds no file of a run, or holds one that cannot be read.
    """
    folders = [options.run, *options.against]
    _check_different(folders)
    run, *others = (read_run(folder, options.name) for folder in folders)
    differences = side_by_side(run, others)
    settings = differing_settings([run, *others]) if others else {}
    with writing(options.run):
        write_page(
            options.run / REPORT,
            "report.html.j2",
            styles=("base.css", "report.css"),
            scripts=("report.js",),
            **_context(run, others, differences, settings),
        )
        write_json(
            options.run / REPORT_NUMBERS,
            {
                "runs": [one.as_json() for one in (run, *others)],
                "differences": differences,
                "differing_settings": settings,
            },
        )
    return options.run / REPORT


def _check_different(folders: Sequence[Path]) -> None:
    seen = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UserError(f"got {folder} twice, expected different runs: leave it out of --against")
        seen.add(folder.resolve())


def _context(
    run: RunFigures, others: Sequence[RunFigures], differences: Sequence[Any], settings: dict[str, Any]
) -> dict[str, Any]:
    runs = [run, *others]
    names = names_of([one.folder for one in runs])
    rows = by_question(run, others)
    histograms = [(name, one.histogram(run.main_score)) for name, one in zip(names, runs, strict=True)]
    histograms = [(name, counts) for name, counts in histograms if any(counts)]
    return {
        "run": run,
        "names": names,
        "facts": _facts(run),
        "charts": _charts(run, others),
        "token_kinds": TOKEN_KINDS,
        "compared": _compared(runs),
        "problems": [(name, one.scores_problem) for name, one in zip(names, runs, strict=True) if one.scores_problem],
        "differences": differences,
        "differing_settings": settings,
        "rows": rows,
        "histograms": histograms,
        "most_in_a_bar": max([1, *(count for _, counts in histograms for count in counts)]),
        "rungs": rungs_in_words,
        "lists": _lists(run, rows, several=bool(others)),
    }


def _facts(run: RunFigures) -> str:
    """What was trained on what, in one line."""
    settings, training = run.settings or {}, run.training or {}
    found = [settings.get(name) for name in ("model", "data", "template", "dtype")]
    found += [f"responses {run.responses_name}"] if run.responses_name else []
    for name, unit in (("epochs", "epoch"), ("steps", "step")):
        if count := training.get(name):
            found.append(f"{count:,} {unit}{'' if count == 1 else 's'}")
    return " · ".join(fact for fact in found if fact)


def _compared(runs: Sequence[RunFigures]) -> list[dict[str, Any]]:
    """The table of all runs' figures, with the places of the best; a dash where one is undefined or not there."""
    held = [{**run.as_json(), **({"scores": None} if run.scores_problem else {})} for run in runs]
    judges = [run.judge for run in runs if run.judge is not None]
    same_judge = all(judge == judges[0] for judge in judges)
    table = []
    for label, (part, name), digits, best in _COMPARED:
        values = [(one[part] or {}).get(name) for one in held]
        known = [value for value in values if value is not None]
        if any(name in (one[part] or {}) for one in held):
            ranked = best is not None and len(known) > 1 and min(known) < max(known)
            top = best(known) if ranked and (same_judge or name != "judge_mean") else None
            table.append({"label": label, "values": values, "digits": digits, "best": top})
    return table


def _lists(run: RunFigures, rows: Sequence[Sequence[Answer | None]], *, several: bool) -> list[dict[str, Any]]:
    """The answers to look at first: best, worst, most disputed."""
    if len(run.answers) < 2:
        return []
    row_of = {row[0].row: row for row in rows if row[0] is not None}
    by = "by the judge's score" if run.main_score == "judge" else "by ROUGE-L"
    lists = [
        {"title": "Best", "note": by, "rows": [row_of[answer.row] for answer in run.best()]},
        {"title": "Worst", "note": by, "rows": [row_of[answer.row] for answer in run.worst()]},
        {
            "title": "Most disputed",
            "note": "judge and ROUGE-L farthest apart, both on 0 to 100",
            "rows": [row_of[answer.row] for answer in run.disputed()],
        },
    ]
    if several:
        lists.append(
            {"title": "Runs farthest apart", "note": by, "rows": farthest_apart(rows, run.main_score)},
        )
    return [one for one in lists if one["rows"]]


# --- Charts ---


def _charts(run: RunFigures, others: Sequence[RunFigures]) -> list[Markup]:
    """The charts that there are numbers for: the losses first, then what else was recorded of this run."""
    names = names_of([one.folder for one in (run, *others)])
    if others:
        charts = [
            chart(_TITLES[curve], _of_all([run, *others], names, curve), _NARROW, logarithmic=True)
            for curve in ("loss", "val_loss")
            if any(curve in one.curves for one in (run, *others))
        ]
    else:
        charts = [chart("loss", losses, _WIDE, logarithmic=True)] if (losses := _losses(run)) else []
    return charts + [
        chart(_TITLES[curve], [Curve(_TITLES[curve], *run.curves[curve])], _NARROW)
        for curve in ("lr", "grad_norm")
        if curve in run.curves
    ]


def _losses(run: RunFigures) -> list[Curve]:
    curves = []
    if "loss" in run.curves:
        style: Any = "raw" if "val_loss" in run.curves else "main"
        curves.append(Curve("training", *run.curves["loss"], style))
    if "val_loss" in run.curves:
        curves.append(Curve("validation", *run.curves["val_loss"], "main", marked=True))
    return curves


def _of_all(runs: Sequence[RunFigures], names: Sequence[str], curve: str) -> list[Curve]:
    return [
        Curve(name, *run.curves[curve], "other" if place else "main", marked=curve == "val_loss")
        for place, (run, name) in enumerate(zip(runs, names, strict=True))
        if curve in run.curves
    ]
