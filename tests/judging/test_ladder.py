from __future__ import annotations

import pytest

from fastft.judging.ladder import Reading, bare_integer, read_score
from fastft.judging.thoughts import spoken

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
    ("Spelling 90/100, facts 40/100, overall 60/100.", 60, "overall"),
    ("Score: 85. It has 2 of 3 facts.", 85, "labelled"),
    ("**Score:** 85", 85, "labelled"),
    ("Score:85", 85, "labelled"),
    ("The rating would be `85`, since 2 words differ.", 85, "labelled"),
    ('"score": 85, "reason": "unfinished', 85, "labelled"),
    ("about 40", 40, "only number"),
    ("85.", 85, "only number"),
    ("85.0", 85, "only number"),
    ("85%", 85, "only number"),
    ("85\nbecause it is right", 85, "only number"),
    ("On a scale from 0 to 100, I give 85.", 85, "only number"),
    ("I give 85 on a scale from 0 to 100, where 100 is the best.", 85, "only number"),
    ("I give 4/5, hence 80.", 80, "only number"),
    ("GPT-4 would have said 80.", 80, "only number"),
    ("In 1997, 80.", 80, "only number"),
    ("90 (out of 100)", 90, "only number"),
    ("Score: 90 (out of 100)", 90, "labelled"),
    ("85 points out of 100.", 85, "only number"),
    ("85 of 100", 85, "out of 100"),
    ("85 out of a possible 100", 85, "only number"),
    ("40 (where 100 is perfect)", 40, "only number"),
    ("a 40, with 100 being the maximum", 40, "only number"),
    ("40 (0 = worst, 100 = best)", 40, "only number"),
    ("30, since a perfect score is 100", 30, "only number"),
    ("100, a perfect score", 100, "only number"),
    # marked and overall forms go before single numbers
    ("Rating: [[70]]. I took off 30 points for the ending.", 70, "marked"),
    ("The words are right: \\boxed{70}, not 100.", 70, "marked"),
    ("<score>70</score> 30 off for the ending", 70, "marked"),
    ("Overall score: 85\nAccuracy score: 40\nFluency score: 45", 85, "overall"),
    ("Accuracy score: 40\nFluency score: 45\nOverall: **85**/100", 85, "overall"),
    ("Initial score: 60. Final score: 85", 85, "overall"),
    ("| | Score |\n|---|---|\n| Facts | 40 |\n| Style | 45 |\n| **Overall** | **85** |", 85, "overall"),
    ("Final Score: 92\n\nCorrectness 50/50, clarity 42/50", 92, "overall"),
    ("The final score is: 85", 85, "overall"),
    ("总分：85", 85, "overall"),
    ("Score: 85 (a perfect answer would be 100/100)", 85, "labelled"),
    ("Score (0-100): 85", 85, "labelled"),
    ("A score of 100 would be for a perfect answer. Score: 40", 40, "labelled"),
    ("Score: 85/100\n\n1. It is right 2. It is short", 85, "labelled"),
    ("{'score': 85, 'errors': 2}", 85, "labelled"),
    ("| Score | 85 |", 85, "labelled"),
    ("得分: 85分", 85, "labelled"),
    ("Оценка: 85", 85, "labelled"),
    ("Puntuación: 85", 85, "labelled"),
    ("On a scale of 1 to 10: 8, hence 80/100", 80, "out of 100"),
    ("Ich gebe 85 Punkte.", 85, "only number"),
    ("85 sur 100", 85, "out of 100"),
    ("85 von 100", 85, "out of 100"),
    ("85 из 100", 85, "out of 100"),
    ("### Evaluation\n- Facts: 80\n- Style: 90\n\n### Final Score: 84/100", 84, "overall"),
    ("**Score:** 85 / 100\n\n**Reasons:** 2 of 3 points; the model lost 15 points.", 85, "labelled"),
    ("<b>85</b>", 85, "only number"),
    ("Version 2 is better. 75", 75, "only number"),
    ("85分", 85, "only number"),
    ("I am 95% confident. Score: 70", 70, "labelled"),
    ("There are 3 errors, so 85.", 85, "only number"),
    ("80-90, so 85", 85, "only number"),
    ('{"accuracy": {"score": 40}, "overall": {"score": 85}}', 85, "json"),
    ('{"accuracy": 40, "overall_score": 85}', 85, "json"),
    ('{"score": {"facts": 40, "overall": 85}}', 85, "json"),
    ('[{"criterion": 1, "score": 85}]', 85, "json"),
    ('{"score": "85%"}', 85, "json"),
]  # fmt: skip

