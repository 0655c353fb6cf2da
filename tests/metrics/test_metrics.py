from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from fastft.metrics import statistics
from fastft.metrics import text_metrics as metrics

REFERENCES = ["The cat sat on the mat.", "Water boils at 100 degrees."]


def test_equal_texts_score_100() -> None:
    scores = metrics.text_metrics(REFERENCES, REFERENCES)
    names = ("exact_match", "bleu", "chrf", "rouge_1", "rouge_2", "rouge_l")
    assert [scores[name] for name in names] == pytest.approx([100] * 6)
    assert (scores["n"], scores["words"], scores["looping"]) == (2, 5.5, 0)
    assert (scores["distinct_1"], scores["distinct_2"]) == (100, 100)


def test_other_texts_score_0() -> None:
    scores = metrics.text_metrics(["blue", "green"], REFERENCES)
    assert scores["exact_match"] == scores["rouge_1"] == scores["rouge_l"] == 0
    assert scores["bleu"] == 0


def test_exact_match_counts_texts_and_forgives_white_space_around_only() -> None:
    responses = [" The cat sat on the mat.\n", "Water  boils at 100 degrees."]
    assert metrics.exact_match(responses, REFERENCES) == 50
    assert metrics.exact_match(["the cat sat on the mat."], REFERENCES[:1]) == 0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # "the cat on mat" is common: precision 4/5, recall 4/6; the second response shares nothing.
    expected = 100 * (2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6) + 0) / 2
    assert metrics.rouge(["the cat mat on mat", "no"], REFERENCES)["rouge_l"] == pytest.approx(expected, abs=1e-9)


def test_bleu_is_the_papers() -> None:
    # One of seven tokens is wrong: 6/7, 4/6, 3/5 and 2/4 of the n-grams are right. Equal lengths: no penalty.
    expected = 100 * math.exp(sum(map(math.log, [6 / 7, 4 / 6, 3 / 5, 2 / 4])) / 4)
    assert metrics.bleu(["The dog sat on the mat."], REFERENCES[:1]) == pytest.approx(expected, abs=1e-9)


def test_bleu_is_of_the_corpus_and_punishes_short_responses() -> None:
    together = metrics.bleu([REFERENCES[0], ""], REFERENCES)
    assert together == pytest.approx(100 * math.exp(1 - 13 / 7), abs=1e-9)


def test_bleu_of_references_without_four_tokens_is_undefined() -> None:
    assert metrics.bleu(["geese"], ["geese"]) is None
    assert metrics.bleu([""], ["one two three four"]) == 0


WORDS = st.sampled_from(["the", "cat", "sat", "on", "a", "mat", ".", ",", "12.5", "über", "猫", "don't", "(hi)", "\n"])
TEXT = st.lists(WORDS, max_size=12).map(" ".join)


@given(st.lists(st.tuples(TEXT, TEXT, st.booleans()), min_size=1, max_size=6))
def test_bleu_chrf_and_rouge_are_their_packages_own(pairs: list[tuple[str, str, bool]]) -> None:
    """ROUGE is their mean over the responses whose references have a word, or two."""
    # References of Latin letters, most of them plain ones: others have words that rouge-score does not know.
    pairs = [(a, f"{b.replace('猫', 'on')} x1", near) for a, b, near in pairs]
    responses = [b + " " + a if near else a for a, b, near in pairs]
    references = [b for _, b, _ in pairs]
    bleu = metrics.bleu(responses, references)
    if bleu is not None:
        assert bleu == pytest.approx(sacrebleu.corpus_bleu(responses, [references], force=True).score, abs=1e-9)
    assert metrics.chrf(responses, references) == pytest.approx(
        sacrebleu.corpus_chrf(responses, [references]).score, abs=1e-9
    )
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(b, a) for a, b in zip(responses, references, strict=True)]
    found = metrics.rouge(responses, references)
    for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        enough = 2 if name == "rouge_2" else 1
        words = [re.findall("[a-z0-9]+", reference.lower()) for reference in references]
        of = [100 * score[key].fmeasure for score, one in zip(scores, words, strict=True) if len(one) >= enough]
        assert found[name] == (pytest.approx(np.mean(of), abs=1e-9) if of else None)


