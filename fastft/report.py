"""The stage RUN -> RUN/report.html: one page that needs nothing but itself, made from the files of a run.

Every file may be missing: its section then names the command that makes it. All text is escaped by jinja2; only the
charts, drawn here from numbers, go in as markup.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from fastft.errors import UserError
from fastft.files import read_json, write_text
from fastft.ledger import read_ledger
from fastft.metrics import is_exact
from fastft.run import Run, read_metrics
from fastft.score import RESPONSES, SCORES, read_responses, responses_sha256

REPORT = "report.html"

_CONFIG = "config.yaml"
_METRICS = "metrics.jsonl"
_DEMO = "demo.json"
_INK = "#010203"  # stands for the page's text colour until the SVG is on the page
_COLOURS = ("#3d7fd9", "#e07a2f")  # both at least 3:1 on white and on the dark background
_TOKEN_KINDS = {
    "tokens_padded": "with padding, as an ordinary trainer computes them",
    "tokens_real": "real, each example's own",
    "tokens_computed": "computed, after every saving",
    "tokens_supervised": "supervised, asked for by the loss",
}

Series = tuple[list[float], list[float]]
"""Steps and values of one curve, of equal length."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What `fastft report` takes."""

    run: Path
    """Folder of the run; report.html is written into it."""


@dataclass(frozen=True)
class TokenRow:
    """One kind of token over the whole run: how many, and in percent of the padded ones (None: unknown)."""

    label: str
    count: int
    share: float | None


@dataclass(frozen=True)
class ResponseRow:
    """One line of the table of responses."""

    number: int
    entry: Mapping[str, Any]
    exact: bool
    judgement: Mapping[str, Any] | None


def report(options: ReportOptions) -> Path:
    """Writes RUN/report.html and returns its path.

    Raises:
        UserError: the folder does not exist, holds no file of a run, or holds one that cannot be read.
    """
    run = options.run
    if not run.is_dir():
        raise UserError(f"no such run: {run} is not a folder; make one with `fastft train --out {run}`")
    if not any((run / name).is_file() for name in (_CONFIG, _METRICS, RESPONSES, SCORES)):
        raise UserError(
            f"nothing to report: {run} holds none of {_CONFIG}, {_METRICS}, {RESPONSES}, {SCORES}; "
            f"make them with `fastft train --out {run}`"
        )
    page = _template().render(**_context(run))
    # Half of a surrogate pair can stand in the JSON of a response, but not in a UTF-8 page.
    write_text(run / REPORT, page.encode(errors="replace").decode())
    return run / REPORT


def _template() -> jinja2.Template:
    source = files("fastft").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    return environment.from_string(source)


def _context(run: Path) -> dict[str, Any]:
    steps, validation = _read_metrics(run / _METRICS)
    scores, scores_problem = _read_scores(run)
    entries = read_responses(run) if (run / RESPONSES).is_file() else []
    judgements = scores["judgements"] if scores is not None and not scores_problem else []
    return {
        "run": run,
        "title": run.resolve().name,
        "config": _read_config(run / _CONFIG),
        "has_metrics": bool(steps or validation),
        "charts": _charts(steps, validation),
        "tokens": _token_rows(steps),
        "speed": _speed(steps),
        "skipped": sum(bool(step.get("skipped") and not step.get("rescaled")) for step in steps),
        "ledger": read_ledger(read_metrics(Run(run).ledger)),
        "summary": None if scores is None else scores["summary"],
        "scores_problem": scores_problem,
        "before": _exact_match_before(run / _DEMO),
        "responses": _response_rows(entries, judgements),
    }


