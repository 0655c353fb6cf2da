"""Ratings that people have exported from a page of `fastft ab` -> RUN_A/ab.json: who wins, how sure that is, and
whether the raters agree with each other and with the judge.

What is counted is the question, not the rating: raters of one question are no independent witnesses of the models.
Each question has one verdict, the choice of most of its raters (a tie where no choice has most), and for each run one
mean on the scale where the page asks for one; the intervals are over questions.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fastft.common.console import SafeConsole, warn
from fastft.common.effects import check_effects
from fastft.common.errors import UserError
from fastft.common.files import object_or_empty, read_json, write_json
from fastft.common.lock import writing
from fastft.common.shell import command
from fastft.metrics.statistics import (
    Floats,
    WinTieLoss,
    bootstrap,
    bootstrap_mean,
    cohen_kappa,
    krippendorff_alpha,
    sign_flip,
    spearman,
    wilson,
)
from fastft.pages.render import chance
from fastft.run.decodings import UNNAMED, Names, check_name, page_called
from fastft.run.folder import AB_NUMBERS, Run, names_of
from fastft.scores.ab import CHOICES, RATINGS_FORMAT, SCALE, AbOptions, Sheet, make_sheet
from fastft.scores.score import OTHER_JUDGES, judge_identity, responses_of, responses_sha256
from fastft.scores.scores_file import read_scores

VERDICTS = ("first", "second", "tie", "both_bad")

_LEAST_OF_A_LETTER = 10  # questions, for a resample to lack them all is then one in twenty thousand
_SIGNS = {"first": 1, "second": -1, "tie": 0, "both_bad": 0}


@dataclass(frozen=True, slots=True)
class Rating:
    """What one rater said of one question, of the runs and no longer of A and B."""

    item: int
    choice: str
    """One of `VERDICTS`."""
    first: int | None
    second: int | None
    """On the scale of 1 to 5; None where the page does not ask for it."""
    seconds: float
    chose: str
    """What stood on the page: one of `CHOICES`."""
    reason: str
    """In the rater's own words; empty where none was asked for or given."""


@dataclass(frozen=True, slots=True)
class RatingsFile:
    """One rater's file, checked."""

    path: Path
    rater: str
    page: str
    runs: tuple[Path, Path]
    names: Names
    """What the responses are called."""
    seed: int
    limit: int | None
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all raters of one question said together."""

    item: int
    choice: str
    first: float | None
    second: float | None
    votes: dict[str, int]
    reasons: list[str]


def import_ratings(options: AbOptions) -> tuple[Path, dict[str, Any]]:
    """Sums up ratings of one page, writes RUN_A/ab.json (RUN_A/ab.NAME.json), and returns its path and what it holds.

    Raises:
        UserError: a file holds no ratings, or ratings of another page than the two runs give.
    """
    check_effects(options)
    files = [_read(path) for path in options.import_]
    _check_one_page(files)
    sheet = _sheet_of(files[0], options)
    by_rater = {file.rater: _unblinded(file, sheet) for file in files}
    result = summary(sheet, by_rater)
    path = sheet.runs[0] / page_called(AB_NUMBERS, sheet.names)
    with writing(sheet.runs[0]):
        _say_who_is_gone(path, sheet, by_rater)
        write_json(path, result)
    return path, result


def _say_who_is_gone(path: Path, sheet: Sheet, by_rater: Mapping[str, Any]) -> None:
    """Warns where an earlier sum of the same page's ratings, which is replaced, has raters that this one has not."""
    earlier: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # what is no JSON has nobody's ratings
        earlier = object_or_empty(path)
    raters = earlier.get("raters")
    if earlier.get("page") != sheet.page or not isinstance(raters, list):
        return
    gone = [str(one["name"]) for one in raters if isinstance(one, dict) and one.get("name") not in (None, *by_rater)]
    if gone:
        warn(f"{path} has no longer the ratings of {', '.join(gone)}: --import takes the files of all raters at once")


# --- Files ---


def _read(path: Path) -> RatingsFile:
    value = read_json(path, what="the ratings")
    if not isinstance(value, dict) or value.get("format") != RATINGS_FORMAT:
        raise UserError(f"{path} is no file of ratings: expected what the page of fastft ab exports")
    try:
        first, second = map(Path, value["runs"])
        a, b = value.get("names", (None, None))
        file = RatingsFile(
            path, str(value["rater"]), value["page"], (first, second), (a, b), value["seed"], value["limit"],
            value["ratings"],
        )  # fmt: skip
        _check_draw(file)
        for row in file.rows:
            _check_row(row)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: got ratings of another form ({error!r}); export them from the page again") from None
    if not file.rows:
        raise UserError(f"{path} holds no rating: {file.rater} has rated nothing yet, or nothing in full")
    twice = [item for item, times in Counter(row["item"] for row in file.rows).items() if times > 1]
    if twice:
        raise UserError(f"{path}: question {twice[0]} is rated twice; export the ratings from the page again")
    return file


