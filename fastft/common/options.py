"""Options: a dataclass as a table, and what is made of the table: a command line, YAML, help, and refusals in plain
words.

A class of options is a dataclass whose fields have their text behind them. `table` reads it: each field's group (the
class that defines it), its type in words, its default, its limits, what it needs to have an effect, and whether a
resumed run may change it. `option` says what a field's annotation and default do not.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import numbers
import re
import textwrap
import types
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastft.common.errors import UserError
from fastft.common.nearest import did_you_mean, did_you_mean_path

if TYPE_CHECKING:  # it takes a fifth of a second, which `--help` does not need
    import jsonargparse

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
}
_PLAIN: dict[type, Any] = {bool: bool, int: numbers.Integral, float: numbers.Real, str: str}
"""What is taken for each type, the narrower ones first."""
_SEVERAL = {Path: "paths", str: "several of them", float: "numbers with commas between"}
_PLACES = {int: "INTEGER", float: "NUMBER", bool: "true|false", str: "TEXT", Path: "PATH"}
_WRONG_VALUE = re.compile(r'Parser key "(?P<key>\w+)":.*(?:Got|Given) value: ?(?P<value>.*)', re.DOTALL)
_NO_CONFIG = re.compile(r"File does not exist: '(?P<path>[^']*)'")
_UNKNOWN = re.compile(r"Option '(?P<name>\w+)' is not accepted")
_WIDTH = 80
_NAMES_WIDTH = 26


@dataclass(frozen=True, slots=True)
class Facts:
    """What options alone do not tell, where it is known already."""

    steps: int | None = None
    """Optimizer steps of the whole run."""
    val_examples: int | None = None
    ranks: int | None = None
    device: str | None = None
    """`cpu`, `cuda` or `mps`."""


@dataclass(frozen=True, slots=True)
class Condition:
    """Under which an option has an effect.

    Attributes:
        holds: whether it is so; what is not known yet (None) is no reason against.
        needs: the condition in words, behind `needs`.
        refused: whether the option is refused where it does not hold. It is said where a file of options may serve
            several machines and data sets.
    """

    holds: Callable[[Any, Facts], bool]
    needs: str
    refused: bool = True


@dataclass(frozen=True, slots=True)
class Option:
    """A row of the table.

    Attributes:
        name: the field's.
        group: of which it is one, in words.
        hint: its type.
        default: `dataclasses.MISSING` where one must be given.
        text: what it is for.
        at_least: the least value; at_most: the largest.
        needs: without which it has no effect.
        may_change: whether a resumed run may change it: how far and how it runs, never what it computes; or when, in
            words.
        is_place: whether it is given by its place, and not by its name.
        was: the name of an earlier version's option whose place it has taken.
    """

    name: str
    group: str
    hint: Any
    default: Any
    text: str
    at_least: float | None
    at_most: float | None
    needs: tuple[Condition, ...]
    may_change: bool | str
    is_place: bool
    was: str | None

    @property
    def flag(self) -> str:
        """Its name on a command line; a field that would be a keyword of Python ends in `_`, which is left out."""
        return f"--{self.name.rstrip('_')}"

    @property
    def type_in_words(self) -> str:
        """`auto, cpu or cuda`, `a whole number or null`."""
        return _in_words(self.hint)

    @property
    def is_flag(self) -> bool:
        """Whether `--name` alone means `--name true`."""
        return self.hint is bool

    @property
    def of_list(self) -> Any:
        """Of what it is a list, where it is one or may be one; else None."""
        lists = [one for one in _kinds(self.hint) if typing.get_origin(one) is list]
        return typing.get_args(lists[0])[0] if lists else None

    @property
    def is_list(self) -> bool:
        """Whether it takes all values that follow its name. Numbers are one value, with commas between them."""
        return self.of_list not in (None, float)

    @property
    def value(self) -> str:
        """What stands for its value in help: `INTEGER`, `auto|cpu|cuda`."""
        kinds = [one for one in _kinds(self.hint) if one is not type(None)]
        if self.of_list is not None:
            return f"{_PLACES[self.of_list]}{' ...' if self.is_list else ',...'}"
        choices = [str(choice) for one in kinds for choice in _choices(one)]
        return "|".join(choices) or _PLACES.get(kinds[0], "TEXT")


def option(
    default: Any = MISSING,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    needs: Condition | tuple[Condition, ...] = (),
    may_change: bool | str = False,
    was: str | None = None,
) -> Any:
    """A field of a class of options, with what its annotation does not say: see `Option`.

    A class that gives a field another default keeps what the class before said of it.
    """
    needs = (needs,) if isinstance(needs, Condition) else needs
    given = {"at_least": at_least, "at_most": at_most, "needs": needs or None, "may_change": may_change or None,
             "was": was}  # fmt: skip
    more = {name: value for name, value in given.items() if value is not None}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=more)
    return field(default=default, metadata=more)


_TABLES: dict[type[Any], tuple[Option, ...]] = {}
"""Those that have been read."""


def table(options: type[Any]) -> tuple[Option, ...]:
    """The options of a class, in their order.

    A field's group is the first sentence of the class that first defines it; its text the last class's that has one.
    """
    if options not in _TABLES:
        _TABLES[options] = _read_table(options)
    return _TABLES[options]


def _read_table(options: type[Any]) -> tuple[Option, ...]:
    groups: dict[str, str] = {}
    texts: dict[str, str] = {}
    more: dict[str, dict[str, Any]] = defaultdict(dict)
    for one in reversed(options.__mro__):
        title = (inspect.getdoc(one) or "").partition(".")[0].partition(":")[0]
        for name, text in _texts(one).items():
            groups.setdefault(name, title)
            texts[name] = text or texts.get(name, "")
            more[name].update(vars(one)["__dataclass_fields__"][name].metadata)
    hints = typing.get_type_hints(options)
    return tuple(
        Option(
            name=one.name,
            group=groups[one.name],
            hint=hints[one.name],
            default=one.default if one.default_factory is MISSING else one.default_factory(),
            text=texts[one.name],
            at_least=more[one.name].get("at_least"),
            at_most=more[one.name].get("at_most"),
            needs=more[one.name].get("needs", ()),
            may_change=more[one.name].get("may_change", False),
            is_place=not one.kw_only,
            was=more[one.name].get("was"),
        )
        for one in fields(options)
    )


def _texts(of: type[Any]) -> dict[str, str]:
    """The fields that a class itself defines, and the string behind each."""
    if "__annotations__" not in vars(of) or not hasattr(of, "__dataclass_fields__"):
        return {}
    body = typing.cast("ast.ClassDef", ast.parse(textwrap.dedent(inspect.getsource(of))).body[0]).body
    found = {}
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            behind = after.value if isinstance(after, ast.Expr) else None
            text = behind.value if isinstance(behind, ast.Constant) and isinstance(behind.value, str) else ""
            found[statement.target.id] = " ".join(text.split())
    return {name: text for name, text in found.items() if name in of.__dataclass_fields__}


def check_values(options: Any) -> None:
    """Holds the values of an options object against the choices and limits in its table; what is or may be a list is
    first put into the form that it is written in: one text as it is, several as a list, numbers as a list of them, also
    where they came as `2,1`. A path may be given as text.

    Raises:
        UserError: one is not among its choices, beyond a limit, or no text or number.
    """
    _settle_lists(options)
    _settle_paths(options)
    for one in table(type(options)):
        value = getattr(options, one.name)
        if value is None:
            check_given(one, value)
            continue
        choices = [choice for kind in _kinds(one.hint) for choice in _choices(kind)]
        if choices and value not in choices:
            raise UserError(f"got {one.flag} {value}, expected {_listed([str(choice) for choice in choices])}")
        _settle_number(options, one, value)
        if one.at_least is not None and not value >= one.at_least:
            raise UserError(f"got {one.flag} {value}, expected at least {one.at_least:,}")
        if one.at_most is not None and not value <= one.at_most:
            raise UserError(f"got {one.flag} {value}, expected at most {one.at_most:,}")


def _settle_number(options: Any, one: Option, value: Any) -> None:
    """A number, flag or text of its own type; whole numbers are numbers too, and those of numpy as good as Python's.

    Raises:
        UserError: it is of another type, as a command line would say it.
    """
    kinds = {*_kinds(one.hint)} & _PLAIN.keys()
    if not kinds or one.of_list is not None or Path in _kinds(one.hint):
        return
    for kind in _PLAIN:  # a flag is no number, though Python takes it for one
        if kind in kinds and isinstance(value, _PLAIN[kind]) and (kind is bool or not isinstance(value, bool)):
            object.__setattr__(options, one.name, kind(value))
            return
    raise UserError(f"got {one.flag} {value!r}, expected {one.type_in_words}")


Options = TypeVar("Options")


def names_checked(options: type[Options]) -> type[Options]:
    """A class of options that refuses names of none in Python as a command line does: a `UserError` names the nearest.

    Its `__init__` keeps the signature that the parser reads.
    """
    init = options.__init__

    @functools.wraps(init)
    def checked(self: Options, *places: Any, **given: Any) -> None:
        names = [one.name for one in table(type(self))]
        for name in given:
            if name not in names:
                raise UserError(f"got {name}, which is no option of {type(self).__name__}{did_you_mean(name, names)}")
        init(self, *places, **given)

    options.__init__ = checked  # type: ignore[assignment] # a dataclass makes its own
    return options


def _settle_lists(options: Any) -> None:
    for one in table(type(options)):
        value = getattr(options, one.name)
        if one.of_list is None or typing.get_origin(one.hint) is list or value is None:
            continue
        several = list(value) if isinstance(value, list | tuple) else [value]
        settled: Any
        if several == ["null"] and type(None) in _kinds(one.hint):  # so a command line takes back what a file says
            settled = None
        elif one.of_list is float:
            settled = _numbers(one, value, several)
        else:
            if not several or not all(isinstance(text, str | Path) for text in several):
                raise UserError(f"got {one.flag} {value}, expected {one.type_in_words}")
            texts = [str(text) for text in several]
            settled = texts[0] if len(texts) == 1 else texts
        object.__setattr__(options, one.name, settled)


def _settle_paths(options: Any) -> None:
    for one in table(type(options)):
        kinds, value = _kinds(one.hint), getattr(options, one.name)
        if Path in kinds and str not in kinds and value is not None:
            check_given(one, value)
            object.__setattr__(options, one.name, Path(value))
        elif one.of_list is Path and typing.get_origin(one.hint) is list:
            several = list(value) if isinstance(value, list | tuple) else [value]
            if not all(isinstance(path, str | Path) for path in several):
                raise UserError(f"got {one.flag} {value}, expected {one.type_in_words}")
            object.__setattr__(options, one.name, [Path(path) for path in several])


def _numbers(one: Option, value: Any, several: list[Any]) -> list[float]:
    parts = several[0].split(",") if len(several) == 1 and isinstance(several[0], str) else several
    try:
        found = [float(part) for part in parts if not isinstance(part, bool)]
        if len(found) < max(1, len(parts)):
            raise ValueError
        return found
    except (TypeError, ValueError):
        raise UserError(f"got {one.flag} {value}, expected {one.type_in_words}") from None


def check_given(one: Option, value: Any) -> None:
    """Holds a value that was read from a file, or is None, against an option's type as far as the parser does not.

    Raises:
        UserError: null where none is taken, no list for a list, anything but text for a path.
    """
    kinds = _kinds(one.hint)
    if value is None and type(None) not in kinds:
        raise UserError(f"got {one.flag} null, expected {one.type_in_words}")
    if typing.get_origin(one.hint) is list and not isinstance(value, list):
        raise UserError(f"got {one.flag} {value}, expected a list: [{value}]")
    if Path in kinds and str not in kinds and not isinstance(value, str | Path | None):
        raise UserError(f"got {one.flag} {value}, expected {one.type_in_words}")


def check_config(options: type[Any], values: Mapping[Any, Any], *, prog: str, path: str) -> None:
    """Holds what a file of options has against the table.

    Raises:
        UserError: a name that is no option's, or what `check_given` refuses.
    """
    rows = {one.name: one for one in table(options)}
    for name, value in values.items():
        if name not in rows:
            raise UserError(f"{prog}: --config {path}: {_no_option(options, str(name))}")
        try:
            check_given(rows[name], value)
        except UserError as error:
            raise UserError(f"{prog}: --config {path}: {error}") from None


def _no_option(options: type[Any], name: str) -> str:
    """What to do about a name in a file that is no option's: the nearest one, or the one that has taken its place."""
    rows = {one.name: one for one in table(options)}
    if now := next((one for one in rows.values() if one.was == name), None):
        return (
            f"got {name}, an option of an earlier version's; take its line out of the file, and put "
            f"`{now.name}: {name}` there where it was true"
        )
    return f"got {name}, which is no option of it{did_you_mean(name.replace('-', '_'), list(rows))}"


