"""What came of judging a response, and what a run's judgements add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastft.judging.ladder import Reading
from fastft.judging.wire import NoAnswerError

EMPTY_RESPONSE = "empty response"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What came of judging one response."""

    score: int | None
    """0 to 100, or None where there is no score."""
    raw: str = ""
    """The judge's reply as it was read, also where it was read in part."""
    reason: str | None = None
    """One line: why there is no score, or why there is one without a call."""
    key: str | None = None
    """SHA-256 (hex) of the judge and the question; None where no judge was ever seen."""
    answered: bool = False
    """Whether asking again would be of no use: whole answers were read, or none was needed."""
    rung: str | None = None
    """How the score was found in the reply (`fastft.judging.ladder`)."""
    raw_again: str | None = None
    """The reply to the same question with a JSON schema, where the first one held no score."""
    more_room: bool = False
    """Whether a reply was all thinking, and was asked for again with more room."""
    cut: bool = False
    """Whether the server cut the front of the prompt: the score is of something else."""
    left_out: bool = False
    """Whether there is no response that could be judged: `fastft generate` left the entry out."""
    prompt_tokens: int | None = None
    """As the server counts them."""

    def as_json(self) -> dict[str, Any]:
        """The fields as a JSON object, without those that have nothing to say."""
        always = ("score", "raw", "key", "answered")
        return {name: value for name, value in asdict(self).items() if name in always or value not in (None, False)}


def counts(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """How the scores came about, and the responses (counted from 1) that something is the matter with."""
    return {
        "n_empty_scored_0": sum(judgement.reason == EMPTY_RESPONSE for judgement in judgements),
        "n_more_room": sum(judgement.more_room for judgement in judgements),
        "n_asked_again": sum(judgement.raw_again is not None for judgement in judgements),
        "judge_rungs": dict(Counter(judgement.rung for judgement in judgements if judgement.rung)),
        "unparsed_rows": _rows(
            judgement.answered and judgement.score is None and not judgement.left_out for judgement in judgements
        ),
        "unanswered_rows": _rows(not judgement.answered for judgement in judgements),
        "cut_rows": _rows(judgement.cut for judgement in judgements),
    }


def why_no_score(
    first: Reading, again: Reading | None, failure: NoAnswerError | None, refusal: str | None
) -> str | None:
    """Why there is no score, of one that was asked about twice both times."""
    if first.score is not None or (again is not None and again.score is not None):
        return None
    if again is not None:
        return f"{first.reason}; asked again: {again.reason}"
    missing = str(failure) if failure is not None else refusal
    return f"{first.reason}; asked again: {missing}" if missing else first.reason


def _rows(chosen: Iterable[bool]) -> list[int]:
    return [row for row, yes in enumerate(chosen, start=1) if yes]
