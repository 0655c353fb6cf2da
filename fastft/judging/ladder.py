"""The text of a judge's reply -> a score from 0 to 100, or why there is none.

A ladder from what says the score beyond doubt to what probably does: an integer alone; a JSON object with a `score`;
marks such as `[[85]]`; `Overall score: 85`; `Score: 85`; `85/100`; the only whole number. The first rung with a
candidate decides. Where its candidates differ (`85 out of 100. Else it would be 0 out of 100`), or where it cannot be
read (`Score: 8/10`, `Score: 80-90`), there is no score: a lower rung would read something else. Passed over are words
of the question (`from 0 to 100`, `100 is the best`), the numbers of a list, and numbers that count something (`3
errors`, `GPT-4`, `12:30`).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastft.judging.thoughts import spoken

_SHOWN_CHARACTERS = 200
_LONGEST = 1 << 16
"""Characters of an answer in which a score is looked for."""
_DEEPEST = 4
MOST_OBJECTS = 100
_MOST_NAMED = 6
_LONGEST_WORD = 200


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Every repetition is bounded: an answer can be much of anything.
_QUESTION = re.compile(
    r"\b[01]\s{0,9}(?:to|-|–|—|and|\.\.|…|,)\s{0,9}100\b|\b100[\s-]points?\s{1,9}scale\b|\bscale\s{1,9}of\s{1,9}100\b"
    r"|\b100(?:\s{1,9}\w{1,20})?\s{1,9}(?:is|being)\s{1,9}(?:the\s{1,9})?best",
    re.IGNORECASE,
)
_MAXIMUM = re.compile(
    r"\bout\s{1,9}of\s{1,9}(?:(?:a|the|possible|total|maximum)\s{1,9}){0,3}100\b|(?<=\d)\s{1,9}of\s{1,9}100\b"
    r"|\b(?:0|100)\s{0,9}(?:=|is|being|as)\s{0,9}(?:the\s{1,9})?(?:best|perfect|maximum|max|highest|top|worst|lowest)\b"
    r"|\b(?:perfect|maximum|max|highest|best|full|top|possible)\s{1,9}(?:possible\s{1,9})?"
    r"(?:score|rating|grade|points|marks)?\s{0,9}(?:is|of|being|would\s{1,9}be|:|=)\s{0,9}100\b",
    re.IGNORECASE,
)
_OTHER_SCALE = re.compile(r"\b[01]\s{0,9}(?:to|-|–|—|\.\.|and)\s{0,9}(?:5|7|10|20|50)\b(?!\s{0,3}[%/])")
_NOT_THE_SCORE = re.compile(  # numbers of a step, of what would have been right, of points lost, and mere bounds
    r"(?:\b(?:(?:step|part|item|question|response|option|example|line|row|fact|section|sentence|version|level|criterion"
    r"|criteria|no\.|number)s?\s{1,3}#?|(?:correct|right|expected|reference)\s{1,3}(?:answer|output|response|result)"
    r"\s{1,3}(?:is|was|(?:would|should)\s{1,3}be|:)\s{0,3}"
    r"|(?:deduct\w{0,5}|subtract\w{0,5}|(?:take|took|taking|knock\w{0,3})\s{1,3}off|los(?:es?|ing|t)|minus"
    r"|penalty\s{1,3}of)"
    r"(?:\s{1,3}(?:about|only|another|the|an?))?\s{1,3}"
    r"|(?:(?:lower|less|fewer|higher|greater|more|better|worse)\s{1,3}than|below|under|above|over|beyond"
    r"|at\s{1,3}(?:least|most)|up\s{1,3}to)\s{1,3})|(?<=[:= ])[<>≥≤]=?\s{0,3}|#)\d{1,3}\b",
    re.IGNORECASE,
)
_LIST_MARK = re.compile(r"(?<![\w.,/-])\(?(\d{1,2})[.)](?=\s{1,9}\S)")

_SPACE = r"[\"'`*_\s|]{0,40}"
# A number with what changes its meaning: `85/100`, `80-90`, `100 - 15`, `12:30`.
_AMOUNT = (
    r"(?<![\w.,/$€£])(?<![\w.,/$€£][-−])(?<!\d:)(?P<number>[-+−]?\d{1,9}(?:[.,]\d{1,9}){0,4})"
    r"(?![A-Za-z0-9_]|\s{0,2}[°€£¥])[*_]{0,4}"
    r"(?P<of>\s{0,9}(?:/|\b(?:out\s{1,9}of|of|on|sur|von|из|sobre|de|su)\b)\s{0,9}[*_]{0,4}"
    r"(?P<most>\d{1,9}(?:[.,]\d{1,9})?)(?![A-Za-z0-9_]))?"
    r"(?P<tail>:\d|\+|\s{0,9}(?:[-+–—−×=→|]|->|=>|\b(?:to|or|minus|plus|less)\b)\s{0,9}[\"'`*_]{0,4}\d|/\d)?"
)
_NUMBER = re.compile(_AMOUNT, re.IGNORECASE)
_LABEL = (
    r"(?:scores?|rating|grade|points|评分|得分|分数|スコア|点数|점수|bewertung|punktzahl|puntuación|puntaje|calificación"
    r"|оценка|балл|pontuação|punteggio)"
)
_VERB = r"(?:is|are|was|would\s{1,3}be|should\s{1,3}be)?\s{0,3}[:：=→]?"
_ABOUT = r"(?:(?:about|around|roughly|approximately|approx\.?|only|just|~|≈)\s{0,3})?"
_AFTER_LABEL = rf"(?:\s{{0,3}}[(\[][^()\[\]\n]{{0,40}}[)\]])?{_SPACE}{_VERB}{_SPACE}{_ABOUT}{_AMOUNT}"
_LABELLED = re.compile(rf"(?<!\w){_LABEL}(?![A-Za-z_]){_AFTER_LABEL}", re.IGNORECASE)
_OVERALL = re.compile(
    r"(?<!\w)(?:(?:overall|final|total|combined|aggregate)(?!\w)|总分|总体|总评|最终|合計|総合|총점|gesamt(?!\w))"
    rf"{_SPACE}(?:{_LABEL}|mark|assessment|evaluation|verdict|answer|judge?ment|result)?{_AFTER_LABEL}",
    re.IGNORECASE,
)
_MARKED = tuple(
    re.compile(before + r"\s{0,5}" + _AMOUNT + r"\s{0,5}" + after, re.IGNORECASE)
    for before, after in (
        (r"\[\[(?:\s{0,5}[a-z ]{1,20}[:=])?", r"\]\]"),
        (r"\\boxed\s{0,3}\{", r"\}"),
        (r"<(?P<tag>(?:final_|overall_)?(?:score|rating|grade|answer))>", r"</(?P=tag)>"),
    )
)

_WORD_BEFORE = re.compile(r"([^\W\d_][\w-]{0,30})[\"'`*_ \t]{1,9}\Z")
_NO_QUALIFIER = _words(
    "the my a an this that its your and so thus hence therefore assigned given numeric numerical integer following "
    "response model answer overall final total combined aggregate"
)
_WORD_AFTER = re.compile(r"[*_\"'`%]{0,6}[ \t]{0,9}%?[ \t]{0,9}([^\W\d_][\w'’]{0,30})")
_UNITS = _words(
    "point points pt pts percent mark marks punkt punkte punkten punto puntos ponto pontos punti балл балла баллов "
    "分 点 점"
)
_MAY_FOLLOW = _UNITS | _words(
    "because since as for on in out of is was seems feels overall from where given due although though but and with "
    "while which that it i the this to by here based"
)
_ONLY_THOUGHT_OF = _words("would could should might means mean requires require needs if indicates")

_FENCE = re.compile(r"\A```[a-z]{0,10}\s{0,9}\n?(.*?)\n?\s{0,9}(?:```)?\Z", re.DOTALL | re.IGNORECASE)
_SCORE_OF_HALF_AN_OBJECT = re.compile(r"\"score\"\s{0,9}:\s{0,9}\"?(\d{1,9})\"?\s{0,9}[,}]", re.IGNORECASE)
_KEYS = (("score",), ("overall_score", "final_score", "total_score", "overall", "final"), ("rating", "grade"))
_UNFINISHED = re.compile(r"[\w.,/+%-]*\Z")


@dataclass(frozen=True, slots=True)
class Reading:
    """A score and the rung that it was found on, or no score and the reason."""

    score: int | None
    rung: str | None = None
    """`integer`, `json`, `marked`, `overall`, `labelled`, `out of 100` or `only number`."""
    reason: str | None = None
    """One line."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A number in the text."""

    value: int | None
    """None where it is there and cannot be the score: a range, a decimal, of another scale."""
    of_100: bool = False
    word_after: str = ""


