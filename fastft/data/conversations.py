"""Rows that are made of parts: conversations (`messages`, `conversations`), and segments.

A conversation may begin with a system's turn; then user and assistant take turns, and the assistant has the last one.
Nothing is joined, dropped or put in order: a row that is otherwise is malformed, and it is said what to do about it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fastft.common.kinds import kind_of
from fastft.data.json_rows import in_one_line, named_keys
from fastft.data.pairs import check_kindless, noted
from fastft.data.records import NOT_READ, ReadingRules, Record, Role, Turn
from fastft.data.texts import Malformed, check_no_end, check_text, from_text, without_end

OPENAI = ("role", "content")
SHAREGPT = ("from", "value")
_MARKS = ("train", "weight")
INNER_KEYS = (*OPENAI, *SHAREGPT, *_MARKS, "label")
"""Keys of what a row's array holds, that `--fields` can map too."""

_ROLES: dict[str, Role] = {role: role for role in ("system", "user", "assistant")}
_OTHER_ROLES: dict[str, Role] = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "ai"), "assistant"),
}
_CARRY = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking", "audio", "images")
"""Keys of a turn that hold what was said too, and that are not read."""
_OTHER_MARKS = ("training", "train_detail")
"""Axolotl's names of what a turn's marks say; the second one says it of parts of a turn."""
_AROUND = ("tools", "functions", "images", "videos", "history")
"""The same, of a row."""


def messages(row: int, fields: dict[str, Any], rules: ReadingRules, notes: list[str]) -> Record:
    """The record of a row with `messages`."""
    return _conversation(row, fields, "messages", OPENAI, rules, notes)


def sharegpt(row: int, fields: dict[str, Any], rules: ReadingRules, notes: list[str]) -> Record:
    """The record of a row with `conversations`; their turns may also be written as those of `messages`."""
    return _conversation(row, fields, "conversations", SHAREGPT, rules, notes)


def _conversation(
    row: int, fields: dict[str, Any], key: str, names: tuple[str, str], rules: ReadingRules, notes: list[str]
) -> Record:
    _check_around(fields)
    turns = [*_system(fields, rules), *_turns(_array(fields, key), key, names, rules, notes)]
    return _record(row, fields, turns, key, (key, "system"), rules, notes)


def _system(fields: Mapping[str, Any], rules: ReadingRules) -> list[Turn]:
    """The system's turn that a row has beside its messages, where it has one."""
    system = fields.get("system")
    if system is None or system == "":
        return []
    text = check_text(system, "`system`")
    check_no_end(text, "`system`", rules)
    return [Turn("system", text)]


def prompt_and_completion(row: int, fields: dict[str, Any], rules: ReadingRules, notes: list[str]) -> Record:
    """The record of a row whose `prompt` and `completion` are lists of messages. The prompt's answers are not learned.

    Raises:
        Malformed: it is none.
    """
    _check_around(fields)
    asked = [*_system(fields, rules), *_turns(_array(fields, "prompt"), "prompt", OPENAI, rules, notes)]
    answered = _turns(_array(fields, "completion"), "completion", OPENAI, rules, notes)
    if answered[0].role != "assistant":
        raise Malformed(f"`completion` begins with the {answered[0].role}, expected the assistant's answer")
    given = [turn._replace(learned=False) if turn.role == "assistant" else turn for turn in asked]
    return _record(row, fields, [*given, *answered], "completion", ("prompt", "completion", "system"), rules, notes)


