"""Error bars and tests for figures over N items: resampling, proportions, agreement of raters, correlation.

Letters: `N` items, `R` resamples, `M` raters. What is resampled is always the item, so that paired figures stay paired.
Everything is two-sided, and random numbers come from a seed: the same call gives the same figures.

A figure of all items is given to the resampling functions as a `Statistic`: it takes weights `[R, N]`, how often each
item counts in each resample, and gives `[R]` figures. A mean of values `[N]` is `weights @ values / weights.sum(1)`;
BLEU is computed from weighted sums of counts, so that it is resampled without looking at any text again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Weights `[R, N]` -> figures `[R]`."""
Swapped = Callable[[Floats], Floats]
"""Signs `[R, N]`, -1 where a pair's two sides change places and else 1 -> differences `[R]`."""

_EXACT_UP_TO = 16  # items: 65,536 sign patterns
_CHUNK = 1 << 21  # numbers of a block of resamples: 16 MiB
_TIE = 1e-12  # relative: sums of the same numbers in another order are the same figure


class Interval(NamedTuple):
    """The bounds of a confidence interval."""

    low: float
    high: float


class Permutation(NamedTuple):
    """A permutation test's p, and whether every permutation was looked at."""

    p: float
    exact: bool


@dataclass(frozen=True, slots=True)
class WinTieLoss:
    """How often the first of two is better, as good, and worse."""

    wins: int
    ties: int
    losses: int

    @property
    def decided(self) -> int:
        """Items that are no tie."""
        return self.wins + self.losses

    def win_rate(self) -> float | None:
        """The share of wins among the decided items; None where all are ties."""
        return self.wins / self.decided if self.decided else None

    def interval(self, level: float = LEVEL) -> Interval | None:
        """Wilson's interval of `win_rate`. It leaves 1/2 out about where the sign test rejects."""
        return wilson(self.wins, self.decided, level) if self.decided else None

    def sign_test(self) -> float:
        """The exact two-sided p of as many wins or more if both were equally likely (Dixon and Mood 1946)."""
        fewer = min(self.wins, self.losses)
        ways = sum(math.comb(self.decided, k) for k in range(fewer + 1))
        return min(1.0, float(2 * ways / 2**self.decided))


def mean_of(values: Sequence[float] | Floats) -> Statistic:
    """The mean of values `[N]` as a `Statistic`."""
    held = np.asarray(values, dtype=np.float64)

    def mean(weights: Floats) -> Floats:
        return np.asarray(weights @ held / weights.sum(axis=1))

    return mean


