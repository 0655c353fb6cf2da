"""The stage RUN -> RUN/report.html and RUN/report.json: one page that needs nothing but itself, and its numbers.

Every file of the run may be missing: its section then names the command that makes it. All text is escaped by jinja2;
only the charts, drawn from numbers, go in as markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastft.common.errors import UserError
from fastft.common.files import write_json
from fastft.common.lock import writing
from fastft.common.options import check_values, names_checked, option
from fastft.pages.charts import Curve, chart
from fastft.pages.render import write_page
from fastft.reports.answer_data import answer_data
from fastft.reports.answers import are_short, shared_reasons
from fastft.reports.figures import (
    CURVES,
    TOKEN_KINDS,
    RunFigures,
    differing_decoding,
    differing_settings,
    headlines,
    read_run,
    side_by_side,
)
from fastft.reports.plots import plots_of, write_plots
from fastft.reports.talks import side_by_side as talks_side_by_side
from fastft.run.decodings import check_name
from fastft.run.folder import PLOTS, REPORT, REPORT_NUMBERS, names_of
from fastft.scores.conversations import talk_notes
from fastft.scores.score import rungs_in_words

_TITLES = {"loss": "training loss", "val_loss": "validation loss", "lr": "learning rate", "grad_norm": "gradient norm"}
_BEST, _LEAST = max, min
_Figure = tuple[str, tuple[str, ...], int, Any]
# Label, path into report.json's figures of a run, digits, which is best (None: neither).
_COMPARED: dict[str, tuple[_Figure, ...]] = {
    "Scores": (
        ("Judge’s mean, 0 to 100", ("scores", "judge_mean"), 2, _BEST),
        ("Conversations, judge’s mean", ("conversations", "judge_mean"), 2, _BEST),
        ("Exact match, %", ("scores", "exact_match"), 2, _BEST),
        ("Multiple choice, %", ("scores", "multiple_choice", "accuracy"), 2, _BEST),
        ("… by likelihood, %", ("scores", "choices_by_likelihood", "total", "accuracy"), 2, _BEST),
        ("… by likelihood a token, %", ("scores", "choices_by_likelihood", "per_token", "accuracy"), 2, _BEST),
        ("Perplexity of the references", ("scores", "perplexity"), 2, _LEAST),
        ("Responses", ("scores", "n"), 0, None),
        ("Empty responses", ("scores", "empty_responses"), 0, _LEAST),
        ("Words of a response", ("scores", "words"), 1, None),
        ("Responses that loop, %", ("scores", "looping"), 2, _LEAST),
        ("Different words, %", ("scores", "distinct_1"), 1, None),
        ("Different pairs of words, %", ("scores", "distinct_2"), 1, None),
    ),
    "Overlap with the references": (
        ("BLEU, %", ("scores", "bleu"), 2, _BEST),
        ("chrF, %", ("scores", "chrf"), 2, _BEST),
        ("ROUGE-1 F1, %", ("scores", "rouge_1"), 2, _BEST),
        ("ROUGE-2 F1, %", ("scores", "rouge_2"), 2, _BEST),
        ("ROUGE-L F1, %", ("scores", "rouge_l"), 2, _BEST),
    ),
    "Training": (
        ("Best validation loss", ("training", "best_val_loss"), 4, _LEAST),
        ("Last validation loss", ("training", "last_val_loss"), 4, _LEAST),
        ("Last training loss", ("training", "last_loss"), 4, None),
        ("Steps", ("training", "steps"), 0, None),
        ("Steps that were skipped", ("training", "skipped"), 0, _LEAST),
        ("Real tokens a second", ("training", "real_tokens_per_second"), 0, _BEST),
        ("Peak memory, MiB", ("training", "peak_memory_mib"), 0, _LEAST),
    ),
    "Tokens of all steps": tuple((f"{kind[:1].upper()}{kind[1:]}", ("tokens", kind), 0, None) for kind in TOKEN_KINDS),
    "Seconds": (
        ("Data: read, encode, plan", ("seconds", "data"), 1, None),
        ("Train: the steps", ("seconds", "train"), 1, None),
        ("Evaluate: validation losses", ("seconds", "eval"), 1, None),
        ("Generate: responses", ("seconds", "generate"), 1, None),
        ("Judge: scores", ("seconds", "judge"), 1, None),
    ),
}
_BY_CATEGORY = (
    ("Judge’s mean", "judge_mean"), ("Exact match, %", "exact_match"),
    ("BLEU, %", "bleu"), ("ROUGE-L F1, %", "rouge_l"),
)  # fmt: skip


@names_checked
@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The runs that are shown."""

    run: Path
    """Folder of the run; report.html and report.json are written into it."""
    against: list[Path] = option([])
    """Folders of other runs to show beside it."""
    name: str | None = None
    """What the responses are called, where they have a name, in all of the runs."""
    plots: bool = False
    """Also draws RUN/plots: loss, learning rate, tokens and scores as SVG, PNG and PDF, by matplotlib, which
    `pip install 'fastft[plots]'` brings."""

    def __post_init__(self) -> None:
        check_values(self)
        check_name(self.name)


