"""Figures of responses held against references, in percent, each with its 95% interval.

All functions take `responses` and `references`, two lists of the same length N > 0, and raise ValueError otherwise:
a mean over nothing is no number. They count what is the same text, not what means the same: a right answer in other
words scores low in all of them.

A metric is held as counts `[N, K]` of each response and the figure of their sum. So a figure of all responses, of
resampled ones and of two runs with swapped pairs are one formula, and no text is looked at twice.

What a metric cannot say is None and not 0: ROUGE-2 of a reference of one word, anything of an empty one. Such responses
are left out of the metric's mean, and it has the fewer of them; so responses that are their references have 100 in each
figure that there is. Which responses those are depends on the references alone, and so does what a word is: two runs
over the same entries are measured alike.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from fastft.data.records import category_of, choices_of, right_choice
from fastft.metrics.statistics import (
    LEVEL,
    RESAMPLES,
    SEED,
    Floats,
    Interval,
    Statistic,
    bootstrap_all,
    bootstrap_mean,
    wilson,
)

if TYPE_CHECKING:  # half a second, with what they bring: imported where a figure of theirs is asked for
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

INTERVAL_METHOD = (
    f"{LEVEL:.0%} intervals: BCa bootstrap over responses ({RESAMPLES:,} resamples, seed {SEED}), Wilson's for shares"
)

_MAX_ORDER = 4  # of BLEU's n-grams of tokens
_CHARACTER_ORDERS = 6  # of chrF's n-grams of characters
_BETA = 2  # chrF weighs recall so much more than precision
_PLAIN_WORD = re.compile(r"\w+")
_LOOP_WORDS, _LOOP_TIMES = 4, 3
_LETTER_ALONE = re.compile(r"\W*([A-Za-z])\W*")
_LETTER_FIRST = re.compile(r"\W*([A-Z])[.):](?=\s)")
_LABEL = re.compile(
    r"\W*(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:answer|choice|option)(?:\s+is\b)?\s*:?\s*", re.IGNORECASE
)
_LETTER_SAID = re.compile(r"(?i:\b(?:answer|choice|option)(?:\s+is)?)\s*:?\s*\W?([A-Z])(?![\w'’])")


# Scripts that put no space between words: Thai and Lao, Burmese, Khmer, kana, Han with its extensions.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_LETTERS_AND_DIGITS = {"Lu", "Ll", "Lt", "Lm", "Lo", "Nd"}
_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}

NAMES = ("exact_match", "bleu", "chrf", *_ROUGE, "words", "looping")
"""Of the metrics of `measures`, in the order of tables."""


class TextMetrics(TypedDict):
    """Figures over `n` responses: percent, but words; None where a figure is undefined."""

    n: int
    exact_match: float
    bleu: float | None
    chrf: float | None
    rouge_1: float | None
    rouge_2: float | None
    rouge_l: float | None
    words: float
    """Mean words of a response (`words_of`)."""
    distinct_1: float | None
    distinct_2: float | None
    looping: float
    """Share of responses in which some four words in a row stand three times or more."""
    intervals: dict[str, list[float] | None]
    """`[low, high]` of the figures that have one, by name; None where the figure is None, or a mean of one."""
    left_out: dict[str, int]
    """How many responses are not in a figure, since their references leave it undefined; by the names of those."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric of N responses as counts `[N, K]`, and the figure `[R]` that sums of them `[R, K]` give."""

    counts: Floats
    figure_of: Callable[[Floats], Floats]
    is_share: bool = False
    """Each response either has it or not: the first column is 0 or 1."""

    def figure(self) -> float:
        """The figure of all responses."""
        return float(self.figure_of(self.counts.sum(axis=0, keepdims=True))[0])

    def statistic(self) -> Statistic:
        """The figure as a function of weights `[R, N]`."""
        return lambda weights: self.figure_of(weights @ self.counts)


