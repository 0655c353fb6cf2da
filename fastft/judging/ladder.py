"""The text of a judge's reply -> a score from 0 to 100, or why there is none.

A ladder from what says the score beyond doubt to what probably does: an integer alone; a JSON object with a `score`;
`85/100` or `85 out of 100`; `Score: 85`; the last whole number in range. Left out of the last three are ranges and
words of the question (`from 0 to 100`, `100 is the best`, `out of a possible 100`), fractions of something else
(`4/5`), decimals, dates, and numbers within words (`GPT-4`).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_SHOWN_CHARACTERS = 200
_DEEPEST = 4

_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_QUESTION = re.compile(
    r"\b[01]\s{0,9}(?:to|-|–|—|and|\.\.)\s{0,9}100\b|\b100[\s-]points?\s{1,9}scale\b|\bscale\s{1,9}of\s{1,9}100\b"
    r"|\b100(?:\s{1,9}\w{1,20})?\s{1,9}(?:is|being)\s{1,9}(?:the\s{1,9})?best",
    re.IGNORECASE,
)
# Every repetition is bounded: a reply can be a megabyte of anything.
# A whole number that stands alone: no part of a word, decimal, date, fraction or thousand, and not negative.
_NUMBER = r"(?<![\w.,/$€£-])(?<!\d:)\+?(\d{1,3})(?:\.0{1,9})?(?![\w/]|[.,:-]\d)"
_OUT_OF_100 = re.compile(
    r"(?<![\w.,/-])(\d{1,3})(?:\.0{1,9})?[*_]{0,9}\s{0,9}(?:/|out of)\s{0,9}[*_]{0,9}100(?![\w/]|[.,]\d)", re.IGNORECASE
)
_FRACTION = re.compile(r"(?<!\d)\d{1,9}(?:\.\d{1,9})?\s{0,9}(?:/|out of)\s{0,9}\d+", re.IGNORECASE)
_LABELLED = re.compile(
    r"\b(?:score|rating|grade)\b[\"'`*_\s]{0,9}(?:is|of|would be|:|=)?[\"'`*_:\s]{0,9}" + _NUMBER, re.IGNORECASE
)
_MAXIMUM = re.compile(
    r"\bout\s{1,9}of\s{1,9}(?:(?:a|the|possible|total|maximum)\s{1,9}){0,3}100\b|(?<=\d)\s{1,9}of\s{1,9}100\b"
    r"|\b(?:0|100)\s{0,9}(?:=|is|being|as)\s{0,9}(?:the\s{1,9})?(?:best|perfect|maximum|max|highest|top|worst|lowest)\b"
    r"|\b(?:perfect|maximum|highest|best|full)\s{1,9}(?:possible\s{1,9})?(?:score|rating|grade)\s{1,9}"
    r"(?:is|of|being)\s{1,9}100\b",
    re.IGNORECASE,
)
_LAST = re.compile(_NUMBER)
_UNFINISHED = re.compile(r"[\w.,/+%-]*\Z")
_LONGEST_WORD = 200
_MOST_OBJECTS = 100


@dataclass(frozen=True, slots=True)
class Reading:
    """A score and the rung that it was found on, or no score and the reason."""

    score: int | None
    rung: str | None = None
    """`integer`, `json`, `out of 100`, `labelled` or `last number`."""
    reason: str | None = None
    """One line."""


def read_score(text: str, *, cut: bool = False) -> Reading:
    """Reads the score out of a whole reply.

    Args:
        text: the reply.
        cut: whether the reply ended because its room was full: the last word may then be half of one (`8` of `85`),
            and the last number may be anything.
    """
    said = _THOUGHT.sub("", text).strip()
    if (alone := bare_integer(said)) is not None and not cut:
        return Reading(alone, "integer") if _in_range(alone) else Reading(None, reason=f"not in 0..100: {_shown(said)}")
    if (score := _json_score(said)) is not None:
        return Reading(score, "json") if _in_range(score) else Reading(None, reason=f"not in 0..100: {score}")
    plain = _without_last_word(said) if cut else said
    for rung, score in _found(_QUESTION.sub(" ", plain)):
        if not (cut and rung == "last number"):
            return Reading(score, rung)
    problem = "cut off at its longest" if cut else "no score in it"
    return Reading(None, reason=f"{problem}: {_shown(repr(text))}")


def bare_integer(text: str) -> int | None:
    """What the book takes for the score: an integer and nothing else, of any size."""
    try:
        return int(text)
    except ValueError:
        return None


def _found(text: str) -> Iterator[tuple[str, int]]:
    """The scores that the text's rungs give, surest first."""
    fractions = [int(found[1]) for found in _OUT_OF_100.finditer(text)]
    yield from (("out of 100", score) for score in fractions[-1:] if _in_range(score))
    rest = _MAXIMUM.sub(" ", _FRACTION.sub(" / ", text))
    for rung, pattern in (("labelled", _LABELLED), ("last number", _LAST)):
        scores = [score for found in pattern.finditer(rest) if _in_range(score := int(found[1]))]
        yield from ((rung, score) for score in scores[-1:])


def _without_last_word(text: str) -> str:
    unfinished = _UNFINISHED.search(text[-_LONGEST_WORD:])
    return text[: len(text) - len(unfinished[0])] if unfinished else text


def _json_score(text: str) -> int | None:
    """The `score` of the first JSON object in the text that has one, also in a fence or between other words."""
    decoder = json.JSONDecoder()
    for start in itertools.islice((found.start() for found in re.finditer(r"\{", text)), _MOST_OBJECTS):
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if (score := _score_of(value)) is not None:
            return score
    return None


def _score_of(value: Any, depth: int = 0) -> int | None:
    if not isinstance(value, dict) or depth > _DEEPEST:
        return None
    for name, item in value.items():
        if name.casefold() == "score" and (score := _whole(item)) is not None:
            return score
    return next((score for item in value.values() if (score := _score_of(item, depth + 1)) is not None), None)


def _whole(value: Any) -> int | None:
    """A whole number, also written as `85.0`, `"85"` or `"85/100"`."""
    if isinstance(value, str):
        text = value.strip().removesuffix("/100").strip()
        return bare_integer(text)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if value == value // 1 else None


def _in_range(score: int) -> bool:
    return 0 <= score <= 100


def _shown(text: str) -> str:
    line = " ".join(text.encode(errors="replace").decode().split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"
