"""Charts of values against steps as SVG elements that take the colours of the page they stand in, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

# Each stands for a colour of the page until the SVG is on it.
_COLOURS = {
    "#010201": "currentColor",
    "#010202": "var(--accent)",
    "#010203": "var(--soft)",
    "#010204": "var(--line)",
    "#010205": "var(--quiet)",
}
_INK, _ACCENT, _SOFT, _LINE, _QUIET = _COLOURS
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_WIDE_SPREAD = 8
_FEW = 60  # points, up to which each is marked: a validation loss has few, and a run of one step a single one

_MANY = 200  # points, from which a thick line becomes a smear


@dataclass(frozen=True, slots=True)
class Curve:
    """Values against steps, both `[N]`."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    style: Literal["main", "raw", "other"] = "main"
    """`main` in the page's accent, `raw` behind it and quiet, `other` in ink with a dash of its own."""
    marked: bool = False
    """Whether its points are marked, where they are few."""


def chart(name: str, curves: Sequence[Curve], size: tuple[float, float], *, logarithmic: bool = False) -> Markup:
    """One chart. `size` is in inches, of which the page shows 96 pixels each.

    Args:
        logarithmic: the values' axis is, where all are positive and the largest is many times the smallest.
    """
    # Text stays text (smaller, and in the page's font); the salt keeps ids of two charts apart, and pages equal.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        n_other = 0
        for curve in curves:
            n_other += curve.style == "other"
            _draw(axes, curve, n_other)
        if logarithmic and _spread(curves) > _WIDE_SPREAD:
            _logarithmic(axes)
        axes.set_xlabel("step")
        axes.set_title(name[:1].upper() + name[1:], loc="left", fontsize=9.5, color=_INK)
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor=_INK, handlelength=2.4)
        _dress(axes)
        return _svg(figure, f"{name} against step")


def _spread(curves: Sequence[Curve]) -> float:
    """The largest value over the smallest; 0 where one is not positive."""
    values = [value for curve in curves for value in curve.values]
    return max(values) / min(values) if min(values) > 0 else 0.0


def _logarithmic(axes: Any) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw(axes: Any, curve: Curve, n_other: int) -> None:
    few = len(curve.steps) == 1 or (curve.marked and len(curve.steps) <= _FEW)
    looks = {
        "main": {"color": _ACCENT, "linewidth": 1.8 if len(curve.steps) < _MANY else 1.2, "zorder": 3},
        "raw": {"color": _QUIET, "linewidth": 1.0, "zorder": 1},
        "other": {"color": _SOFT, "linewidth": 1.3, "linestyle": _DASHES[n_other % len(_DASHES)], "zorder": 2},
    }[curve.style]
    axes.plot(curve.steps, curve.values, label=curve.label, marker="o" if few else "", markersize=3.2, **looks)


def _dress(axes: Any) -> None:
    axes.tick_params(colors=_SOFT, which="both", length=0)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.yaxis.get_offset_text()):
        text.set_color(_SOFT)
    for side, spine in axes.spines.items():
        spine.set(color=_LINE, visible=side == "bottom")


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an element of an HTML page: no prologue, no metadata, no address, in the page's colours."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"(/?)>', r"<g\1>", svg)  # ids of groups are the same in every chart
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    for placeholder, colour in _COLOURS.items():
        svg = svg.replace(placeholder, colour)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