def _check_draw(file: RatingsFile) -> None:
    if not isinstance(file.seed, int) or not (file.limit is None or (isinstance(file.limit, int) and file.limit > 0)):
        raise ValueError(f"seed {file.seed!r} and limit {file.limit!r}, expected whole numbers")
    if not all(name is None or isinstance(name, str) for name in file.names):
        raise ValueError(f"names {file.names!r}, expected texts, or null")
    for name in file.names:
        check_name(name)


def _check_row(row: Mapping[str, Any]) -> None:
    for name in ("scale_a", "scale_b"):
        if row[name] is not None and row[name] not in SCALE:
            raise ValueError(f"{name} {row[name]!r} in question {row['item']}, expected 1 to 5, or null")
    if not isinstance(row.get("reason") or "", str):
        raise ValueError(f"reason {row['reason']!r} in question {row['item']}, expected text")
    if row["choice"] not in CHOICES:
        raise ValueError(f"choice {row['choice']!r} in question {row['item']}, expected {', '.join(CHOICES)}")
    if not isinstance(row["item"], int):
        raise ValueError(f"question {row['item']!r}, expected its number")
    if not 0 <= float(row["seconds"]) < math.inf:
        raise ValueError(f"{row['seconds']} seconds for question {row['item']}")


def _check_one_page(files: Sequence[RatingsFile]) -> None:
    for one, other in itertools.combinations(files, 2):
        if one.page != other.page:
            raise UserError(f"{one.path} and {other.path} are ratings of two pages; import those of one page at a time")
        if one.rater == other.rater:
            raise UserError(
                f"{one.path} and {other.path} are both by {one.rater}; leave one out, or give each rater a name"
            )


def _sheet_of(file: RatingsFile, options: AbOptions) -> Sheet:
    """What the page showed, made again from the runs."""
    runs = file.runs
    if options.run_a is not None and options.run_b is not None:
        runs = (options.run_a, options.run_b)
    elif not all(responses_of(*side).is_file() for side in zip(runs, file.names, strict=True)):
        raise UserError(
            f"{file.path} was made of {runs[0]} and {runs[1]}, which are not here; "
            f"say where they are: fastft ab RUN_A RUN_B --import {shlex.quote(str(file.path))}"
        )
    sheet = make_sheet(runs, file.seed, file.limit, file.names)
    if sheet.page != file.page:
        raise UserError(
            f"{file.path} rates other answers than {runs[0]} and {runs[1]} give now: these are other runs, in another "
            f"order, or they have answered again since; rated were {file.runs[0]} and {file.runs[1]}"
        )
    return sheet


def _unblinded(file: RatingsFile, sheet: Sheet) -> list[Rating]:
    first_is_a = {item.item: is_a for item, is_a in zip(sheet.items, sheet.first_is_a, strict=True)}
    unknown = [row["item"] for row in file.rows if row["item"] not in first_is_a]
    if unknown:
        raise UserError(f"{file.path}: question {unknown[0]} is not on its page; export the ratings from it again")
    return [_rating(row, first_is_a=first_is_a[row["item"]]) for row in file.rows]


def _rating(row: Mapping[str, Any], *, first_is_a: bool) -> Rating:
    names = {"a": "first", "b": "second"} if first_is_a else {"a": "second", "b": "first"}
    scales = {names["a"]: row["scale_a"], names["b"]: row["scale_b"]}
    choice = names.get(row["choice"], row["choice"])
    reason = (row.get("reason") or "").strip()
    return Rating(row["item"], choice, scales["first"], scales["second"], float(row["seconds"]), row["choice"], reason)


# --- Figures ---


