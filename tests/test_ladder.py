from __future__ import annotations

import pytest

from fastft.judging.ladder import bare_integer, read_score

READ = [
    ("85", 85, "integer"),
    (" 0\n", 0, "integer"),
    ("+100", 100, "integer"),
    ("-0", 0, "integer"),
    ("<think>\nmaybe 20\n</think>\n85", 85, "integer"),
    ('{"score": 85}', 85, "json"),
    ('{"reason": "20/100 at first sight, score: 30", "score": 85}', 85, "json"),
    ('{"Score": "85/100"}', 85, "json"),
    ('{"score": 85.0}', 85, "json"),
    ('{"score": null, "evaluation": {"score": 85}}', 85, "json"),
    ('Sure:\n```json\n{\n  "score": 85\n}\n```\nOut of 100.', 85, "json"),
    ("{not JSON} but {\"score\": 85}", 85, "json"),
    ("85/100", 85, "out of 100"),
    ("**85 / 100**", 85, "out of 100"),
    ("I give it 85 out of 100, 3 facts of 4 are right.", 85, "out of 100"),
    ("Spelling 90/100, facts 40/100, overall 60/100.", 60, "out of 100"),
    ("Score: 85. It has 2 of 3 facts.", 85, "labelled"),
    ("**Score:** 85", 85, "labelled"),
    ("Score:85", 85, "labelled"),
    ("The rating would be `85`, since 2 words differ.", 85, "labelled"),
    ('"score": 85, "reason": "unfinished', 85, "labelled"),
    ("about 40", 40, "last number"),
    ("85.", 85, "last number"),
    ("85.0", 85, "last number"),
    ("85%", 85, "last number"),
    ("85\nbecause it is right", 85, "last number"),
    ("On a scale from 0 to 100, I give 85.", 85, "last number"),
    ("I give 85 on a scale from 0 to 100, where 100 is the best.", 85, "last number"),
    ("I give 4/5, hence 80.", 80, "last number"),
    ("GPT-4 would have said 80.", 80, "last number"),
    ("In 1997, 80.", 80, "last number"),
    ("90 (out of 100)", 90, "last number"),
    ("Score: 90 (out of 100)", 90, "labelled"),
    ("85 points out of 100.", 85, "last number"),
    ("85 of 100", 85, "last number"),
    ("85 out of a possible 100", 85, "last number"),
    ("40 (where 100 is perfect)", 40, "last number"),
    ("a 40, with 100 being the maximum", 40, "last number"),
    ("40 (0 = worst, 100 = best)", 40, "last number"),
    ("30, since a perfect score is 100", 30, "last number"),
    ("100, a perfect score", 100, "last number"),
]  # fmt: skip

NOT_READ = [
    ("", "no score in it"),
    ("I cannot score this.", "no score in it"),
    ("101", "not in 0..100: 101"),
    ("-1", "not in 0..100: -1"),
    ('{"score": 850}', "not in 0..100: 850"),
    ('{"score": true}', "no score in it"),
    ('{"score": 1e999}', "no score in it"),
    ('{"score": "high"}', "no score in it"),
    ("8/10", "no score in it"),
    ("4 out of 5", "no score in it"),
    ("85.5", "no score in it"),
    ("85-90", "no score in it"),
    ("from 0 to 100", "no score in it"),
    ("1997", "not in 0..100"),
    ("12:30", "no score in it"),
    ("1,000 words", "no score in it"),
    ("GPT-4, 3rd", "no score in it"),
    ("<think>20, no, 30", "no score in it"),
    ("9" * 5000, "no score in it"),
    ("{" * 5000, "no score in it"),
    ('{"a":' * 5000, "no score in it"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "score", "rung"), READ)
def test_each_rung_reads_its_score(text: str, score: int, rung: str) -> None:
    reading = read_score(text)
    assert (reading.score, reading.rung, reading.reason) == (score, rung, None)


@pytest.mark.parametrize(("text", "reason"), NOT_READ)
def test_what_is_no_score_says_why_in_one_line(text: str, reason: str) -> None:
    reading = read_score(text)
    assert (reading.score, reading.rung) == (None, None)
    assert reading.reason is not None
    assert reading.reason.startswith(reason)
    assert "\n" not in reading.reason
    assert len(reading.reason) < 250


@pytest.mark.parametrize("text", ["8", "The score is 8", "Score: 8", '{"score": 8', "I gave 8/100", "2 of 3 facts are"])
def test_a_reply_that_was_cut_off_gives_no_half_number(text: str) -> None:
    assert read_score(text, cut=True).score is None


@pytest.mark.parametrize(
    ("text", "score"), [("Score: 85 because the", 85), ("85/100. It is", 85), ('{"score": 85} and', 85)]
)
def test_a_score_before_the_cut_counts(text: str, score: int) -> None:
    assert read_score(text, cut=True).score == score


@pytest.mark.parametrize(
    ("text", "value"), [("85", 85), (" 850\n", 850), ("-3", -3), ("85.0", None), ("Score: 85", None)]
)
def test_the_books_reading_is_pythons_int(text: str, value: int | None) -> None:
    assert bare_integer(text) == value


@pytest.mark.parametrize(
    "text", ["9", "9 ", "{", '{"a":', "score ", "score *", "9/", "<think>", "100 is ", " \n", "a.", "-1"]
)
@pytest.mark.parametrize("cut", [True, False])
def test_a_megabyte_of_anything_is_read(text: str, cut: bool) -> None:
    """A repetition that is not bounded would take hours over some of these."""
    read_score(text * ((1 << 20) // len(text)), cut=cut)
