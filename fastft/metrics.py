"""Text metrics of responses against references, in percent: exact match, BLEU, ROUGE-L.

All functions take `responses` and `references`, two lists of the same length N > 0, and raise ValueError otherwise:
a mean over nothing is no number. They count what is the same text, not what means the same: a right answer in other
words scores low in all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

_MAX_ORDER = 4


class TextMetrics(TypedDict):
    """The three metrics in percent (0 to 100) over `n` responses; `bleu` is None where it is undefined."""

    n: int
    exact_match: float
    bleu: float | None
    rouge_l: float


def is_exact(response: str, reference: str) -> bool:
    """Whether the two are the same text, apart from white space around it."""
    return response.strip() == reference.strip()


def exact_match(responses: Sequence[str], references: Sequence[str]) -> float:
    """Percent of responses that are their reference's text, apart from white space around it."""
    _check(responses, references)
    return 100.0 * sum(map(is_exact, responses, references)) / len(responses)


def bleu(responses: Sequence[str], references: Sequence[str]) -> float | None:
    """Corpus BLEU-4 in percent (Papineni et al. 2002), as sacrebleu computes it (Post 2018: 13a tokens, exp smoothing).

    One figure for the whole corpus, not a mean over responses. None where no reference has four tokens: BLEU-4 would
    be 0 there even for perfect responses.
    """
    _check(responses, references)
    if _four_grams(references) == 0:
        return None
    # Summing logarithms gives 100.00000000000004 for equal texts.
    return min(100.0, sacrebleu.corpus_bleu(list(responses), [list(references)], force=True).score)


def _four_grams(texts: Sequence[str]) -> int:
    counted = sacrebleu.corpus_bleu(list(texts), [list(texts)], force=True)
    return int(counted.totals[_MAX_ORDER - 1])


def rouge_l(responses: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1 in percent (Lin 2004): the longest common subsequence of words, by Google's rouge-score.

    Its tokens are runs of a-z and 0-9 after lower-casing, without stemming; a text with no such token (another script)
    scores 0.
    """
    _check(responses, references)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(responses, references, strict=True)
    total = sum(float(scorer.score(reference, response)["rougeL"].fmeasure) for response, reference in pairs)
    return 100.0 * total / len(responses)


def text_metrics(responses: Sequence[str], references: Sequence[str]) -> TextMetrics:
    """All three metrics of N responses."""
    return TextMetrics(
        n=len(responses),
        exact_match=exact_match(responses, references),
        bleu=bleu(responses, references),
        rouge_l=rouge_l(responses, references),
    )


def by_category(
    categories: Sequence[str | None], responses: Sequence[str], references: Sequence[str]
) -> dict[str, TextMetrics]:
    """The metrics of each category, in order of first appearance.

    Args:
        categories: N names; a response whose category is None belongs to none. All None gives an empty result.
    """
    _check(responses, references)
    rows: dict[str, list[int]] = {}
    for row, (category, _) in enumerate(zip(categories, responses, strict=True)):
        if category is not None:
            rows.setdefault(category, []).append(row)
    return {
        category: text_metrics([responses[row] for row in chosen], [references[row] for row in chosen])
        for category, chosen in rows.items()
    }


def _check(responses: Sequence[str], references: Sequence[str]) -> None:
    if len(responses) != len(references) or not responses:
        raise ValueError(f"got {len(responses)} responses and {len(references)} references, expected N > 0 of each")
