"""Whether other programs make the ids of a prompt out of its text that training has before an answer."""

from __future__ import annotations

import itertools

from fastft.common.console import warn
from fastft.data.chat_template import AnyTemplate
from fastft.data.encode import prompts_of
from fastft.data.prompts import Special
from fastft.data.records import Record
from fastft.data.tokenizer import Tokenizer

_ASKED = Record(instruction="Name it.", output="")


def warn_of_other_ids(template: AnyTemplate, tokenizer: Tokenizer) -> None:
    """Says where they do not. White space at a prompt's end is the usual reason: GPT-2's tokenizer has one token for
    two line ends, but cuts them apart before a word, as training has them."""
    (own,) = prompts_of([_ASKED], template, tokenizer)
    if ids_of_text(template, tokenizer, _ASKED) != own:
        warn(
            f"the prompts of template {template.name} end in {template.prompt_of(_ASKED)[-2:]!r}, which transformers, "
            "llama.cpp and Ollama encode otherwise than training does before an answer: their answers may differ from "
            "fastft's; a template whose prompts do not end in two line ends, such as chatml, has this not"
        )


def ids_of_text(template: AnyTemplate, tokenizer: Tokenizer, asked: Record) -> list[int]:
    """The ids that a program gives a prompt which it has as one text: cut at special tokens, each piece by itself."""
    ids: list[int] = []
    for is_token, run in itertools.groupby(template.prompt_parts(asked), key=lambda part: isinstance(part[0], Special)):
        parts = list(run)
        ids += (
            [tokenizer.special(text) for text, _ in parts]
            if is_token
            else tokenizer.encode("".join(text for text, _ in parts))
        )
    return ids
