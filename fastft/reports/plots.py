"""A run's figures as plots for papers and slides: RUN -> RUN/plots/NAME.svg, .png and .pdf, by matplotlib.

The report's own charts need nothing; matplotlib is an extra (`pip install 'fastft[plots]'`), imported when a plot is
drawn. The same run gives the same bytes: no file holds a date.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from fastft.common.console import warn
from fastft.common.errors import UserError
from fastft.common.files import make_folder, replacing
from fastft.common.optional import need
from fastft.reports.figures import TOKEN_KINDS, Headline, RunFigures, headlines, read_run
from fastft.run.folder import names_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("svg", "png", "pdf")

_MOST_CATEGORIES = 24
_COLOURS = ("#1f5fbf", "#c8641b", "#3a7d44", "#7a4fa3", "#59626c")
_STYLE = {
    "svg.hashsalt": "fastft", "svg.fonttype": "none", "pdf.fonttype": 42, "font.size": 10,
    "axes.spines.right": False, "axes.spines.top": False, "legend.frameon": False,
}  # fmt: skip
_NO_DATE: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "png": {"Software": None}, "pdf": {"CreationDate": None}}
_TOKENS = {
    "padded": "with padding", "real": "real", "computed": "computed", "supervised": "supervised",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot, which a notebook shows where it is the last value of a cell."""

    name: str
    """Of its files, without their endings."""
    figure: Figure

    def as_bytes(self, kind: str, dpi: int = 150) -> bytes:
        """The plot as one of `FORMATS`; `dpi` is a PNG's."""
        buffer = io.BytesIO()
        with need("matplotlib", extra="plots").rc_context(_STYLE):
            self.figure.savefig(buffer, format=kind, dpi=dpi, metadata=_NO_DATE[kind])
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.as_bytes("png", dpi=96)


def plots(*folders: Path) -> list[Plot]:
    """The plots that the first run has figures for: `loss`, `learning-rate`, `tokens`, `scores`; the others beside it.

    Raises:
        UserError: matplotlib is not installed, or a folder holds nothing of a run or what cannot be read.
    """
    return plots_of([read_run(folder) for folder in folders])


def plots_of(runs: Sequence[RunFigures]) -> list[Plot]:
    """`plots` of runs that have been read. Scores of other responses than are there are not drawn, and it is said."""
    matplotlib = need("matplotlib", extra="plots")
    names = names_of([run.folder for run in runs])
    for run, name in zip(runs, names, strict=True):
        if run.scores_problem:
            warn(f"the scores of {name} are not drawn: {run.scores_problem}")
    with matplotlib.rc_context(_STYLE):
        made = {name: make(runs, names) for name, make in _MAKERS.items()}
    return [Plot(name, figure) for name, figure in made.items() if figure is not None]


def write_plots(made: Sequence[Plot], folder: Path) -> list[Path]:
    """Writes each plot into a folder in all `FORMATS`; those of an earlier call which this one has not are removed.

    Raises:
        UserError: there is nothing to draw, or a file cannot be written.
    """
    if not made:
        raise UserError(f"nothing to plot: {folder.parent} has neither steps nor scores; train or score it first")
    make_folder(folder, remedy="check its permissions")
    paths = []
    for plot in made:
        for kind in FORMATS:
            paths.append(folder / f"{plot.name}.{kind}")
            with replacing(paths[-1]) as file:
                file.write(plot.as_bytes(kind))
    for name in _MAKERS.keys() - {plot.name for plot in made}:
        for kind in FORMATS:
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    return paths


def _new(size: tuple[float, float] = (6.4, 3.8)) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _losses(runs: Sequence[RunFigures], names: Sequence[str]) -> Figure | None:
    """Training and validation loss against epochs, with the tokens seen above, as in the book."""
    if not any(curve in run.curves for run in runs for curve in ("loss", "val_loss")):
        return None
    figure, axes = _new()
    by_epoch = all(run.seen.epochs for run in runs if run.seen.steps)
    for run, name, colour in zip(runs, names, _cycled(len(runs)), strict=True):
        of = f" of {name}" if len(runs) > 1 else ""
        for curve, label, looks in (
            ("loss", f"training{of}", {"linewidth": 0.9, "alpha": 0.55}),
            ("val_loss", f"validation{of}", {"linewidth": 1.8, "linestyle": "-.", "marker": "o", "markersize": 3.5}),
        ):
            if curve in run.curves:
                steps, values = run.curves[curve]
                x = run.seen.epochs_at(steps) if by_epoch else steps
                axes.plot(x, values, color=colour, label=label, **looks)
    _logarithmic_where_wide(axes, runs)
    _whole_numbers(axes)
    axes.set(xlabel="epochs" if by_epoch else "steps", ylabel="loss")
    axes.legend(loc="upper right")
    if by_epoch and runs[0].seen.tokens:
        _tokens_above(axes, runs[0], names[0] if len(runs) > 1 else "")
    return figure


