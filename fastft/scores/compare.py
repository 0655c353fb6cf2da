"""The stage RUN_A, RUN_B -> RUN_A/compare-NAME.json: what differs between two runs over the same test entries.

Everything is paired: entry by entry, A less B. An entry is the same where instruction, input and reference output are.
Each metric has its difference with a BCa bootstrap interval and a two-sided permutation test; the judge's scores also
wins, ties and losses. With `--pairwise` a judge is asked which of the two responses is better
(`fastft.judging.pairwise`); its replies are kept beside the figures, in the journal that `fastft score` keeps too.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fastft.common import files
from fastft.common.console import SafeConsole, meter, say, warn
from fastft.common.errors import JudgeUnavailable, UserError
from fastft.common.lock import writing
from fastft.common.nearest import did_you_mean_path
from fastft.common.options import names_checked
from fastft.common.shell import command
from fastft.data.records import category_of, choices_of
from fastft.judging import pairwise
from fastft.judging.journal import Journal
from fastft.judging.options import JudgeOptions
from fastft.judging.pairwise import Pair, judge_pairs
from fastft.judging.referee import ServerReferee
from fastft.metrics.statistics import (
    LEVEL,
    RESAMPLES,
    SEED,
    Floats,
    Interval,
    Permutation,
    Statistic,
    bootstrap_all,
    bootstrap_mean,
    holm,
    paired_permutation,
    pearson,
    pearson_interval,
    sign_flip,
    spearman,
    win_tie_loss,
)
from fastft.metrics.text_metrics import NAMES, Measure, bounds, measures, multiple_choice_measure, words_of
from fastft.pages.render import chance
from fastft.run.decodings import UNNAMED, Names, decoding_of, differing, names_joined, names_of_two
from fastft.run.folder import COMPARISON, COMPARISON_ELSEWHERE, JUDGE_REPLIES, Run
from fastft.scores.compare_conversations import (
    Side,
    compare_conversations,
    conversation_lines,
    decoding_in_words,
    rows_of,
)
from fastft.scores.conversations import read_talks
from fastft.scores.score import (
    answer_notes,
    judge_identity,
    judges_differ,
    left_out_rows,
    other_judges,
    read_responses,
    responses_of,
    responses_sha256,
)
from fastft.scores.scores_file import read_scores

_TITLES = {
    "judge": "judge's mean",
    "exact_match": "exact match, %",
    "multiple_choice": "multiple choice, %",
    "bleu": "BLEU, %",
    "chrf": "chrF, %",
    "rouge_1": "ROUGE-1 F1, %",
    "rouge_2": "ROUGE-2 F1, %",
    "rouge_l": "ROUGE-L F1, %",
    "words": "words of a response",
    "looping": "responses that loop, %",
}
_UNDEFINED: dict[str, Any] = dict.fromkeys(("a", "b", "difference", "interval", "p", "exact")) | {"n": 0}
"""The row of a metric that the references leave undefined for every entry."""
_NOTE = (
    f"A less B, by entry; {LEVEL:.0%} intervals: BCa bootstrap over entries ({RESAMPLES:,} resamples, seed {SEED}); "
    "p by the paired permutation test, two-sided, of one row alone; p of all: raised for the number of rows, those of "
    "conversations among them (Holm)"
)


@dataclass(frozen=True)
class _PairOptions:
    """The two runs."""

    run_a: Path
    """Folder of the first run, A; its responses.json is read, and its scores.json where it is there."""
    run_b: Path
    """Folder of the second run, B; differences are A less B."""
    _: KW_ONLY
    name: str | list[str] | None = None
    """What the responses are called, where they have a name, in both runs; or two names, A's and B's, by which two
    decodings of one run are compared. In place of a name, test means the responses that have none."""
    out: Path | None = None
    """The file for the figures, or a folder for compare.json; by default compare-NAME.json in A's folder, NAME being
    B's, with the names of the responses behind it."""
    pairwise: bool = False
    """Ask a judge which of the two responses is better, in both orders."""


