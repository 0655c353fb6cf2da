"""Prompt templates: one object makes the training text, what is learned, the generation prompt and the extraction.

A template is a handful of fixed strings around the turns of a conversation; a record with an instruction and an output
is one of two turns. Because prompt and response are built from the same parts everywhere, training and generation
cannot drift apart, and what is learned needs no search for tokens. `fastft.data.chat_template` has the other kind of
template, a Jinja program as transformers has them.

Where the fixed strings are from: `alpaca` and `phi3`, the book's chapter 7 (github.com/rasbt/LLMs-from-scratch,
ch07/01_main-chapter-code: `gpt_instruction_finetuning.py`, `exercise_experiments.py`; as there, the response header is
the model's to write, so it is learned); `alpaca-two`, `PROMPT_DICT` of Stanford's train.py
(github.com/tatsu-lab/stanford_alpaca); `chatml`, OpenAI's markup as Qwen's tokenizers have it; `llama3`, Meta's model
cards; `vicuna`, version 1.1 of FastChat's conversation.py (github.com/lm-sys/FastChat).
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from fastft.common.errors import UserError
from fastft.common.nearest import did_you_mean
from fastft.data.records import Record, Role, Turn


class Special(str):
    """The text of a token that templates write and that is never read out of text. Its text is empty where it is the
    tokenizer's own end-of-text."""

    __slots__ = ()


END = Special("")
"""The end-of-text."""

Part = tuple[str, bool]
"""Text or a special token, and whether it is learned."""

TrainOn = Literal["responses", "all", "last"]


@dataclass(frozen=True, slots=True)
class Learn:
    """Which parts of an example are learned, beside what the data themselves say of a turn.

    Attributes:
        what: `responses`: each turn of these roles; `last`: of those of which the data say nothing the last one alone;
            `all`: everything, the template's own text too.
        roles: whose turns; of the assistant's the end is learned as well, of others the text alone.
    """

    what: TrainOn = "responses"
    roles: tuple[Role, ...] = ("assistant",)

    def of(self, turns: Sequence[Turn]) -> list[bool]:
        """Whether each turn is learned."""
        found = [
            turn.learned if turn.learned is not None else self.what == "all" or turn.role in (*self.roles, "raw")
            for turn in turns
        ]
        if self.what == "last":
            last = max((number for number, learned in enumerate(found) if learned), default=None)
            return [turn.learned is True or number == last for number, turn in enumerate(turns)]
        return found


