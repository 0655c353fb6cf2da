"""Intervals, tests and agreement, held against scipy and against published figures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fastft.metrics import statistics
from fastft.metrics.statistics import WinTieLoss

SCORES = [
    ("skewed", [0, 0, 5, 10, 20, 85, 90, 95, 100, 100, 100, 100]),
    ("ties", [50, 50, 50, 50, 60, 60, 70]),
    ("two", [3.5, 8.25]),
    ("floats", list(np.random.default_rng(5).gamma(0.7, 20, 40))),
]
values = pytest.mark.parametrize("values", [values for _, values in SCORES], ids=[name for name, _ in SCORES])


@values
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_bootstrap_interval_is_scipys_bca(values: list[float], level: float) -> None:
    """The same draws: scipy's generator is asked for the same numbers."""
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, confidence_level=level, method="BCa", rng=np.random.default_rng(3)
    ).confidence_interval
    ours = statistics.bootstrap_mean(values, level=level, resamples=2000, seed=3)
    assert ours == pytest.approx((theirs.low, theirs.high), rel=1e-9)


def test_the_bootstrap_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = statistics.bootstrap_mean(SCORES[0][1])
    monkeypatch.setattr(statistics, "_CHUNK", 100)
    assert statistics.bootstrap_mean(SCORES[0][1]) == whole


def test_a_bootstrap_interval_of_nothing_to_resample() -> None:
    assert statistics.bootstrap_mean([]) is None
    assert statistics.bootstrap_mean([7]) is None
    assert statistics.bootstrap_mean([7, 7, 7]) == (7, 7)
    assert statistics.bootstrap_mean([0.1] * 7) == pytest.approx((0.1, 0.1))


def test_bca_intervals_hold_the_mean_as_often_as_they_say() -> None:
    """Of a skewed distribution, where the plain percentile interval is known to miss more."""
    random = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        low, high = statistics.bootstrap_mean(random.exponential(1.0, 50), resamples=500, seed=seed) or (0, 0)
        held += low <= 1.0 <= high
    assert 178 <= held <= 199  # 95% of 200 are 190; its standard deviation is 3.1, and n = 50 costs BCa about 2%


@values
def test_the_sign_flip_test_is_scipys_exact_one(values: list[float]) -> None:
    a = np.array(values[:12])
    b = np.round(np.random.default_rng(1).permutation(a) * 0.9)
    theirs = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=math.inf, alternative="two-sided"
    )
    ours = statistics.sign_flip(a - b)
    assert ours.exact
    assert ours.p == pytest.approx(theirs.pvalue, abs=1e-12)


def test_random_permutations_come_close_to_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(2).normal(0.5, 1, 14)
    exact = statistics.sign_flip(differences)
    monkeypatch.setattr(statistics, "_EXACT_UP_TO", 13)
    sampled = statistics.sign_flip(differences, resamples=20_000)
    assert (exact.exact, sampled.exact) == (True, False)
    assert sampled.p == pytest.approx(exact.p, abs=4 * math.sqrt(exact.p / 20_000))


def test_a_permutation_p_is_never_0_and_1_where_nothing_differs() -> None:
    assert statistics.sign_flip(np.ones(40), resamples=999).p == pytest.approx(1 / 1000)
    assert statistics.sign_flip(np.zeros(40)) == (1, True)
    assert statistics.sign_flip([]) == (1, True)
    assert statistics.sign_flip([1.0] * 5 + [0.0] * 40) == (2 / 32, True)


def rejections(test: object, runs: int = 200) -> int:
    """Of so many comparisons of two runs that are alike: entries differ a lot, runs by chance alone."""
    random = np.random.default_rng(1)
    found = 0
    for run in range(runs):
        level = random.normal(60, 25, 60)
        a, b = (np.clip(np.round(level + random.normal(0, 10, 60)), 0, 100) for _ in range(2))
        found += bool(test(a, b, run))
    return found


def by_permutation(a: np.ndarray, b: np.ndarray, seed: int) -> bool:
    return statistics.sign_flip(a - b, resamples=1000, seed=seed).p < 0.05