OTHER_SCRIPTS = [
    "猫坐在垫子上。",
    "ネコがマットに座っている。",
    "고양이가 매트 위에 앉아 있다.",
    "Кошка сидит на коврике.",
    "القطة تجلس على السجادة.",
    "बिल्ली चटाई पर बैठी है।",
    "แมวนั่งบนเสื่อ",
    "Η γάτα κάθεται στο χαλί.",
]


@pytest.mark.parametrize("text", OTHER_SCRIPTS)
def test_equal_texts_of_any_script_score_100_and_others_less(text: str) -> None:
    words = metrics.words_of(text)
    near = text.replace(words[1], words[0], 1)
    for response, is_all in ((text, True), (near, False)):
        scores = metrics.text_metrics([response], [text])
        for name in ("bleu", "chrf", "rouge_1", "rouge_2", "rouge_l"):
            assert (scores[name] == pytest.approx(100)) is is_all, name
            assert scores[name] > 0
    assert metrics.text_metrics(["cats"], [text])["rouge_l"] == 0


def test_chinese_is_cut_as_sacrebleu_cuts_it() -> None:
    responses, references = ["猫在垫子上睡觉。", "今天天气很好"], ["猫坐在垫子上。", "今天天气不好。"]
    expected = sacrebleu.corpus_bleu(responses, [references], tokenize="zh").score
    assert metrics.bleu(responses, references) == pytest.approx(expected, abs=1e-9)
    # Of the characters: "猫在垫子上" is common to seven and six, without the full stop.
    assert metrics.rouge(responses[:1], references[:1])["rouge_l"] == pytest.approx(
        100 * 2 * (5 / 7) * (5 / 6) / (5 / 7 + 5 / 6)
    )


def test_the_reference_says_what_a_word_is_so_that_two_runs_are_measured_alike() -> None:
    assert metrics.rouge(["The cat 猫"], ["The cat sat"])["rouge_1"] == pytest.approx(100 * 2 * 2 / 5)
    assert metrics.rouge(["猫 the"], ["猫"])["rouge_1"] == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(
    ("reference", "wrong"),
    [
        ("GPT-2 很好", "GPT-2 很坏"),
        ("The word 猫 means cat.", "The word 狗 means cat."),
        ("In Russian it is слово.", "In Russian it is дело."),
        ("The angle is π.", "The angle is φ."),
        ("Write ٣ in words.", "Write ٤ in words."),
    ],
)
def test_a_foreign_word_among_latin_ones_counts(reference: str, wrong: str) -> None:
    """rouge-score drops it, so that a wrong one scored 100."""
    assert metrics.rouge([reference], [reference]) == pytest.approx(
        dict.fromkeys(("rouge_1", "rouge_2", "rouge_l"), 100)
    )
    for value in metrics.rouge([wrong], [reference]).values():
        assert value is not None
        assert 0 < value < 100


@pytest.mark.parametrize("text", ["Übung macht den Meister, naïve façade", "120 m² and 1º, ½ of the 3ª"])
def test_latin_letters_are_cut_as_rouge_score_cuts_them(text: str) -> None:
    theirs = RougeScorer(["rouge1", "rougeL"]).score(text, text[4:])
    ours = metrics.rouge([text[4:]], [text])
    assert ours["rouge_1"] == pytest.approx(100 * theirs["rouge1"].fmeasure)
    assert ours["rouge_l"] == pytest.approx(100 * theirs["rougeL"].fmeasure)
    assert ours["rouge_1"] != 100


