from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter

import pytest

from fastft.data.sample import CATEGORIES, Fact, Question, sample_questions, sample_records

QUESTIONS = sample_questions()
N = len(QUESTIONS)
TRAIN_END = int(0.85 * N)
TEST_END = TRAIN_END + int(0.10 * N)
TRAIN, TEST, VALIDATION = QUESTIONS[:TRAIN_END], QUESTIONS[TRAIN_END:TEST_END], QUESTIONS[TEST_END:]
HELD_OUT = TEST + VALIDATION

# Categories whose answers are several tokens long and follow the operand letter by letter or number by number.
LONG_ANSWERS = {"capital letters", "sorting", "spelling"}


def asked(question: Question) -> tuple[str, str]:
    return question.record["instruction"], question.record["input"]


def test_the_set_is_large_enough_and_its_parts_fall_on_the_cut_by_position() -> None:
    assert 1_300 <= N <= 1_500
    assert len(TEST) >= 110
    assert len(VALIDATION) >= 55
    assert {question.part for question in TRAIN} == {"train"}
    assert {question.part for question in TEST} == {"test"}
    assert {question.part for question in VALIDATION} == {"validation"}


def test_records_are_the_questions_in_order_with_four_text_fields() -> None:
    records = sample_records()
    assert records == [question.record for question in QUESTIONS]
    for record in records:
        assert list(record) == ["instruction", "input", "output", "category"]
        assert all(isinstance(value, str) for value in record.values())
        assert record["instruction"]
        assert "{" not in record["instruction"]


def test_no_question_is_asked_twice_so_none_held_out_stands_in_training() -> None:
    def normal(question: Question) -> str:
        return " ".join(" ".join(asked(question)).lower().split())

    held_out = [normal(question) for question in HELD_OUT]
    assert len(set(held_out)) == len(held_out)
    assert not set(held_out) & {normal(question) for question in TRAIN}
    assert len({normal(question) for question in QUESTIONS}) == N


def test_each_held_out_fact_is_practised_in_other_wordings() -> None:
    practised: dict[Fact, set[str]] = {}
    for question in TRAIN:
        practised.setdefault(question.fact, set()).add(question.wording)
    for question in HELD_OUT:
        others = practised[question.fact]
        assert question.wording not in others
        assert len(others) >= 5, question
    assert max(Counter(question.fact for question in HELD_OUT).values()) == 1


def test_each_held_out_wording_is_practised_with_other_facts() -> None:
    practised = Counter((question.fact.category, question.wording) for question in TRAIN)
    for question in HELD_OUT:
        assert practised[question.fact.category, question.wording] >= 5, question


def test_every_category_is_held_out_in_test_and_validation() -> None:
    names = {category.name for category in CATEGORIES}
    assert {question.fact.category for question in TEST} == names
    assert {question.fact.category for question in VALIDATION} == names


def test_a_fact_has_one_answer() -> None:
    answers: dict[tuple[str, str], set[str]] = {}
    for question in QUESTIONS:
        answers.setdefault((question.fact.category, question.fact.operand), set()).add(question.fact.answer)
    assert all(len(found) == 1 for found in answers.values())
    assert 220 <= len(answers) <= 260
    assert sum(len(category.answers) for category in CATEGORIES) == len(answers)


@pytest.mark.parametrize("name", ["opposite", "plural", "past tense"])
def test_no_answer_serves_two_operands_nor_is_an_operand_itself(name: str) -> None:
    (answers,) = (category.answers for category in CATEGORIES if category.name == name)
    assert len(set(answers.values())) == len(answers)
    assert not set(answers) & set(answers.values())


def test_computed_answers_are_right() -> None:
    to_ten = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    to_twenty = [f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
    words = [*to_ten, "eleven", "twelve", *to_twenty, "twenty"]
    tables = {category.name: category.answers for category in CATEGORIES}
    assert all(words.index(answer) == 2 * words.index(operand) for operand, answer in tables["doubling"].items())
    assert all(
        answer == words[int(operand)] for operand, answer in tables["number in words"].items() if int(operand) <= 20
    )
    assert all(answer == f"{int(operand) * 1000} metres" for operand, answer in tables["unit conversion"].items())
    for operand, answer in tables["sorting"].items():
        assert [int(part) for part in answer.split(", ")] == sorted(int(part) for part in operand.split(", "))
        assert answer != operand


def test_answers_are_short_and_free_of_markers() -> None:
    for record in sample_records():
        assert 1 <= len(record["output"].split()) <= 6
        assert record["output"] == record["output"].strip()
        assert "### Response:" not in record["output"]
        assert all("<|endoftext|>" not in value for value in record.values())


def test_few_answers_are_long() -> None:
    assert {category.name for category in CATEGORIES} > LONG_ANSWERS
    assert sum(question.fact.category in LONG_ANSWERS for question in QUESTIONS) <= 0.10 * N


def test_a_category_asks_in_one_style_with_the_operand_after_a_space_or_alone() -> None:
    for category in CATEGORIES:
        inline = ["{}" in wording for wording in category.wordings]
        assert all(inline) or not any(inline), category.name
        assert all(" {}" in wording for wording in category.wordings if "{}" in wording)
        assert len(set(category.wordings)) == 6


def test_training_mixes_the_categories() -> None:
    names = {category.name for category in CATEGORIES}
    quarter = len(TRAIN) // 4
    for start in range(0, 4 * quarter, quarter):
        assert {question.fact.category for question in TRAIN[start : start + quarter]} == names
    repeats = sum(a.fact.category == b.fact.category for a, b in itertools.pairwise(TRAIN))
    assert repeats < 0.2 * len(TRAIN)


def test_the_set_is_the_same_on_every_python_and_leaves_random_alone() -> None:
    state = random.getstate()
    text = json.dumps(sample_records(), ensure_ascii=False)
    assert random.getstate() == state
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "d9a8ed5cfca97b3a"
