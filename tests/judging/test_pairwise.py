from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from fastft.judging import pairwise
from fastft.judging.pairwise import NoVerdict, Pair, RefereeGone, Said, judge_pairs, parse_verdict, prompt_of, summary

ENTRY = {"instruction": "Name a bird.", "input": "", "output": "owl"}


def pair(a: str, b: str) -> Pair:
    return Pair(ENTRY, a, b)


@pytest.mark.parametrize(
    ("raw", "verdict"),
    [
        ("A", "A"),
        (" b.\n", "B"),
        ("Tie", "tie"),
        ("draw", "tie"),
        ("**B**", "B"),
        ("Response A", "A"),
        ("Model B", "B"),
        ("[[A]]", "A"),
        ("Both are fine, so [[C]]", "tie"),
        ('{"reason": "B is short", "winner": "A"}', "A"),
        ('```json\n{"verdict": "Response B"}\n```', "B"),
        ('{"winner": "neither of them"}', None),
        ("A. It names a bird, B does not.", "A"),
        ("B\n\nIt is right.", "B"),
        ("Response A is better because it names a bird.", "A"),
        ("I would say that B is clearly better.", "B"),
        ("Winner: tie", "tie"),
        ("The better response is B", "B"),
        ("A is better. No: B is better.", None),
        ("A good question", None),
        ("Response A: incorrect.\nResponse B: correct.\nWinner: B", "B"),
        ("A) incorrect. B) correct. The winner is B", "B"),
        ("A: wrong number.\nB: right number.\nB is better.", "B"),
        ("A: wrong.\nB: right.", None),
        ("Winner: A tie", "tie"),
        ("Verdict: A tie.", "tie"),
        ("A draw", "tie"),
        ("Neither gives the right answer. A tie.", None),
        ("Answer A is wrong, the other one is right.", None),
        ("The verdict is B.", "B"),
        ("100", None),
        ("", None),
        ("{" * 5000, None),
        ("<think>A is better</think>B", "B"),
        ("A is better, so [[A]]</think>[[B]]", "B"),
        ("[THINK][[A]][/THINK]\n\nB", "B"),
        ("<|channel|>analysis<|message|>A is better<|end|><|start|>assistant<|channel|>final<|message|>B", "B"),
        ("<think>A is better", None),
        ("<|channel|>analysis<|message|>Winner: A", None),
        ("[[A]] at first, then [[B]]", None),
        ("[[B]]. Yes, [[B]]", "B"),
        ('{"winner": "A"} or {"winner": "B"}', None),
        ('{"winner": null} B is better', None),
        ("I do not think that A is better.", None),
        ("A isn't right, so B is better.", None),
        ("A is not right. B is better.", "B"),
        ("A\nB", None),
        ("A, B", None),
        ("A\nA", "A"),
    ],
)
def test_verdicts(raw: str, verdict: str | None) -> None:
    assert parse_verdict(raw) == verdict


def test_both_orders_show_each_response_once_under_each_letter() -> None:
    ab, ba = (prompt_of(pair("OURS", "THEIRS"), order) for order in ("ab", "ba"))
    assert "A `OURS`" in ab
    assert "B `THEIRS`" in ab
    assert "A `THEIRS`" in ba
    assert "B `OURS`" in ba
    assert "Name a bird." in ab
    assert "`owl`" in ab


class Script:
    """A referee that says one thing after the other, and notes what it was asked; None: it takes no schema."""

    def __init__(self, *replies: str | Said | Exception | None) -> None:
        self.replies = list(replies)
        self.asked: list[str] = []
        self.schemas: list[Any] = []

    def ask(self, prompt: str, schema: Mapping[str, Any] | None = None) -> Said | None:
        self.asked.append(prompt)
        self.schemas.append(schema)
        reply = self.replies[len(self.asked) - 1]
        if isinstance(reply, Exception):
            raise reply
        return Said(reply) if isinstance(reply, str) else reply


@pytest.mark.parametrize(
    ("replies", "winner"),
    [
        (("A", "B"), "a"),
        (("B", "A"), "b"),
        (("A", "A"), "tie"),
        (("B", "B"), "tie"),
        (("tie", "tie"), "tie"),
        (("A", "tie"), "tie"),
    ],
)
def test_a_win_needs_both_orders(replies: tuple[str, str], winner: str | None) -> None:
    (found,), gone = judge_pairs([pair("x", "y")], Script(*replies))
    assert (found["winner"], gone) == (winner, None)
    assert [one["raw"] for one in found["asked"]] == list(replies)