def summary(sheet: Sheet, by_rater: Mapping[str, Sequence[Rating]]) -> dict[str, Any]:
    """What ab.json holds."""
    ratings = list(itertools.chain.from_iterable(by_rater.values()))
    verdicts = _verdicts(ratings)
    return {
        "runs": [str(run) for run in sheet.runs],
        "names": dict(zip(("first", "second"), _called(sheet), strict=True)),
        "responses_names": list(sheet.names),
        "page": sheet.page,
        "seed": sheet.seed,
        "limit": sheet.limit,
        "responses_sha256": [responses_sha256(*side) for side in _sides(sheet)],
        "n_items": len(sheet.items),
        "n_rated": len(verdicts),
        "n_same_text": sheet.n_same,
        "raters": [_rater(name, rows) for name, rows in by_rater.items()],
        "verdicts": _shares(verdicts),
        "win_rate": _win_rate(verdicts),
        "scale": _scales(verdicts),
        "agreement": {"raters": _agreement(by_rater), "judge": _judge_agreement(sheet, verdicts)},
        "position": _position(ratings),
        "items": [
            {
                "item": v.item,
                "verdict": v.choice,
                "first": v.first,
                "second": v.second,
                "votes": v.votes,
                "reasons": v.reasons,
            }
            for v in verdicts
        ],
    }


def _sides(sheet: Sheet) -> list[tuple[Path, str | None]]:
    return list(zip(sheet.runs, sheet.names, strict=True))


def _called(sheet: Sheet) -> list[str]:
    """What the two are called beside each other."""
    one, other = sheet.runs
    runs = [one.resolve().name] * 2 if one.resolve() == other.resolve() else names_of(sheet.runs)
    if not any(sheet.names):
        return runs
    return [f"{run} ({name or UNNAMED})" for run, name in zip(runs, sheet.names, strict=True)]


def _rater(name: str, rows: Sequence[Rating]) -> dict[str, Any]:
    return {"name": name, "n": len(rows), "median_seconds": round(median(row.seconds for row in rows), 1)}


def _verdicts(ratings: Sequence[Rating]) -> list[Verdict]:
    by_item: dict[int, list[Rating]] = {}
    for rating in sorted(ratings, key=lambda rating: rating.item):
        by_item.setdefault(rating.item, []).append(rating)
    return [
        Verdict(
            item,
            _most(Counter(row.choice for row in rows)),
            _mean_or_none([row.first for row in rows]),
            _mean_or_none([row.second for row in rows]),
            dict(Counter(row.choice for row in rows)),
            [row.reason for row in rows if row.reason],
        )
        for item, rows in by_item.items()
    ]


def _mean_or_none(values: Sequence[int | None]) -> float | None:
    given = [value for value in values if value is not None]
    return fmean(given) if given else None


def _most(votes: Counter[str]) -> str:
    (choice, most), *others = votes.most_common(2)
    return "tie" if others and others[0][1] == most else choice