@names_checked
@dataclass(frozen=True)
class CompareOptions(JudgeOptions, _PairOptions):
    """The options of `fastft compare`."""

    _: KW_ONLY
    judge: Literal["ollama", "openai"] = "ollama"
    """Who is asked, for --pairwise: a model behind Ollama, or behind any OpenAI-compatible server."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.names()

    def names(self) -> Names:
        """What the responses of A and of B are called; None of those without a name.

        Raises:
            UserError: there are more than two, or one is no name.
        """
        return names_of_two(self.name)

    def path(self) -> Path:
        """Where the figures go."""
        if self.out is None:
            named = names_joined(self.names()) if any(self.names()) else ""
            return self.run_a / COMPARISON.format(f"{self.run_b.resolve().name}{named and '.'}{named}")
        return self.out / COMPARISON_ELSEWHERE if self.out.is_dir() else self.out


def compare(options: CompareOptions) -> dict[str, Any]:
    """Compares two runs, writes the figures, and returns them.

    Raises:
        UserError: a run has no responses, they answer other entries, or a file is malformed.
        JudgeUnavailable: `require_judge`, and the judge cannot be used; the figures are written all the same.
    """
    place = options.path().parent
    with contextlib.ExitStack() as held:
        # The figures and the judge's replies may go elsewhere, where another comparison's may go too.
        for folder in {options.run_a.resolve(): options.run_a, place.resolve(): place}.values():
            held.enter_context(writing(folder))
        return _compare(options)


def _compare(options: CompareOptions) -> dict[str, Any]:
    # Made first: a mistyped address is to be heard of at once, not after the figures.
    server = options.server() if options.pairwise else None
    sides = _sides_of(options)
    if _have_only_talked(sides):
        return _compare_talks(options, sides)
    a, b = (read_responses(*side) for side in sides)
    order = matched(a, b, options.run_a, options.run_b)
    b = [b[index] for index in order]
    scores, judges, why_not = _scores(sides, order)
    kept, rows = _answered_by_both(a, b)
    if not kept:
        raise UserError(
            f"nothing to compare: fastft generate left out each of the {len(a)} entries in {options.run_a} or in "
            f"{options.run_b}"
        )
    a, b = ([entries[index] for index in kept] for entries in (a, b))
    scores = None if scores is None else (scores[0][kept], scores[1][kept])
    path = options.path()
    _check_ours(path, options)
    talks, no_talks = compare_conversations(sides)
    found = figures(a, b, scores)
    raise_for_all([found["judge"], *found["metrics"].values(), *rows_of(talks)])
    result = {
        **_what_is_compared(sides),
        "differing_judge": judges_differ(*judges) if all(judges) else {},
        "n": len(a),
        "left_out_rows": rows,
        "note": _NOTE,
        **found,
        "no_judge": why_not,
        "conversations": talks,
        "no_conversations": no_talks,
        "pairwise": None,
    }
    files.write_json(path, result)
    if why_not is not None:
        say(f"the text metrics alone are compared: {why_not}")
    if server is not None:
        pairs = [Pair(one, one["model_response"], two["model_response"]) for one, two in zip(a, b, strict=True)]
        referee = ServerReferee(server, Journal(path.parent / JUDGE_REPLIES), options.judge_tokens)
        is_known = referee.find(pairs, lambda: options.before(server))
        result["pairwise"] = _pairwise(pairs, referee if is_known else None, referee.problem, [i + 1 for i in kept])
        files.write_json(path, result)
        problem = result["pairwise"]["no_judge"]
        if problem is not None and options.require_judge:
            raise JudgeUnavailable(problem)
        if problem is not None:
            say(f"no pairwise judge, everything else is kept: {problem}")
    return result


def _have_only_talked(sides: Sequence[Side]) -> bool:
    """Whether both runs have had conversations, and neither has responses."""
    return all(not responses_of(*side).is_file() and read_talks(*side) is not None for side in sides)


def _compare_talks(options: CompareOptions, sides: Sequence[Side]) -> dict[str, Any]:
    """The comparison of two runs without responses: of their conversations alone.

    Raises:
        UserError: they do not compare, or responses are to be compared in pairs.
    """
    if options.pairwise:
        raise UserError("got --pairwise, and neither run has responses; make them with `fastft generate`")
    path = options.path()
    _check_ours(path, options)
    talks, why_not = compare_conversations(sides)
    if talks is None:
        raise UserError(f"nothing to compare: neither run has responses, and of their conversations {why_not}")
    raise_for_all(rows_of(talks))
    result = {
        **_what_is_compared(sides),
        "differing_judge": {},
        "n": 0,
        "left_out_rows": {"a": [], "b": []},
        "note": _NOTE,
        "judge": None,
        "metrics": {},
        "no_judge": None,
        "conversations": talks,
        "no_conversations": None,
        "pairwise": None,
    }
    files.write_json(path, result)
    return result


def _sides_of(options: CompareOptions) -> list[Side]:
    """Both runs, each with the name of its responses.

    Raises:
        UserError: there is no such run.
    """
    sides = [*zip((options.run_a, options.run_b), options.names(), strict=True)]
    for run, _ in sides:
        if not run.is_dir():
            near = did_you_mean_path(run)
            raise UserError(f"no such run: {run} is not a folder{near}; compare takes the folders of two runs")
    if _same_file(*sides):
        say("A and B are the same responses")
    for side in dict.fromkeys(sides):
        for note in answer_notes(*side):
            warn(f"{_said(side)}: {note}")
    return sides


def _what_is_compared(sides: Sequence[Side]) -> dict[str, Any]:
    """The runs, their responses (or, without, their conversations), and what these were decoded with."""
    held = [(responses_of(*side), Run(side[0]).conversations(side[1])) for side in sides]
    decodings = [decoding_of(responses if responses.is_file() else talks) for responses, talks in held]
    return {
        "run_a": str(sides[0][0]),
        "run_b": str(sides[1][0]),
        "names": [name for _, name in sides],
        "decodings": decodings,
        "differing_decoding": differing(*decodings),
        "responses_sha256": [responses_sha256(*side) for side in sides],
    }


def figures(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], scores: tuple[Floats, Floats] | None
) -> dict[str, Any]:
    """All figures of two runs' entries `[N]`, which are the same entries in the same order.

    Args:
        a, b: entries with `output` and `model_response`.
        scores: the judge's of both, `[N]` each, NaN where there is none; None leaves the judge out.

    Returns:
        `judge` (`judge_figures`) and `metrics` (`metric_figures`).
    """
    texts_a, texts_b = ([entry["model_response"] for entry in entries] for entries in (a, b))
    outputs = [entry["output"] for entry in a]
    ours, theirs = measures(texts_a, outputs), measures(texts_b, outputs)
    judged = None if scores is None else judge_figures(*scores, _words(texts_a) - _words(texts_b))
    if judged is not None and scores is not None:
        judged["by_category"] = _by_category(a, *scores)
    found = {name: _UNDEFINED | {} for name in NAMES} | metric_figures(ours, theirs)
    same = [(one, two) for one, two in zip(a, b, strict=True) if choices_of(one) == choices_of(two)]
    choices_a, choices_b = (multiple_choice_measure([pair[side] for pair in same]) for side in (0, 1))
    if choices_a is not None and choices_b is not None:
        found |= metric_figures({"multiple_choice": choices_a}, {"multiple_choice": choices_b})
    return {"judge": judged, "metrics": found}


def raise_for_all(rows: Sequence[dict[str, Any] | None]) -> None:
    """Gives each row of a comparison `p_of_all`: its `p` raised for the number of rows that have one (Holm)."""
    tested = [row for row in rows if row is not None and row["p"] is not None]
    for row in filter(None, rows):
        row["p_of_all"] = None
    for row, raised in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_of_all"] = raised


def metric_figures(a: Mapping[str, Measure], b: Mapping[str, Measure]) -> dict[str, dict[str, Any]]:
    """The metrics of both runs, and of each the `difference` with `interval` and `p`.

    Both are over the same `n` entries, those for which the metric is defined.
    """
    names = [name for name in a if name in b]
    differences = {name: _difference(a[name], b[name]) for name in names}
    counted = {name: len(a[name].counts) for name in names}
    intervals: dict[str, Interval | None] = {}
    for n in set(counted.values()):
        intervals |= bootstrap_all({name: differences[name] for name in names if counted[name] == n}, n)
    found = {}
    for name in names:
        ours, theirs = a[name].figure(), b[name].figure()
        test = swap_test(a[name], b[name])
        found[name] = {
            "n": counted[name],
            "a": ours,
            "b": theirs,
            "difference": ours - theirs,
            "interval": bounds(intervals[name]),
            "p": test.p,
            "exact": test.exact,
        }
    return found


def swap_test(a: Measure, b: Measure) -> Permutation:
    """The permutation test of a metric of two runs: the responses of an entry change sides."""
    differs = (a.counts != b.counts).any(axis=1)  # the others change nothing by changing sides
    half = (a.counts - b.counts)[differs] / 2
    middle = (a.counts + b.counts).sum(axis=0) / 2

    def difference(signs: Floats) -> Floats:
        moved = signs @ half
        return a.figure_of(middle + moved) - a.figure_of(middle - moved)

    return paired_permutation(difference, len(half))


def _difference(a: Measure, b: Measure) -> Statistic:
    return lambda weights: a.figure_of(weights @ a.counts) - b.figure_of(weights @ b.counts)


def judge_figures(a: Floats, b: Floats, words: Floats) -> dict[str, Any] | None:
    """The judge's scores of both runs over the entries that have both; None where there is no such entry.

    Args:
        a, b: scores `[N]`, NaN where there is none.
        words: by how many words A's responses are longer, `[N]`.

    Returns:
        Means, `difference` with `interval` and `p`, `win_tie_loss` by score, and `length_bias`: how the difference of
        the scores goes with the difference of the lengths. A correlation is no proof of a bias: a longer answer can be
        the better one.
    """
    both = ~(np.isnan(a) | np.isnan(b))
    if not both.any():
        return None
    differences = (a - b)[both]
    test = sign_flip(differences)
    return {
        "n": int(both.sum()),
        "n_left_out": int((~both).sum()),
        "a": float(a[both].mean()),
        "b": float(b[both].mean()),
        "difference": float(differences.mean()),
        "interval": bounds(bootstrap_mean(differences)),
        "p": test.p,
        "exact": test.exact,
        "win_tie_loss": pairwise.as_json(win_tie_loss(differences)),
        "length_bias": _length_bias(differences, words[both]),
    }


def matched(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], run_a: Path, run_b: Path) -> list[int]:
    """Where in B each entry of A is. Entries that stand more than once are matched in their order.

    Raises:
        UserError: an entry of one run is not in the other.
    """
    places: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for index, entry in enumerate(b):
        places[_entry_key(entry)].append(index)
    for indices in places.values():
        indices.reverse()
    found = [places[key].pop() if places.get(key := _entry_key(entry)) else None for entry in a]
    missing = [row for row, index in enumerate(found, start=1) if index is None]
    left = sum(map(len, places.values()))
    if missing or left:
        first = f" (first: row {missing[0]})" if missing else ""
        raise UserError(
            f"{run_a} and {run_b} answer other test entries: {len(missing)} of {len(a)} of the first{first} are not in "
            f"the second, {left} of {len(b)} of the second not in the first; train both on the same --data and "
            "--split_seed, and answer the whole split"
        )
    return [index for index in found if index is not None]


def show(result: Mapping[str, Any], path: Path) -> None:
    """Prints the comparison for people."""
    out = SafeConsole(highlight=False, soft_wrap=True)
    out.print(_table(result) if result["n"] else "   ".join(_sides(result)), markup=result["n"] > 0)
    lines = [*_decoding_lines(result), *_left_out_lines(result), *_judge_lines(result["judge"])]
    lines += conversation_lines(result["conversations"], result["no_conversations"])
    for line in [*lines, *_pairwise_lines(result["pairwise"])]:
        out.print(line, markup=False)
    out.print(f"{result['note']}; {path}", markup=False)


def _entry_key(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return entry["instruction"], entry["input"], entry["output"]


def _answered_by_both(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]
) -> tuple[list[int], dict[str, list[int]]]:
    """Which entries, from 0, have a response in both runs; and under `a` and `b` the rows, from 1 in A's order, that
    `generate` left out in each."""
    rows = {name: left_out_rows(entries) for name, entries in (("a", a), ("b", b))}
    gone = {*rows["a"], *rows["b"]}
    return [index for index in range(len(a)) if index + 1 not in gone], rows


def _words(texts: Sequence[str]) -> Floats:
    return np.array([len(words_of(text)) for text in texts], dtype=np.float64)


def _same_file(one: Side, other: Side) -> bool:
    """Whether two sides are the same responses of the same run."""
    return one[1] == other[1] and one[0].resolve() == other[0].resolve()


def _scores(
    sides: Sequence[Side], order: Sequence[int]
) -> tuple[tuple[Floats, Floats] | None, tuple[Any, Any], str | None]:
    """Both runs' scores in A's order; who gave them; why they do not compare."""
    read = [_scores_of(side, len(order)) for side in sides]
    (a, judge_a, why_not_a), (b, judge_b, why_not_b) = read
    judges, why_not = (judge_a, judge_b), why_not_a or why_not_b
    if why_not is None and judge_identity(judge_a) != judge_identity(judge_b):
        why_not = other_judges(judge_a, judge_b)
    if a is None or b is None or why_not is not None:
        return None, judges, why_not
    return (a, b[list(order)]), judges, None


def _scores_of(side: Side, n: int) -> tuple[Floats | None, Any, str | None]:
    """A run's scores `[n]`, NaN where there is none; who gave them; why there are none."""
    run, name = side
    path = Run(run).scores(name)
    remedy = f"`{command('score', run=run, name=name)}` makes them"
    if not path.is_file():
        return None, None, f"{_said(side)} has no scores; {remedy}"
    saved = read_scores(path)
    try:
        summary = saved["summary"]
        scores = np.array([one["score"] for one in saved["judgements"]], dtype=np.float64)  # null becomes NaN
        scored = str(summary["responses_sha256"])
        if scored == responses_sha256(*side) and scores.shape != (n,):
            raise ValueError(f"{len(scores)} judgements of {n} responses")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a file that fastft score wrote ({error!r}); move it away") from error
    if scored != responses_sha256(*side):
        return None, None, f"the scores of {_said(side)} are of other responses; {remedy} anew"
    if np.isnan(scores).all():
        why = summary.get("no_judge") or "its judge gave none"
        return None, None, f"{_said(side)} has no scores ({why}); {remedy}"
    return scores, summary.get("judge"), None