RESPONSES, ALL, LAST = Learn(), Learn("all"), Learn("last")


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

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns of a conversation, which end with the answer; none where there is none but the question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """The fixed strings around turns.

    What is asked is `instruction` (+ before_input + input, where there is an input) (+ before_choices + a line for each
    option, where there are options: `A. owl`, `B. tool`, ...). An example is

        begin + (before_system + system + after_system)
        + before_instruction + what is asked + after_instruction
        + before_response + response_header + output + end + after_response     and so on, with `between` before
                                                                                each further question

    and what is learned of a turn of the assistant is `response_header + output + end`.

    Attributes:
        name: of the template.
        begin: before everything.
        system: the text of the system where an example has none of its own; empty: that section is left out.
        system_with_input: the same for an instruction with an input; `system` where it is None.
        before_system, after_system: around it.
        before_instruction, after_instruction: around what is asked.
        before_input, before_choices: before its sections.
        before_response: the end of the prompt.
        response_header: what the model writes before its answer.
        end: the special token that ends an answer; empty: end-of-text.
        after_response: after an answer.
        between: before each question but the first.
        special_tokens: which strings within the others are tokens by themselves.
        as_transformers: what of a text is learned begins with the token that holds its first character, where a token
            spans the boundary, as transformers' `return_assistant_tokens_mask` has it. Else such parts are encoded
            apart.
    """

    name: str
    before_instruction: str
    begin: str = ""
    system: str = ""
    system_with_input: str | None = None
    before_system: str = ""
    after_system: str = ""
    before_input: str = "\n\n"
    before_choices: str = "\n"
    after_instruction: str = ""
    before_response: str = ""
    response_header: str = ""
    end: str = ""
    after_response: str = ""
    between: str = ""
    special_tokens: tuple[str, ...] = ()
    as_transformers: bool = False

    def __post_init__(self) -> None:
        if not (self.before_response or self.response_header.strip()):
            raise UserError(
                f"template {self.name!r}: got a blank response header and no before_response, expected text that marks "
                "where the response starts; without it a generated response cannot be told from its prompt"
            )
        if self.end and self.end not in self.special_tokens:
            raise UserError(f"template {self.name!r}: got end {self.end!r}, expected one of its special_tokens")

    def prompt(self, instruction: str, input: str = "", choices: Sequence[str] = ()) -> str:
        """The text that a response is asked for with; an empty `input` and no `choices` leave their sections out."""
        asked = Turn("user", asked_in(self, instruction, input, choices))
        return text_of(self._written((asked,), (False,), bool(input)).parts) + self.before_response

    def prompt_of(self, question: Question) -> str:
        """The prompt of a record, with all that it has, as text."""
        return text_of(self.prompt_parts(question))

    def prompt_parts(self, question: Question) -> tuple[Part, ...]:
        """The prompt of a record: of a conversation, all but its last turn. Parts that training has apart are so here:
        their ids may be others than those of one text."""
        turns = with_options(question.turns, question.choices, self.before_choices)[:-1] or (self._question(question),)
        written = self._written(turns, RESPONSES.of(turns), bool(question.input), ends=False)
        if turns[0].role != "raw":
            written.add_fixed(self.before_response, False)
        return tuple((text, False) for text, _ in written.as_parts())

    def parts(self, record: Record, learn: Learn = RESPONSES) -> tuple[Part, ...]:
        """A record's whole text, and what of it is learned."""
        turns = with_options(record.turns, record.choices, self.before_choices)
        turns = turns or (self._question(record), Turn("assistant", record.output))
        return self._written(turns, learn.of(turns), bool(record.input), everything=learn.what == "all").as_parts()

    def response(self, output: str) -> str:
        """The text that follows the prompt in training, header first."""
        return self.response_header + output

    def extract(self, generated: str) -> str:
        """The response in the text generated after a prompt: every occurrence of the header goes, as in the book."""
        header = self.response_header.strip()
        return (generated.replace(header, "") if header else generated).strip()

    def description(self) -> dict[str, Any]:
        """Everything that it is, as JSON; `described` makes it anew."""
        return {**asdict(self), "special_tokens": list(self.special_tokens)}

    def _question(self, question: Question) -> Turn:
        return Turn("user", asked_in(self, question.instruction, question.input, question.choices))

    def _written(
        self,
        turns: Sequence[Turn],
        learned: Sequence[bool],
        has_input: bool,
        *,
        everything: bool = False,
        ends: bool = True,
    ) -> _Parts:
        """All turns with what is around them.

        Args:
            turns, learned: of them, and whether each is learned.
            has_input: whether a lone question has an input.
            everything: whether the fixed strings are learned too.
            ends: whether these are all turns there are, so that an end-of-text is behind segments.
        """
        written = _Parts(self.special_tokens)
        if turns[0].role != "raw":
            written.add_fixed(self.begin, everything)
            given = self.system if self.system_with_input is None or not has_input else self.system_with_input
            if given and turns[0].role != "system":
                written.add_fixed(self.before_system + given + self.after_system, everything)
        for number, (turn, is_learned) in enumerate(zip(turns, learned, strict=True)):
            if turn.role == "user" and number and turns[number - 1].role == "assistant":
                written.add_fixed(self.between, everything)
            self._add(written, turn, is_learned, everything)
        if ends and turns[-1].role == "raw":
            written.add(END, learned[-1])
        return written

    def _add(self, written: _Parts, turn: Turn, learned: bool, everything: bool) -> None:
        if turn.role == "raw":
            written.add(turn.text, learned)
        elif turn.role == "system":
            written.add_fixed(self.before_system, everything)
            written.add(turn.text, learned)
            written.add_fixed(self.after_system, everything)
        elif turn.role == "user":
            written.add_fixed(self.before_instruction, everything)
            written.add(turn.text, learned)
            written.add_fixed(self.after_instruction, everything)
        else:
            written.add_fixed(self.before_response, everything)
            written.begin()
            written.add(self.response_header + turn.text, learned)
            written.add(Special(self.end), learned)
            written.add_fixed(self.after_response, everything)


class _Parts:
    """The parts of an example while they are put together."""

    def __init__(self, special_tokens: Sequence[str]) -> None:
        self.parts: list[Part] = []
        self._special = special_tokens
        self._apart = False

    def begin(self) -> None:
        """What comes next is a part by itself, though the one before be learned like it: a response."""
        self._apart = True

    def add(self, text: str, learned: bool) -> None:
        """Text of the data, or a special token."""
        if not (text or isinstance(text, Special)):
            return
        last, last_learned = self.parts[-1] if self.parts else (END, learned)
        if isinstance(text, Special) or isinstance(last, Special) or last_learned != learned or self._apart:
            self.parts.append((text, learned))
        else:
            self.parts[-1] = (last + text, learned)
        self._apart = False

    def add_fixed(self, text: str, learned: bool) -> None:
        """Text of the template, with its special tokens."""
        for piece in split_at(text, self._special):
            self.add(piece, learned)

    def as_parts(self) -> tuple[Part, ...]:
        """All of them."""
        return tuple(self.parts)


def split_at(text: str, special_tokens: Sequence[str]) -> list[str]:
    """A text of a template as its text and its special tokens."""
    if not special_tokens:
        return [text] if text else []
    found = re.split("(" + "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) + ")", text)
    return [Special(piece) if number % 2 else piece for number, piece in enumerate(found) if piece]


def text_of(parts: Sequence[Part]) -> str:
    """Parts as one text."""
    return "".join(text for text, _ in parts)


class _Sections(Protocol):
    """What a template has before the sections of a question."""

    @property
    def before_input(self) -> str:
        """Before an input."""

    @property
    def before_choices(self) -> str:
        """Before options."""


