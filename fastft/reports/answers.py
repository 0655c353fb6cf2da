"""The answers of a run with what is said of each, and where several runs' answers differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from fastft.data.records import category_of, left_out
from fastft.metrics.text_metrics import is_exact, loops, rouge_scores, words_of
from fastft.reports.numbers import finite

MOST_ANSWERS = 5
PROBLEMS = {
    "different": "not the reference’s text",
    "low": "judge’s score below 50",
    "empty": "empty",
    "looping": "loops",
    "no_score": "no score by the judge",
    "cut": "cut in the judge’s prompt",
    "left_out": "left out by generate",
}
"""What can be wrong with an answer, in words; the page filters by it."""

_LOW = 50
_OFTEN = 5  # a reason that more answers share than this is said once, and not beside each of them
_SHORT = 4  # words, the longest n-gram of BLEU: below, most references hold none


@dataclass(frozen=True)
class Answer:
    """One response with what is said of it."""

    row: int
    """From 1, in responses.json."""
    entry: Mapping[str, Any]
    exact: bool | None
    """Whether it is the reference's text; None of an entry that `generate` left out, of which nothing is said."""
    rouge_l: float | None
    """ROUGE-L F1 against the reference, in percent; None where the reference leaves it undefined."""
    judgement: Mapping[str, Any] | None
    """None where the run has none for this response."""

    @property
    def judge(self) -> float | None:
        """The judge's score, 0 to 100."""
        return None if self.judgement is None else finite(self.judgement.get("score"))

    @property
    def left_out(self) -> str | None:
        """Why `generate` left the entry without a response; None where there is one."""
        return left_out(self.entry)

    @property
    def reason(self) -> str | None:
        """What the judge's answer needs said of it, such as why it has no score."""
        reason = None if self.judgement is None else self.judgement.get("reason")
        return str(reason) if reason else None

    @property
    def category(self) -> str | None:
        """The entry's, where it has one."""
        return category_of(self.entry)

    @property
    def question(self) -> tuple[str, str, str]:
        """What was asked, and the answer that was expected: by this, answers of several runs stand side by side."""
        return self.entry["instruction"], self.entry["input"], self.entry["output"]

    @cached_property
    def problems(self) -> list[str]:
        """What is wrong with it, by the names of `PROBLEMS`."""
        if self.left_out is not None:
            return ["left_out"]
        response, judgement = self.entry["model_response"], self.judgement or {}
        found = {
            "different": self.exact is False,
            "low": self.judge is not None and self.judge < _LOW,
            "empty": not response.strip(),
            "looping": loops(response),
            "no_score": self.judgement is not None and self.judge is None,
            "cut": bool(judgement.get("cut")),
        }
        return [name for name, is_so in found.items() if is_so]

    def score(self, of: str) -> float | None:
        """The figure named `judge` or `rouge_l`."""
        return self.judge if of == "judge" else self.rouge_l

    def as_json(self) -> dict[str, Any]:
        """The numbers without the texts."""
        why = {} if self.left_out is None else {"left_out": self.left_out}
        return {
            "row": self.row, "exact": self.exact, "judge": self.judge, "rouge_l": self.rouge_l,
            "problems": self.problems, **why,
        }  # fmt: skip


def answers_of(entries: Sequence[dict[str, Any]], judgements: Sequence[Any]) -> list[Answer]:
    """The entries of responses.json with the judgements that scores.json has for them, as far as it has any."""
    if not entries:
        return []
    held = [item if isinstance(item, dict) else None for item in judgements]
    held += [None] * (len(entries) - len(held))
    texts = [(entry["model_response"], entry["output"]) for entry in entries]
    scores = rouge_scores([text for text, _ in texts], [reference for _, reference in texts])
    return [
        Answer(row, entry, is_exact(*text), score["rouge_l"], judgement)
        if left_out(entry) is None
        else Answer(row, entry, None, None, None)
        for row, (entry, text, score, judgement) in enumerate(zip(entries, texts, scores, held, strict=False), start=1)
    ]


def are_short(answers: Sequence[Answer]) -> bool:
    """Whether the references are mostly of so few words that BLEU and its like have next to nothing to count."""
    return bool(answers) and median(len(words_of(answer.entry["output"])) for answer in answers) < _SHORT


def shared_reasons(answers: Sequence[Answer]) -> dict[str, int]:
    """The reasons for having no score that stand once, for all the answers that have them, with their number."""
    counts = Counter(answer.reason for answer in answers if answer.reason and "no_score" in answer.problems)
    total = counts.total()
    return {reason: n for reason, n in counts.most_common() if reason and (n > _OFTEN or (n == total and n > 1))}


def by_question(mine: Sequence[Answer], others: Sequence[Sequence[Answer]]) -> list[list[Answer | None]]:
    """One row for each of one run's answers: it, and each other run's answer to the same question (None: none)."""
    found = [_by_question(answers) for answers in others]
    return [[answer, *(answers.get(key) for answers in found)] for key, answer in _by_question(mine).items()]


def farthest_apart(rows: Sequence[Sequence[Answer | None]], of: str) -> list[Sequence[Answer | None]]:
    """The questions on which the runs' scores lie farthest apart, widest first; none on which they agree."""
    apart = []
    for row in rows:
        scores = [score for answer in row if answer is not None and (score := answer.score(of)) is not None]
        if len(scores) > 1 and max(scores) > min(scores):
            apart.append((max(scores) - min(scores), row))
    apart.sort(key=lambda pair: -pair[0])
    return [row for _, row in apart[:MOST_ANSWERS]]


def _by_question(answers: Sequence[Answer]) -> dict[tuple[Any, ...], Answer]:
    """By what was asked, and which time that is: a question may be asked twice."""
    found: dict[tuple[Any, ...], Answer] = {}
    times: dict[tuple[str, str, str], int] = {}
    for answer in answers:
        times[answer.question] = times.get(answer.question, 0) + 1
        found[(*answer.question, times[answer.question])] = answer
    return found