def intervals_of(measured: Mapping[str, Measure]) -> dict[str, list[float] | None]:
    """The 95% intervals of metrics of the same responses: Wilson's for a share, which has a width at 0 and 100 too."""
    shares = {name: _wilson(measure) for name, measure in measured.items() if measure.is_share}
    others = {name: measure.statistic() for name, measure in measured.items() if not measure.is_share}
    found: dict[str, Interval | None] = dict(shares)
    for n in {len(measured[name].counts) for name in others}:
        found |= bootstrap_all({name: of for name, of in others.items() if len(measured[name].counts) == n}, n)
    return {name: bounds(found[name]) for name in measured}


def is_exact(response: str, reference: str) -> bool:
    """Whether the two are the same text, apart from white space around it."""
    return response.strip() == reference.strip()


def names_it(response: str, reference: str) -> bool:
    """Whether a response says its reference word for word somewhere, letters' cases and marks apart."""
    said, wanted = (_PLAIN_WORD.findall(text.casefold()) for text in (response, reference))
    return bool(wanted) and any(said[at : at + len(wanted)] == wanted for at in range(len(said) - len(wanted) + 1))


def exact_match(responses: Sequence[str], references: Sequence[str]) -> float:
    """Percent of responses that are their reference's text, apart from white space around it."""
    return exact_match_measure(responses, references).figure()


def bleu(responses: Sequence[str], references: Sequence[str]) -> float | None:
    """Corpus BLEU-4 in percent (Papineni et al. 2002), equal to sacrebleu's (Post 2018: 13a tokens, exp smoothing).

    One figure for the whole corpus, not a mean over responses. The tokens are those of sacrebleu's `zh` where the
    reference is of a script without spaces. None where no reference has four tokens: BLEU-4 would be 0 there even for
    perfect responses.
    """
    measure = bleu_measure(responses, references)
    return None if measure is None else measure.figure()


def chrf(responses: Sequence[str], references: Sequence[str]) -> float | None:
    """Corpus chrF2 in percent (Popović 2015), equal to sacrebleu's: n-grams of 1 to 6 characters without white space.

    It needs no words, so that it also says something of short answers and of other scripts. None where no reference
    has a character.
    """
    measure = chrf_measure(responses, references)
    return None if measure is None else measure.figure()


def rouge(responses: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L F1 in percent (Lin 2004), by Google's rouge-score: rouge_1, rouge_2, rouge_l.

    Of single words, of two in a row, and of the longest common subsequence. Its words are runs of a-z and 0-9 after
    lower-casing, without stemming; where the reference has a letter of another script than Latin, or most of its
    letters are others, both texts' words are those of `words_of`, without punctuation. A reference without a word, or
    two for ROUGE-2, leaves its response out of the mean; None where none is left.
    """
    measured = rouge_measures(responses, references)
    return {name: measured[name].figure() if name in measured else None for name in _ROUGE}


def rouge_scores(responses: Sequence[str], references: Sequence[str]) -> list[dict[str, float | None]]:
    """The ROUGE F1 of each response in percent, by name; None where its reference leaves it undefined."""
    _check(responses, references)
    return [_rouge_of(response, reference) for response, reference in zip(responses, references, strict=True)]


def words_of(text: str) -> list[str]:
    """The words of a text: cut at white space, and every character of a script without spaces a word of its own."""
    return _UNSPACED.sub(r" \g<0> ", text).split()


def distinct(responses: Sequence[str], n: int) -> float | None:
    """Different n-grams of words in percent of all in the responses (Li et al. 2016); None where there are none.

    Low is repetitive, within a response or across them. It falls with the number of responses, so that it compares
    only runs over the same entries.
    """
    grams = [gram for response in responses for gram in _grams(words_of(response), n)]
    return 100.0 * len(set(grams)) / len(grams) if grams else None


def loops(response: str) -> bool:
    """Whether some four words in a row stand three times or more in a response, as where a model cannot stop."""
    return max(Counter(_grams(words_of(response), _LOOP_WORDS)).values(), default=0) >= _LOOP_TIMES


def chosen(response: str, choices: Sequence[str]) -> int | None:
    """Which choice a response names: by its text, or its letter where that is no word (`B`, `B) ...`, `answer is B`).

    None where it names none, which counts as wrong and is counted apart.
    """
    label = _LABEL.match(response)
    for said in (response, *([response[label.end() :]] if label else [])):
        if (index := _by_text(said, choices)) is not None:
            return index
    alone = _LETTER_ALONE.fullmatch(response)
    found = alone or _LETTER_FIRST.match(response) or _LETTER_SAID.search(response)
    index = string.ascii_uppercase.index(found[1].upper()) if found else len(choices)
    return index if index < len(choices) else None


def _by_text(said: str, choices: Sequence[str]) -> int | None:
    """The choice that is what was said; in other cases of letters where none is so exactly."""
    texts = [text.strip().removesuffix(".") for text in (said, *choices)]
    for fold in (str, str.casefold):
        first, *others = map(fold, texts)
        if first in others:
            return others.index(first)
    return None


def exact_match_measure(responses: Sequence[str], references: Sequence[str]) -> Measure:
    """`exact_match` as counts."""
    _check(responses, references)
    return _share(map(is_exact, responses, references))


def bleu_measure(responses: Sequence[str], references: Sequence[str]) -> Measure | None:
    """`bleu` as counts: length, reference's length, right and all n-grams of each order. None where undefined."""
    _check(responses, references)
    scores = [_bleu_scorer(b).sentence_score(a, [b]) for a, b in zip(responses, references, strict=True)]
    counts = np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores], dtype=np.float64)
    return Measure(counts, _bleu_of) if counts[:, 1].max() >= _MAX_ORDER else None


