"""Which of two responses is better: a judge is asked twice, with the responses in both orders.

A judge favours a place (FastChat #3911: 12.9% of its verdicts turned when the two changed places). So a response wins
only where it wins in both orders; a disagreement between the orders is a tie, and counted as a flip. Who is asked is
a `Referee`, which takes a prompt and gives a reply: nothing here knows of servers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fastft.common.errors import FastftError
from fastft.data.prompts import ALPACA
from fastft.data.records import choices_of
from fastft.judging.judgement import EMPTY_RESPONSE
from fastft.judging.ladder import MOST_OBJECTS
from fastft.judging.thoughts import spoken
from fastft.metrics.statistics import WinTieLoss, wilson
from fastft.metrics.text_metrics import bounds

Verdict = Literal["A", "B", "tie"]
"""As the judge says it: of the first response that it was shown, the second, or neither."""
Winner = Literal["a", "b", "tie"]
"""Of the runs: the first, the second, or neither."""

SAME_TEXT = "the same text"
NOT_ASKED = "not asked"

ORDERS = ("ab", "ba")
_LETTER_ALONE = "Respond with A, B or tie only."
_AS_JSON = "Respond with a JSON object whose only member, `winner`, is A, B or tie."
_VERDICT_SCHEMA = {
    "type": "object",
    "properties": {"winner": {"type": "string", "enum": ["A", "B", "tie"]}},
    "required": ["winner"],
}
_KEYS = ("winner", "verdict", "better", "choice", "answer")
_BARE = re.compile(r"\W*(?:(?i:response|answer|model)\s+)?([ABab]|(?i:tie|draw))\W*")
_BRACKETS = re.compile(r"\[\[([ABC])\]\]")
_FIRST_LINE = re.compile(r"\W*(?:(?i:response|answer)\s+)?([AB]|(?i:tie))\s*(?:[.:,;)*]|\n|—|-\s)")
_LABELS = re.compile(r"(?:^|[.;]\s|\n)\W*(?:(?i:model\s+)?(?i:response|answer)\s+)?([AB])\s*[:)]")
_SENTENCE = re.compile(
    r"\b([AB])\W{0,3}\s+(?i:is|was)\s+(?i:slightly |clearly |much |the )*(?i:better|best)\b"
    r"|(?i:\b(?:winner|verdict|answer|choice|better)\b(?:\s+(?:response|one|answer))?)(?:\s*:|\s+(?i:is)\b)\s*:?\s*"
    r"\W{0,3}(?:(?i:response)\s+)?([AB]\b|(?i:tie\b))"
)
_SENTENCE_LENGTH = 60
_NEGATED = re.compile(r"(?:\b(?:not|never|neither|nor|hardly|cannot)\b|n['’]t\b)[^.;\n]*\Z", re.IGNORECASE)
_A_TIE = re.compile(r"\b[Aa]\s+(?=(?i:tie|draw)\b)")


class NoVerdict(FastftError):
    """No whole reply was read. The message is the reason in one line."""


class RefereeGone(FastftError):
    """The judge cannot be used any more. The message ends with the remedy."""


@dataclass(frozen=True, slots=True)
class Said:
    """A whole reply."""

    text: str
    ended: bool = True
    """Whether it came to its end; half a reply is no verdict."""
    cut: bool = False
    """Whether the prompt filled the judge's context, and may have lost its front."""
    nothing: str | None = None
    """Why it is no answer: a reasoning model's trace took all its room."""


class Referee(Protocol):
    """Who is asked."""

    def ask(self, prompt: str, schema: Mapping[str, Any] | None = None) -> Said | None:
        """The reply to a prompt, held to a JSON schema where there is one; None where it cannot be held to it.

        Raises:
            NoVerdict: this one question got no answer.
            RefereeGone: it got none because nobody is there any more.
        """


@dataclass(frozen=True, slots=True)
class Pair:
    """A test entry (`instruction`, `input`, `output`) with both runs' responses."""

    entry: Mapping[str, Any]
    a: str
    b: str


