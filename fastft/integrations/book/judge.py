"""The book's judge (chapter 7): a model in Ollama gives each response a score. `fastft evaluate` does more with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psutil

from fastft.common.console import meter
from fastft.common.errors import JudgeUnavailable
from fastft.integrations.book.data import format_input
from fastft.judging.ollama import OllamaServer
from fastft.judging.questions import Question
from fastft.judging.wire import NoAnswerError

_UNBOUNDED = -1
"""Ollama's word for a reply as long as it gets, as the book's are."""


def check_if_running(process_name: str) -> bool:
    """Whether a process of this machine has `process_name` in its name."""
    return any(process_name in (process.info["name"] or "") for process in psutil.process_iter(["name"]))


def query_model(prompt: str, model: str = "llama3", url: str = "http://localhost:11434/api/chat") -> str:
    """The answer of a model in Ollama: seed 123, temperature 0, a context of 2,048 tokens.

    Raises:
        JudgeUnavailable: no whole answer came, after retries.
        UserError: the address is none.
    """
    try:
        return OllamaServer(url, model).ask(Question(prompt, room=_UNBOUNDED)).content
    except NoAnswerError as failure:
        raise JudgeUnavailable(f"{model} at {url} gave no answer ({failure}); is `ollama serve` running?") from failure


def generate_model_scores(json_data: Sequence[Mapping[str, str]], json_key: str, model: str = "llama3") -> list[int]:
    """A score from 0 to 100 of each entry's response, which is its `json_key`; answers that are no integer are printed
    and left out."""
    scores = []
    with meter("Scoring entries", len(json_data)) as shown:
        for entry in json_data:
            score = query_model(_question(entry, entry[json_key]), model)
            try:
                scores.append(int(score))
            except ValueError:
                print(f"Could not convert score: {score}")
            shown.advance()
    return scores


def _question(entry: Mapping[str, str], response: str) -> str:
    return (
        f"Given the input `{format_input(entry)}` and correct output `{entry['output']}`, "
        f"score the model response `{response}` on a scale from 0 to 100, where 100 is the best score. "
        "Respond with the integer number only."
    )