def without_effect(
    options: Any, facts: Facts | None = None, *, defaults: Mapping[str, Any] | None = None
) -> Iterator[tuple[Condition, str]]:
    """The options that are given and can have no effect: what each needs, and a line that says so.

    Args:
        options: an options object.
        facts: what is known beside it.
        defaults: in place of those of the class.
    """
    for one in table(type(options)):
        value, default = getattr(options, one.name), (defaults or {}).get(one.name, one.default)
        for condition in one.needs if value != default else ():
            if not condition.holds(options, facts or Facts()):
                yield (
                    condition,
                    f"got {one.flag} {_written(value)}, which has no effect here: it needs {condition.needs}",
                )


def _written(value: Any) -> Any:
    """A value as a command line gives it."""
    if isinstance(value, list):
        return ",".join(f"{one:g}" if isinstance(one, float) else str(one) for one in value)
    return str(value).lower() if isinstance(value, bool) else value


def options_parser(options: type[Any], *, prog: str) -> jsonargparse.ArgumentParser:
    """A parser with an option or a place for each field of a dataclass; it raises `jsonargparse.ArgumentError`.

    A list takes all values that follow its name. A place that has a default may be left empty. Its help is `help_of`.
    What may be a list comes out as it was given: see `check_values`.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=False)
    parser = jsonargparse.ArgumentParser(
        prog=prog, exit_on_error=False, default_env=False, allow_abbrev=False, add_help=False
    )
    parser.add_argument("--config", action="config", help="a YAML file of this command's options")
    by_hand = [one for one in table(options) if one.of_list or (one.is_place and one.default is None)]
    skip: set[str | int] = {one.name for one in by_hand}
    parser.add_class_arguments(options, as_group=False, as_positional=True, skip=skip)
    for one in by_hand:  # what jsonargparse does not make of a field
        if typing.get_origin(one.hint) is list:
            parser.add_argument(one.flag, dest=one.name, nargs="+", type=one.of_list, default=one.default)
        elif one.of_list is not None:
            parser.add_argument(one.flag, dest=one.name, nargs="+" if one.is_list else None, default=one.default)
        else:
            parser.add_argument(one.name, nargs="?", type=Path)
    return parser


def spelt_out(options: type[Any], arguments: Sequence[str], *, prog: str) -> list[str]:
    """A command line as the parser takes it: `--batch-size` as `--batch_size`, `--resume` alone as `--resume true`, and
    files of options in front, as the parser lets what comes later count.

    Raises:
        UserError: an option that there is not; the nearest one is named. Or one that takes several values stands twice:
            the first ones would not count.
    """
    rows = {one.flag: one for one in table(options)}
    has_places = any(one.is_place for one in rows.values())
    spelt: list[str] = []
    lists: set[str] = set()
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--") and name != "--":
            name = _known(name, [*rows, "--config", "--help"], prog)
            if name in lists:
                raise UserError(f"{prog}: got {name} twice, expected all its values behind one: {name} A B")
            lists.update([name] if name in rows and rows[name].is_list else [])
        spelt.append(name + equals + value)
        following = arguments[position + 1] if position + 1 < len(arguments) else "--"
        # Where something can come without an option's name, only what is a value is taken for the flag's.
        is_value = following in ("true", "false") if has_places else not following.startswith("-")
        if not equals and name in rows and rows[name].is_flag and not is_value:
            spelt.append("true")
    return _files_first(spelt)


def _files_first(arguments: list[str]) -> list[str]:
    files: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            files += [argument, *itertools.islice(rest, 1)]
        else:
            (files if argument.startswith("--config=") else others).append(argument)
    return files + others


def _known(name: str, names: Sequence[str], prog: str) -> str:
    underscored = f"--{name[2:].replace('-', '_')}"
    if underscored in names:
        return underscored
    raise UserError(
        f"{prog}: got {name}, which is no option of it{did_you_mean(underscored, names)}; see {prog} --help"
    )


def help_of(options: type[Any], *, prog: str, text: str, names: Sequence[str] = ()) -> str:
    """The help of a command: its options by groups, a line each.

    Args:
        options: the class.
        prog: the command.
        text: what it does.
        names: of options of which all is to be said.

    Raises:
        UserError: a name is no option's.
    """
    rows = table(options)
    if names:
        by_flag = {one.flag: one for one in rows}
        flags = [_known(f"--{name.lstrip('-')}", list(by_flag), prog) for name in names]
        return "\n\n".join(_all_of(by_flag[flag]) for flag in flags)
    places = "".join(f" {one.name.upper()}" if one.default is MISSING else f" [{one.name.upper()}]"
                     for one in rows if one.is_place)  # fmt: skip
    lines = [
        f"usage: {prog}{places} [--OPTION VALUE ...]",
        "",
        *textwrap.wrap(text[:1].upper() + text[1:] + ".", _WIDTH),
    ]
    for group in dict.fromkeys(one.group for one in rows):
        lines += ["", group]
        for one in rows:
            if one.group == group:
                lines += _line(one.name.upper() if one.is_place else f"{one.flag} {one.value}", _in_short(one))
    lines += ["", "More"]
    lines += _line("--config FILE", "A YAML file of options. What is given here counts more than what it says.")
    lines += _line("--help OPTION ...", "All about these options.")
    return "\n".join(lines)


def _line(name: str, text: str) -> list[str]:
    """A line of help, or as many as it takes."""
    indent = " " * (_NAMES_WIDTH + 2)
    wrapped = textwrap.wrap(text, _WIDTH - len(indent)) or [""]
    if len(name) > _NAMES_WIDTH - 2:
        return [*textwrap.wrap(f"  {name}", _WIDTH, subsequent_indent="      "), *(indent + line for line in wrapped)]
    return [f"  {name:<{_NAMES_WIDTH}}{wrapped[0]}", *(indent + line for line in wrapped[1:])]


def _in_short(one: Option) -> str:
    """The first sentence of its text, and its default."""
    first = re.split(r"(?<=[^.])\.(?:\s|$)", one.text, maxsplit=1)[0]
    return f"{first}{_default(one)}"


def _default(one: Option) -> str:
    if one.default is MISSING:
        return "" if one.is_place else " (must be given)"
    if one.default is None or one.default == []:
        return ""
    return f" ({str(one.default).lower() if isinstance(one.default, bool) else one.default})"


def _all_of(one: Option) -> str:
    needs = [f"It needs {condition.needs}." for condition in one.needs]
    limits = [
        f"{word} {limit:,}."
        for word, limit in (("At least", one.at_least), ("At most", one.at_most))
        if limit is not None
    ]
    when = f" {one.may_change}" if isinstance(one.may_change, str) else ""
    resumed = [f"A resumed run may change it{when}."] if one.may_change else []
    lines = [f"Expected: {one.type_in_words}{_default(one)}.", *limits, *needs, *resumed]
    body = [wrapped for line in (one.text, *lines) for wrapped in textwrap.wrap(line, _WIDTH - 2)]
    return "\n".join([one.flag, *(f"  {line}" for line in body)])


def plain_error(error: Exception, options: type[Any]) -> str:
    """What the parser found, in one line: `got --lr fast, expected a number`."""
    message = " ".join(str(error).split())
    rows = {one.name: one for one in table(options)}
    if (wrong := _WRONG_VALUE.fullmatch(message)) and wrong["key"] in rows:
        one = rows[wrong["key"]]
        return f"got {one.flag} {wrong['value'] or repr('')}, expected {one.type_in_words}"
    if missing := _NO_CONFIG.search(message):
        path = Path(missing["path"])
        return f"--config: file not found: {path}{did_you_mean_path(path)}"
    if message.startswith("Unexpected config:"):
        return (
            f"--config: got {message.partition(':')[2].strip() or 'an empty file'}, expected options as `name: value`"
        )
    if unknown := _UNKNOWN.search(message):
        return _no_option(options, unknown["name"])
    message = re.sub(r'^Parser key "(\w+)"', r"--\1", message)
    if required := re.fullmatch(r"(.*arguments are required: )(.*)", message):
        named = [name.upper() if rows[name].is_place else rows[name].flag for name in required[2].split(", ")]
        return required[1] + ", ".join(named)
    return message


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of anything else, itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _in_words(hint: Any) -> str:
    kinds = _kinds(hint)
    if len(kinds) > 1:
        return _listed([_in_words(one) for one in kinds])
    if choices := _choices(hint):
        return _listed([str(choice) for choice in choices])
    if typing.get_origin(hint) is list:
        return _SEVERAL[typing.get_args(hint)[0]]
    return _WORDS.get(hint, str(hint))


def _listed(words: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
