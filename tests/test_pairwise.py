from __future__ import annotations

import pytest

from fastft import pairwise
from fastft.pairwise import NoVerdict, Pair, Referee, RefereeGone, judge_pairs, parse_verdict, prompt_of, summary

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
        ("100", None),
        ("", None),
        ("{" * 5000, None),
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
    """Says one thing after the other, and notes what it was asked."""

    def __init__(self, *replies: str | Exception) -> None:
        self.replies = list(replies)
        self.asked: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.asked.append(prompt)
        reply = self.replies[len(self.asked) - 1]
        if isinstance(reply, Exception):
            raise reply
        return reply

    def referee(self) -> Referee:
        return Referee({"model": "script"}, self)


@pytest.mark.parametrize(
    ("replies", "winner"),
    [
        (("A", "B"), "a"),
        (("B", "A"), "b"),
        (("A", "A"), "tie"),
        (("B", "B"), "tie"),
        (("tie", "tie"), "tie"),
        (("A", "tie"), "tie"),
        (("A", "?"), None),
    ],
)
def test_a_win_needs_both_orders(replies: tuple[str, str], winner: str | None) -> None:
    (found,), gone = judge_pairs([pair("x", "y")], Script(*replies).referee(), {})
    assert (found["winner"], gone) == (winner, None)
    assert [one["raw"] for one in found["asked"]] == list(replies)


def test_equal_and_empty_responses_need_no_call() -> None:
    script = Script()
    found, _ = judge_pairs([pair("x", " x\n"), pair("x", " "), pair("", "y"), pair("", " ")], script.referee(), {})
    assert [one["winner"] for one in found] == ["tie", "a", "b", "tie"]
    assert script.asked == []
    assert summary(found)["n_without_call"] == 4
    assert summary(found)["flip_rate"] is None


def test_position_bias_is_counted() -> None:
    """Two pairs go to whichever came first, one to whichever came second, one is half a tie, two hold."""
    script = Script("A", "A", "A", "A", "B", "B", "A", "tie", "A", "B", "tie", "tie")
    found = summary(judge_pairs([pair(f"x{i}", f"y{i}") for i in range(6)], script.referee(), {})[0])
    assert (found["wins"], found["ties"], found["losses"]) == (1, 5, 0)
    assert (found["flips"], found["n_both_orders"], found["flip_rate"]) == (4, 6, pytest.approx(4 / 6))
    assert (found["first_twice"], found["second_twice"], found["position_p"]) == (2, 1, 1)
    assert found["flip_interval"][0] < 4 / 6 < found["flip_interval"][1]


def test_what_was_read_is_not_asked_again_and_each_reply_is_kept_at_once() -> None:
    replies: dict[str, str] = {}
    kept: list[int] = []
    first = Script("A", RefereeGone("no server"))
    found, gone = judge_pairs(
        [pair("x", "y"), pair("v", "w")], first.referee(), replies, lambda: kept.append(len(replies))
    )
    assert (kept, gone) == ([1], "no server")
    assert [one["winner"] for one in found] == [None, None]
    assert found[1]["reason"] == pairwise.NOT_ASKED
    second = Script("B", "A", "B")
    found, gone = judge_pairs([pair("x", "y"), pair("v", "w")], second.referee(), replies)
    assert [one["winner"] for one in found] == ["a", "a"]
    assert len(second.asked) == 3
    again = Script()
    assert judge_pairs([pair("x", "y"), pair("v", "w")], again.referee(), replies) == (found, None)


def test_another_judge_is_asked_anew() -> None:
    script = Script("A", "B")
    assert script.referee().key("p") != Referee({"model": "other"}, script).key("p")
    assert script.referee().key("p") != script.referee().key("q")


def test_one_failed_question_leaves_the_others() -> None:
    found, gone = judge_pairs([pair("x", "y"), pair("v", "w")], Script(NoVerdict("timed out"), "B", "A").referee(), {})
    assert [(one["winner"], one.get("reason")) for one in found] == [(None, "timed out"), ("b", None)]
    assert (summary(found)["n_unread"], gone) == (1, None)


def test_without_a_referee_nothing_is_asked() -> None:
    found, _ = judge_pairs([pair("x", "y"), pair("x", "x")], None, {})
    assert [one["winner"] for one in found] == [None, "tie"]
