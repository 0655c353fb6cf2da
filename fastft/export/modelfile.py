"""What Ollama makes a model of: a GGUF, the template of its prompts, and where answers end."""

from __future__ import annotations

import re
from pathlib import Path

from fastft.common.errors import UserError
from fastft.data.chat_template import AnyTemplate
from fastft.data.prompts import Template
from fastft.export.go_template import as_go
from fastft.model.gpt2 import GPT2Config

_NAME = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]{0,79}(?::[A-Za-z0-9_][\w.-]{0,79})?", re.ASCII)


def modelfile(gguf: str, template: AnyTemplate, config: GPT2Config) -> str:
    """The text of a `Modelfile`.

    Answers are the greedy ones that `fastft generate` gives: temperature 0, and no penalty on what has been said.

    Args:
        gguf: the name of the model's file, beside it.
        template: that the model was trained with.
        config: the model's.

    Raises:
        UserError: the template is a Jinja program, which is not to be had in Go's syntax.
    """
    if not isinstance(template, Template):
        raise UserError(
            f"got --to ollama and a run with the Jinja template {template.name}, expected one of fixed parts: Ollama's "
            "templates are in Go's syntax; --to gguf exports the model with the template as it is"
        )
    end_mark = config.tokenizer.end_mark
    lines = [
        f"FROM ./{gguf}",
        f'TEMPLATE """{as_go(template, end_mark)}"""',
        *(f'PARAMETER stop "{token}"' for token in dict.fromkeys((template.end or end_mark, end_mark))),
        f"PARAMETER num_ctx {config.n_ctx}",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
    ]
    return "\n".join(lines) + "\n"


def model_name(given: str | None, folder: Path) -> str:
    """The name that Ollama shall know a model by: the one given, or the run's folder's, in letters that Ollama takes.

    Raises:
        UserError: the one given has others.
    """
    if given is None:
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).strip(".-")[:80] or "fastft"
    if not _NAME.fullmatch(given):
        raise UserError(f"got --name {given}, expected a name as Ollama has them: letters, digits, - _ . and name:tag")
    return given