def prompt_of(pair: Pair, order: str, ending: str = _LETTER_ALONE) -> str:
    """The question about a pair, with the responses in the order `ab` or `ba`; worded like the book's for one response.

    The entry is in Alpaca style whatever template the models were trained with, as in `fastft.judging.judge`.
    """
    first, second = (pair.a, pair.b) if order == "ab" else (pair.b, pair.a)
    asked = ALPACA.prompt(pair.entry["instruction"], pair.entry.get("input") or "", choices_of(pair.entry))
    return (
        f"Given the input `{asked}` "
        f"and correct output `{pair.entry['output']}`, "
        f"compare model response A `{first}` "
        f"with model response B `{second}`. "
        f"Which one answers the input better? Their order and their length do not matter. {ending}"
    )


def parse_verdict(raw: str) -> Verdict | None:
    """The verdict in a whole reply, or None where it holds none, or two different ones.

    A ladder, of which the first rung that holds decides: JSON objects with the verdict; `[[A]]`; the verdict alone;
    the verdict first, and a reason behind it; sentences such as "A is better" and "Winner: B" that agree. What a
    reasoning model thought before its answer (`fastft.judging.thoughts`) says nothing.
    """
    answer = spoken(raw).text
    for said in (_from_json(answer), [one.replace("C", "tie") for one in _BRACKETS.findall(answer)]):
        if said:
            return _agreed(map(_verdict, said))
    plain = _A_TIE.sub("", answer)  # where A is no letter of a response
    labelled = len(set(_LABELS.findall(plain))) == 2  # the reply goes through both responses: its first letter is none
    if found := _BARE.fullmatch(plain) or (None if labelled else _FIRST_LINE.match(plain)):
        rest = _BARE.fullmatch(plain, found.end())
        return _agreed(_verdict(one[1]) for one in (found, rest) if one is not None)
    sentences = list(_SENTENCE.finditer(plain))
    if any(_NEGATED.search(plain, max(0, one.start() - _SENTENCE_LENGTH), one.start()) for one in sentences):
        return None
    return _agreed(_verdict(one[1] or one[2]) for one in sentences)


def _agreed(verdicts: Iterable[Verdict | None]) -> Verdict | None:
    named = set(verdicts)
    return named.pop() if len(named) == 1 else None


def _from_json(raw: str) -> list[str]:
    """What the JSON objects of a reply say, also in fences or between other words."""
    decoder = json.JSONDecoder()
    found, place = [], 0
    for start in itertools.islice((brace.start() for brace in re.finditer(r"\{", raw)), MOST_OBJECTS):
        if start < place:
            continue
        with contextlib.suppress(ValueError, RecursionError):
            value, place = decoder.raw_decode(raw, start)
            found += [str(value[key]) for key in _KEYS if key in value][:1]
    return found


def _verdict(said: str) -> Verdict | None:
    found = _BARE.fullmatch(said)
    if found is None:
        return None
    word = found[1].upper()
    return "A" if word == "A" else "B" if word == "B" else "tie"


def winner_of(verdict: Verdict, order: str) -> Winner:
    """Which run a verdict is for, when they were shown in an order."""
    if verdict == "tie":
        return "tie"
    return "a" if (verdict == "A") == (order == "ab") else "b"


def outcome_of(winners: Sequence[Winner]) -> Winner:
    """What the verdicts of both orders come to: a win needs both."""
    first, second = winners
    return first if first == second else "tie"


def judge_pairs(
    pairs: Sequence[Pair], referee: Referee | None, advance: Callable[[], None] = lambda: None
) -> tuple[list[dict[str, Any]], str | None]:
    """Asks about each pair in both orders, in the order of the pairs.

    Equal responses are a tie and an empty one loses to any other, without a call. A reply without a verdict is asked
    about once more, with a JSON schema.

    Args:
        pairs: what is asked about.
        referee: who is asked, or None.
        advance: is called after each pair.

    Returns:
        For each pair `winner` (`a`, `b`, `tie` or null), `asked` (each order's reply and winner) and `reason` where
        there is something to explain; and why some pairs could not be asked about, or None.
    """
    judgements: list[dict[str, Any]] = []
    gone: str | None = None
    for pair in pairs:
        judgement = _without_a_call(pair)
        if judgement is None and referee is None:
            judgement = {"winner": None, "asked": [], "reason": NOT_ASKED}
        elif judgement is None and referee is not None:
            try:
                judgement = _asked_about(pair, referee)
            except RefereeGone as error:
                gone = gone or str(error)
                judgement = {"winner": None, "asked": [], "reason": str(error)}
        assert judgement is not None
        judgements.append(judgement)
        advance()
    return judgements, gone