@pytest.mark.parametrize(
    ("again", "winner", "raw_again"),
    [
        ('{"winner": "B"}', "a", '{"winner": "B"}'),
        ("neither", None, "neither"),
        (None, None, None),
        (NoVerdict("timed out"), None, None),
    ],
)
def test_a_reply_without_a_verdict_is_asked_about_once_more_with_a_schema(
    again: str | Exception | None, winner: str | None, raw_again: str | None
) -> None:
    script = Script("A", "Both are nice.", again)
    (found,), _ = judge_pairs([pair("x", "y")], script)
    assert found["winner"] == winner
    assert [one["raw"] for one in found["asked"]] == ["A", "Both are nice."]
    assert found["asked"][1].get("raw_again") == raw_again
    assert script.schemas[:2] == [None, None]
    assert script.schemas[2]["properties"]["winner"]["enum"] == ["A", "B", "tie"]
    assert script.asked[2].startswith(script.asked[1].removesuffix("Respond with A, B or tie only."))
    assert "JSON" in script.asked[2]
    figures = summary([found])
    assert figures["n_asked_again"] == (raw_again is not None)
    assert figures["n_unread"] == (winner is None)


def test_half_a_reply_is_no_verdict() -> None:
    half = Said("A is better in style, but on the facts", ended=False)
    script = Script(half, '{"winner": "B"}', half, Said('{"winner": "B"', ended=False))
    (found,), _ = judge_pairs([pair("x", "y")], script)
    assert [one["winner"] for one in found["asked"]] == ["b", None]
    assert len(script.asked) == 4


def test_pairs_whose_prompts_were_cut_are_listed() -> None:
    script = Script("A", "B", Said("A", cut=True), "B", "A", "?", Said("B", cut=True))
    found, _ = judge_pairs([pair("x", "y"), pair("v", "w"), pair("t", "u")], script)
    assert summary(found)["cut_rows"] == [2, 3]


def test_equal_and_empty_responses_need_no_call() -> None:
    script = Script()
    found, _ = judge_pairs([pair("x", " x\n"), pair("x", " "), pair("", "y"), pair("", " ")], script)
    assert [one["winner"] for one in found] == ["tie", "a", "b", "tie"]
    assert script.asked == []
    assert summary(found)["n_without_call"] == 4
    assert summary(found)["flip_rate"] is None


def test_position_bias_is_counted() -> None:
    """Two pairs go to whichever came first, one to whichever came second, one is half a tie, two hold."""
    script = Script("A", "A", "A", "A", "B", "B", "A", "tie", "A", "B", "tie", "tie")
    found = summary(judge_pairs([pair(f"x{i}", f"y{i}") for i in range(6)], script)[0])
    assert (found["wins"], found["ties"], found["losses"]) == (1, 5, 0)
    assert (found["flips"], found["n_both_orders"], found["flip_rate"]) == (4, 6, pytest.approx(4 / 6))
    assert (found["first_twice"], found["second_twice"], found["position_p"]) == (2, 1, 1)
    assert found["flip_interval"][0] < 4 / 6 < found["flip_interval"][1]


def test_one_failed_question_leaves_the_others() -> None:
    found, gone = judge_pairs([pair("x", "y"), pair("v", "w")], Script(NoVerdict("timed out"), "B", "A"))
    assert [(one["winner"], one.get("reason")) for one in found] == [(None, "timed out"), ("b", None)]
    assert (summary(found)["n_unread"], gone) == (1, None)


def test_a_referee_that_goes_away_may_still_know_later_replies() -> None:
    found, gone = judge_pairs([pair("x", "y"), pair("v", "w")], Script(RefereeGone("no server"), "A", "B"))
    assert [(one["winner"], one.get("reason")) for one in found] == [(None, "no server"), ("a", None)]
    assert gone == "no server"


def test_without_a_referee_nothing_is_asked() -> None:
    found, _ = judge_pairs([pair("x", "y"), pair("x", "x")], None)
    assert [(one["winner"], one["reason"]) for one in found] == [
        (None, pairwise.NOT_ASKED),
        ("tie", pairwise.SAME_TEXT),
    ]
