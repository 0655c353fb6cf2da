from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastft.encode import encode
from fastft.errors import UserError
from fastft.prompts import ALPACA, PHI3, TEMPLATES, Template
from fastft.records import Record
from fastft.tokenizer import END_OF_TEXT, gpt2_tokenizer

PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)


@pytest.mark.parametrize(
    ("template", "input", "prompt", "response"),
    [
        (ALPACA, "", PREAMBLE + "Spell it.", "\n\n### Response:\nC-A-T"),
        (ALPACA, "cat", PREAMBLE + "Spell it.\n\n### Input:\ncat", "\n\n### Response:\nC-A-T"),
        (PHI3, "", "<|user|>\nSpell it.", "\n<|assistant|>:\nC-A-T"),
        (PHI3, "cat", "<|user|>\nSpell it.\ncat", "\n<|assistant|>:\nC-A-T"),
    ],
    ids=["alpaca", "alpaca with input", "phi3", "phi3 with input"],
)
def test_the_exact_strings(template: Template, input: str, prompt: str, response: str) -> None:
    assert template.prompt("Spell it.", input) == prompt
    assert template.response("C-A-T") == response


def test_templates_are_found_by_name() -> None:
    assert TEMPLATES == {"alpaca": ALPACA, "phi3": PHI3}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@given(instruction=st.text(min_size=1), input=st.text(), output=st.text().map(str.strip))
@settings(max_examples=60)
def test_what_training_encodes_gives_the_output_back(
    template: Template, instruction: str, input: str, output: str
) -> None:
    """Prompt, mask, training text and extraction are of one make: a model that learned its text gives the output."""
    assume(template.response_header.strip() not in output)
    tokenizer = gpt2_tokenizer()
    record = Record(instruction=instruction, input=input, output=output)
    encoded = encode([record], template, tokenizer, mask_prompt=True, max_length=10_000)
    ids, start = encoded[0].tolist(), int(encoded.first_target[0])
    assert tokenizer.decode(ids[:start]) == template.prompt(instruction, input)
    assert tokenizer.decode(ids[:-1]) == template.prompt(instruction, input) + template.response(output)
    assert ids[-1] == END_OF_TEXT
    assert template.extract(tokenizer.decode(ids[start:-1])) == output


@pytest.mark.parametrize(
    ("template", "generated", "response"),
    [
        (ALPACA, "\n\n### Response:\nYes.", "Yes."),
        (ALPACA, " \n### Response: Yes.\n\n", "Yes."),
        (ALPACA, "\n\n### Response:\na ### Response: b ### Response:", "a  b"),
        (ALPACA, "no header at all", "no header at all"),
        (ALPACA, "### Response", "### Response"),
        (PHI3, "\n<|assistant|>:\na<|assistant|>:b", "ab"),
        (PHI3, "\n<|assistant|>\nYes.", "<|assistant|>\nYes."),
        (ALPACA, "", ""),
    ],
)
def test_every_occurrence_of_the_header_is_removed_as_in_the_book(
    template: Template, generated: str, response: str
) -> None:
    header = "### Response:" if template is ALPACA else "<|assistant|>:"
    assert template.extract(generated) == response
    assert template.extract(generated) == generated.replace(header, "").strip()


@pytest.mark.parametrize("header", ["", " \n"])
def test_a_template_that_swallows_the_response_is_refused(header: str) -> None:
    with pytest.raises(UserError, match=r"'mine'.*blank response header.*expected"):
        Template(name="mine", before_instruction="", before_input="\n", response_header=header)
