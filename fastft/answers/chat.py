"""`fastft chat`: a run's model in the terminal, one instruction a line, the response as it is written.

The models are tuned on single instructions: a line is a question of its own, and earlier ones are not remembered.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastft.answers.generation import AnswerOptions
from fastft.common.console import printable, say
from fastft.common.effects import check_effects
from fastft.data.chat_template import AnyTemplate
from fastft.data.encode import prompts_of
from fastft.data.records import Record
from fastft.decoding.answers import Answer
from fastft.decoding.decode import decode
from fastft.model.gpt2 import GPT2

HELP = "/input TEXT gives the next instruction an input, /quit or Ctrl-D ends, Ctrl-C stops a response"


@dataclass(frozen=True, kw_only=True)
class ChatOptions(AnswerOptions):
    """The options of `fastft chat`: those of answering."""


def chat(options: ChatOptions) -> None:
    """Answers the lines of standard input on standard output, until it ends.

    Raises:
        UserError: the run has no model, or an option can have no effect.
    """
    check_effects(options)
    model = options.answering(rows=1)
    template = options.asked_by()
    given = ""
    if sys.stdin.isatty():
        say(f"{options.run or options.model}, each line an instruction of its own; {HELP}")
    for turn, line in enumerate(_lines()):
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/input":
            given = rest.strip()
        elif command.startswith("/"):
            say(f"got {command}, expected an instruction; {HELP}")
        elif line:
            with contextlib.suppress(KeyboardInterrupt):
                _answer(model, options, template, Record(instruction=line, input=given, output=""), turn)
            print(flush=True)
            given = ""


def _lines() -> Iterator[str]:
    """The lines of standard input without white space around them; with history where a person types."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        yield from map(str.strip, sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 # gives `input` its history
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ").strip()


def _answer(model: GPT2, options: ChatOptions, template: AnyTemplate, question: Record, turn: int) -> None:
    """Prints the response to a question as it is written; one that leaves no room is told, and the chat goes on."""
    tokenizer = model.config.tokenizer
    (ids,) = prompts_of([question], template, tokenizer)
    if len(ids) >= model.config.n_ctx:
        say(f"the instruction fills the model's context of {model.config.n_ctx} tokens ({len(ids)}); shorten it")
        return
    show = _printer(template)

    def heard(answer: Answer) -> None:
        show(tokenizer.decode(answer.ids), False)

    for answer in decode(
        model,
        [ids],
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling,
        streams=[turn],
        heard=heard,
        graphs=True,
    ):
        show(tokenizer.decode(answer.ids), True)


def _printer(template: AnyTemplate) -> Callable[[str, bool], None]:
    """Prints what is new of a growing text; what may yet turn out otherwise waits for the end."""
    shown = ""

    def show(generated: str, is_whole: bool) -> None:
        nonlocal shown
        text = printable(template.extract(generated if is_whole else _settled(generated, template)))
        if text.startswith(shown):
            print(text[len(shown) :], end="", flush=True)
            shown = text

    return show


def _settled(generated: str, template: AnyTemplate) -> str:
    """The text but for an end that may be half a letter, or a part of the response header."""
    text = generated.rstrip("\ufffd")
    header = template.response_header.strip()
    kept = next((n for n in range(min(len(header), len(text)), 0, -1) if header.startswith(text[-n:])), 0)
    return text[: len(text) - kept]