def chrf_measure(responses: Sequence[str], references: Sequence[str]) -> Measure | None:
    """`chrf` as counts: n-grams of the response, of the reference and common ones, of each order. None if undefined."""
    _check(responses, references)
    rows = [_chrf_counts(a, b) for a, b in zip(responses, references, strict=True)]
    return Measure(np.array(rows, dtype=np.float64), _chrf_of) if any(map(str.strip, references)) else None


def rouge_measures(responses: Sequence[str], references: Sequence[str]) -> dict[str, Measure]:
    """`rouge` as counts, each of the responses that it is defined for; without those that are for none."""
    scores = rouge_scores(responses, references)
    defined = {name: [one for score in scores if (one := score[name]) is not None] for name in _ROUGE}
    return {name: _mean(values) for name, values in defined.items() if values}


def measures(responses: Sequence[str], references: Sequence[str]) -> dict[str, Measure]:
    """The metrics of N responses that are figures of sums, by the `NAMES` of those that are defined."""
    found: dict[str, Measure | None] = {
        "exact_match": exact_match_measure(responses, references),
        "bleu": bleu_measure(responses, references),
        "chrf": chrf_measure(responses, references),
        **rouge_measures(responses, references),
        "words": _mean([float(len(words_of(response))) for response in responses]),
        "looping": _share(map(loops, responses)),
    }
    return {name: measure for name, measure in found.items() if measure is not None}


def text_metrics(responses: Sequence[str], references: Sequence[str]) -> TextMetrics:
    """All metrics of N responses, with their intervals."""
    found = measures(responses, references)
    figures = {name: measure.figure() for name, measure in found.items()}
    return TextMetrics(
        n=len(responses),
        exact_match=figures["exact_match"],
        bleu=figures.get("bleu"),
        chrf=figures.get("chrf"),
        rouge_1=figures.get("rouge_1"),
        rouge_2=figures.get("rouge_2"),
        rouge_l=figures.get("rouge_l"),
        words=figures["words"],
        distinct_1=distinct(responses, 1),
        distinct_2=distinct(responses, 2),
        looping=figures["looping"],
        intervals={**dict.fromkeys(NAMES), **intervals_of(found)},
        left_out={name: n for name in _ROUGE if (n := len(responses) - _n_of(found.get(name)))},
    )


