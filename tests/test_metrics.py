from __future__ import annotations

import math

import pytest

from fastft import metrics

REFERENCES = ["The cat sat on the mat.", "Water boils at 100 degrees."]


def test_equal_texts_score_100() -> None:
    assert metrics.text_metrics(REFERENCES, REFERENCES) == {"n": 2, "exact_match": 100, "bleu": 100, "rouge_l": 100}


def test_other_texts_score_0() -> None:
    scores = metrics.text_metrics(["blue", "green"], REFERENCES)
    assert scores["exact_match"] == scores["rouge_l"] == 0
    assert scores["bleu"] == 0


def test_exact_match_counts_texts_and_forgives_white_space_around_only() -> None:
    responses = [" The cat sat on the mat.\n", "Water  boils at 100 degrees."]
    assert metrics.exact_match(responses, REFERENCES) == 50
    assert metrics.exact_match(["the cat sat on the mat."], REFERENCES[:1]) == 0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # "the cat on mat" is common: precision 4/5, recall 4/6; the second response shares nothing.
    expected = 100 * (2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6) + 0) / 2
    assert metrics.rouge_l(["the cat mat on mat", "no"], REFERENCES) == pytest.approx(expected, abs=1e-9)


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


def test_categories_are_scored_apart_in_order_of_appearance() -> None:
    scores = metrics.by_category(["b", None, "a", "b"], ["x", "y", "z", "wrong"], ["x", "y", "z", "x"])
    assert list(scores) == ["b", "a"]
    assert (scores["b"]["n"], scores["b"]["exact_match"], scores["b"]["rouge_l"]) == (2, 50, 50)
    assert scores["a"]["exact_match"] == 100
    assert metrics.by_category([None], ["x"], ["x"]) == {}


@pytest.mark.parametrize("metric", [metrics.exact_match, metrics.bleu, metrics.rouge_l, metrics.text_metrics])
def test_nothing_to_score_is_an_error(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="N > 0"):
        metric([], [])
    with pytest.raises(ValueError, match="2 responses and 1 references"):
        metric(["a", "b"], ["a"])


def test_categories_of_another_length_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        metrics.by_category(["a"], ["x", "y"], ["x", "y"])