def read_score(text: str, *, cut: bool = False) -> Reading:
    """Reads the score out of a whole reply.

    Args:
        text: the reply.
        cut: whether the reply ended because its room was full: the last word may then be half of one (`8` of `85`),
            and the only number may be anything.
    """
    said, _, ended = spoken(text)
    if not ended:
        return Reading(None, reason=f"its thinking has no end: {_shown(repr(text))}")
    if (alone := bare_integer(said)) is not None and not cut:
        return Reading(alone, "integer") if _in_range(alone) else Reading(None, reason=f"not in 0..100: {_shown(said)}")
    if len(said) > _LONGEST:
        return Reading(None, reason=f"longer than {_LONGEST:,} characters: {_shown(repr(said[:_SHOWN_CHARACTERS]))}")
    problem = "cut off at its longest" if cut else "no score in it"
    for rung, candidates in _rungs(said, cut=cut):
        values = list(dict.fromkeys(candidates))
        if len(values) > 1:
            named = ", ".join("unreadable" if one is None else str(one) for one in values[:_MOST_NAMED])
            return Reading(None, reason=f"several numbers may be the score ({named}): {_shown(repr(text))}")
        if values and values[0] is not None:
            in_range = _in_range(values[0])
            return Reading(values[0], rung) if in_range else Reading(None, reason=f"not in 0..100: {values[0]}")
        if values:
            break
    return Reading(None, reason=f"{problem}: {_shown(repr(text))}")


