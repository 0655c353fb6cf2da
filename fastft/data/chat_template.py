"""Jinja chat templates, as transformers has them: read, for training and prompts; written, for what is exported.

What is learned of a conversation is what stands within `{% generation %} ... {% endgeneration %}`, as transformers'
`apply_chat_template(..., return_assistant_tokens_mask=True)` has it (transformers/utils/chat_template_utils.py).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from fastft.common.errors import UserError
from fastft.common.nearest import did_you_mean
from fastft.data.prompts import (
    RESPONSES,
    TEMPLATES,
    Learn,
    Part,
    Question,
    Special,
    Template,
    asked_in,
    described,
    split_at,
    template_of_file,
    text_of,
    with_options,
)
from fastft.data.records import END_OF_TEXT_MARK, Record, Turn

_OPEN, _CLOSE = "\ue0f0\ue0f1<", ">\ue0f1\ue0f0"
"""Around what is learned while a template is rendered: private characters, of which no text has these in a row."""
_LIKE_A_TOKEN = re.compile(r"<[|｜][\w ./:▁-]+[|｜]>|</?s>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>")
"""What special tokens look like. A template writes some of them out, and leaves others to `bos_token`, `eos_token`."""
_MADE_OF = re.compile(r"\{#- made by fastft of (\{.*?\}) -#\}")
"""Before a program that was made of somebody's own fixed parts: these, from which the template is made again."""
JINJA_SUFFIXES = (".jinja", ".jinja2", ".j2")


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`."""

    tags = {"generation"}  # noqa: RUF012 # as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        """Renders what is within between two marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


@functools.cache
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _as_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _refuse_the_date}
    return environment.from_string(source)


def _as_json(value: Any, indent: int | None = None) -> str:
    """As transformers has it: not escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> Any:
    raise jinja2.TemplateError(message)


def _refuse_the_date(_: str) -> Any:
    raise jinja2.TemplateError("it writes the date of the day, which makes other examples tomorrow")


@dataclass(frozen=True, slots=True)
class JinjaTemplate:
    """A Jinja program that writes a conversation.

    Attributes:
        name: of the template.
        source: the program.
        begin_token: what it gets as `bos_token`.
        end_token: what it gets as `eos_token`; that of the tokenizer's end-of-text where it is empty.

    Raises:
        UserError: it is none, marks nothing as learned, or does not end a response with a special token.
    """

    name: str
    source: str
    begin_token: str = ""
    end_token: str = ""
    as_transformers = True
    response_header = ""
    before_input = "\n\n"
    before_choices = "\n\n"

    def __post_init__(self) -> None:
        try:
            _compiled(self.source)
        except jinja2.TemplateError as error:
            raise UserError(f"template {self.name}: it is no Jinja program: {error}") from error
        if "{%" not in self.source or not re.search(r"\{%-?\s*generation\s*-?%\}", self.source):
            raise UserError(
                f"template {self.name}: got no {{% generation %}} ... {{% endgeneration %}}, expected it around what "
                "the assistant writes, its end included: what is learned is told by it"
            )
        if not isinstance(self._last_learned(), Special):
            raise UserError(
                f"template {self.name}: got a response that ends without a special token, expected eos_token or a "
                "token such as <|im_end|> before {% endgeneration %}: else a model never learns where to stop"
            )
        self._check_prompt()

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The tokens that it writes, beside the end-of-text."""
        named = {"bos_token": self.begin_token, "eos_token": self.end_token}
        found = [*(token for name, token in named.items() if name in self.source), *_LIKE_A_TOKEN.findall(self.source)]
        return tuple(token for token in dict.fromkeys(found) if token and token != END_OF_TEXT_MARK)

    @property
    def end(self) -> str:
        """The special token that ends an answer; empty: end-of-text."""
        return str(self._last_learned())

    def prompt(self, instruction: str, input: str = "", choices: Sequence[str] = ()) -> str:
        """See `Template.prompt`."""
        asked = asked_in(self, instruction, input, choices)
        return text_of(self._rendered((Turn("user", asked),), answer=True))

    def prompt_of(self, question: Question) -> str:
        """See `Template.prompt_of`."""
        return text_of(self.prompt_parts(question))

    def prompt_parts(self, question: Question) -> tuple[Part, ...]:
        """See `Template.prompt_parts`."""
        turns = with_options(question.turns, question.choices, self.before_choices)[:-1]
        turns = turns or (Turn("user", self._asked(question)),)
        return tuple((text, False) for text, _ in self._rendered(turns, answer=True))

    def parts(self, record: Record, learn: Learn = RESPONSES) -> tuple[Part, ...]:
        """See `Template.parts`.

        Raises:
            UserError: the record, or `learn`, asks for other parts than the program marks.
        """
        turns = with_options(record.turns, record.choices, self.before_choices)
        turns = turns or (Turn("user", self._asked(record)), Turn("assistant", record.output))
        if turns[0].role == "raw":
            return Template(name=self.name, before_instruction="", before_response=" ").parts(record, learn)
        if set(learn.roles) != {"assistant"} or any(turn.learned for turn in turns if turn.role != "assistant"):
            raise UserError(
                f"template {self.name}: got turns of others than the assistant to be learned, and a Jinja template "
                "marks the assistant's alone; expected --train_roles assistant, or a template of fixed parts"
            )
        parts = self._rendered(turns, answer=False)
        everything = learn.what == "all"
        if everything and any(turn.learned is False for turn in turns if turn.role != "assistant"):
            raise UserError(
                f"template {self.name}: got --train_on all and a turn of another than the assistant that is not to be "
                "learned, and a Jinja template marks the assistant's alone; expected --train_on responses"
            )
        if everything and all(turn.learned is not False for turn in turns):
            return tuple((text, True) for text, _ in parts)
        wanted = [is_on for turn, is_on in zip(turns, learn.of(turns), strict=True) if turn.role == "assistant"]
        return _of_turns(parts, wanted, self.name, everything)

    def response(self, output: str) -> str:
        """See `Template.response`."""
        return output

    def extract(self, generated: str) -> str:
        """See `Template.extract`."""
        return generated.strip()

    def description(self) -> dict[str, Any]:
        """See `Template.description`."""
        return {"name": self.name, "jinja": self.source, "begin_token": self.begin_token, "end_token": self.end_token}

    def _asked(self, question: Question) -> str:
        return asked_in(self, question.instruction, question.input, question.choices)

    def _last_learned(self) -> str:
        tried = self._rendered(_TRIED, answer=False)
        learned = [text for text, is_learned in tried if is_learned]
        return learned[-1] if learned else ""

    def _check_prompt(self) -> None:
        """Refuses a program that asks for an answer by another text than it has before one."""
        trained, prompt = self._rendered(_TRIED, answer=False), text_of(self._rendered(_TRIED[:1], answer=True))
        before = text_of([*itertools.takewhile(lambda part: not part[1], trained)])
        if not (prompt.startswith(before) and text_of(trained).startswith(prompt)):
            raise UserError(
                f"template {self.name}: got the prompt {prompt!r} with add_generation_prompt, and {before!r} before "
                "what is learned of an answer; expected the same: a model would be asked in another way than it was "
                "trained"
            )

    def _rendered(self, turns: Sequence[Turn], *, answer: bool) -> list[Part]:
        """What the program writes, cut at its special tokens, and what of it is learned."""
        end = self.end_token or END_OF_TEXT_MARK
        try:
            text = _compiled(self.source).render(
                messages=[{"role": turn.role, "content": turn.text} for turn in turns],
                bos_token=self.begin_token, eos_token=end, add_generation_prompt=answer,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, AttributeError, KeyError) as error:
            raise UserError(f"template {self.name}: it cannot write a conversation: {error}") from error
        self._check_contents(turns, text)
        tokens = (*self.special_tokens, end)
        parts: list[Part] = []
        for number, piece in enumerate(re.split(f"{_OPEN}|{_CLOSE}", text)):
            parts += [(_as_end(one, end), number % 2 == 1) for one in split_at(piece, tokens)]
        return parts

    def _check_contents(self, turns: Sequence[Turn], text: str) -> None:
        """What a program writes and what the data hold cannot be told apart afterwards."""
        for turn in turns:
            for token in (*self.special_tokens, self.end_token or END_OF_TEXT_MARK, _OPEN, _CLOSE):
                if token in turn.text:
                    raise UserError(
                        f"template {self.name}: got a turn of the {turn.role} that holds {token}, which the template "
                        "writes as a token, expected text without it: leave that record out"
                    )
            if turn.text.strip() not in text:
                raise UserError(
                    f"template {self.name}: got a turn of the {turn.role} that it leaves out or changes, expected a "
                    "program that writes every turn as it is; change the program, or the data"
                )


def _as_end(piece: str, end: str) -> str:
    return Special("") if isinstance(piece, Special) and piece == end == END_OF_TEXT_MARK else piece


def _of_turns(parts: Sequence[Part], wanted: Sequence[bool], name: str, everything: bool) -> tuple[Part, ...]:
    """The marks of turns that are not wanted taken away, the rest marked where `everything` is learned; each run of
    learned parts is one turn of the assistant."""
    found: list[Part] = []
    turn, inside = -1, False
    for text, learned in parts:
        turn += learned and not inside
        inside = learned
        found.append((text, turn < len(wanted) and wanted[turn] if learned else everything))
    if turn + 1 != len(wanted):
        raise UserError(
            f"template {name}: got {turn + 1} marked responses of a conversation with {len(wanted)}, expected "
            "{% generation %} around each turn of the assistant"
        )
    return tuple(found)


_TRIED = (Turn("user", "a"), Turn("assistant", "b"))

AnyTemplate = Template | JinjaTemplate


def template_named(name: str) -> AnyTemplate:
    """A template by its name, or from a file: YAML of its fixed parts, or a Jinja program.

    Raises:
        UserError: there is none of that name, or the file cannot be used.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if path.suffix in (*JINJA_SUFFIXES, ".json"):
        return _jinja_of_file(path)
    if path.suffix in (".yaml", ".yml"):
        return template_of_file(path)
    raise UserError(
        f"got the template {name!r}{did_you_mean(name, [*TEMPLATES])}, expected {', '.join(TEMPLATES)}, or a file: "
        ".yaml of its fixed parts, .jinja of a chat template, or the tokenizer_config.json that holds one"
    )


def template_described(description: dict[str, Any], source: str) -> AnyTemplate:
    """A template from its `description()`.

    Raises:
        UserError: it is none.
    """
    if "jinja" not in description:
        return described(description, source)
    return JinjaTemplate(
        description["name"], description["jinja"], description["begin_token"], description["end_token"]
    )


def template_beside(path: Path) -> str:
    """The chat template in a file by its name: that of the shipped template that it was made of, telling more (where an
    input goes, what an answer begins with), else the file's."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return str(path)  # which is said by whoever reads it
    return next((name for name, template in TEMPLATES.items() if as_jinja(template) == text), str(path))


def _jinja_of_file(path: Path) -> AnyTemplate:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the template {path}: {error}; check the path") from error
    beside = path if path.suffix == ".json" else path.with_name("tokenizer_config.json")
    config = _config_of(beside)
    source = config.get("chat_template") if path.suffix == ".json" else text
    if not isinstance(source, str):
        raise UserError(f"{path}: got no chat_template, expected one as text")
    if (template := _made_of(source, path)) is not None:
        return template
    begin, end = (_token_named(config, name) for name in ("bos_token", "eos_token"))
    return JinjaTemplate(str(path), source, begin, end)


def _made_of(source: str, path: Path) -> AnyTemplate | None:
    """The template of fixed parts that a program was made of; None where it is another one, or has been changed."""
    if (found := _MADE_OF.match(source)) is None:
        return None
    with contextlib.suppress(ValueError, UserError):
        template = described(json.loads(found[1]), str(path))
        return template if as_jinja(template) == source else None
    return None


def _config_of(path: Path) -> dict[str, Any]:
    """What a `tokenizer_config.json` says; nothing where it is not there."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not an object")
    return found


def _token_named(config: dict[str, Any], name: str) -> str:
    value = config.get(name)
    token = value.get("content") if isinstance(value, dict) else value
    return token if isinstance(token, str) else ""


def as_jinja(template: AnyTemplate) -> str:
    """The Jinja program that writes what a template writes, for what is exported.

    A program's tokens are set in it: those that the tokenizer names may be others, as it has the token that ends an
    answer for its end-of-text.
    """
    if isinstance(template, JinjaTemplate):
        tokens = {"bos_token": template.begin_token, "eos_token": template.end_token or None}
        used = {name: token for name, token in tokens.items() if token is not None and name in template.source}
        # The line ends belong to these blocks, so that a program may begin with one of its own.
        return "".join(f"{{% set {name} = {_quoted(token)} %}}\n" for name, token in used.items()) + template.source
    t = template
    lines = [
        _comment_of(t),
        _say(t.begin),
        "{%- if messages[0]['role'] != 'system' %}" + _say(_system_of(t)) + "{%- endif %}" if t.system else "",
        "{%- for message in messages %}",
        "{%- if message['role'] == 'system' %}",
        _say(t.before_system, "message['content']", t.after_system),
        "{%- elif message['role'] == 'user' %}",
        "{%- if loop.index0 and loop.previtem['role'] == 'assistant' %}" + _say(t.between) + "{%- endif %}"
        if t.between
        else "",
        _say(t.before_instruction, "message['content']", t.after_instruction),
        "{%- elif message['role'] == 'assistant' %}",
        _say(t.before_response),
        "{%- generation %}",
        _header_of(t),
        _say("", "message['content']", None if not t.end else t.end),
        "{%- endgeneration %}",
        _say(t.after_response),
        "{%- endif %}",
        "{%- endfor %}",
        "{%- if add_generation_prompt %}" + _say(t.before_response) + "{%- endif %}" if t.before_response else "",
    ]
    return "".join(lines)


def _comment_of(template: Template) -> str:
    """Somebody's own fixed parts: a program alone does not tell where an input goes, or what an answer begins with."""
    if template in TEMPLATES.values():
        return ""
    parts = {**template.description(), "name": Path(template.name).name}
    text = json.dumps(parts).replace("#", r"\u0023")  # nothing in it ends a comment
    return f"{{#- made by fastft of {text} -#}}"


def _system_of(template: Template) -> str:
    return template.before_system + template.system + template.after_system


def _header_of(template: Template) -> str:
    """The response header, unless an answer has it already, with or without white space before it: where the model
    writes it, programs send it back. A header of white space may be any answer's own beginning."""
    header = template.response_header
    if not (bare := header.lstrip()):
        return _say(header)
    has, has_bare = (f"message['content'].startswith({_quoted(begin)})" for begin in (header, bare))
    space = f"{{%- elif {has_bare} %}}{_say(header.removesuffix(bare))}" if bare != header else ""
    return f"{{%- if {has} %}}{space}{{%- else %}}{_say(header)}{{%- endif %}}"


def _say(before: str, value: str | None = None, after: str | None = "") -> str:
    """An output of a Jinja program; `after` None stands for the end-of-text."""
    said = [_quoted(before)] if before else []
    said += [value] if value else []
    said += ["eos_token"] if after is None else [_quoted(after)] if after else []
    return "{{- " + " + ".join(said) + " }}" if said else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