def report(options: ReportOptions) -> Path:
    """Writes RUN/report.html, RUN/report.json and, where they are asked for, RUN/plots; returns the page's path.

    Raises:
        UserError: a folder does not exist, holds no file of a run, or holds one that cannot be read; plots are asked
            for, and matplotlib is not installed.
    """
    folders = [options.run, *options.against]
    _check_different(folders)
    run, *others = (read_run(folder, options.name) for folder in folders)
    # Drawn before anything is written: where matplotlib is missing, nothing has changed.
    drawn = plots_of([run, *others]) if options.plots else []
    context = _context([run, *others])
    with writing(options.run):
        if options.plots:
            write_plots(drawn, options.run / PLOTS)
        write_page(
            options.run / REPORT,
            "report.html.j2",
            styles=("base.css", "report.css"),
            scripts=("report.js", "answers.js"),
            **context,
        )
        numbers = {name: context[name] for name in ("differences", "differing_settings", "differing_decoding")}
        write_json(options.run / REPORT_NUMBERS, {"runs": [one.as_json() for one in (run, *others)], **numbers})
    return options.run / REPORT


def _check_different(folders: Sequence[Path]) -> None:
    seen = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UserError(f"got {folder} twice, expected different runs: leave it out of --against")
        seen.add(folder.resolve())


def _context(runs: Sequence[RunFigures]) -> dict[str, Any]:
    run, *others = runs
    names = names_of([one.folder for one in runs])
    named = list(zip(names, runs, strict=True))
    histograms = [(name, one.histogram(run.main_score)) for name, one in named]
    histograms = [(name, counts) for name, counts in histograms if any(counts)]
    return {
        "run": run,
        "named": named,
        "names": names,
        "facts": _facts(run),
        "charts": _charts(runs, names),
        "token_kinds": TOKEN_KINDS,
        "headlines": headlines(run),
        "short": are_short(run.answers),
        "compared": _compared(runs),
        "categories": _categories(runs),
        "problems": [(name, one.scores_problem) for name, one in named if one.scores_problem],
        "answer_notes": [(name, note) for name, one in named for note in one.answer_notes],
        "reasons": [(name, shared_reasons(one.answers)) for name, one in named],
        "differences": side_by_side(run, others),
        "differing_settings": differing_settings(runs) if others else {},
        "differing_decoding": differing_decoding(runs) if others else {},
        "histograms": histograms,
        "most_in_a_bar": max([1, *(count for _, counts in histograms for count in counts)]),
        "rungs": rungs_in_words,
        "answers": answer_data(runs, names),
        "talks": talks_side_by_side([one.talks for one in runs]),
        "talk_figures": _talk_figures(runs),
        "talk_notes": [
            (name, note) for name, one in named if one.conversations is not None for note in _notes(one.conversations)
        ],
        "talks_unscored": [name for name, one in named if one.talks and one.conversations is None],
    }