def segments(row: int, fields: dict[str, Any], rules: ReadingRules, notes: list[str]) -> Record:
    """The record of a row with `segments`, which no template writes anything around.

    Raises:
        Malformed: it is none.
    """
    turns: list[Turn] = []
    held = _array(fields, "segments")
    for number, item in enumerate(held, start=1):
        where = f"`segments` number {number}"
        part = _object(from_text(item), where, ("label", "text"), rules)
        label = part.get("label")
        if not isinstance(label, bool):
            raise Malformed(f"`label` of {where} is {kind_of(label)}, expected true (learned) or false")
        text = check_text(part["text"], f"`text` of {where}")
        if number == len(held):
            text = without_end(text, rules, notes)
        check_no_end(text, where, rules, "the last segment")
        if not text and not rules.allow_empty_output:
            raise Malformed(f"{where} is empty, expected text; --allow_empty_output takes it as a segment of nothing")
        _note_others(part, "segments", ("label", "text"), notes)
        turns.append(Turn("raw", text, label))
    if not any(turn.learned for turn in turns):
        raise Malformed("nothing of `segments` is learned, expected `label` true of at least one")
    check_kindless(fields, None)
    return Record(
        instruction="".join(turn.text for turn in turns[:-1]),
        output=turns[-1].text,
        row=row,
        extra={key: item for key, item in fields.items() if key != "segments"},
        notes=noted(notes),
        turns=tuple(turns),
    )


def _check_around(fields: Mapping[str, Any]) -> None:
    for key in _AROUND:
        if fields.get(key):
            raise Malformed(f"`{key}` is not read, and what is said depends on it; leave out rows with it, or the key")


def _array(fields: Mapping[str, Any], key: str) -> list[Any]:
    """What a row holds under a key.

    Raises:
        Malformed: it is not there, no array, or empty.
    """
    if key not in fields:
        raise Malformed(f"`{key}` is missing, expected an array of objects; got the keys {named_keys(dict(fields))}")
    value = from_text(fields[key])
    if not isinstance(value, list) or not value:
        written = "; in a cell or a text, as JSON" if isinstance(value, str) else ""
        raise Malformed(f"`{key}` is {kind_of(value)}, expected an array of objects{written}")
    return value


def _object(item: Any, where: str, names: Sequence[str], rules: ReadingRules) -> dict[str, Any]:
    """What an array holds, by its own names.

    Raises:
        Malformed: it is no object, or lacks a name.
    """
    if not isinstance(item, dict):
        raise Malformed(f"{where} is {kind_of(item)}, expected an object with `{names[0]}` and `{names[1]}`")
    part = dict(item)
    for own, theirs in rules.fields:
        if own in (*names, *_MARKS) and theirs in part:
            part[own] = part.pop(theirs)
    lacking = next((name for name in names if name not in part), None)
    if lacking is not None:
        raise Malformed(f"{where} has no `{lacking}`, expected `{names[0]}` and `{names[1]}`; got {named_keys(part)}")
    return part


def _turns(held: list[Any], key: str, names: tuple[str, str], rules: ReadingRules, notes: list[str]) -> list[Turn]:
    """The turns that an array holds, each checked for itself."""
    turns = []
    for number, item in enumerate(held, start=1):
        where = f"`{key}` number {number}"
        item = from_text(item)
        own = OPENAI if names == SHAREGPT and isinstance(item, dict) and "role" in item else names
        part = _object(item, where, own, rules)
        carried = next((one for one in _CARRY if part.get(one)), None)
        if carried is not None:
            raise Malformed(f"{where} has `{carried}`, which is not read; leave the row out, or the key")
        mark = next((one for one in _OTHER_MARKS if part.get(one) is not None), None)
        if mark is not None:
            reads = "; --fields training=train reads it" if mark == "training" else "; make `segments` of the row"
            raise Malformed(f"{where} has `{mark}`, expected `train` or `weight` to say whether it is learned{reads}")
        role = _role(part[own[0]], where, own)
        text = _content(part[own[1]], f"`{own[1]}` of {where}")
        if role == "assistant":
            text = without_end(text, rules, notes)
        check_no_end(text, where, rules, "an assistant's turn")
        _note_others(part, key, (*own, *_MARKS, *_CARRY), notes)
        turns.append(Turn(role, text, _learned(part, where)))
    return turns