def asked_in(template: _Sections, instruction: str, input: str = "", choices: Sequence[str] = ()) -> str:
    """What is asked: an instruction with its input and its options, where it has such."""
    with_input = template.before_input + input if input else ""
    return instruction + with_input + (template.before_choices + lettered(choices) if choices else "")


def with_options(turns: tuple[Turn, ...], choices: Sequence[str], before: str) -> tuple[Turn, ...]:
    """The turns of a conversation, if it is one, with the options of its last question behind that question."""
    if not (turns and choices):
        return turns
    *earlier, question, answer = turns
    return (*earlier, question._replace(text=question.text + before + lettered(choices)), answer)


def lettered(choices: Sequence[str]) -> str:
    """Options as lines, `A. owl`. An option's own further lines are indented, so that none looks like an option."""
    lines = zip(string.ascii_uppercase[: len(choices)], choices, strict=True)
    return "\n".join(f"{letter}. {choice}".replace("\n", "\n   ") for letter, choice in lines)


_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."

ALPACA = Template(
    name="alpaca",
    system=f"{_TASK}. {_REQUEST}",
    after_system="\n\n",
    before_instruction="### Instruction:\n",
    before_input="\n\n### Input:\n",
    response_header="\n\n### Response:\n",
    between="\n\n",
    before_choices="\n\n### Options:\n",
)

ALPACA_TWO = Template(
    name="alpaca-two",
    system=ALPACA.system,
    system_with_input=f"{_TASK}, paired with an input that provides further context. {_REQUEST}",
    after_system="\n\n",
    before_instruction="### Instruction:\n",
    before_input="\n\n### Input:\n",
    before_response="\n\n### Response:",
    between="\n\n",
    before_choices="\n\n### Options:\n",
)

PHI3 = Template(
    name="phi3",
    before_system="<|system|>\n",
    after_system="\n",
    before_instruction="<|user|>\n",
    before_input="\n",
    response_header="\n<|assistant|>:\n",
    between="\n",
    before_choices="\n",
)

CHATML = Template(
    name="chatml",
    before_system="<|im_start|>system\n",
    after_system="<|im_end|>\n",
    before_instruction="<|im_start|>user\n",
    after_instruction="<|im_end|>\n",
    before_response="<|im_start|>assistant\n",
    end="<|im_end|>",
    after_response="\n",
    special_tokens=("<|im_start|>", "<|im_end|>"),
    as_transformers=True,
)

LLAMA3 = Template(
    name="llama3",
    begin="<|begin_of_text|>",
    before_system="<|start_header_id|>system<|end_header_id|>\n\n",
    after_system="<|eot_id|>",
    before_instruction="<|start_header_id|>user<|end_header_id|>\n\n",
    after_instruction="<|eot_id|>",
    before_response="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    special_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    as_transformers=True,
)

VICUNA = Template(
    name="vicuna",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    after_system=" ",
    before_instruction="USER: ",
    before_response=" ASSISTANT:",
    response_header=" ",  # the model's: its first token has the space in front
    as_transformers=True,
)

PLAIN = Template(
    name="plain", after_system="\n\n", before_instruction="", before_input="\n", before_response="\n",
    between="\n",
)  # fmt: skip

TEMPLATES = {one.name: one for one in (ALPACA, ALPACA_TWO, PHI3, CHATML, LLAMA3, VICUNA, PLAIN)}

_OF_A_FILE = {field.name for field in fields(Template)} - {"name"}


def described(description: dict[str, Any], source: str) -> Template:
    """A template from what a file says of it.

    Args:
        description: its fields, such as `description()` gives; `name` may be missing.
        source: where they are from, for messages and as its name.

    Raises:
        UserError: a field is unknown, is missing, or has another type.
    """
    given = {"name": source, **description}
    for key, value in given.items():
        if key not in _OF_A_FILE | {"name"}:
            near = did_you_mean(str(key), sorted(_OF_A_FILE))
            raise UserError(f"{source}: got the field {key!r}{near}, expected some of {', '.join(sorted(_OF_A_FILE))}")
        wanted = {"special_tokens": list, "as_transformers": bool}.get(key, str)
        if not isinstance(value, wanted) and not (key == "system_with_input" and value is None):
            raise UserError(f"{source}: got {value!r} for {key}, expected {_KINDS[wanted]}")
    if "before_instruction" not in given:
        raise UserError(f"{source}: got no before_instruction, expected the text before what is asked (may be empty)")
    tokens = given.get("special_tokens", [])
    if not all(isinstance(token, str) and token.strip() for token in tokens) or len({*tokens}) < len(tokens):
        raise UserError(f"{source}: got special_tokens {tokens!r}, expected different texts")
    return Template(**{**given, "special_tokens": tuple(tokens)})


_KINDS = {str: "text", list: "a list of texts", bool: "true or false"}


def template_of_file(path: Path) -> Template:
    """The template in a YAML file of its fields.

    Raises:
        UserError: it cannot be read, or is none.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the template {path}: {error}; check the path") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: got no fields, expected some of {', '.join(sorted(_OF_A_FILE))}")
    return described(found, str(path))