def by_bootstrap(a: np.ndarray, b: np.ndarray, seed: int) -> bool:
    low, high = statistics.bootstrap_mean(a - b, resamples=1000, seed=seed) or (0, 0)
    return not low <= 0 <= high


def by_signs(a: np.ndarray, b: np.ndarray, seed: int) -> bool:
    return statistics.win_tie_loss(a - b).sign_test() < 0.05


def unpaired(a: np.ndarray, b: np.ndarray, seed: int) -> bool:
    return bool(stats.ttest_ind(a, b).pvalue < 0.05)


def one_sided_after_looking(a: np.ndarray, b: np.ndarray, seed: int) -> bool:
    return statistics.sign_flip(a - b, resamples=1000, seed=seed).p / 2 < 0.05


def every_pair_twice(a: np.ndarray, b: np.ndarray, seed: int) -> bool:
    return statistics.sign_flip(np.tile(a - b, 2), resamples=1000, seed=seed).p < 0.05


@pytest.mark.parametrize("test", [by_permutation, by_bootstrap, by_signs])
def test_two_runs_that_are_alike_are_told_apart_as_often_as_the_level_says(test: object) -> None:
    assert 3 <= rejections(test) <= 19
    assert rejections(test, 1000) <= 75  # 5% are 50; its standard deviation is 7


@pytest.mark.parametrize("wrong", [unpaired, every_pair_twice])
def test_those_bounds_reject_wrong_tests(wrong: object) -> None:
    assert not 3 <= rejections(wrong) <= 19


def test_the_sharper_bound_rejects_a_level_twice_too_high() -> None:
    assert rejections(one_sided_after_looking, 1000) > 75  # 10% are 100; its standard deviation is 9.5


@pytest.mark.parametrize(
    ("ps", "raised"),
    [
        ([], []),
        ([0.04], [0.04]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5, 0.01, 0.9], [1.0, 0.03, 1.0]),
        ([0.01, 0.0101, 0.0102], [0.03, 0.03, 0.03]),
    ],
)
def test_p_of_several_tests_is_raised_as_holm_does(ps: list[float], raised: list[float]) -> None:
    assert statistics.holm(ps) == pytest.approx(raised)


def test_one_of_ten_tests_is_small_by_chance_as_often_as_one_test_is() -> None:
    random = np.random.default_rng(3)
    tests = random.uniform(size=(4000, 10))
    found = np.mean([min(statistics.holm(row.tolist())) < 0.05 for row in tests])
    assert 0.04 < found < 0.06  # its standard deviation is 0.0034
    assert np.mean(tests.min(axis=1) < 0.05) > 0.35


def test_a_difference_that_is_there_is_found() -> None:
    random = np.random.default_rng(4)
    found = sum(
        statistics.sign_flip(random.normal(4, 10, 60), resamples=1000, seed=seed).p < 0.05 for seed in range(50)
    )
    assert found >= 35  # the t test's power is 0.86


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (37, 110), (1, 1)])
def test_proportions_have_scipys_wilson_interval(k: int, n: int) -> None:
    theirs = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert statistics.wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_a_proportion_of_none_has_no_interval() -> None:
    assert statistics.wilson(0, 0) is None


def test_wins_ties_and_losses() -> None:
    tally = statistics.win_tie_loss([3, 0, -1, 2, 0.5])
    assert tally == WinTieLoss(3, 1, 1)
    assert tally.win_rate() == 0.75
    assert tally.interval() == statistics.wilson(3, 4)
    nothing = statistics.win_tie_loss([0, 0])
    assert (nothing.win_rate(), nothing.interval(), nothing.sign_test()) == (None, None, 1)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (3, 1), (10, 0), (4, 4), (60, 50), (700, 900)])