@pytest.mark.parametrize(
    ("text", "undefined"),
    [
        ("👍", {"bleu", "rouge_1", "rouge_2", "rouge_l"}),
        ("!?", {"bleu", "rouge_1", "rouge_2", "rouge_l"}),
        ("", {"bleu", "chrf", "rouge_1", "rouge_2", "rouge_l"}),
        ("geese", {"bleu", "rouge_2"}),
        ("猫", {"bleu", "rouge_2"}),
        ("42", {"bleu", "rouge_2"}),
        ("two words", {"bleu"}),
    ],
)
def test_what_a_metric_cannot_say_is_none_and_not_0(text: str, undefined: set[str]) -> None:
    scores: Any = metrics.text_metrics([text, text], [text, text])
    names = {"bleu", "chrf", "rouge_1", "rouge_2", "rouge_l"}
    assert {name for name in names if scores[name] is None} == undefined
    assert {name for name in names if scores["intervals"][name] is None} == undefined
    assert all(scores[name] == pytest.approx(100) for name in names - undefined)
    assert scores["left_out"] == {name: 2 for name in undefined if name.startswith("rouge")}


def test_an_undefined_response_is_left_out_of_the_mean_and_of_its_interval() -> None:
    responses, references = ["a b", "x", "a c", "👍"], ["a b", "x", "a b", "👍"]
    scores = metrics.text_metrics(responses, references)
    assert (scores["rouge_2"], scores["rouge_1"]) == (50, pytest.approx(250 / 3))
    assert scores["left_out"] == {"rouge_1": 1, "rouge_2": 2, "rouge_l": 1}
    assert scores["intervals"]["rouge_1"] == list(statistics.bootstrap_mean([100, 100, 50]) or ())
    assert [one["rouge_2"] for one in metrics.rouge_scores(responses, references)] == [100, None, 0, None]


def test_words_of_a_script_without_spaces_are_its_characters() -> None:
    assert metrics.words_of("I 喜欢 cats猫 don't") == ["I", "喜", "欢", "cats", "猫", "don't"]
    assert metrics.text_metrics(["我不知道"], ["x"])["words"] == 4


def test_a_resampled_corpus_scores_as_that_corpus() -> None:
    """Figures of weighted counts are those of the texts, each as often as its weight says."""
    responses, references = [*REFERENCES, "The cat boils."], [*REFERENCES, "The cat boils at 100 degrees on the mat."]
    weights = [0, 3, 2]
    repeated = [index for index, weight in enumerate(weights) for _ in range(weight)]
    again = metrics.measures([responses[i] for i in repeated], [references[i] for i in repeated])
    for name, measure in metrics.measures(responses, references).items():
        assert measure.statistic()(np.array([weights], float))[0] == pytest.approx(again[name].figure()), name


def test_intervals_are_of_the_same_name_and_hold_the_figure() -> None:
    scores: Any = metrics.text_metrics([*REFERENCES * 3, "x", "Water"], [*REFERENCES * 3, "y", "Water boils."])
    assert set(scores["intervals"]) == {
        *("exact_match", "bleu", "chrf", "rouge_1", "rouge_2", "rouge_l", "words", "looping"),
    }
    for name, (low, high) in scores["intervals"].items():
        assert low <= scores[name] <= high, name
    share = statistics.wilson(6, 8)
    assert share is not None
    assert scores["intervals"]["exact_match"] == pytest.approx([100 * share.low, 100 * share.high])


def test_intervals_of_one_response() -> None:
    intervals = metrics.text_metrics(["a"], ["a"])["intervals"]
    assert (intervals["bleu"], intervals["chrf"], intervals["words"]) == (None, None, None)
    assert intervals["exact_match"] == pytest.approx([20.65, 100], abs=0.01)


def test_mean_interval_is_over_the_scores_that_are_there() -> None:
    assert metrics.mean_interval([10, None, 90, 50]) == list(statistics.bootstrap_mean([10, 90, 50]) or ())
    assert metrics.mean_interval([None, 3]) is None


