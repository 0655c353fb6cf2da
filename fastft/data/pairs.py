"""Rows that ask for something and answer it: alpaca, Dolly, and a prompt with its completion."""

from __future__ import annotations

from typing import Any

from fastft.common.kinds import kind_of
from fastft.data.json_rows import named_keys
from fastft.data.records import ALIASES, ReadingRules, Record, fault_of_category, fault_of_choices
from fastft.data.texts import Malformed, check_no_end, check_text, without_end

OF_CHATS = {"system": "a system text", "history": "earlier turns"}
"""Keys that change what a response answers to, and that a pair has no place for."""


def name_fields(fields: dict[str, Any], notes: list[str]) -> None:
    """Puts Dolly's fields under alpaca's names: an alias is read where its field is not there, or holds nothing."""
    for alias, name in ALIASES.items():
        held, own = fields.get(alias), fields.get(name)
        if held is not None and (own is None or (own == "" and held != "")):
            fields[name] = fields.pop(alias)
            notes.append(alias)


def pair(
    row: int,
    fields: dict[str, Any],
    rules: ReadingRules,
    notes: list[str],
    names: tuple[str, str | None, str] = ("instruction", "input", "output"),
) -> Record:
    """The record of a row.

    Args:
        row: in its file.
        fields: the row's object.
        rules: what is a record.
        notes: takes what was done to it.
        names: of the instruction, the input (None: there is none) and the output.

    Raises:
        Malformed: it is none.
    """
    asked, given, answer = names
    if isinstance(fields.get(answer), str):
        fields[answer] = without_end(fields[answer], rules, notes)
    for key in (asked, answer):
        if key not in fields:
            raise Malformed(f"`{key}` is missing, expected text; got the keys {named_keys(fields)}")
    read = [key for key in names if key]
    for key in read:
        if fields.get(key) is not None or key != given:
            check_text(fields.get(key), f"`{key}`")
    for key, what in OF_CHATS.items():
        if (held := fields.get(key)) and not (isinstance(held, str) and not held.strip()):
            raise Malformed(
                f"`{key}` ({what}) is not read beside `{asked}`; use the chat format, whose `messages` hold it"
            )
    if not fields[asked].strip():
        raise Malformed(f"`{asked}` is blank, expected text")
    check_kindless(fields, fields[answer])
    for key in read:
        check_no_end(fields.get(key) or "", f"`{key}`", rules)
    if fields.get("choices"):
        check_no_end("\n".join(fields["choices"]), "`choices`", rules)
    if not fields[answer].strip() and not rules.allow_empty_output:
        raise Malformed(f"`{answer}` is empty, expected text; --allow_empty_output takes it as a response of nothing")
    return Record(
        instruction=fields[asked],
        input=(fields.get(given) or "") if given else "",
        output=fields[answer],
        row=row,
        extra={key: item for key, item in fields.items() if key not in names},
        notes=noted(notes),
    )


def noted(notes: list[str]) -> tuple[str, ...]:
    """Notes as a record has them: each once."""
    return tuple(dict.fromkeys(notes)) if notes else ()


def check_kindless(fields: dict[str, Any], output: str | None) -> None:
    """Looks at the keys that mean the same in rows of every format.

    Args:
        fields: the row's object.
        output: the answer that choices are of; None where nothing is asked.

    Raises:
        Malformed: a category is no text, or choices are none.
    """
    choices = fields.get("choices")
    if output is None and choices is not None:
        raise Malformed(
            f"`choices` is {kind_of(choices)}, and nothing is asked here that it could answer; "
            "give the key another name if it means something else"
        )
    fault = fault_of_category(fields.get("category")) or fault_of_choices(choices, output or "")
    if fault is not None:
        raise Malformed(fault)
