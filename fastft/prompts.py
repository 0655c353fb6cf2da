"""Prompt templates: one object makes the training text, the label mask, the generation prompt and the extraction.

A template is a handful of fixed strings around a record's fields. Because the prompt and the response are built from
the same parts everywhere, training and generation cannot drift apart, and the label mask needs no search for tokens.

The two templates are those of the book's chapter 7 (github.com/rasbt/LLMs-from-scratch, ch07/01_main-chapter-code:
`gpt_instruction_finetuning.py` for Alpaca, `exercise_experiments.py` for Phi-3). As in the book, the prompt of both
ends after the instruction or the input: the response header is the model's to write, so it is always supervised.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastft.errors import UserError


@dataclass(frozen=True, slots=True)
class Template:
    """The fixed parts around a record.

    prompt   = before_instruction + instruction (+ before_input + input, where there is an input)
    response = response_header + output
    """

    name: str
    before_instruction: str
    before_input: str
    response_header: str

    def __post_init__(self) -> None:
        if not self.response_header.strip():
            raise UserError(
                f"template {self.name!r}: got a blank response header, expected text that marks where the response "
                "starts; without it a generated response cannot be told from its prompt"
            )

    def prompt(self, instruction: str, input: str = "") -> str:
        """The text that a response is asked for with; an empty `input` leaves its section out."""
        with_input = self.before_input + input if input else ""
        return self.before_instruction + instruction + with_input

    def response(self, output: str) -> str:
        """The text that follows the prompt in training, header first."""
        return self.response_header + output

    def extract(self, generated: str) -> str:
        """The response in the text generated after a prompt: every occurrence of the header goes, as in the book."""
        return generated.replace(self.response_header.strip(), "").strip()


ALPACA = Template(
    name="alpaca",
    before_instruction=(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\n"
    ),
    before_input="\n\n### Input:\n",
    response_header="\n\n### Response:\n",
)

PHI3 = Template(
    name="phi3",
    before_instruction="<|user|>\n",
    before_input="\n",
    response_header="\n<|assistant|>:\n",
)

TEMPLATES = {template.name: template for template in (ALPACA, PHI3)}