def _read_config(path: Path) -> list[tuple[str, str]] | None:
    """The settings as (dotted name, value); text that is not YAML is shown as it is, under an empty name."""
    if not path.is_file():
        return None
    text = _read_text(path)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return [("", text)]
    return list(_flat(value))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, "" if value is None else str(value)


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of optimizer steps and those of validation, both by step; lines of other kinds are passed over.

    The last line of a step counts, should there be two.
    """
    steps: dict[int, dict[str, Any]] = {}
    validation: dict[int, dict[str, Any]] = {}
    for line in read_metrics(path):
        step = line.get("step")
        if isinstance(step, int) and ("val_loss" in line or "loss" in line):
            (validation if "val_loss" in line else steps)[step] = line
    return [steps[step] for step in sorted(steps)], [validation[step] for step in sorted(validation)]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _read_scores(run: Path) -> tuple[dict[str, Any] | None, str | None]:
    """scores.json, and why its judgements cannot stand beside the responses (None: they can)."""
    if not (run / SCORES).is_file():
        return None, None
    scores = read_json(run / SCORES, what="the scores")
    parts = (scores.get("summary"), scores.get("judgements")) if isinstance(scores, dict) else (None, None)
    if not isinstance(parts[0], dict) or not isinstance(parts[1], list):
        raise UserError(f"{run / SCORES} is not a file that fastft score wrote; move it away and score again")
    if not (run / RESPONSES).is_file():
        return scores, f"{RESPONSES}, which was scored, is gone"
    if parts[0].get("responses_sha256") != responses_sha256(run):
        return scores, f"{RESPONSES} has changed since it was scored: run fastft score --run {run} again"
    return scores, None


def _exact_match_before(path: Path) -> float | None:
    """Exact match in percent before training, which only `fastft demo` measures."""
    value = read_json(path, what="the demo's figures") if path.is_file() else None
    return _finite(value.get("exact_match_before")) if isinstance(value, dict) else None


def _response_rows(entries: Sequence[Mapping[str, Any]], judgements: Sequence[Any]) -> list[ResponseRow]:
    found = [item if isinstance(item, dict) else None for item in judgements]
    found += [None] * (len(entries) - len(found))
    return [
        ResponseRow(number, entry, is_exact(entry["model_response"], entry["output"]), judgement)
        for number, (entry, judgement) in enumerate(zip(entries, found, strict=False), start=1)
    ]


def _token_rows(steps: Sequence[Mapping[str, Any]]) -> list[TokenRow]:
    """The sums over all steps; a kind that no step has is left out."""
    sums = {kind: _sum(steps, kind) for kind in _TOKEN_KINDS if any(kind in step for step in steps)}
    padded = sums.get("tokens_padded")
    return [
        TokenRow(_TOKEN_KINDS[kind], int(count), 100.0 * count / padded if padded else None)
        for kind, count in sums.items()
    ]


def _speed(steps: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Seconds of all steps, and real tokens a second; None where the steps were not timed."""
    seconds = _sum(steps, "seconds")
    if not seconds:
        return None
    return {"seconds": seconds, "tokens_per_second": _sum(steps, "tokens_real") / seconds}


def _sum(steps: Sequence[Mapping[str, Any]], key: str) -> float:
    return math.fsum(_finite(step.get(key)) or 0.0 for step in steps)


def _finite(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _charts(steps: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> dict[str, Markup]:
    """The charts that there are numbers for, as SVG elements, by name."""
    wanted: dict[str, tuple[dict[str, Series], tuple[float, float]]] = {
        "loss": ({"training": _series(steps, "loss"), "validation": _series(validation, "val_loss")}, (7.6, 3.2)),
        "learning rate": ({"learning rate": _series(steps, "lr")}, (3.7, 2.0)),
        "gradient norm": ({"gradient norm": _series(steps, "grad_norm")}, (3.7, 2.0)),
    }
    return {
        name: _chart(name, {label: series for label, series in curves.items() if series[0]}, size)
        for name, (curves, size) in wanted.items()
        if any(series[0] for series in curves.values())
    }


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> Series:
    points = [(float(line["step"]), value) for line in lines if (value := _finite(line.get(key))) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _chart(name: str, curves: Mapping[str, Series], size: tuple[float, float]) -> Markup:
    """One chart of values against steps. `size` is in inches, of which the page shows 96 pixels each."""
    # Text stays text (smaller, and in the page's font); the salt keeps ids of two charts apart, and pages equal.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for (label, (x, y)), colour in zip(curves.items(), _COLOURS, strict=False):
            # A validation loss has few points, and a run of one step a single one: lines alone would not show them.
            marker = "o" if (len(x) < 50 and label != "training") or len(x) == 1 else ""
            axes.plot(x, y, color=colour, label=label, linewidth=1.4, marker=marker, markersize=3)
        axes.set(xlabel="step", ylabel=name)
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor=_INK)
        _ink(axes)
        return _svg(figure, f"{name} against step")


def _ink(axes: Any) -> None:
    axes.tick_params(colors=_INK, which="both")
    axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.yaxis.get_offset_text()):
        text.set_color(_INK)
    for side, spine in axes.spines.items():
        spine.set(color=_INK, visible=side in ("left", "bottom"))


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an element of an HTML page: no prologue, no metadata, no address, in the page's text colour."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # ids of groups are the same in every chart
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = svg.replace(_INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return Markup(svg)


def _number(value: Any, digits: int = 2) -> str:
    """A figure for people, a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"
