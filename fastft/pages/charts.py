"""Charts of values against steps as SVG elements that take the colours of the page they stand in, light or dark.

They are drawn here, in a hundred lines, and not by a library: a page needs no more, and fastft no such dependency.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 500, 270
_TOP, _RIGHT, _BOTTOM = 30, 12, 40  # around the curves; the left margin is as wide as the labels of the values
_FONT, _CHARACTER = 12.5, 6.8  # px, and about how wide a digit is
_LEGEND_ROW = 18
_LONGEST_NAME = 26  # characters
_DASHES = ("", "6 3", "1.5 2.5", "6 2 1.5 2")
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


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis: which number lies where, and which are named."""

    low: float
    high: float
    start: float
    end: float
    """Where `low` and `high` lie, in px."""
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, in px."""
        low, high, value = (map(math.log, (self.low, self.high, value)) if self.logarithmic
                            else (self.low, self.high, value))  # fmt: skip
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def chart(name: str, curves: Sequence[Curve], *, logarithmic: bool = False) -> Markup:
    """One chart of 500 times 270 px, which the page may scale.

    Args:
        logarithmic: the values' axis is, where all are positive and the largest is many times the smallest.
    """
    is_log = logarithmic and _spread(curves) > _WIDE_SPREAD
    steps = [step for curve in curves for step in curve.steps]
    values = [value for curve in curves for value in curve.values]
    top = _TOP + _LEGEND_ROW * (_legend_rows(curves) if len(curves) > 1 else 0)
    y = _values_axis(min(values), max(values), _HEIGHT - _BOTTOM, top, is_log)
    labels = [_label(tick) for tick in y.ticks]
    left = 10 + _CHARACTER * max(map(len, labels))
    x = _steps_axis(min(steps), max(steps), left + 4, _WIDTH - _RIGHT)
    parts = [_title(name), *_grid(x, y, labels, left), *_lines(curves, x, y)]
    parts += _legend(curves) if len(curves) > 1 else []
    return Markup(
        f'<svg role="img" aria-label="{escape(name)} against step" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-size="{_FONT}">{"".join(parts)}</svg>'
    )


def _spread(curves: Sequence[Curve]) -> float:
    """The largest value over the smallest; 0 where one is not positive."""
    values = [value for curve in curves for value in curve.values]
    return max(values) / min(values) if min(values) > 0 else 0.0


# --- Axes ---


def _steps_axis(low: float, high: float, start: float, end: float) -> _Axis:
    """Steps are whole numbers, and so are those that are named."""
    low -= low == 1  # from where the first step began
    ticks = _ticks(low, high, most=6, least_step=1.0)
    return _Axis(low - 0.5 * (low == high), high + 0.5 * (low == high), start, end, ticks)


def _values_axis(low: float, high: float, start: float, end: float, logarithmic: bool) -> _Axis:
    if logarithmic:
        return _Axis(low, high, start, end, _log_ticks(low, high), logarithmic=True)
    room = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = 0.0 if 0 <= low <= 0.25 * high else low - room, high + room
    return _Axis(low, high, start, end, _ticks(low, high, most=6))


def _ticks(low: float, high: float, *, most: int, least_step: float = 0.0) -> tuple[float, ...]:
    """Round numbers from low to high, `most` or fewer, at a distance of 1, 2 or 5 times a power of ten."""
    rough = max((high - low) / most, least_step, 1e-300)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(place * step for place in range(first, last + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    subs = (1, 2, 5) if len(powers) <= 5 else (1,)
    return tuple(sub * 10.0**power for power in powers for sub in subs if low <= sub * 10.0**power <= high)


def _label(value: float) -> str:
    return f"{value:.6g}".replace("-", "−") if abs(value) < 1e6 else f"{value:,.0f}"


# --- Marks ---


def _title(name: str) -> str:
    return f'<text x="2" y="15" font-weight="600" fill="currentColor">{escape(name[:1].upper() + name[1:])}</text>'


def _grid(x: _Axis, y: _Axis, labels: Sequence[str], left: float) -> Iterator[str]:
    for tick, label in zip(y.ticks, labels, strict=True):
        at = f"{y.at(tick):.1f}"
        yield f'<path d="M{left:.1f} {at}H{_WIDTH - _RIGHT}" stroke="var(--line)"/>'
        yield f'<text x="{left - 6:.1f}" y="{at}" dy=".35em" text-anchor="end" fill="var(--soft)">{label}</text>'
    yield f'<path d="M{left:.1f} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" stroke="var(--quiet)"/>'
    for tick in x.ticks:
        yield (
            f'<text x="{x.at(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle" fill="var(--soft)">'
            f"{round(tick):,}</text>"
        )
    yield f'<text x="{(left + _WIDTH) / 2:.1f}" y="{_HEIGHT - 6}" text-anchor="middle" fill="var(--soft)">step</text>'


def _looks(curve: Curve, n_other: int) -> str:
    width = 1.8 if len(curve.steps) < _MANY else 1.3
    return {
        "main": f'stroke="var(--accent)" stroke-width="{width}"',
        "raw": 'stroke="var(--quiet)" stroke-width="1"',
        "other": f'stroke="var(--soft)" stroke-width="1.4" stroke-dasharray="{_DASHES[n_other % len(_DASHES)]}"',
    }[curve.style]


def _numbered(curves: Sequence[Curve]) -> list[tuple[int, Curve]]:
    """Each curve with the number of its dash."""
    others = 0
    numbered = []
    for curve in curves:
        others += curve.style == "other"
        numbered.append((others, curve))
    return numbered


def _lines(curves: Sequence[Curve], x: _Axis, y: _Axis) -> Iterator[str]:
    # The page's own colour on top, what is raw at the bottom.
    depth = {"raw": 0, "other": 1, "main": 2}
    for n_other, curve in sorted(_numbered(curves), key=lambda pair: depth[pair[1].style]):
        looks = _looks(curve, n_other)
        points = [(x.at(step), y.at(value)) for step, value in zip(curve.steps, curve.values, strict=True)]
        drawn = "L".join(f"{at:.1f} {height:.1f}" for at, height in _thinned(points))
        yield f'<path d="M{drawn}" fill="none" {looks} stroke-linejoin="round"/>'
        if len(points) == 1 or (curve.marked and len(points) <= _FEW):
            colour = looks.split('"')[1]
            yield "".join(f'<circle cx="{at:.1f}" cy="{up:.1f}" r="2.8" fill="{colour}"/>' for at, up in points)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lowest and the highest of the points of one pixel: no more can be seen, and the page stays small."""
    if len(points) <= 2 * _WIDTH:
        return list(points)
    columns: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        columns.setdefault(int(point[0]), []).append(point)
    kept = []
    for column in columns.values():
        ends: list[Any] = [min(column, key=lambda point: point[1]), max(column, key=lambda point: point[1])]
        kept += sorted(dict.fromkeys(ends))
    return kept


# --- The legend ---


def _entry_width(curve: Curve) -> float:
    return 40 + _CHARACTER * len(_shortened(curve.label))


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _places(curves: Sequence[Curve]) -> list[tuple[float, int]]:
    """Where each entry begins, and in which row."""
    places, at, row = [], 2.0, 0
    for curve in curves:
        width = _entry_width(curve)
        if at + width > _WIDTH and at > 2:
            at, row = 2.0, row + 1
        places.append((at, row))
        at += width
    return places


def _legend_rows(curves: Sequence[Curve]) -> int:
    return _places(curves)[-1][1] + 1


def _legend(curves: Sequence[Curve]) -> Iterator[str]:
    for (n_other, curve), (at, row) in zip(_numbered(curves), _places(curves), strict=True):
        height = _TOP + 2 + row * _LEGEND_ROW
        yield f'<path d="M{at:.1f} {height}h22" {_looks(curve, n_other)}/>'
        name = escape(_shortened(curve.label))
        yield f'<text x="{at + 28:.1f}" y="{height}" dy=".35em" fill="currentColor">{name}</text>'