def test_distinct_counts_over_all_responses() -> None:
    assert metrics.distinct(["a b a", "a b"], 1) == 40
    assert metrics.distinct(["a b a", "a b"], 2) == pytest.approx(200 / 3)
    assert metrics.distinct(["", "a"], 2) is None
    assert metrics.distinct(["猫猫", "猫"], 1) == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("response", "yes"),
    [
        ("no " * 6, True),
        ("no " * 5, False),
        ("the cat " * 4, True),
        ("the cat " * 3, False),
        ("", False),
        ("我不知道" * 3, True),
        ("我不知道" * 2, False),
    ],
)
def test_loops(response: str, yes: bool) -> None:
    assert metrics.loops(response) is yes


CHOICES = ["owl", "daisy", "A tool", "trumpet."]


@pytest.mark.parametrize(
    ("response", "index"),
    [
        ("owl", 0),
        (" Daisy.\n", 1),
        ("B", 1),
        ("(c)", 2),
        ("**D**", 3),
        ("C) A tool", 2),
        ("B. It is a flower", 1),
        ("The answer is D.", 3),
        ("Answer: C", 2),
        ("I think the right choice is (A)", 0),
        ("a tool", 2),
        ("A daisy is a flower", None),
        ("The answer is a daisy", None),
        ("The answer is Danish", None),
        ("E", None),
        ("", None),
        ("it may be an owl", None),
    ],
)
def test_chosen(response: str, index: int | None) -> None:
    assert metrics.chosen(response, CHOICES) == index


@pytest.mark.parametrize(
    ("response", "choices", "index"),
    [
        ("Answer: A dog", ["A cat", "A dog"], 1),
        ("The answer is A dog.", ["A cat", "A dog"], 1),
        ("The correct answer is A cat", ["A dog", "A cat"], 1),
        ("The answer is Apple", ["Pear", "Apple"], 1),
        ("The answer is A", ["Pear", "Apple"], 0),
        ("US", ["us", "US"], 1),
        ("us", ["us", "US"], 0),
        ("Us.", ["us", "US"], 0),
    ],
)
def test_a_choices_text_goes_before_a_letter(response: str, choices: list[str], index: int) -> None:
    assert metrics.chosen(response, choices) == index


def entry(response: str, output: str = "x", **more: Any) -> dict[str, Any]:
    return {"instruction": "i", "input": "", "output": output, "model_response": response, **more}


def test_multiple_choice_counts_the_right_ones_and_the_unread() -> None:
    entries = [
        entry("B", "daisy", choices=CHOICES),
        entry("owl", "A", choices=CHOICES),
        entry("D", "owl", choices=CHOICES),
        entry("no idea", "owl", choices=CHOICES),
        entry("no choices", "owl"),
    ]
    found = metrics.multiple_choice(entries)
    assert found is not None
    assert (found["n"], found["accuracy"], found["unread"]) == (4, 50, 1)
    assert metrics.multiple_choice(entries[-1:]) is None


def test_categories_are_scored_apart_in_order_of_appearance() -> None:
    entries = [
        entry("x", category="b"),
        entry("y", "y"),
        entry("z", "z", category="a"),
        entry("", category="b", choices=["x", "w"]),
    ]
    found = metrics.summary(entries)
    assert (found["n"], found["exact_match"], found["empty_responses"]) == (4, 75, 1)
    assert found["multiple_choice"]["accuracy"] == 0
    rows = found["by_category"]
    assert list(rows) == ["b", "a"]
    assert (rows["b"]["n"], rows["b"]["exact_match"], rows["b"]["rouge_l"]) == (2, 50, 50)
    assert rows["b"]["empty_responses"] == rows["b"]["multiple_choice"]["unread"] == 1
    assert (rows["a"]["exact_match"], rows["a"]["multiple_choice"]) == (100, None)
    assert metrics.summary([entry("x")])["by_category"] == {}


@pytest.mark.parametrize(
    "metric", [metrics.exact_match, metrics.bleu, metrics.chrf, metrics.rouge, metrics.text_metrics]
)
def test_nothing_to_score_is_an_error(metric) -> None:
    with pytest.raises(ValueError, match="N > 0"):
        metric([], [])
    with pytest.raises(ValueError, match="2 responses and 1 references"):
        metric(["a", "b"], ["a"])