def summary(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of answered entries (`output`, `model_response`), and under `by_category` those of each category.

    Categories are in order of first appearance; an entry without one is in none. Of no entries no figure is defined.
    """
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        if (category := category_of(entry)) is not None:
            parts.setdefault(category, []).append(entry)
    by_category = {category: _figures(part) for category, part in parts.items()}
    return {**_figures(entries), "by_category": by_category, "interval_method": INTERVAL_METHOD}


def mean_interval(scores: Sequence[int | float | None]) -> list[float] | None:
    """The 95% interval of a mean over the scores that are there: BCa bootstrap; None for fewer than two."""
    return bounds(bootstrap_mean([float(score) for score in scores if score is not None]))


def bounds(interval: Interval | None) -> list[float] | None:
    """An interval as JSON has it."""
    return None if interval is None else list(interval)


def multiple_choice(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How many of the entries with `choices` (`n`) name the right one, in percent (`accuracy`), with its interval.

    `unread` counts the responses that name none: they are not right. None where no entry has choices.
    """
    asked = [entry for entry in entries if choices_of(entry)]
    unread = sum(chosen(entry["model_response"], choices_of(entry)) is None for entry in asked)
    return {**accuracy(list(map(_names_the_right_one, asked))), "unread": unread} if asked else None


def multiple_choice_measure(entries: Sequence[Mapping[str, Any]]) -> Measure | None:
    """The accuracy of `multiple_choice` as counts of the entries with `choices`; None where there is none."""
    asked = [entry for entry in entries if choices_of(entry)]
    return _share(map(_names_the_right_one, asked)) if asked else None


def accuracy(right: Sequence[bool]) -> dict[str, Any]:
    """`n`, the `accuracy` in percent and its Wilson `interval` of N > 0 answers."""
    measure = _share(right)
    return {"n": len(right), "accuracy": measure.figure(), "interval": bounds(_wilson(measure))}


def _figures(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not entries:
        undefined = dict.fromkeys((*NAMES, "distinct_1", "distinct_2", "multiple_choice"))
        return {"n": 0, **undefined, "intervals": dict.fromkeys(NAMES), "left_out": {}, "empty_responses": 0}
    responses = [entry["model_response"] for entry in entries]
    return {
        **text_metrics(responses, [entry["output"] for entry in entries]),
        "empty_responses": sum(not response.strip() for response in responses),
        "multiple_choice": multiple_choice(entries),
    }


def _names_the_right_one(entry: Mapping[str, Any]) -> bool:
    choices = choices_of(entry)
    return chosen(entry["model_response"], choices) == right_choice(entry["output"], choices)


def _mean(values: Sequence[float]) -> Measure:
    counts = np.stack([np.array(values), np.ones(len(values))], axis=1)
    return Measure(counts, lambda sums: np.asarray(sums[:, 0] / sums[:, 1]))


def _share(has: Iterable[bool]) -> Measure:
    values = np.array([float(one) for one in has])
    counts = np.stack([values, np.ones(len(values))], axis=1)
    return Measure(counts, lambda sums: np.asarray(100 * sums[:, 0] / sums[:, 1]), is_share=True)


def _wilson(share: Measure) -> Interval | None:
    found = wilson(round(float(share.counts[:, 0].sum())), len(share.counts))
    return None if found is None else Interval(100 * found.low, 100 * found.high)


def _n_of(measure: Measure | None) -> int:
    return 0 if measure is None else len(measure.counts)


@cache
def _bleu(tokens: str) -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True, tokenize=tokens)  # an order that the counts do not depend on


def _bleu_scorer(reference: str) -> BLEU:
    """By the reference, so that responses of two runs are cut alike; sacrebleu's `zh` knows Han alone."""
    unspaced = _UNSPACED.findall(reference)
    if not _is_other_script(reference) or not unspaced:
        return _bleu("13a")
    return _bleu("zh" if all(one >= "\u3400" for one in unspaced) else "char")


class _Words:
    """Words of any script for rouge-score: `words_of` in lower case, without what is neither letter nor digit."""

    def tokenize(self, text: str) -> list[str]:
        kept = "".join(one if one.isalnum() or _is_mark(one) else " " for one in text)
        return words_of(kept.casefold())


def _is_mark(character: str) -> bool:
    """Whether it belongs to the letter before it, as vowels of Indian scripts do."""
    return unicodedata.category(character).startswith("M")


@cache
def _rouge_scorer(*, latin: bool) -> tuple[RougeScorer, Any]:
    """ROUGE and its tokenizer: rouge-score's own, or one of any script."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    words = DefaultTokenizer(use_stemmer=False) if latin else _Words()
    return RougeScorer(list(_ROUGE.values()), tokenizer=words), words


def _rouge_of(response: str, reference: str) -> dict[str, float | None]:
    is_other = _is_other_script(reference) or any(map(_is_no_latin, reference))
    scorer, words = _rouge_scorer(latin=not is_other)
    n = len(words.tokenize(reference))
    score = scorer.score(reference, response)
    return {
        name: 100 * float(score[key].fmeasure) if n >= (2 if key == "rouge2" else 1) else None
        for name, key in _ROUGE.items()
    }


def _is_other_script(reference: str) -> bool:
    """Whether most letters and digits are outside a-z and 0-9, which alone are words to rouge-score."""
    letters = [letter for letter in reference if letter.isalnum()]
    return 2 * sum(map(str.isascii, letters)) < len(letters)


def _is_no_latin(character: str) -> bool:
    """Whether it is a letter or a digit of another script: rouge-score would take it for a space, a wrong one too."""
    if character.isascii() or unicodedata.category(character) not in _LETTERS_AND_DIGITS:
        return False
    return "LATIN" not in unicodedata.name(character, "") and not unicodedata.normalize("NFKC", character).isascii()


def _grams(items: Sequence[str] | str, n: int) -> list[Any]:
    return [items[i : i + n] if isinstance(items, str) else tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def _bleu_of(sums: Floats) -> Floats:
    """BLEU of summed counts `[R, 10]`: the geometric mean of four precisions, times the penalty for short responses."""
    length, reference = sums[:, 0], sums[:, 1]
    right, total = sums[:, 2 : 2 + _MAX_ORDER], sums[:, 2 + _MAX_ORDER :]
    # Exponential smoothing: an order without a right n-gram counts as half of one, the next such as a quarter.
    missed = np.cumsum(right == 0, axis=1)
    smoothed = np.where(right == 0, 0.5**missed, right)
    is_zero = (total == 0).any(axis=1) | ~(right > 0).any(axis=1)
    precision = np.log(np.where(total > 0, smoothed, 1.0) / np.maximum(total, 1.0)).mean(axis=1)
    penalty = np.minimum(0.0, 1 - reference / np.maximum(length, 1.0))
    return np.where(is_zero, 0.0, np.minimum(100.0, 100 * np.exp(precision + penalty)))


def _chrf_counts(response: str, reference: str) -> list[int]:
    row: list[int] = []
    a, b = ("".join(text.split()) for text in (response, reference))
    for n in range(1, _CHARACTER_ORDERS + 1):
        mine, theirs = Counter(_grams(a, n)), Counter(_grams(b, n))
        # As in sacrebleu, n-grams do not count where the reference has none of that length.
        row += [mine.total() if theirs else 0, theirs.total(), (mine & theirs).total()]
    return row


def _chrf_of(sums: Floats) -> Floats:
    """ChrF of summed counts `[R, 18]`: the F-score of the mean precision and recall over the orders that both have."""
    mine, theirs, common = sums[:, 0::3], sums[:, 1::3], sums[:, 2::3]
    both = (mine > 0) & (theirs > 0)
    orders = np.maximum(both.sum(axis=1), 1)
    precision = np.where(both, common / np.maximum(mine, 1), 0).sum(axis=1) / orders
    recall = np.where(both, common / np.maximum(theirs, 1), 0).sum(axis=1) / orders
    weighted = _BETA**2 * precision + recall
    return np.asarray(100 * (1 + _BETA**2) * precision * recall / np.where(weighted > 0, weighted, 1.0))


def _check(responses: Sequence[str], references: Sequence[str]) -> None:
    if len(responses) != len(references) or not responses:
        raise ValueError(f"got {len(responses)} responses and {len(references)} references, expected N > 0 of each")