def bootstrap(
    statistic: Statistic, n: int, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval | None:
    """The BCa bootstrap interval of a figure over `n` items; None for fewer than two. See `bootstrap_all`."""
    return bootstrap_all({"": statistic}, n, level=level, resamples=resamples, seed=seed)[""]


def bootstrap_all(
    statistics: Mapping[str, Statistic],
    n: int,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, Interval | None]:
    """The BCa bootstrap intervals of several figures over the same `n` items; None for fewer than two.

    Bias-corrected and accelerated (Efron 1987, "Better Bootstrap Confidence Intervals", JASA 82, equations 2.3 and
    6.6): z0 from the share of resamples below the figure, ties half; the acceleration from the jackknife. Where no
    resample differs from the figure the interval is that one point, which says that there was nothing to resample.
    """
    if n < 2:
        return dict.fromkeys(statistics)
    figures = _evaluated(statistics, [np.ones((1, n))])
    drawn = _evaluated(statistics, _draws(n, resamples, seed))
    left_out = _evaluated(statistics, _each_left_out(n))
    return {name: _bca(float(figures[name][0]), drawn[name], left_out[name], level) for name in statistics}


def bootstrap_mean(
    values: Sequence[float] | Floats, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval | None:
    """The BCa interval of the mean of values `[N]`; of paired differences it is the paired bootstrap's."""
    return bootstrap(mean_of(values), len(values), level=level, resamples=resamples, seed=seed)


def paired_permutation(swapped: Swapped, n: int, *, resamples: int = RESAMPLES, seed: int = SEED) -> Permutation:
    """The permutation test of paired figures: if both sides were alike, any pair might have come the other way round.

    All 2^n ways are looked at for n up to 16 pairs; beyond, `resamples` random ones, of which p counts the observed one
    as one more, so that it is never 0 (Phipson and Smyth 2010).
    """
    observed = abs(float(swapped(np.ones((1, n)))[0])) if n else 0.0
    exact = n <= _EXACT_UP_TO
    extreme, total = (0, 0) if exact else (1, 1)
    for signs in _all_signs(n) if exact else _random_signs(n, resamples, seed):
        extreme += int(np.sum(np.abs(swapped(signs)) >= observed - _TIE * max(1.0, observed)))
        total += len(signs)
    return Permutation(extreme / total, exact)


def sign_flip(differences: Sequence[float] | Floats, *, resamples: int = RESAMPLES, seed: int = SEED) -> Permutation:
    """The permutation test of a mean of paired differences `[N]`; zeros have no sign and do not count to the 16."""
    held = np.asarray(differences, dtype=np.float64)
    moved = held[held != 0]
    return paired_permutation(lambda signs: signs @ moved, len(moved), resamples=resamples, seed=seed)


def holm(ps: Sequence[float]) -> list[float]:
    """The p of several tests, raised for their number (Holm 1979): below 0.05 is one at most 5% of the time by chance.

    The smallest counts as often as there are tests, the next one as often as are left, and none less than one before.
    """
    raised = [1.0] * len(ps)
    most = 0.0
    for done, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        most = max(most, min(1.0, (len(ps) - done) * ps[index]))
        raised[index] = most
    return raised


def _evaluated(statistics: Mapping[str, Statistic], blocks: Iterable[Floats]) -> dict[str, Floats]:
    """Each statistic of all rows of weights, which are made once for all of them."""
    parts = [{name: statistic(weights) for name, statistic in statistics.items()} for weights in blocks]
    return {name: np.concatenate([part[name] for part in parts]) for name in statistics}


def _bca(figure: float, drawn: Floats, left_out: Floats, level: float) -> Interval:
    """The interval from the figure, its resamples `[R]`, and the figures with each item left out `[N]`."""
    slack = _TIE * max(1.0, abs(figure))
    if np.all(np.abs(drawn - figure) <= slack):
        return Interval(figure, figure)
    below = (np.sum(drawn < figure - slack) + np.sum(drawn <= figure + slack)) / (2 * len(drawn))
    shares = _bca_shares(float(below), _acceleration(left_out), level)
    low, high = np.percentile(drawn, [100 * share for share in shares])
    return Interval(float(low), float(high))


def _draws(n: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Blocks of weights `[r, n]`: how often each item came when `n` were drawn with replacement."""
    random = np.random.default_rng(seed)
    for rows in _blocks(resamples, n):
        cells = random.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(cells.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _each_left_out(n: int) -> Iterator[Floats]:
    """Blocks of weights `[r, n]` in which one item after the other is left out."""
    begin = 0
    for rows in _blocks(n, n):
        weights = np.ones((rows, n))
        weights[np.arange(rows), begin + np.arange(rows)] = 0
        begin += rows
        yield weights


def _blocks(total: int, width: int) -> Iterator[int]:
    most = max(1, _CHUNK // width)
    return (min(most, total - begin) for begin in range(0, total, most))


def _all_signs(n: int) -> Iterator[Floats]:
    yield np.where((np.arange(2**n)[:, None] >> np.arange(n)) & 1, -1.0, 1.0)


def _random_signs(n: int, resamples: int, seed: int) -> Iterator[Floats]:
    random = np.random.default_rng(seed)
    return (np.where(random.integers(0, 2, (rows, n)), -1.0, 1.0) for rows in _blocks(resamples, n))


def _acceleration(left_out: Floats) -> float:
    """Efron's `a` from the figures with each item left out, `[N]`."""
    pull = left_out.mean() - left_out
    spread = float(np.sum(pull**2))
    return float(np.sum(pull**3)) / (6 * spread**1.5) if spread else 0.0


def _bca_shares(below: float, acceleration: float, level: float) -> tuple[float, float]:
    """Which shares of the resamples the interval's bounds are, where a plain percentile interval has 2.5% and 97.5%."""
    normal = NormalDist()
    if not 0 < below < 1:  # every resample on one side: only possible where the figure is no average of its parts
        return (1 - level) / 2, (1 + level) / 2
    z0 = normal.inv_cdf(below)

    def share(z: float) -> float:
        return normal.cdf(z0 + (z0 + z) / (1 - acceleration * (z0 + z)))

    z = normal.inv_cdf((1 + level) / 2)
    return share(-z), share(z)


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval | None:
    """The interval of a proportion (Wilson 1927); None for n = 0. Unlike a bootstrap's, it has a width at 0 and n."""
    if not n:
        return None
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, widening = successes / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / widening
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / widening
    return Interval(0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def win_tie_loss(differences: Sequence[float] | Floats) -> WinTieLoss:
    """Counts the signs of paired differences `[N]`: positive is a win."""
    signs = np.sign(np.asarray(differences, dtype=np.float64))
    return WinTieLoss(int(np.sum(signs > 0)), int(np.sum(signs == 0)), int(np.sum(signs < 0)))


Scale = Literal["nominal", "ordinal", "interval"]


def krippendorff_alpha(ratings: npt.ArrayLike, scale: Scale = "nominal") -> float | None:
    """Krippendorff's alpha: 1 is full agreement, 0 what chance gives, below 0 worse.

    1 - (observed disagreement) / (expected disagreement) over the coincidences of values ("Computing Krippendorff's
    Alpha-Reliability", 2011). Any number of raters, of whom each may have left items out.

    Args:
        ratings: `[M, N]` numbers, NaN where a rater gave none. Nominal values are only compared for equality.
        scale: `ordinal` counts how many ratings lie between two values, `interval` squares their difference.

    Returns:
        None where it is undefined: no item has two ratings, or all ratings that can be paired are the same value.
    """
    table = np.asarray(ratings, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"got ratings of shape {table.shape}, expected [raters, items]")
    values, coincidences = _coincidences(table)
    counts = coincidences.sum(axis=0)
    distance = _distances(values, counts, scale)
    expected = counts @ distance @ counts / max(counts.sum() - 1, 1)
    return 1 - float(np.sum(coincidences * distance) / expected) if expected > 0 else None


def _coincidences(table: Floats) -> tuple[Floats, Floats]:
    """The values `[K]` in order, and how often each pair of them met in an item, `[K, K]`: m ratings weigh m."""
    values = np.unique(table[~np.isnan(table)])
    each = (table[None] == values[:, None, None]).sum(axis=1)  # [K, N]
    raters = each.sum(axis=0)
    paired = each[:, raters > 1].astype(np.float64)
    per_item = paired / np.maximum(raters[raters > 1] - 1, 1)
    return values, per_item @ paired.T - np.diag(per_item.sum(axis=1))


def _distances(values: Floats, counts: Floats, scale: Scale) -> Floats:
    """The squared distance of each two values, `[K, K]`."""
    if scale == "nominal":
        return 1.0 - np.eye(len(values))
    # Ordinal: the ratings up to a value, its own by half, are its place.
    places = np.cumsum(counts) - counts / 2 if scale == "ordinal" else values
    return np.asarray((places[:, None] - places[None, :]) ** 2)


def cohen_kappa(
    first: Sequence[float], second: Sequence[float], weights: Literal["none", "linear", "quadratic"] = "none"
) -> float | None:
    """Cohen's kappa of two raters of N items (1960; weighted by distance: 1968). None where chance alone agrees fully.

    `linear` and `quadratic` weigh a disagreement by the distance of the two values' ranks among all values given.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"got {len(first)} and {len(second)} ratings, expected N > 0 of each")
    values, flat = np.unique(np.concatenate([first, second]), return_inverse=True)
    a, b = flat[: len(first)], flat[len(first) :]
    apart = np.abs(np.arange(len(values))[:, None] - np.arange(len(values))[None, :]).astype(np.float64)
    cost = {"none": (apart > 0).astype(np.float64), "linear": apart, "quadratic": apart**2}[weights]
    by_chance = np.bincount(a, minlength=len(values)) @ cost @ np.bincount(b, minlength=len(values)) / len(a)
    return 1 - float(cost[a, b].sum() / by_chance) if by_chance > 0 else None


def pearson(x: Sequence[float] | Floats, y: Sequence[float] | Floats) -> float | None:
    """Pearson's r of two `[N]`; None where one of them is constant or N < 2."""
    a, b = _two(x, y)
    a, b = a - a.mean() if len(a) else a, b - b.mean() if len(b) else b
    scale = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return max(-1.0, min(1.0, float(a @ b) / scale)) if scale > 0 else None


def pearson_interval(r: float, n: int, level: float = LEVEL) -> Interval | None:
    """The interval of Pearson's r over n items by Fisher's z (1921); None for n < 4."""
    if n < 4:
        return None
    if abs(r) == 1:
        return Interval(r, r)
    half = NormalDist().inv_cdf((1 + level) / 2) / math.sqrt(n - 3)
    return Interval(math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half))


def spearman(x: Sequence[float] | Floats, y: Sequence[float] | Floats) -> float | None:
    """Spearman's rho: Pearson's r of the ranks, ties sharing their mean rank. None as for `pearson`."""
    a, b = _two(x, y)
    return pearson(ranks(a), ranks(b))


def ranks(values: Sequence[float] | Floats) -> Floats:
    """The ranks of values `[N]` from 1, ties sharing their mean rank."""
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])


def _two(x: Sequence[float] | Floats, y: Sequence[float] | Floats) -> tuple[Floats, Floats]:
    if len(x) != len(y):
        raise ValueError(f"got {len(x)} and {len(y)} values, expected as many of each")
    return np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