AMBIGUOUS = [
    "85 out of 100. Else it would be 0 out of 100!",
    "85/100 for the facts, 40/100 for the style",
    "Accuracy score: 40\nFluency score: 45",
    "Score: 60. No: Score: 85",
    "Final score: 60. Overall: 85",
    "[[60]] or rather [[85]]",
    "To reach a score of 100, the response must name all. I give 40.",
    "between 80 and 90",
    "85, 90",
    "The answer should be 42, not 41.",
    "| Facts | 40 |\n| Style | 45 |",
    '{"score": 40, "score": 85}',
    'Format: {"score": 100}. Mine: {"score": 85}',
    '{"facts": {"score": 40}, "style": {"score": 45}}',
    "Facts score: 40 good ones, so 45",
]
UNREADABLE = [
    "1. Correct 2. Concise",
    "1. Correct\n2. Concise",
    "Score:\n\n1. Correct\n2. Concise",
    "Score: 8/10. It has 2 errors.",
    "Rating: 4 out of 5, 100 words",
    "Score: 8 (on a scale of 1 to 10)",
    "[[8]], from 1-10",
    "Rating: 4 stars",
    "Score: 85.5. It has 2 errors.",
    "Score: 80-90. It has 2 errors.",
    "Score: 80 to 90, 5 for style",
    "Score: 100 - 15 = 85",
    "Score: 85 → 70",
    "Score: -10. It has 2 errors.",
    "Overall: 3 of 4 facts are right",
    "There are 3 errors in it.",
    "Step 1: correct.",
    "The correct answer is 42.",
    '{"errors": 2}',
    '{"score": "8/10", "out_of": 10}',
    '{"score": 8.5, "errors": 2}',
    '```json\n{"score": null, "errors": 2}\n```',
    "[[8/10]] 2 errors",
    "I would deduct 15 points.",
    "The score should be lower than 50.",
    "Score: < 50",
    "Score: at least 80",
    "Score: 80+",
    "Score: 70|80",
    "The temperature is 100 °C, as said.",
    "#1",
    "85 auf 100",
    "Score: 0.85",
    "Score: .85",
    "Score: 8,5",
]

THOUGHTS = [
    "20, no, 30</think>85",
    "<think>20</think>\n\n85",
    "<think>20 <think> 30</think>85",
    "<think>a <think>20</think> 30 </think>85",
    "<think>20</think>40<think>30</think></think>85",
    "<THINK>20</THINK>85",
    "<thinking>score: 20</thinking>85",
    "<thought>20</thought>85",
    "<reasoning>[[20]]</reasoning>85",
    "<seed:think>20</seed:think>85",
    "[THINK]20/100[/THINK]85",
    "20[/THINK]85",
    "◁think▷20◁/think▷85",
    "<|START_THINKING|>20<|END_THINKING|><|START_RESPONSE|>85<|END_RESPONSE|>",
    "<|begin_of_thought|>20<|end_of_thought|><|begin_of_solution|>85<|end_of_solution|>",
    "<|channel>thought\n20<channel|>85",
    "<|channel|>analysis<|message|>20<|end|><|start|>assistant<|channel|>final<|message|>85<|return|>",
    "20<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>85",
    "analysisThe score is 20.assistantfinal85",
    "<think>20</think><answer>85</answer>",
    "<think>20</think>85<|im_end|>",
]
ONLY_THOUGHTS = [
    "<think>20",
    "<think>20</thinking>85",
    "<think>The response is right. Score: 85",
    "<think>I shall write <answer>85</answer>",
    "[THINK]Score: 85",
    "<thinking>85/100",
    "85<think>no, 20",
    "<|channel|>analysis<|message|>Score: 85",
    "<|channel|>analysis<|message|>Score: 85<|end|><|start|>assistant<|channel|>commentary<|message|>85",
    "<|channel|>final<|message|>60<|end|><|start|>assistant<|channel|>analysis<|message|>Score: 85",
    "analysisThe score is 85.",
    "<|START_THINKING|>85",
    "◁think▷85",
]

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
    ("<think>20, no, 30", "its thinking has no end"),
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


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_several_numbers_that_may_be_the_score_are_none(text: str) -> None:
    reading = read_score(text)
    assert (reading.score, reading.rung) == (None, None)
    assert str(reading.reason).startswith("several numbers may be the score")


@pytest.mark.parametrize("text", UNREADABLE)
def test_a_score_that_cannot_be_read_is_not_replaced_by_another_number(text: str) -> None:
    reading = read_score(text)
    assert (reading.score, reading.rung) == (None, None)
    assert str(reading.reason).startswith("no score in it")


@pytest.mark.parametrize("text", THOUGHTS)
def test_the_score_is_read_from_the_answer_and_not_from_the_trace(text: str) -> None:
    assert read_score(text) == Reading(85, "integer")
    assert spoken(text).text == "85"


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("text", ONLY_THOUGHTS)
def test_a_trace_without_an_end_is_no_answer(text: str, cut: bool) -> None:
    reading = read_score(text, cut=cut)
    assert reading.score is None
    assert str(reading.reason).startswith("its thinking has no end")


def test_what_was_thought_is_told_from_what_was_said() -> None:
    assert spoken("85") == ("85", False, True)
    assert spoken("<think>20</think>") == ("", True, True)
    assert spoken("<think>20") == ("", True, False)
    assert spoken("x < y, [1] and <b>85</b>") == ("x < y, [1] and <b>85</b>", False, True)


@pytest.mark.parametrize(
    "text",
    [
        "8",
        "The score is 8",
        "Score: 8",
        '{"score": 8',
        "I gave 8/100",
        "2 of 3 facts are",
        '{"reason": "I would say score: 40',
    ],
)
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
    "text",
    [
        "1. ",
        "| 9 ",
        "overall ",
        "[[9",
        "</think>",
        "<|channel|>a<|message|>",
        "score (",
        "of 100 ",
        "no. 9 ",
        "9",
        "9 ",
        "{",
        '{"a":',
        "score ",
        "score *",
        "9/",
        "<think>",
        "100 is ",
        " \n",
        "a.",
        "-1",
    ],
)
@pytest.mark.parametrize("cut", [True, False])
def test_much_of_anything_is_read(text: str, cut: bool) -> None:
    """A repetition that is not bounded would take hours over some of these."""
    for characters in (1 << 16, 1 << 20):
        read_score(text * (characters // len(text)), cut=cut)