def _without_a_call(pair: Pair) -> dict[str, Any] | None:
    a, b = pair.a.strip(), pair.b.strip()
    if a == b:
        return {"winner": "tie", "asked": [], "reason": SAME_TEXT}
    if not (a and b):
        return {"winner": "a" if a else "b", "asked": [], "reason": EMPTY_RESPONSE}
    return None


def _asked_about(pair: Pair, referee: Referee) -> dict[str, Any]:
    asked: list[dict[str, Any]] = []
    for order in ORDERS:
        try:
            asked.append(_asked_in_order(pair, order, referee))
        except NoVerdict as failure:
            return {"winner": None, "asked": asked, "reason": str(failure)}
    winners = [one["winner"] for one in asked]
    if None in winners:
        why = next((one["reason"] for one in asked if "reason" in one), "a reply holds no verdict")
        return {"winner": None, "asked": asked, "reason": why}
    return {"winner": outcome_of(winners), "asked": asked}


def _verdict_in(said: Said) -> Verdict | None:
    return parse_verdict(said.text) if said.ended else None


def _asked_in_order(pair: Pair, order: str, referee: Referee) -> dict[str, Any]:
    said = referee.ask(prompt_of(pair, order))
    assert said is not None, "a prompt without a schema has a reply"
    verdict, again = _verdict_in(said), None
    if verdict is None:
        with contextlib.suppress(NoVerdict):  # the first reply is still to be listed
            again = referee.ask(prompt_of(pair, order, _AS_JSON), _VERDICT_SCHEMA)
        verdict = None if again is None else _verdict_in(again)
    nothing = None if verdict is not None else (again or said).nothing
    return {
        "order": order,
        "raw": said.text,
        **({} if nothing is None else {"reason": nothing}),
        **({} if again is None else {"raw_again": again.text}),
        "cut": said.cut or (again is not None and again.cut),
        "winner": None if verdict is None else winner_of(verdict, order),
    }


def summary(judgements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Wins, ties and losses of run A, and what the judge's favours are.

    `flip_rate` is the share of pairs, of those read in both orders, in which the orders disagree; in `first_twice` of
    them whichever response came first won both times, in `second_twice` the other one: `position_p` is the sign test of
    the two counts.
    """
    decided = [one["winner"] for one in judgements if one["winner"] is not None]
    both = [[two["winner"] for two in one["asked"]] for one in judgements if len(one["asked"]) == 2]
    read = [winners for winners in both if None not in winners]
    flips = sum(first != second for first, second in read)
    # What is shown first is A's response in the first order and B's in the second.
    first_twice, second_twice = read.count(["a", "b"]), read.count(["b", "a"])
    tally = WinTieLoss(decided.count("a"), decided.count("tie"), decided.count("b"))
    return {
        **as_json(tally),
        "n_unread": sum(one["winner"] is None for one in judgements),
        "n_asked_again": sum("raw_again" in two for one in judgements for two in one["asked"]),
        "cut_rows": [row for row, one in enumerate(judgements, 1) if any(two["cut"] for two in one["asked"])],
        "n_without_call": sum(one.get("reason") in (SAME_TEXT, EMPTY_RESPONSE) for one in judgements),
        "n_both_orders": len(read),
        "flips": flips,
        "flip_rate": flips / len(read) if read else None,
        "flip_interval": bounds(wilson(flips, len(read))),
        "first_twice": first_twice,
        "second_twice": second_twice,
        "position_p": WinTieLoss(first_twice, 0, second_twice).sign_test(),
    }


def as_json(tally: WinTieLoss) -> dict[str, Any]:
    """The counts, the share of wins among the decided pairs with its Wilson interval, and the sign test's p."""
    return {
        "wins": tally.wins,
        "ties": tally.ties,
        "losses": tally.losses,
        "win_rate": tally.win_rate(),
        "interval": bounds(tally.interval()),
        "p": tally.sign_test(),
    }