def _logarithmic_where_wide(axes: Axes, runs: Sequence[RunFigures]) -> None:
    values = [value for run in runs for curve in ("loss", "val_loss") for value in run.curves.get(curve, ((), ()))[1]]
    if min(values) > 0 and max(values) > 8 * min(values):
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _tokens_above(axes: Axes, run: RunFigures, name: str) -> None:
    """An axis above that says how many tokens the run had seen at each epoch."""
    from matplotlib.ticker import EngFormatter

    epochs, tokens = np.array([0.0, *run.seen.epochs]), np.array([0.0, *run.seen.tokens])
    # Beyond its ends the last step's pace goes on, so that what lies in the margins can be placed too.
    epochs = np.array([-epochs[-1], *epochs, 2 * epochs[-1]])
    tokens = np.array([-tokens[-1], *tokens, 2 * tokens[-1]])
    above = axes.secondary_xaxis(
        "top",
        functions=(
            lambda at: np.interp(np.asarray(at, float), epochs, tokens),
            lambda seen: np.interp(np.asarray(seen, float), tokens, epochs),
        ),
    )
    above.set_xlabel(f"tokens seen{f' by {name}' if name else ''}")
    above.xaxis.set_major_formatter(EngFormatter(sep=""))


def _learning_rates(runs: Sequence[RunFigures], names: Sequence[str]) -> Figure | None:
    """The learning rate of each step."""
    if not any("lr" in run.curves for run in runs):
        return None
    figure, axes = _new()
    for run, name, colour in zip(runs, names, _cycled(len(runs)), strict=True):
        if "lr" in run.curves:
            axes.plot(*run.curves["lr"], color=colour, linewidth=1.6, label=name)
    axes.set(xlabel="steps", ylabel="learning rate", ylim=(0, None))
    _whole_numbers(axes)
    if len(runs) > 1:
        axes.legend()
    return figure


def _tokens(runs: Sequence[RunFigures], names: Sequence[str]) -> Figure | None:
    """How many tokens the steps had with padding, without it, after every saving, and asked for by the loss."""
    kinds = [kind for kind in TOKEN_KINDS if any(run.tokens[kind] is not None for run in runs)]
    if not kinds:
        return None
    figure, axes = _new((6.4, 1.2 + 0.5 * len(kinds) * len(runs) ** 0.5))
    height = 0.8 / len(runs)
    for place, (run, name, colour) in enumerate(zip(runs, names, _cycled(len(runs)), strict=True)):
        counts = [run.tokens[kind] or 0 for kind in kinds]
        at = [row + place * height for row in range(len(kinds))]
        bars = axes.barh(at, counts, 0.9 * height, color=colour, label=name)
        axes.bar_label(bars, [f" {count:,}" for count in counts], fontsize=8.5)
    axes.set_yticks(
        [row + (len(runs) - 1) * height / 2 for row in range(len(kinds))], [_TOKENS[kind] for kind in kinds]
    )
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    axes.set(xlabel="tokens of all steps")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    if len(runs) > 1:
        axes.legend(loc="lower right")
    return figure


def _scores(runs: Sequence[RunFigures], names: Sequence[str]) -> Figure | None:
    """The headline figures of 0 to 100 with their 95% intervals, and the first of them in each category."""
    shown = [[] if run.scores_problem else [*headlines(run), *_by_category(run)] for run in runs]
    held = [{one.label: one for one in figures if one.of_100} for figures in shown]
    labels = list(dict.fromkeys(label for one in held for label in one))
    if not labels:
        return None
    figure, axes = _new((6.4, 1.1 + 0.34 * len(labels) * len(runs) ** 0.5))
    height = 0.8 / len(runs)
    for place, (own, name, colour) in enumerate(zip(held, names, _cycled(len(runs)), strict=True)):
        found = [(row + place * height, own[label]) for row, label in enumerate(labels) if label in own]
        axes.barh(
            [at for at, _ in found], [one.value or 0.0 for _, one in found], 0.9 * height, color=colour, label=name
        )
        for at, one in found:
            _mark(axes, at, one.value or 0.0, one.interval)
    axes.set_yticks([row + (len(runs) - 1) * height / 2 for row in range(len(labels))], labels)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set(xlim=(0, 112), xlabel="with 95% intervals", xticks=range(0, 101, 20))
    if len(runs) > 1:
        figure.legend(loc="outside lower center", ncols=len(runs))
    return figure


def _mark(axes: Axes, at: float, value: float, interval: Sequence[float] | None) -> None:
    """A bar's interval, where it has one, and its value beside it."""
    low, high = interval or (value, value)
    if interval is not None:
        reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar([value], [at], xerr=reach, fmt="none", ecolor="#1b1f24", elinewidth=1, capsize=2.5)
    label = f"{value:.1f}"
    axes.annotate(label, (max(value, high), at), (5, 0), textcoords="offset points", va="center", fontsize=8.5)


def _by_category(run: RunFigures) -> list[Headline]:
    categories = (run.summary or {}).get("by_category") or {}
    key, what = ("judge_mean", "judge") if run.main_score == "judge" else ("exact_match", "exact")
    if not 1 < len(categories) <= _MOST_CATEGORIES:
        return []
    shown = {name: figures for name, figures in categories.items() if figures.get(key) is not None}
    return [
        Headline(f"{shorten(name, 30, placeholder='…')} ({what})", figures[key], _interval_of(figures, key))
        for name, figures in shown.items()
    ]


_MAKERS: dict[str, Callable[[Sequence[RunFigures], Sequence[str]], Figure | None]] = {
    "loss": _losses, "learning-rate": _learning_rates, "tokens": _tokens, "scores": _scores,
}  # fmt: skip
"""By the plots' names."""


def _interval_of(figures: Mapping[str, Any], key: str) -> Any:
    return figures.get("judge_interval") if key == "judge_mean" else (figures.get("intervals") or {}).get(key)


def _cycled(n: int) -> list[str]:
    return [_COLOURS[place % len(_COLOURS)] for place in range(n)]


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