def _notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures of conversations has to know, and why no judge gave any."""
    return [*talk_notes(summary), *([f"no judge: {why}"] if (why := summary.get("no_judge")) else [])]


def _talk_figures(runs: Sequence[RunFigures]) -> list[tuple[str, list[tuple[Any, Any]]]]:
    """What is known of conversations: a label, and each run's figure with its interval."""
    held = [one.conversations or {} for one in runs]
    turns = [one.get("turns", []) for one in held]
    by_category = [one.get("by_category", {}) for one in held]
    judged = [("Judge’s mean, all turns", held)]
    for at in range(max(map(len, turns))):
        judged.append((f"… turn {at + 1}", [own[at] if at < len(own) else {} for own in turns]))
    for name in dict.fromkeys(name for own in by_category for name in own):
        judged.append((f"… {name}", [own.get(name, {}) for own in by_category]))
    rows = [(label, [(one.get("judge_mean"), one.get("judge_interval")) for one in of]) for label, of in judged]
    named = [one.get("named") or {} for one in held]
    rows.append(("Says the short right answer, %", [(one.get("accuracy"), one.get("interval")) for one in named]))
    return [(label, values) for label, values in rows if any(value is not None for value, _ in values)]


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
    """The table of all runs' figures in groups, with the best; a dash where one is undefined or not there."""
    none = {"scores": None}  # of other responses, or of conversations alone
    held = [{**run.as_json(), **(none if run.scores_problem or not (run.summary or {}).get("n") else {})}
            for run in runs]  # fmt: skip
    one_judge = {
        "scores": _are_one([run.judge for run in runs]),
        "conversations": _are_one([run.judge_of_talks for run in runs]),
    }
    groups = []
    for title, figures in _COMPARED.items():
        lines = []
        for label, path, digits, best in figures:
            found = [_at(one, path) for one in held]
            if any(there for there, _ in found):
                values = [value for _, value in found]
                ranked = best if path[-1] != "judge_mean" or one_judge[path[0]] else None
                lines.append({"label": label, "values": values, "digits": digits, "best": _top(values, ranked)})
        if lines:
            groups.append({"title": title, "lines": lines})
    return groups


def _are_one(judges: Sequence[Any]) -> bool:
    """Whether all runs that were judged were judged by one, so that the best of them may be called so."""
    known = [judge for judge in judges if judge is not None]
    return all(judge == known[0] for judge in known)


def _at(value: Any, path: Sequence[str]) -> tuple[bool, Any]:
    """Whether there is a place of that name in nested objects, and what lies there."""
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return False, None
        value = value[name]
    return True, value


def _top(values: Sequence[Any], best: Any) -> Any:
    known = [value for value in values if value is not None]
    return best(known) if best is not None and len(known) > 1 and min(known) < max(known) else None


def _categories(runs: Sequence[RunFigures]) -> dict[str, Any]:
    """Each category's figures, by name and then for each run; figures that no run has of any category are left out."""
    held = [{} if run.scores_problem else (run.summary or {}).get("by_category") or {} for run in runs]
    names = list(dict.fromkeys(name for one in held for name in one))
    shown = [
        (label, key) for label, key in _BY_CATEGORY
        if any(row.get(key) is not None for one in held for row in one.values())
        and not (key in ("bleu", "rouge_l") and are_short(runs[0].answers))
    ]  # fmt: skip
    rows = [
        {
            "name": name,
            "n": [one.get(name, {}).get("n") for one in held],
            "values": [[one.get(name, {}).get(key) for one in held] for _, key in shown],
        }
        for name in names
    ]
    return {"labels": [label for label, _ in shown], "rows": rows}


# --- Charts ---


def _charts(runs: Sequence[RunFigures], names: Sequence[str]) -> list[Markup]:
    """The charts that there are numbers for, each with the curve of every run."""
    if len(runs) > 1:
        return [
            chart(_TITLES[curve], curves, logarithmic=curve in ("loss", "val_loss"))
            for curve in CURVES
            if (curves := _of_all(runs, names, curve))
        ]
    losses = _losses(runs[0])
    return [chart("loss", one, logarithmic=True) for one in [losses] if one] + [
        chart(_TITLES[curve], [Curve(_TITLES[curve], *runs[0].curves[curve])])
        for curve in ("lr", "grad_norm")
        if curve in runs[0].curves
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
