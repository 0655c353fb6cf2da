"""`fastft chat`: a model in the terminal, one instruction a line, the response as it is written.

Under a template of conversations earlier questions and answers go along; else a line is a question of its own, as in
what the model was tuned on.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fastft.answers.generation import model_to_answer
from fastft.answers.options import ChatOptions
from fastft.common.console import printable, say
from fastft.common.effects import check_effects
from fastft.common.errors import UserError
from fastft.data.chat_template import AnyTemplate
from fastft.data.encode import prompts_of
from fastft.data.prompts import asked_in
from fastft.data.records import Record, Turn
from fastft.decoding.answers import Answer
from fastft.decoding.decode import decode
from fastft.model.gpt2 import GPT2

HELP = (
    "/input TEXT gives the next instruction an input, /system TEXT is the system's text from now on, /new forgets what "
    "was said, /quit or Ctrl-D ends, Ctrl-C stops a response"
)


@dataclass(slots=True)
class Talk:
    """What was said, as far as it goes along with the next question.

    Attributes:
        remembers: whether it does.
        system: the system's text; empty for none.
        said: earlier questions and answers, in turn.
    """

    remembers: bool
    system: str = ""
    said: list[Turn] = field(default_factory=list)

    def question(self, instruction: str, given: str, template: AnyTemplate) -> Record:
        """The next question, with all that goes along."""
        if not self.said and not self.system:
            return Record(instruction=instruction, input=given, output="")
        system = (Turn("system", self.system),) if self.system else ()
        asked = Turn("user", asked_in(template, instruction, given))
        return Record(instruction=instruction, output="", turns=(*system, *self.said, asked, Turn("assistant", "")))

    def ids(self, instruction: str, given: str, template: AnyTemplate, model: GPT2) -> list[int]:
        """The ids of the next question, with as much of what was said as leaves room for an answer. Where there is none
        without all that, nothing is forgotten."""
        before = self.said
        while True:
            (ids,) = prompts_of([self.question(instruction, given, template)], template, model.config.tokenizer)
            if len(ids) < model.config.n_ctx:
                for _ in range((len(before) - len(self.said)) // 2):
                    say("the context is full: the oldest question and its answer are forgotten")
                return ids
            if not self.said:
                self.said = before
                return ids
            self.said = self.said[2:]

    def answered(self, asked: Turn, answer: str) -> None:
        """Keeps a question and its answer."""
        if self.remembers:
            self.said += [asked, Turn("assistant", answer)]


def chat(options: ChatOptions) -> None:
    """Answers the lines of standard input on standard output, until it ends.

    Raises:
        UserError: the run has no model, an option can have no effect, or standard input is closed.
    """
    check_effects(options)
    if sys.stdin is None or sys.stdin.closed:
        raise UserError("standard input is closed; expected instructions on it, one a line")
    template = options.asked_by()
    model = model_to_answer(options, template, rows=1)
    talk = Talk(template.as_transformers if options.remember is None else options.remember)
    given = ""
    if sys.stdin.isatty():
        alone = "what was said goes along" if talk.remembers else "each line an instruction of its own"
        say(f"{options.run or options.model}, {alone}; {HELP}")
    for turn, line in enumerate(_lines()):
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/input":
            given = rest.strip()
        elif command == "/system":
            talk.system = rest.strip()
        elif command == "/new":
            talk.said.clear()
        elif command.startswith("/"):
            say(f"got {command}, expected an instruction; {HELP}")
        elif line:
            with contextlib.suppress(KeyboardInterrupt):
                _answer(model, options, template, talk, line, given, turn)
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


def _answer(
    model: GPT2, options: ChatOptions, template: AnyTemplate, talk: Talk, line: str, given: str, turn: int
) -> None:
    """Prints the response to a line as it is written; one that leaves no room is told, and the chat goes on. One that
    is stopped is forgotten."""
    tokenizer = model.config.tokenizer
    ids = talk.ids(line, given, template, model)
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
        talk.answered(Turn("user", asked_in(template, line, given)), template.extract(tokenizer.decode(answer.ids)))


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