def bare_integer(text: str) -> int | None:
    """What the book takes for the score: an integer and nothing else, of any size."""
    try:
        return int(text)
    except ValueError:
        return None


def _rungs(said: str, *, cut: bool) -> Iterator[tuple[str, Sequence[int | None]]]:
    """The rungs that the text has candidates on, surest first."""
    fenced = _FENCE.match(said)
    inside = (fenced[1] if fenced else said).strip()
    yield "json", list(_json_scores(said))
    if _is_object(inside) or (cut and inside.startswith("{")):
        # Of an object nothing but its `score` counts: what else it holds are other figures, or the reason's words.
        yield "json", [int(found) for found in _SCORE_OF_HALF_AN_OBJECT.findall(inside)] if cut else []
        yield "json", [None]
    plain = _QUESTION.sub(" ", _without_last_word(said) if cut else said)
    if _OTHER_SCALE.search(plain):
        yield "out of 100", [one.value for one in _numbers(plain) if one.of_100] or [None]
    yield "marked", [_value(found) for pattern in _MARKED for found in pattern.finditer(plain)]
    rest = _without_list_marks(_NOT_THE_SCORE.sub(" ", _MAXIMUM.sub(" ", plain)))
    yield "overall", [_value(found) for found in _OVERALL.finditer(rest) if _is_said(found)]
    labelled = list(_LABELLED.finditer(rest))
    yield "labelled", [_value(found) for found in labelled if _is_said(found) and not _is_one_of_several(found)]
    yield "out of 100", [one.value for one in _numbers(plain) if one.of_100]
    if not cut:
        of_parts = [_value(found) for found in labelled if _is_one_of_several(found)]
        numbers = [one for one in _numbers(rest) if one.value is not None and _in_range(one.value)]
        alone = [*of_parts, *(one.value for one in numbers if _counts_nothing(one))]
        # 100 beside another number is the scale's end, in words that were not understood.
        is_the_scale = set(alone) == {100} and any(one.value != 100 for one in numbers)
        yield "only number", [None] if is_the_scale else alone


