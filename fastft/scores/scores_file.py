"""A `scores.json` as what reads it may rely on: one that `fastft score` has written, of this version or an earlier one.

Anybody can edit a file, and another program may write one of that name. What would be a wrong figure in silence, or an
error of Python's, is refused here, in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastft.common.errors import UserError
from fastft.common.files import read_json
from fastft.common.kinds import kind_of

_NUMBERS = (
    "n", "n_scored", "n_unscored", "judge_mean", "judge_seconds", "exact_match", "bleu", "chrf", "rouge_1", "rouge_2",
    "rouge_l", "words", "distinct_1", "distinct_2", "looping", "empty_responses", "perplexity",
)  # fmt: skip
_OBJECTS = (
    "intervals", "by_category", "judge", "judge_rungs", "multiple_choice", "choices_by_likelihood", "left_out",
    "conversations",
)  # fmt: skip
_TEXTS = ("responses_sha256", "no_judge", "interval_method", "name")


def read_scores(path: Path) -> dict[str, Any]:
    """What a scores.json holds: an object with `summary` and `judgements`, of which what is there is of its kind.

    Raises:
        UserError: the file cannot be read, or is of another form.
    """
    scores = read_json(path, what="the scores")
    if (fault := _fault(scores)) is not None:
        raise UserError(f"{path} is not a file that fastft score wrote ({fault}); move it away and score again")
    return dict(scores)


def _fault(scores: Any) -> str | None:
    """What is wrong with it; None where nothing is."""
    if not isinstance(scores, dict):
        return f"it is {kind_of(scores)}, expected an object"
    summary, judgements = scores.get("summary"), scores.get("judgements")
    if not isinstance(summary, dict):
        return f"summary is {kind_of(summary)}, expected an object"
    if not isinstance(judgements, list):
        return f"judgements is {kind_of(judgements)}, expected a list"
    for row, judgement in enumerate(judgements, start=1):
        if not isinstance(judgement, dict) or not _is_score(judgement.get("score")):
            return f"judgement {row} has no score from 0 to 100, nor null"
    return _fault_of_summary(summary)


def _fault_of_summary(summary: Mapping[str, Any]) -> str | None:
    kinds: dict[str, Any] = {**dict.fromkeys(_NUMBERS, (int, float)), **dict.fromkeys(_OBJECTS, dict)}
    kinds |= {**dict.fromkeys(_TEXTS, str), "left_out_rows": list}
    for name, kind in kinds.items():
        value = summary.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            return f"summary.{name} is {kind_of(value)}"
    for name, row in (summary.get("by_category") or {}).items():
        if not isinstance(row, dict):
            return f"summary.by_category.{name} is {kind_of(row)}, expected an object"
    return None


def _is_score(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100  # NaN is not either