def test_the_sign_test_is_scipys(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert WinTieLoss(wins, 7, losses).sign_test() == pytest.approx(expected, rel=1e-9)


NAN = math.nan
KRIPPENDORFF = [  # "Computing Krippendorff's Alpha-Reliability" (2011), section C: four observers, twelve units
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
]


@pytest.mark.parametrize(("scale", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_krippendorffs_own(scale: statistics.Scale, published: float) -> None:
    assert statistics.krippendorff_alpha(KRIPPENDORFF, scale) == pytest.approx(published, abs=5e-4)


def alpha_pair_by_pair(table: np.ndarray) -> float | None:
    """Interval alpha by its definition: mean squared difference within items over that of all ratings."""
    units = [unit[~np.isnan(unit)] for unit in table.T]
    units = [unit for unit in units if len(unit) > 1]
    everything = np.concatenate(units) if units else np.zeros(0)
    n = len(everything)
    observed = sum(sum((x - y) ** 2 for x in unit for y in unit) / (len(unit) - 1) for unit in units)
    expected = sum((x - y) ** 2 for x, y in itertools.product(everything, repeat=2)) / (n - 1) if n > 1 else 0
    return 1 - observed / expected if expected else None


@given(st.lists(st.lists(st.sampled_from([1.0, 2.0, 4.0, NAN]), min_size=3, max_size=3), min_size=1, max_size=6))
def test_alpha_is_what_its_definition_says(items: list[list[float]]) -> None:
    table = np.array(items).T
    assert statistics.krippendorff_alpha(table, "interval") == pytest.approx(alpha_pair_by_pair(table), abs=1e-9)


def test_alpha_of_full_agreement_of_none_and_of_one_value() -> None:
    assert statistics.krippendorff_alpha([[1, 2, 3], [1, 2, 3]], "ordinal") == 1
    assert statistics.krippendorff_alpha([[1, 2], [2, 1]]) == pytest.approx(-0.5)
    assert statistics.krippendorff_alpha([[1, 1], [1, 1]]) is None
    assert statistics.krippendorff_alpha([[1, NAN], [NAN, 2]]) is None
    assert statistics.krippendorff_alpha([[NAN], [NAN]]) is None
    with pytest.raises(ValueError, match="raters, items"):
        statistics.krippendorff_alpha([1, 2])


def test_kappa() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed 0.7, by chance 0.5.
    first = [1] * 25 + [0] * 25
    second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert statistics.cohen_kappa(first, second) == pytest.approx(0.4)
    assert statistics.cohen_kappa([1, 2, 3], [1, 2, 3], "quadratic") == 1
    assert statistics.cohen_kappa([1, 1], [1, 1]) is None
    with pytest.raises(ValueError, match="N > 0"):
        statistics.cohen_kappa([], [])


def test_weighted_kappa_is_one_less_the_ratio_of_costs() -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(1, 6, 50), random.integers(1, 6, 50)
    for weights, power in (("linear", 1), ("quadratic", 2)):
        observed = np.mean(np.abs(a - b) ** power)
        by_chance = np.mean(np.abs(a[:, None] - b[None, :]) ** power)
        assert statistics.cohen_kappa(a, b, weights) == pytest.approx(1 - observed / by_chance)


pairs = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30)


@given(pairs)
def test_correlations_are_scipys(points: list[tuple[int, int]]) -> None:
    x, y = (list(map(float, column)) for column in zip(*points, strict=True))
    for ours, theirs in (
        (statistics.pearson, stats.pearsonr),
        (statistics.spearman, stats.spearmanr),
    ):
        if len(set(x)) == 1 or len(set(y)) == 1:
            assert ours(x, y) is None
        else:
            assert ours(x, y) == pytest.approx(theirs(x, y).statistic, abs=1e-9)


def test_the_interval_of_a_correlation_is_scipys() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=30)
    y = x + random.normal(size=30)
    theirs = stats.pearsonr(x, y)
    ours = statistics.pearson_interval(statistics.pearson(x, y) or 0, 30)
    assert ours == pytest.approx(tuple(theirs.confidence_interval()))
    assert statistics.pearson_interval(0.5, 3) is None
    assert statistics.pearson_interval(1, 30) == (1, 1)


def test_correlations_of_too_little_or_of_other_lengths() -> None:
    assert statistics.pearson([], []) is None
    assert statistics.spearman([1], [2]) is None
    with pytest.raises(ValueError, match="2 and 1 values"):
        statistics.spearman([1, 2], [1])
