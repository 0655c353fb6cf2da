"""What is asked about an entry: the book's question, the same with a reason first, and the one re-ask.

The book's is that of `ollama_evaluate.py` (github.com/rasbt/LLMs-from-scratch, ch07/01_main-chapter-code). Asking for
a reason before the score told good answers from bad ones best with small judges; a rubric is one more sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastft.data.prompts import ALPACA
from fastft.data.records import choices_of
from fastft.data.tokenizer import gpt2_tokenizer

Style = Literal["book", "reason"]

BOOK_NUM_CTX = 2048
SEED = 123
TEMPERATURE = 0

# The book leaves a reply unbounded; a judge that rambles would then write ten contexts full. What is longer than this
# is no integer, so the book's own figure does not change.
_BOOK_ROOM = 128
_REASON_ROOM = 512
LARGEST_ROOM = _REASON_ROOM
"""The most tokens that the reply to a first question may have."""
_REASON_CHARACTERS = 500

_SCORE = {"type": "integer", "minimum": 0, "maximum": 100}
_SCORE_SCHEMA = {"type": "object", "properties": {"score": _SCORE}, "required": ["score"]}
# A grammar makes the keys come in this order: a reason that is written after the score explains it away.
_REASON_SCHEMA = {
    "type": "object",
    "properties": {"reason": {"type": "string", "maxLength": _REASON_CHARACTERS}, "score": _SCORE},
    "required": ["reason", "score"],
}

_ENDINGS = {
    "book": "Respond with the integer number only.",
    "reason": (
        "Respond with a JSON object: first `reason`, one or two sentences on what is right and what is wrong in the "
        "response, then `score`, the integer number."
    ),
    # Without an example: small judges give its number back.
    "again": "Respond with a JSON object whose only member, `score`, is the integer number.",
}


@dataclass(frozen=True, slots=True)
class Question:
    """One request to a judge, in no server's protocol."""

    prompt: str
    room: int
    """The most tokens of the reply."""
    schema: Mapping[str, Any] | None = None
    """The JSON schema of the reply, or None for plain text."""
    num_ctx: int = BOOK_NUM_CTX
    """The context, in tokens, that prompt and reply must fit, where a server is told it."""
    wide: bool = False
    """Whether it is asked again with room for a trace, which may take minutes to be written."""


def first_question(entry: Mapping[str, Any], style: Style = "book", rubric: str = "") -> Question:
    """The question about one entry (`instruction`, `input`, `output`, `model_response`)."""
    if style == "reason":
        return Question(_prompt(entry, rubric, _ENDINGS["reason"]), _REASON_ROOM, _REASON_SCHEMA)
    return Question(_prompt(entry, rubric, _ENDINGS["book"]), _BOOK_ROOM)


def second_question(entry: Mapping[str, Any], rubric: str = "") -> Question:
    """The same after a reply without a score: a JSON schema leaves room for the number alone."""
    return Question(_prompt(entry, rubric, _ENDINGS["again"]), _BOOK_ROOM, _SCORE_SCHEMA)


def fitted(question: Question, needed: int, context_length: int | None) -> Question:
    """The question with the context for a prompt of at most `needed` tokens and the room of the reply."""
    return replace(question, num_ctx=num_ctx_for(needed + question.room, context_length))


def wider(question: Question, room: int, needed: int, context_length: int | None) -> Question | None:
    """The question with `room` tokens for the reply, or what the context leaves; None where that is no more."""
    left = room if context_length is None else min(room, context_length - needed)
    if left <= question.room:
        return None
    return fitted(replace(question, room=left, wide=True), needed, context_length)


def _prompt(entry: Mapping[str, Any], rubric: str, ending: str) -> str:
    """The book's prompt where there is no rubric and the ending is the book's.

    The entry is always formatted in Alpaca style, whatever template the model was trained with: scores of different
    templates stay comparable, and equal to the book's.
    """
    asked = ALPACA.prompt(entry["instruction"], entry.get("input") or "", choices_of(entry))
    return (
        f"Given the input `{asked}` "
        f"and correct output `{entry['output']}`, "
        f"score the model response `{entry['model_response']}`"
        " on a scale from 0 to 100, where 100 is the best score. "
        f"{rubric}{' ' if rubric else ''}{ending}"
    )


def token_bound(prompts: Sequence[str]) -> int:
    """More tokens than any tokenizer in use makes of the longest of the prompts and the chat template around it.

    The judge's own tokenizer is not at hand. GPT-2's count is: half as much again covers vocabularies of 32,000
    (Llama 2), one more token a digit those that split numbers into digits, 64 the chat template. It is an estimate,
    which the server's own count in each reply is held against (see `Judge`).
    """
    counts = [len(ids) for ids in gpt2_tokenizer().encode_many(prompts)]
    digits = [sum(map(str.isdigit, prompt)) for prompt in prompts]
    return max((3 * n // 2 + d + 64 for n, d in zip(counts, digits, strict=True)), default=0)


def num_ctx_for(needed: int, context_length: int | None) -> int:
    """The context, in tokens, of every request of a run: the book's 2048, doubled until `needed` fit.

    One figure for the whole run, since Ollama loads the model anew when it changes; in powers of two, so that a
    somewhat longer response does not change it and with it every question. Never less than 2048, else never more than
    the model has.
    """
    num_ctx = BOOK_NUM_CTX
    while num_ctx < needed:
        num_ctx *= 2
    return num_ctx if context_length is None else max(BOOK_NUM_CTX, min(num_ctx, context_length))
