"""Prompt templates: one object makes the training text, the label mask, the generation prompt and the extraction.

A template is a handful of fixed strings around a record's fields. Because the prompt and the response are built from
the same parts everywhere, training and generation cannot drift apart, and the label mask needs no search for tokens.

The two templates are those of the book's chapter 7 (github.com/rasbt/LLMs-from-scratch, ch07/01_main-chapter-code:
`gpt_instruction_finetuning.py` for Alpaca, `exercise_experiments.py` for Phi-3). As in the book, the prompt of both
ends after the instruction or the input: the response header is the model's to write, so it is always supervised.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fastft.common.errors import UserError


class Question(Protocol):
    """What a prompt is made of, such as a `fastft.data.records.Record`."""

    @property
    def instruction(self) -> str:
        """What is asked for."""

    @property
    def input(self) -> str:
        """What it is asked of; may be empty."""

    @property
    def choices(self) -> list[str]:
        """The options of a multiple-choice question, else none."""


@dataclass(frozen=True, slots=True)
class Template:
    """The fixed parts around a record.

    prompt   = before_instruction + instruction (+ before_input + input, where there is an input)
               (+ before_choices + a line for each option, where there are options: `A. owl`, `B. tool`, ...)
    response = response_header + output
    """

    name: str
    before_instruction: str
    before_input: str
    response_header: str
    before_choices: str = "\n"

    def __post_init__(self) -> None:
        if not self.response_header.strip():
            raise UserError(
                f"template {self.name!r}: got a blank response header, expected text that marks where the response "
                "starts; without it a generated response cannot be told from its prompt"
            )

    def prompt(self, instruction: str, input: str = "", choices: Sequence[str] = ()) -> str:
        """The text that a response is asked for with; an empty `input` and no `choices` leave their sections out."""
        with_input = self.before_input + input if input else ""
        with_choices = self.before_choices + lettered(choices) if choices else ""
        return self.before_instruction + instruction + with_input + with_choices

    def prompt_of(self, question: Question) -> str:
        """The prompt of a record, with all that it has."""
        return self.prompt(question.instruction, question.input, question.choices)

    def response(self, output: str) -> str:
        """The text that follows the prompt in training, header first."""
        return self.response_header + output

    def extract(self, generated: str) -> str:
        """The response in the text generated after a prompt: every occurrence of the header goes, as in the book."""
        return generated.replace(self.response_header.strip(), "").strip()


def lettered(choices: Sequence[str]) -> str:
    """Options as lines, `A. owl`. An option's own further lines are indented, so that none looks like an option."""
    lines = zip(string.ascii_uppercase[: len(choices)], choices, strict=True)
    return "\n".join(f"{letter}. {choice}".replace("\n", "\n   ") for letter, choice in lines)


ALPACA = Template(
    name="alpaca",
    before_instruction=(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\n"
    ),
    before_input="\n\n### Input:\n",
    response_header="\n\n### Response:\n",
    before_choices="\n\n### Options:\n",
)

PHI3 = Template(
    name="phi3",
    before_instruction="<|user|>\n",
    before_input="\n",
    response_header="\n<|assistant|>:\n",
    before_choices="\n",
)

TEMPLATES = {template.name: template for template in (ALPACA, PHI3)}