def _role(said: Any, where: str, names: tuple[str, str]) -> Role:
    roles = _ROLES | _OTHER_ROLES if names == SHAREGPT else _ROLES
    role = roles.get(said) if isinstance(said, str) else None
    if role is None:
        got = f"`{in_one_line(said)}`" if isinstance(said, str) else kind_of(said)
        other = _OTHER_ROLES.get(said) if isinstance(said, str) else None
        expected = "human, gpt or system" if names == SHAREGPT else "system, user or assistant"
        remedy = f"; it means {other}" if other else "; other roles are not read: leave out rows with them"
        raise Malformed(f"`{names[0]}` of {where} is {got}, expected {expected}{remedy}")
    return role


def _content(value: Any, where: str) -> str:
    """A text, or the parts of one."""
    if not isinstance(value, list):
        return check_text(value, where)
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise Malformed(f"{where} has a part of type {in_one_line(str(kind))}, expected text alone")
        parts.append(check_text(part.get("text"), where))
    return "".join(parts)


def _learned(part: Mapping[str, Any], where: str) -> bool | None:
    """What a turn's marks say of it; None where they say nothing."""
    train, weight = part.get("train"), part.get("weight")
    if train is not None and not isinstance(train, bool):
        raise Malformed(f"`train` of {where} is {kind_of(train)}, expected true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        got = weight if isinstance(weight, int | float) else kind_of(weight)
        raise Malformed(f"`weight` of {where} is {got}, expected 0 or 1: a turn is learned or not")
    if train is not None and weight is not None and train != bool(weight):
        raise Malformed(f"{where} has `train` {str(train).lower()} and `weight` {weight}; leave one of them out")
    return train if train is not None else None if weight is None else bool(weight)


def _note_others(part: Mapping[str, Any], key: str, known: Sequence[str], notes: list[str]) -> None:
    notes.extend(f"{NOT_READ}{key}.{name}" for name, item in part.items() if name not in known and item is not None)


def _record(
    row: int,
    fields: dict[str, Any],
    turns: list[Turn],
    key: str,
    read: Sequence[str],
    rules: ReadingRules,
    notes: list[str],
) -> Record:
    """A conversation whose turns follow each other as they must.

    Raises:
        Malformed: they do not.
    """
    _check_order(turns, key)
    for number, turn in enumerate(turns, start=1):
        if not turn.text.strip() and not (rules.allow_empty_output and turn.role != "user"):
            remedy = "" if turn.role == "user" else "; --allow_empty_output takes it as a turn of nothing"
            raise Malformed(f"turn {number} (the {turn.role}'s) is empty, expected text{remedy}")
    if all(turn.learned is False for turn in turns):
        raise Malformed("nothing of it is learned: each turn has `train` false or `weight` 0")
    check_kindless(fields, turns[-1].text)
    check_no_end("\n".join(fields.get("choices") or []), "`choices`", rules)
    return Record(
        instruction=turns[-2].text,
        output=turns[-1].text,
        row=row,
        extra={name: item for name, item in fields.items() if name not in read},
        notes=noted(notes),
        turns=tuple(turns),
    )


def _check_order(turns: Sequence[Turn], key: str) -> None:
    roles = [turn.role for turn in turns]
    talk = roles[1:] if roles[0] == "system" else roles
    if "system" in talk:
        raise Malformed(f"turn {len(roles) - talk[::-1].index('system')} is a system's, expected it first alone")
    if not talk:
        raise Malformed(f"`{key}` has a system's turn alone, expected a user's and an assistant's behind it")
    if talk[0] != "user":
        raise Malformed(f"`{key}` begins with the assistant, expected the user's turn first; leave that answer out")
    skipped = len(roles) - len(talk)
    for number, (one, other) in enumerate(itertools.pairwise(talk), start=skipped + 1):
        if one == other:
            raise Malformed(f"turns {number} and {number + 1} are both the {one}'s; join them into one")
    if talk[-1] == "user":
        raise Malformed(f"`{key}` ends with the user, expected the assistant's answer last; leave that question out")