def _said(side: Side) -> str:
    """A side as it is called: the run, and the name of its responses where they have one."""
    return str(side[0]) if side[1] is None else f"{side[0]} ({side[1]})"


def _by_category(entries: Sequence[Mapping[str, Any]], a: Floats, b: Floats) -> dict[str, Any]:
    """Of each category the number of entries with both scores and the mean difference with its interval."""
    names = [category_of(entry) for entry in entries]
    rows = {}
    for name in dict.fromkeys(name for name in names if name is not None):
        own = (a - b)[[one == name for one in names]]
        own = own[~np.isnan(own)]
        mean = float(own.mean()) if len(own) else None
        rows[name] = {"n": len(own), "difference": mean, "interval": bounds(bootstrap_mean(own))}
    return rows


def _length_bias(differences: Floats, words: Floats) -> dict[str, Any]:
    """Correlations of score difference and difference in words `[N]`; null where one of them never changes."""
    r = pearson(differences, words)
    return {
        "words": float(words.mean()),
        "pearson": r,
        "interval": None if r is None else bounds(pearson_interval(r, len(words))),
        "spearman": spearman(differences, words),
    }


def _check_ours(path: Path, options: CompareOptions) -> None:
    """Refuses to write over a file of something else, and over the comparison with another run of the same name, or of
    other responses."""
    if not path.is_file():
        return
    earlier = files.read_json(path, what="the earlier comparison")
    if not (isinstance(earlier, dict) and isinstance(earlier.get("run_b"), str) and "pairwise" in earlier):
        raise UserError(f"{path} is not a file that fastft compare wrote; move it away, or choose another with --out")
    other = Path(earlier["run_b"])
    if other.resolve() != options.run_b.resolve() and other.is_dir():
        raise UserError(f"{path} compares with another run, {other}; choose another file with --out")
    names = earlier.get("names", [None, None])
    if names != list(options.names()):
        said = " and ".join(str(one or UNNAMED) for one in names)
        raise UserError(f"{path} compares the responses {said}; choose another file with --out")


