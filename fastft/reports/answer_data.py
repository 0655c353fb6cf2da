"""The answers as the page's script takes them: one compact JSON, of which it draws a page at a time.

A table of ten thousand rows takes a browser many seconds to lay out, and nobody reads it from top to bottom: what is
not looked at is never drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fastft.reports.answers import PROBLEMS, Answer, by_question, farthest_apart, shared_reasons
from fastft.reports.figures import RunFigures

_NAMES = list(PROBLEMS)


def answer_data(runs: Sequence[RunFigures], names: Sequence[str]) -> dict[str, Any] | None:
    """All answers of the first run with the others' beside them; None where it has none.

    `rows` hold `[row, instruction, input, reference, category, answers]`, and an answer is null or `[response, judge,
    ROUGE-L, exact, problems, reason, reply]`, where `problems` are places in `problems`, and `reason` one in `reasons`.
    """
    run, *others = runs
    if not run.answers:
        return None
    rows = by_question(run.answers, [one.answers for one in others])
    said = [shared_reasons(one.answers).keys() for one in runs]
    reasons = _Numbered()
    categories = _Numbered()
    return {
        "names": [*names],
        "main": run.main_score,
        "problems": list(PROBLEMS.values()),
        "no_score": PROBLEMS["no_score"],
        "rows": [_row(row, said, categories, reasons) for row in rows],
        "categories": categories.values,
        "reasons": reasons.values,
        "lists": _lists(run, rows, several=bool(others)),
    }


class _Numbered:
    """Texts that stand once, and by their places elsewhere."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    @property
    def values(self) -> list[str]:
        return list(self._places)

    def place(self, text: str | None) -> int | None:
        return None if text is None else self._places.setdefault(text, len(self._places))


def _row(
    row: Sequence[Answer | None], said: Sequence[Collection[str]], categories: _Numbered, reasons: _Numbered
) -> list[Any]:
    first = row[0]
    assert first is not None  # a row is there for each answer of the first run
    return [
        first.row,
        *first.question,
        categories.place(first.category),
        [None if one is None else _answer(one, known, reasons) for one, known in zip(row, said, strict=True)],
    ]


def _answer(answer: Answer, said: Collection[str], reasons: _Numbered) -> list[Any]:
    reason = answer.left_out or (None if answer.reason in said else answer.reason)
    raw = answer.judgement.get("raw") if answer.judgement is not None and answer.judge is None else None
    return [
        answer.entry["model_response"],
        answer.judge,
        None if answer.rouge_l is None else round(answer.rouge_l, 1),
        None if answer.exact is None else int(answer.exact),
        [_NAMES.index(problem) for problem in answer.problems],
        reasons.place(reason),
        raw or None,
    ]


def _lists(run: RunFigures, rows: Sequence[Sequence[Answer | None]], *, several: bool) -> list[dict[str, Any]]:
    """The answers to look at first, as places in `rows`: best, worst, most disputed."""
    if len(run.answers) < 2:
        return []
    by = "by the judge’s score" if run.main_score == "judge" else "by ROUGE-L"
    lists = [
        ("Best", by, run.best()),
        ("Worst", by, run.worst()),
        ("Most disputed", "judge and ROUGE-L farthest apart, both on 0 to 100", run.disputed()),
    ]
    if several:
        apart = [row[0] for row in farthest_apart(rows, run.main_score) if row[0] is not None]
        lists.append(("Runs farthest apart", by, apart))
    place_of = {row[0].row: place for place, row in enumerate(rows) if row[0] is not None}
    return [
        {"title": title, "note": note, "rows": [place_of[answer.row] for answer in found]}
        for title, note, found in lists
        if found
    ]
