"""The conversations of two runs beside each other: the difference of the judge's scores, paired by conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastft.common.errors import UserError
from fastft.common.shell import command
from fastft.metrics.statistics import LEVEL, bootstrap_mean, sign_flip
from fastft.metrics.text_metrics import bounds
from fastft.pages.render import chance
from fastft.run.decodings import decoding_of, differing
from fastft.run.folder import Run
from fastft.scores.conversations import Talks, read_talks
from fastft.scores.score import judge_identity, other_judges
from fastft.scores.scores_file import read_scores

Side = tuple[Path, str | None]
"""A run, and what its answers are called."""
_Scores = list[list[float]]
"""By conversation, of each turn; NaN where there is none."""


def compare_conversations(sides: Sequence[Side]) -> tuple[dict[str, Any] | None, str | None]:
    """The figures of both runs' conversations, A less B; None where either has none, and why where both have some.

    A conversation counts with the turns that have a score in both. `n` counts conversations; `a`, `b` and `difference`
    are means over them, with `interval` and `p`; `turns` has the same for the first turns, the second ones, ...;
    `differing_decoding` says in what the answers were decoded otherwise, with A's value and B's.
    """
    talks = [read_talks(*side) for side in sides]
    a, b = talks
    if a is None or b is None:
        return None, None
    order = _order(a, b)
    if order is None:
        return None, "the two runs had other conversations; give both the same --conversation"
    read = [_scores_of(side, one) for side, one in zip(sides, (a, b), strict=True)]
    why_not = next((why for _, _, why in read if why is not None), None)
    (scores_a, judge_a, _), (scores_b, judge_b, _) = read
    if why_not is None and judge_identity(judge_a) != judge_identity(judge_b):
        why_not = other_judges(judge_a, judge_b)
    if why_not is not None:
        return None, why_not
    decoding = differing(*(decoding_of(one.path) for one in (a, b)))
    return {**_figures(scores_a, [scores_b[index] for index in order]), "differing_decoding": decoding}, None


def rows_of(found: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The rows of a comparison of conversations, each with a p of its own: all turns together, the first ones, ..."""
    return [] if found is None else [found, *found["turns"]]


def conversation_lines(found: dict[str, Any] | None, why_not: str | None) -> list[str]:
    """What a comparison of conversations says, for people."""
    if found is None:
        return [] if why_not is None else [f"the conversations are not compared: {why_not}"]
    lines = [f"{found['n']} conversations, judge's mean: {_row(found)}"]
    lines += [f"  turn {turn['turn']}: {_row(turn)}" for turn in found["turns"]]
    said = decoding_in_words(found["differing_decoding"])
    return [*lines, *([f"the conversations' decoding differs: {said}"] if said else [])]


def decoding_in_words(differing_decoding: Mapping[str, Sequence[Any]]) -> str:
    """`temperature 0.0 in A and 1.0 in B`; empty where nothing differs."""
    return ", ".join(f"{name} {a} in A and {b} in B" for name, (a, b) in differing_decoding.items())


def _row(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return "no conversation has scores of both"
    interval = "" if row["interval"] is None else f" {LEVEL:.0%} [{row['interval'][0]:+.2f}, {row['interval'][1]:+.2f}]"
    tested = f"p {chance(row['p'])}, of all {chance(row['p_of_all'])}"
    return f"A {row['a']:.2f}, B {row['b']:.2f}, A - B {row['difference']:+.2f}{interval}, {tested}"


def _order(a: Talks, b: Talks) -> list[int] | None:
    """Where in B each conversation of A is; None where they are not the same."""
    asked_a, asked_b = (
        [str([one.get("system"), [(turn["question"], turn.get("reference")) for turn in one["turns"]]]) for one in of]
        for of in (a.conversations, b.conversations)
    )
    places: dict[str, list[int]] = {}
    for index in reversed(range(len(asked_b))):
        places.setdefault(asked_b[index], []).append(index)
    if sorted(asked_a) != sorted(asked_b):
        return None
    return [places[one].pop() for one in asked_a]


def _scores_of(side: Side, talks: Talks) -> tuple[_Scores, Any, str | None]:
    """A run's scores, who gave them, and why there are none."""
    run, name = side
    path = Run(run).scores(name)
    said = str(run) if name is None else f"{run} ({name})"
    remedy = f"`{command('score', run=run, name=name)}`"
    saved = read_scores(path) if path.is_file() else {}
    summary = (saved.get("summary") or {}).get("conversations")
    if summary is None:
        return [], None, f"the conversations of {said} have no scores; {remedy} makes them"
    try:
        scored = summary["conversations_sha256"] == talks.sha256
        scores = [[_number(turn["score"]) for turn in one["turns"]] for one in saved["conversations"]]
        if scored and [len(turns) for turns in scores] != [len(one["turns"]) for one in talks.conversations]:
            raise ValueError("other numbers of turns")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a file that fastft score wrote ({error!r}); move it away") from error
    if not scored:
        return [], None, f"the scores of {said} are of other conversations; {remedy} makes them anew"
    if not summary["n_scored"]:
        why = summary.get("no_judge") or "its judge gave none"
        return [], None, f"the conversations of {said} have no scores ({why}); {remedy} makes them"
    return scores, summary.get("judge"), None


def _number(score: Any) -> float:
    return float("nan") if score is None else float(score)


def _figures(a: _Scores, b: _Scores) -> dict[str, Any]:
    pairs = [
        [(one, two) for one, two in zip(ours, theirs, strict=True) if not np.isnan([one, two]).any()]
        for ours, theirs in zip(a, b, strict=True)
    ]
    means = [tuple(np.mean(held, axis=0)) for held in pairs if held]
    turns = []
    for number in range(max(map(len, a), default=0)):
        own = [(ours[number], theirs[number]) for ours, theirs in zip(a, b, strict=True) if len(ours) > number]
        turns.append({"turn": number + 1, **_paired([pair for pair in own if not np.isnan(pair).any()])})
    return {**_paired(means), "turns": turns}


def _paired(pairs: Sequence[Sequence[float]]) -> dict[str, Any]:
    if not pairs:
        return {"n": 0, **dict.fromkeys(("a", "b", "difference", "interval", "p", "exact"))}
    both = np.array(pairs, dtype=np.float64)
    differences = both[:, 0] - both[:, 1]
    test = sign_flip(differences)
    return {
        "n": len(pairs),
        "a": float(both[:, 0].mean()),
        "b": float(both[:, 1].mean()),
        "difference": float(differences.mean()),
        "interval": bounds(bootstrap_mean(differences)),
        "p": test.p,
        "exact": test.exact,
    }
