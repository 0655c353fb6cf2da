"""What is asked about an entry: the book's question, the same with a reason first, and the one re-ask; the same three
about a turn of a conversation.

The book's is that of `ollama_evaluate.py` (github.com/rasbt/LLMs-from-scratch, ch07/01_main-chapter-code). Asking for
a reason before the score told good answers from bad ones best with small judges; a rubric is one more sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


PromptOf = Callable[[Mapping[str, Any], str, str], str]
"""An entry, a rubric and what ends the prompt -> the prompt."""


def response_prompt(entry: Mapping[str, Any], rubric: str, ending: str) -> str:
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


def turn_prompt(entry: Mapping[str, Any], rubric: str, ending: str) -> str:
    """The prompt about an answer in a conversation, as MT-Bench's single-answer grading has it (Zheng et al. 2023,
    arXiv:2306.05685, section 3.1): the judge sees the whole conversation so far, with the right answers where there are
    some, and scores its last answer.

    Args:
        entry: `instruction`, `output` (empty where there is no right answer) and `model_response` of the turn; under
            `before` the same of the turns before it; perhaps `system`.
        rubric: what is good and what is bad.
        ending: what is to be replied.
    """
    system = f"### System:\n{entry['system']}\n\n" if entry.get("system") else ""
    before = entry["before"]
    said = "".join(_turn(turn, number, "The assistant answered") for number, turn in enumerate(before, start=1))
    last = _turn(entry, len(before) + 1, "The assistant's answer, which is to be scored")
    which = f"the assistant's answer in turn {len(before) + 1}" if before else "the assistant's answer"
    depends = " Judge it as a part of the conversation: it should fit what was said before." if before else ""
    right = " Hold it against the correct answer." if entry["output"] else ""
    return (
        f"Here is a conversation between a user and an assistant.\n\n{system}{said}{last}"
        f"Score {which} on a scale from 0 to 100, where 100 is the best score: is it correct, relevant and helpful, "
        f"and as detailed as the user asks for? Its length by itself does not matter.{depends}{right} "
        f"{rubric}{' ' if rubric else ''}{ending}"
    )


def _turn(turn: Mapping[str, Any], number: int, answered: str) -> str:
    reference = f"### Correct answer to turn {number}:\n{turn['output']}\n\n" if turn["output"] else ""
    question = f"### Turn {number}, the user said:\n{turn['instruction']}\n\n"
    return f"{question}{reference}### Turn {number}. {answered}:\n{turn['model_response']}\n\n"


def first_question(
    entry: Mapping[str, Any], style: Style = "book", rubric: str = "", prompt: PromptOf = response_prompt
) -> Question:
    """The question about one entry (`instruction`, `input`, `output`, `model_response`)."""
    if style == "reason":
        return Question(prompt(entry, rubric, _ENDINGS["reason"]), _REASON_ROOM, _REASON_SCHEMA)
    return Question(prompt(entry, rubric, _ENDINGS["book"]), _BOOK_ROOM)


def second_question(entry: Mapping[str, Any], rubric: str = "", prompt: PromptOf = response_prompt) -> Question:
    """The same after a reply without a score: a JSON schema leaves room for the number alone."""
    return Question(prompt(entry, rubric, _ENDINGS["again"]), _BOOK_ROOM, _SCORE_SCHEMA)


def fitted(question: Question, needed: int, context_length: int | None) -> Question:
    """The question with the context for a prompt of at most `needed` tokens and the room of the reply."""
    return replace(question, num_ctx=num_ctx_for(needed + question.room, context_length))


def wider(question: Question, room: int, needed: int, context_length: int | None) -> Question | None:
    """The question with `room` tokens for the reply, or what the context leaves; None where that is no more."""
    left = room if context_length is None else min(room, context_length - needed)
    if left <= question.room:
        return None
    return fitted(replace(question, room=left, wide=True), needed, context_length)


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