def _shares(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """How many questions have each verdict, with Wilson's interval of its share."""
    counts = Counter(verdict.choice for verdict in verdicts)
    return {
        name: {
            "n": counts[name],
            "share": counts[name] / len(verdicts),
            "interval": wilson(counts[name], len(verdicts)),
        }
        for name in VERDICTS
    }


def _win_rate(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """How often the first run wins where one of the two does, with Wilson's interval and the sign test's p."""
    signs = Counter(_SIGNS[verdict.choice] for verdict in verdicts)
    counted = WinTieLoss(signs[1], signs[0], signs[-1])
    return {
        "wins": counted.wins,
        "ties": counted.ties,
        "losses": counted.losses,
        "rate": counted.win_rate(),
        "interval": counted.interval(),
        "p": counted.sign_test(),
    }


def _scales(verdicts: Sequence[Verdict]) -> dict[str, Any] | None:
    """The runs' means on the scale and their difference; None where nobody was asked for it."""
    rated = _rated_pairs(verdicts)
    if not rated:
        return None
    differences = [first - second for first, second in rated]
    return {
        "first": _mean([first for first, _ in rated]),
        "second": _mean([second for _, second in rated]),
        "difference": {**_mean(differences), "p": sign_flip(differences).p},
    }


def _rated_pairs(verdicts: Sequence[Verdict]) -> list[tuple[float, float]]:
    return [(v.first, v.second) for v in verdicts if v.first is not None and v.second is not None]


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": fmean(values), "interval": bootstrap_mean(values)}


def _agreement(by_rater: Mapping[str, Sequence[Rating]]) -> dict[str, Any] | None:
    """Krippendorff's alpha over all raters, and each two of them; None for a single rater."""
    if len(by_rater) < 2:
        return None
    items = sorted({rating.item for rows in by_rater.values() for rating in rows})
    held = [{rating.item: rating for rating in rows} for rows in by_rater.values()]
    nothing = float("nan")
    choices = [[VERDICTS.index(rows[i].choice) if i in rows else nothing for i in items] for rows in held]
    scales = [[_scale_of(rows.get(i), side) for side in ("first", "second") for i in items] for rows in held]
    on_scale = any(value == value for row in scales for value in row)
    return {
        "alpha_choice": krippendorff_alpha(choices, "nominal"),
        "alpha_scale": krippendorff_alpha(scales, "ordinal") if on_scale else None,
        "pairs": [_pair(*two) for two in itertools.combinations(by_rater.items(), 2)],
    }


def _scale_of(rating: Rating | None, side: str) -> float:
    """What a rater gave a run's answer; not-a-number where that is nothing."""
    value = None if rating is None else getattr(rating, side)
    return math.nan if value is None else float(value)


def _pair(one: tuple[str, Sequence[Rating]], other: tuple[str, Sequence[Rating]]) -> dict[str, Any]:
    mine = {rating.item: VERDICTS.index(rating.choice) for rating in one[1]}
    yours = {rating.item: VERDICTS.index(rating.choice) for rating in other[1]}
    both = sorted(mine.keys() & yours.keys())
    return {"raters": [one[0], other[0]], **_same_choice([mine[i] for i in both], [yours[i] for i in both])}


def _same_choice(mine: Sequence[int], yours: Sequence[int]) -> dict[str, Any]:
    same = sum(a == b for a, b in zip(mine, yours, strict=True))
    return {
        "n": len(mine),
        "same": same / len(mine) if mine else None,
        "interval": wilson(same, len(mine)),
        "kappa": cohen_kappa(mine, yours) if mine else None,
    }


def _judge_agreement(sheet: Sheet, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """How often the judge, scoring each run for itself, prefers what people prefer; or why that is not known."""
    scores = []
    for side in _sides(sheet):
        found = _judge_scores(*side)
        if isinstance(found, str):
            return {"n": 0, "reason": found}
        scores.append(found)
    first, second = scores[0][0], [scores[1][0][place] for place in sheet.order]
    if scores[0][1] != scores[1][1]:
        return {"n": 0, "reason": OTHER_JUDGES}
    judged = [v for v in verdicts if first[v.item - 1] is not None and second[v.item - 1] is not None]
    if not judged:
        return {"n": 0, "reason": "the judge has scored no question that people have rated in both runs"}
    pairs = [(float(first[v.item - 1] or 0), float(second[v.item - 1] or 0)) for v in judged]
    preferred = [(one > other) - (one < other) for one, other in pairs]
    on_scale = [(v, pair) for v, pair in zip(judged, pairs, strict=True) if _rated_pairs([v])]
    scales = [value for v, _ in on_scale for value in _rated_pairs([v])[0]]
    return {
        **_same_choice([_SIGNS[v.choice] for v in judged], preferred),
        "spearman_scale": spearman(scales, [score for _, pair in on_scale for score in pair]) if on_scale else None,
    }


def _judge_scores(run: Path, name: str | None) -> tuple[list[float | None], Any] | str:
    """The judge's score of each response of a run, and who gave them; or why they cannot be used."""
    path = Run(run).scores(name)
    remedy = command("score", run=run, name=name)
    if not path.is_file():
        return f"{path} does not exist: {remedy}"
    held = read_scores(path)
    try:
        if held["summary"]["responses_sha256"] != responses_sha256(run, name):
            return f"{path} scores other responses: {remedy}"
        scores = [judgement["score"] for judgement in held["judgements"]]
        judge = judge_identity(held["summary"].get("judge"))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file that fastft score wrote ({error!r}); score again") from None
    if all(score is None for score in scores):
        return f"{path} holds no judge's score"
    return scores, judge


def _position(ratings: Sequence[Rating]) -> dict[str, Any]:
    """How often A was preferred where one was; far from 1/2 is a liking for a letter.

    The better run may by chance have been A more often. So the questions where the first run was A, and those where the
    second was, weigh the same: `rate_a` is the mean of the two groups' shares, its interval over questions.
    """
    decided: dict[tuple[bool, int], list[bool]] = {}
    for rating in ratings:
        if rating.chose in ("a", "b"):
            is_a = (rating.chose == "a") == (rating.choice == "first")
            decided.setdefault((is_a, rating.item), []).append(rating.chose == "a")
    chose_a = np.array([fmean(answers) for answers in decided.values()])
    first_is_a = np.array([is_a for is_a, _ in decided], dtype=np.bool_)
    return {
        "n": sum(map(len, decided.values())),
        "a": sum(map(sum, decided.values())),
        **_letter_rate(chose_a, first_is_a),
    }


def _letter_rate(chose_a: Floats, first_is_a: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """The mean of the two groups' mean; None where a group is empty, and no interval where one is small."""
    groups = [first_is_a.astype(np.float64), (~first_is_a).astype(np.float64)]
    smallest = min(float(group.sum()) for group in groups)
    if not smallest:
        return {"rate_a": None, "interval": None}

    def rate(weights: Floats) -> Floats:
        shares = [weights @ (chose_a * group) / np.maximum(weights @ group, 1) for group in groups]
        return np.asarray((shares[0] + shares[1]) / 2)

    enough = smallest >= _LEAST_OF_A_LETTER
    return {
        "rate_a": float(rate(np.ones((1, len(chose_a))))[0]),
        "interval": bootstrap(rate, len(chose_a)) if enough else None,
    }


# --- What the terminal shows ---


def print_summary(result: Mapping[str, Any]) -> None:
    """Prints the figures as tables, and what they rest on."""
    out = SafeConsole(highlight=False, soft_wrap=True)
    names = result["names"]
    out.print(_verdict_table(result, names))
    if result["scale"] is not None:
        out.print(_scale_table(result, names))
    for line in _lines(result, names):
        out.print(line, markup=False)


def _verdict_table(result: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    words = {"first": f"{names['first']} is better", "second": f"{names['second']} is better"}
    table = _table("verdict", "questions", "share", "95% interval")
    for verdict, row in result["verdicts"].items():
        words_of = words.get(verdict, verdict.replace("_", " "))
        table.add_row(Text(words_of), str(row["n"]), _percent(row["share"]), _interval(row["interval"], 100, 1))
    return table


def _scale_table(result: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    table = _table("scale of 1 to 5", "", "mean", "95% interval")
    for side, row in result["scale"].items():
        label = names.get(side, f"difference (p {_p(row.get('p', 1.0))})")
        table.add_row(Text(label), "", f"{row['mean']:.2f}", _interval(row["interval"], 1, 2))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left")
    return table


def _lines(result: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    win = result["win_rate"]
    rated, asked = result["n_rated"], result["n_items"]
    lines = [f"rated {rated} of {asked} questions; both runs say the same in {result['n_same_text']} more"]
    if win["rate"] is not None:
        lines.append(
            f"{names['first']} wins {win['wins']} of {win['wins'] + win['losses']} decided questions: "
            f"{_percent(win['rate'])} ({_interval(win['interval'], 100, 1)}), p {_p(win['p'])}"
        )
    lines += [
        f"{one['name']}: {one['n']} questions, {one['median_seconds']:.1f} s each (median)" for one in result["raters"]
    ]
    return [*lines, *_agreement_lines(result["agreement"]), _position_line(result["position"])]


def _agreement_lines(agreement: Mapping[str, Any]) -> list[str]:
    raters, judge = agreement["raters"], agreement["judge"]
    lines = []
    if raters is not None:
        lines.append(
            f"raters agree: Krippendorff's alpha {_figure(raters['alpha_choice'])} on the choice"
            + ("" if raters["alpha_scale"] is None else f", {_figure(raters['alpha_scale'])} on the scale")
        )
        lines += [
            f"{' and '.join(pair['raters'])}: the same choice in {_percent(pair['same'])} of {pair['n']}, "
            f"Cohen's kappa {_figure(pair['kappa'])}"
            for pair in raters["pairs"]
        ]
    if "reason" in judge:
        return [*lines, f"agreement with the judge is not known: {judge['reason']}"]
    rho = judge["spearman_scale"]
    return [
        *lines,
        f"people and judge: the same preference in {_percent(judge['same'])} of {judge['n']}, Cohen's kappa "
        f"{_figure(judge['kappa'])}" + ("" if rho is None else f", Spearman's rho of scale and score {_figure(rho)}"),
    ]


def _position_line(position: Mapping[str, Any]) -> str:
    return (
        f"of the two letters on the page, A was preferred in {_percent(position['rate_a'])} of {position['n']} ratings "
        f"({_interval(position['interval'], 100, 1)}), the runs' own merits set apart; 50% is no liking for a letter"
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _p(p: float) -> str:
    return chance(p) if p < 0.001 else f"= {chance(p)}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _interval(bounds: Sequence[float] | None, factor: float, digits: int) -> str:
    return "–" if bounds is None else " to ".join(f"{factor * bound:.{digits}f}" for bound in bounds)
