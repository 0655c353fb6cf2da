"""Conversations that a model is to have: what the user says in each turn, and the right answers where there are some.

Rows have `turns`, the user's texts, and perhaps `reference`, as many texts or nulls, `category`, `system` and `id` (or
`question_id`, as MT-Bench's own file has it). Rows of `messages` or `conversations` are read as for training: the
user's turns are asked, and the assistant's are the references.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.answers.benchmark_sample import sample_rows
from fastft.common.console import say
from fastft.common.errors import UserError
from fastft.common.keywords import hidden_path, is_keyword
from fastft.common.kinds import kind_of
from fastft.common.nearest import did_you_mean
from fastft.data.containers import rows_of
from fastft.data.formats import checked
from fastft.data.json_rows import BadRecord, in_one_line
from fastft.data.records import ReadingRules, Record, category_of, fault_of_category
from fastft.data.texts import Malformed, check_text, from_text

_IDS = ("id", "question_id")
_KEYS = ("turns", "reference", "category", "system", *_IDS)
_MOST_NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What is asked, turn by turn.

    Attributes:
        id: what it is called.
        turns: the user's texts, at least one.
        references: a right answer to each, None where there is none.
        category: what its figures are put together by.
        system: the text of the system; empty for the template's own.
    """

    id: int | str
    turns: tuple[str, ...]
    references: tuple[str | None, ...]
    category: str | None = None
    system: str = ""

    def as_json(self) -> dict[str, Any]:
        """All of it but the turns, as they stand in `conversations.json`."""
        more = {"category": self.category, "system": self.system or None}
        return {"id": self.id, **{name: value for name, value in more.items() if value is not None}}


def read_conversations(source: str) -> list[Conversation]:
    """The conversations of a file, or the embedded ones (`sample`).

    Raises:
        UserError: the file cannot be read, holds none, or a row is none.
    """
    if is_keyword("conversation", source):
        if (hidden := hidden_path("conversation", source)) is not None:
            say(hidden)
        rows: Iterable[tuple[int, Any]] = enumerate(sample_rows(), start=1)
    else:
        rows = rows_of(Path(source), expected="--conversation takes a file, or `sample`")
    unread: dict[str, None] = {}
    found = []
    for row, value in rows:
        found.append(_read(row, value))
        if isinstance(value, dict) and "turns" in value:
            unread |= dict.fromkeys(key for key in value if key not in _KEYS)
    bad = [str(one) for one in found if isinstance(one, BadRecord)]
    if bad:
        raise UserError(f"{source}: {'; '.join(bad[:5])}; mend them, or remove these rows")
    conversations = [one for one in found if isinstance(one, Conversation)]
    if not conversations:
        raise UserError(f"{source} holds no conversation; expected rows with `turns`, the user's texts")
    seen = {str(one.id) for one in conversations}
    if len(seen) < len(conversations):
        raise UserError(f"{source} has conversations with the same `id`; give each its own, or leave the key out")
    if unread:
        named = ", ".join(f"`{in_one_line(key)}`{did_you_mean(key, _KEYS)}" for key in list(unread)[:_MOST_NAMED])
        say(f"{source}: keys of rows with `turns` that are not read: {named}; read are {', '.join(_KEYS)}")
    return conversations


def _read(row: int, value: Any) -> Conversation | BadRecord:
    try:
        if isinstance(value, BadRecord):
            return value
        if not isinstance(value, dict):
            raise Malformed(f"it is {kind_of(value)}, expected an object with `turns`")
        if (fault := fault_of_category(value.get("category"))) is not None:
            raise Malformed(fault)
        if "turns" not in value and ("messages" in value or "conversations" in value):
            return _of_messages(row, value)
        return _of_turns(row, value)
    except Malformed as error:
        return BadRecord(row, str(error))


def _of_turns(row: int, value: Mapping[str, Any]) -> Conversation:
    turns = _texts(value, "turns")
    if not turns:
        raise Malformed("`turns` is empty, expected the user's texts" if "turns" in value else "`turns` is missing")
    mute = next((number for number, text in enumerate(turns, start=1) if not (text or "").strip()), None)
    if mute is not None:
        raise Malformed(f"`turns` number {mute} is empty, expected what the user says")
    references = _texts(value, "reference")
    if len(references) not in (0, len(turns)):
        raise Malformed(
            f"`reference` has {len(references)} texts of {len(turns)} turns, expected one for each, null where there "
            "is no right answer"
        )
    return Conversation(
        id=_id(row, value),
        turns=tuple(text or "" for text in turns),
        references=tuple(text or None for text in references) or (None,) * len(turns),
        category=category_of(value),
        system=check_text(value.get("system") or "", "`system`"),
    )


def _texts(value: Mapping[str, Any], key: str) -> list[str | None]:
    held = from_text(value.get(key))
    if held is None:
        return []
    if not isinstance(held, list):
        raise Malformed(f"`{key}` is {kind_of(held)}, expected an array of texts")
    return [
        None if one is None else check_text(one, f"`{key}` number {number}") for number, one in enumerate(held, start=1)
    ]


def _of_messages(row: int, value: dict[str, Any]) -> Conversation:
    rules = ReadingRules(end_of_text_in_data="keep", allow_empty_output=True)
    (record,) = checked([(row, value)], rules)
    if not isinstance(record, Record):
        raise Malformed(record.reason)
    said = [turn.text for turn in record.turns if turn.role == "user"]
    answered = [turn.text for turn in record.turns if turn.role == "assistant"]
    system = [turn.text for turn in record.turns if turn.role == "system"]
    return Conversation(
        id=_id(row, value),
        turns=tuple(said),
        references=tuple(text or None for text in answered),
        category=record.category,
        system="".join(system),
    )


def _id(row: int, value: Mapping[str, Any]) -> int | str:
    given = next((value[name] for name in _IDS if value.get(name) is not None), row)
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise Malformed(f"`id` is {kind_of(given)}, expected a text or a whole number")
    return given