def _pairwise(
    pairs: Sequence[Pair], referee: ServerReferee | None, problem: str | None, rows: Sequence[int]
) -> dict[str, Any]:
    """What a judge says of the pairs, which are of these rows.

    `problem`: why nothing is known of it, or of its server.
    """
    with meter("pairs", len(pairs)) as shown:
        judgements, gone = judge_pairs(pairs, referee, advance=shown.advance)
    gone = gone or _of_no_use(judgements)
    said = pairwise.summary(judgements)
    return {
        "judge": None if referee is None else referee.identity(),
        "no_judge": problem if referee is None else gone,  # none is needed where every reply is there already
        **said,
        "cut_rows": [rows[place - 1] for place in said["cut_rows"]],
        "judgements": [{"row": row, **one} for row, one in zip(rows, judgements, strict=True)],
    }


def _of_no_use(judgements: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a judge that was asked was of no use: it gave no verdict on any pair."""
    asked = [one for one in judgements if one["asked"]]
    if not asked or any(one["winner"] is not None for one in asked):
        return None
    return (
        f"the judge gave no verdict on any of {len(asked)} pairs, for the last one: {asked[-1]['reason']}; give it "
        "more room with --judge_tokens, or ask another model with --judge_model"
    )


def _sides(result: Mapping[str, Any]) -> list[str]:
    """`A out/medium (t1.0)`, and B."""
    runs = zip("AB", (result["run_a"], result["run_b"]), result["names"], strict=True)
    return [f"{letter} {_said((Path(run), name))}" for letter, run, name in runs]


def _table(result: Mapping[str, Any]) -> Table:
    table = Table(
        "", "A", "B", "A - B", f"{LEVEL:.0%} interval", "p", "p of all", box=SIMPLE_HEAD, title_justify="left",
        title=Text("   ".join((*_sides(result), f"{result['n']} test entries"))),
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {**({"judge": result["judge"]} if result["judge"] else {}), **result["metrics"]}
    for name, row in rows.items():
        cells = (_figure(row["a"]), _figure(row["b"]), _figure(row["difference"], "+"), _range(row["interval"]))
        table.add_row(_TITLES.get(name, name), *cells, _p(row["p"]), _p(row["p_of_all"]))
    return table


def _decoding_lines(result: Mapping[str, Any]) -> list[str]:
    """What A and B were decoded with, where it is not the same."""
    found = decoding_in_words(result["differing_decoding"])
    unknown = [side for side, one in zip("AB", result["decodings"], strict=True) if one is None]
    lines = [f"the decoding differs: {found}"] if found else []
    if len(unknown) == 1:
        lines.append(f"nothing says how {unknown[0]} was decoded")
    return lines


def _figure(value: float | None, sign: str = "") -> str:
    """A figure, or a dash where it is undefined."""
    return "–" if value is None else f"{value:{sign}.2f}"


def _left_out_lines(result: Mapping[str, Any]) -> list[str]:
    """Which entries are not compared, and of which metrics some are left out, since they leave them undefined."""
    rows = result["left_out_rows"]
    gone = {*rows["a"], *rows["b"]}
    lines = [
        f"{len(gone)} more entries are not compared, since generate left out {len(rows['a'])} of them in A and "
        f"{len(rows['b'])} in B"
    ]
    counts = {name: row["n"] for name, row in result["metrics"].items() if 0 < row["n"] < result["n"]}
    found = [f"{_TITLES.get(name, name)}: over {n} of {result['n']} entries" for name, n in counts.items()]
    return [*(lines if gone else []), *found]


def _judge_lines(judged: Mapping[str, Any] | None) -> list[str]:
    if judged is None:
        return []
    lines = [f"judge, by score: {_tally(judged['win_tie_loss'])}"]
    if judged["n_left_out"]:
        lines[0] += f"; {judged['n_left_out']} entries without both scores are left out"
    bias = judged["length_bias"]
    if bias["pearson"] is not None:
        lines.append(
            f"length: A's responses have {bias['words']:+.1f} words; score and length differences correlate by "
            f"{bias['pearson']:+.2f} {_range(bias['interval'])} (ranks: {bias['spearman']:+.2f})"
        )
    return lines


def _pairwise_lines(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lines = [f"judge, in pairs: {_tally(found)}; {found['n_unread']} without a verdict"]
    if found["cut_rows"]:
        lines.append(f"pairs whose prompts were longer than the judge's context: rows {found['cut_rows']}")
    if found["flip_rate"] is not None:
        lines.append(
            f"position: the orders disagree on {found['flips']} of {found['n_both_orders']} pairs "
            f"({100 * found['flip_rate']:.0f}%), {found['first_twice']} times for whichever came first, "
            f"{found['second_twice']} times for whichever came second"
        )
    return lines


def _tally(found: Mapping[str, Any]) -> str:
    said = f"A wins {found['wins']}, ties {found['ties']}, loses {found['losses']}"
    if found["win_rate"] is None:
        return said
    low, high = found["interval"]
    share = f"{100 * found['win_rate']:.0f}% of the decided [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{said}: {share}, sign test p {_p(found['p'])}"


def _range(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"


def _p(p: float | None) -> str:
    return "–" if p is None else chance(p)