def _numbers(text: str) -> Iterator[_Candidate]:
    for found in _NUMBER.finditer(text):
        yield _Candidate(_value(found), found["most"] == "100", _word_after(found))


def _value(found: re.Match[str]) -> int | None:
    """`85`, `85.0` and `85/100` as 85."""
    whole = re.fullmatch(r"\+?(\d{1,9})(?:\.0{1,9})?", found["number"])
    if whole is None or found["tail"] or found["most"] not in (None, "100"):
        return None
    return int(whole[1])


def _word_after(found: re.Match[str]) -> str:
    word = _WORD_AFTER.match(found.string, found.end())
    return word[1] if word else ""


def _is_said(found: re.Match[str]) -> bool:
    """Whether a labelled number is the label's: neither one of something (`score: 3 errors`) nor only thought of."""
    word = _word_after(found)
    return word in _MAY_FOLLOW or not (word.casefold() in _ONLY_THOUGHT_OF or word.islower())


def _is_one_of_several(found: re.Match[str]) -> bool:
    """Whether a label is one of several: `Fluency score: 45`."""
    word = _WORD_BEFORE.search(found.string[max(0, found.start() - 40) : found.start()])
    return word is not None and word[1].casefold() not in _NO_QUALIFIER


def _counts_nothing(number: _Candidate) -> bool:
    """Whether a number that stands somewhere may be a score: no fraction, and no number of things."""
    if number.of_100:
        return False
    return not number.word_after or number.word_after.casefold() in _MAY_FOLLOW


def _without_list_marks(text: str) -> str:
    """The text without `1.`, `2.`, `3.` or `(1)`, `(2)` in their order."""
    pieces, place, expected = [], 0, 1
    for mark in _LIST_MARK.finditer(text):
        if int(mark[1]) == expected:
            pieces.append(text[place : mark.start()])
            place, expected = mark.end(), expected + 1
    return " ".join([*pieces, text[place:]])


def _without_last_word(text: str) -> str:
    unfinished = _UNFINISHED.search(text[-_LONGEST_WORD:])
    return text[: len(text) - len(unfinished[0])] if unfinished else text


def _is_object(text: str) -> bool:
    """Whether the text is a JSON object, or a list of some, and nothing else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value))


def _json_scores(text: str) -> Iterator[int | None]:
    """The scores of the JSON objects in the text, also in a fence or between other words; None: one without sense."""
    decoder = json.JSONDecoder(object_pairs_hook=_Pairs)
    place = 0
    for start in itertools.islice((found.start() for found in re.finditer(r"\{", text)), MOST_OBJECTS):
        if start < place:
            continue
        try:
            value, place = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        yield from _scores_of(value)


class _Pairs(list[tuple[str, Any]]):
    """The members of a JSON object: a key that stands twice is not lost."""


def _scores_of(value: Any, depth: int = 0) -> list[int | None]:
    """The scores under the surest name that an object has; of its inner objects where it has none itself."""
    if depth > _DEEPEST:
        return []
    if not isinstance(value, _Pairs):
        return [score for item in value for score in _scores_of(item, depth + 1)] if isinstance(value, list) else []
    for names in _KEYS:
        own = [item for name, item in value if name.casefold().strip().replace(" ", "_") in names]
        found = [
            score
            for item in own
            if item is not None
            for score in (_scores_of(item, depth + 1) if isinstance(item, list) else [_whole(item)])
        ]
        if found:
            return found
    return [score for _, item in value for score in _scores_of(item, depth + 1)]


def _whole(value: Any) -> int | None:
    """A whole number, also written as `85.0`, `"85"`, `"85%"` or `"85/100"`."""
    if isinstance(value, str):
        text = value.strip().removesuffix("/100").removesuffix("%").strip()
        return bare_integer(text)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if value == value // 1 else None


def _in_range(score: int) -> bool:
    return 0 <= score <= 100


def _shown(text: str) -> str:
    line = " ".join(text.encode(errors="replace").decode().split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"
