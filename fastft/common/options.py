"""A dataclass of options as a parser of command lines and YAML, with errors in plain words."""

from __future__ import annotations

import re
import types
import typing
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal

import docstring_parser
import jsonargparse

from fastft.common.errors import UserError

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
}
_WRONG_VALUE = re.compile(r'Parser key "(?P<key>\w+)":.*(?:Got|Given) value: ?(?P<value>.*)', re.DOTALL)


def positionals(options: type[Any]) -> list[str]:
    """The fields that are given by their place and not by an option's name: those that are not keyword-only."""
    return [f.name for f in fields(options) if not f.kw_only]


def options_parser(options: type[Any], *, prog: str, description: str = "") -> jsonargparse.ArgumentParser:
    """A parser with an option or a place for each field of a dataclass; it raises `jsonargparse.ArgumentError`.

    A list takes all values that follow its name. A place that has a default may be left empty. A field that would be a
    keyword of Python ends in `_`, and its option does not.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=description, exit_on_error=False, default_env=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="a YAML file of this command's options")
    by_hand = [f for f in fields(options) if _is_list(f) or (not f.kw_only and f.default is None)]
    skip = {f.name for f in by_hand}
    parser.add_class_arguments(options, as_group=False, as_positional=True, skip=skip)
    texts = {text.arg_name: text.description for text in docstring_parser.parse_from_object(options).params}
    for one in by_hand:
        _add_paths(parser, one, texts.get(one.name) or "")
    return parser


def _is_list(one: Field[Any]) -> bool:
    return str(one.type).startswith("list[")


def _add_paths(parser: jsonargparse.ArgumentParser, one: Field[Any], text: str) -> None:
    """What jsonargparse does not make of a field: an option of several paths, or a place that may be left empty."""
    if _is_list(one):
        parser.add_argument(
            f"--{one.name.rstrip('_')}",
            dest=one.name,
            nargs="+",
            type=Path,
            default=[],
            metavar=one.metadata["metavar"],
            help=text,
        )
    else:
        parser.add_argument(one.name, nargs="?", type=Path, metavar=one.name.upper(), help=text)


def check_choices(options: Any) -> None:
    """Holds the fields of an options object that are a choice against their choices.

    Raises:
        UserError: a value is not among them.
    """
    for name, hint in typing.get_type_hints(type(options)).items():
        choices = [choice for one in (hint, *typing.get_args(hint)) for choice in _choices(one)]
        value = getattr(options, name)
        if choices and value is not None and value not in choices:
            raise UserError(f"got --{name} {value}, expected {_listed(choices)}")


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def plain_error(error: jsonargparse.ArgumentError, options: type[Any]) -> str:
    """What the parser found, in one line: `got --lr fast, expected a number`."""
    message = " ".join(str(error).split())
    hints = typing.get_type_hints(options)
    if (wrong := _WRONG_VALUE.fullmatch(message)) and wrong["key"] in hints:
        return f"got --{wrong['key']} {wrong['value'] or repr('')}, expected {_expected(hints[wrong['key']])}"
    if message.startswith("Unexpected config:"):
        return (
            f"--config: got {message.partition(':')[2].strip() or 'an empty file'}, expected options as `name: value`"
        )
    message = re.sub(r'^Parser key "(\w+)"', r"--\1", message)
    if required := re.fullmatch(r"(.*arguments are required: )(.*)", message):
        named = [name.upper() if name in positionals(options) else f"--{name}" for name in required[2].split(", ")]
        return required[1] + ", ".join(named)
    return message


def _expected(hint: Any) -> str:
    """A type in words: `auto, cpu or cuda`, `a whole number or null`."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return _listed([str(choice) for choice in typing.get_args(hint)])
    if origin in (typing.Union, types.UnionType):
        return _listed([_expected(one) for one in typing.get_args(hint)])
    return _WORDS.get(hint, str(hint))


def _listed(words: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
