from __future__ import annotations

import functools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastft.common.errors import UserError
from fastft.data.chat_template import template_named
from fastft.data.encode import encode, prompts_of
from fastft.data.folder_tokenizer import with_special_tokens
from fastft.data.prompts import ALPACA, PHI3, TEMPLATES, Template, lettered
from fastft.data.records import Record
from fastft.data.tokenizer import Tokenizer, gpt2_tokenizer

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


CHOICES = ["owl", "a tool"]


@pytest.mark.parametrize(
    ("template", "input", "prompt"),
    [
        (ALPACA, "", PREAMBLE + "What is it?\n\n### Options:\nA. owl\nB. a tool"),
        (ALPACA, "eyes", PREAMBLE + "What is it?\n\n### Input:\neyes\n\n### Options:\nA. owl\nB. a tool"),
        (PHI3, "", "<|user|>\nWhat is it?\nA. owl\nB. a tool"),
        (PHI3, "eyes", "<|user|>\nWhat is it?\neyes\nA. owl\nB. a tool"),
    ],
)
def test_options_stand_in_the_prompt_with_their_letters(template: Template, input: str, prompt: str) -> None:
    assert template.prompt("What is it?", input, CHOICES) == prompt
    record = Record(instruction="What is it?", input=input, output="owl", extra={"choices": CHOICES})
    assert template.prompt_of(record) == prompt
    encoded = encode([record], template, gpt2_tokenizer(), max_length=1024)
    taught = gpt2_tokenizer().decode(encoded[0][:-1].tolist())
    assert taught == prompt + template.response("owl")


OPTION = st.text(st.sampled_from("aA. B\n"), min_size=1, max_size=9).filter(str.strip)
OPTIONS = st.lists(OPTION, min_size=2, max_size=4)


@given(one=OPTIONS, other=OPTIONS)
def test_other_options_make_another_prompt(one: list[str], other: list[str]) -> None:
    """Also where an option holds a line that looks like the next option."""
    for template in TEMPLATES.values():
        assert (template.prompt("a", "", one) == template.prompt("a", "", other)) == (one == other)


def test_an_option_cannot_pass_for_two() -> None:
    assert lettered(["a", "b\nB. c"]) != lettered(["a\nB. b", "c"])
    assert lettered(["a\nB. b", "c"]) == "A. a\n   B. b\nB. c"


def test_more_options_than_letters_are_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        lettered(["a"] * 27)


def test_templates_are_found_by_name() -> None:
    assert [*TEMPLATES] == ["alpaca", "alpaca-two", "phi3", "chatml", "llama3", "vicuna", "plain"]
    assert all(template_named(name) is template for name, template in TEMPLATES.items())


@functools.cache
def tokenizer_for(template: Template) -> Tokenizer:
    return with_special_tokens(gpt2_tokenizer(), template.special_tokens, template.end)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@given(instruction=st.text(min_size=1), input=st.text(), output=st.text().map(str.strip))
@settings(max_examples=60)
def test_what_training_encodes_gives_the_output_back(
    template: Template, instruction: str, input: str, output: str
) -> None:
    """Prompt, mask, training text and extraction are of one make: a model that learned its text gives the output."""
    assume(not template.response_header.strip() or template.response_header.strip() not in output)
    tokenizer = tokenizer_for(template)
    record = Record(instruction=instruction, input=input, output=output)
    encoded = encode([record], template, tokenizer, max_length=10_000)
    ids, start = encoded[0].tolist(), int(encoded.first_target[0])
    prompt = template.prompt(instruction, input)
    assert tokenizer.decode(ids[:-1]) == prompt + template.response(output)
    assert ids[-1] == tokenizer.end_of_text
    if not template.as_transformers:  # else a token may span both, and is learned
        assert tokenizer.decode(ids[:start]) == prompt
        assert template.extract(tokenizer.decode(ids[start:-1])) == output
        assert prompts_of([record], template, tokenizer) == [ids[:start]]


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
