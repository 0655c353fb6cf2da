"""Formats: a row's keys -> what they mean, and the record that the row is.

A file has one format: the one that is named, else the one that the keys of its first usable row tell. Rows with the
keys of another one are malformed. `fields` reads keys by other names.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastft.common.errors import UserError
from fastft.common.kinds import kind_of
from fastft.common.nearest import did_you_mean, nearest
from fastft.data.conversations import INNER_KEYS, messages, prompt_and_completion, segments, sharegpt
from fastft.data.json_rows import BadRecord, RepeatedKeys, named_keys
from fastft.data.pairs import check_kindless, name_fields, noted, pair
from fastft.data.records import (
    FIELDS,
    KINDLESS_KEYS,
    NOT_READ,
    REPEATED_KEY,
    Format,
    ReadingRules,
    Record,
    Tokens,
    Turn,
)
from fastft.data.texts import Malformed, check_no_end, check_text, from_text, plain, without_end

Fields = tuple[tuple[str, str], ...]
Maker = Callable[[int, dict[str, Any], ReadingRules, list[str]], Record]

_NEEDS: dict[Format, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "segments": ("segments",),
    "tokens": ("input_ids",),
    "text": ("text",),
}
"""The keys by which each is told."""
_READS: dict[Format, tuple[str, ...]] = {
    "alpaca": FIELDS,
    "dolly": ("instruction", "context", "response"),
    "prompt_completion": ("prompt", "completion", "system"),
    "messages": ("messages", "system"),
    "sharegpt": ("conversations", "system"),
    "segments": ("segments",),
    "tokens": ("input_ids", "labels", "attention_mask"),
    "text": ("text",),
}
"""All that each reads."""
_DOLLYS: Fields = (("input", "context"), ("output", "response"))
_PREFERENCES = ("chosen", "rejected")
_OF_PREFERENCES = (
    "holds preferences (`chosen`, `rejected`), which are not trained on; --fields chosen=completion beside `prompt`, "
    "or chosen=messages, learns those that were chosen"
)
_MASKS = ("completion_mask", "assistant_masks", "position_ids", "seq_lengths")
"""Keys of tokens that say what is learned, or what sees what, and that are not read."""
_NOT_LEARNED = -100
_LARGEST_ID = (1 << 31) - 1

_ALSO = {
    "instruction": ("question", "query", "prompt", "problem", "task", "request", "human", "user"),
    "output": ("answer", "response", "completion", "target", "reply", "solution", "assistant", "label"),
    "input": ("context",),
    "messages": ("dialog", "dialogue", "chat", "turns", "conversation"),
    "text": ("content", "document", "body", "passage"),
    "input_ids": ("ids", "tokens", "token_ids"),
}
"""What keys are called elsewhere, as far as a message proposes it."""


def checked(
    rows: Iterable[tuple[int, Any]], rules: ReadingRules, *, told: Callable[[Format], None] | None = None
) -> Iterator[Record | BadRecord]:
    """Turns the rows of a file, (row, value or `BadRecord`), into records, or says what is wrong with them.

    Args:
        rows: of one file.
        rules: what is a record.
        told: is told the format as soon as it is known.
    """
    file, is_told = _File(rules), told is None
    for row, value in rows:
        if isinstance(value, BadRecord):
            yield value
            continue
        try:
            found: Record | BadRecord = file.record(row, value)
        except Malformed as fault:
            found = BadRecord(row, str(fault))
        except RecursionError:
            found = BadRecord(row, "nested too deeply, expected a flat object")
        if told is not None and file.format is not None and not is_told:
            told(file.format)
            is_told = True
        yield found


def parse_fields(text: str | None, format: Format = "auto") -> Fields:
    """The (own, theirs) of `question=instruction,answer=output`.

    Raises:
        UserError: it is not written so, or a name on the right means nothing in the format.
    """
    if text is None:
        return ()
    example = "expected THEIRS=OURS pairs, such as question=instruction,answer=output"
    known = {*(key for name, keys in _READS.items() if format in ("auto", name) for key in keys)}
    known |= {*KINDLESS_KEYS, *INNER_KEYS, "text"}
    found: list[tuple[str, str]] = []
    for one in text.split(","):
        theirs, equals, own = (part.strip() for part in one.partition("="))
        if not (theirs and equals and own):
            raise UserError(f"got --fields {text}, {example}")
        if own not in known:
            of = "" if format == "auto" else f" of {format}"
            raise UserError(
                f"got --fields {text}: {own} is no key{of} that is read{did_you_mean(own, known)}; {example}"
            )
        found.append((own, theirs))
    for side, names in (("left", [theirs for _, theirs in found]), ("right", [own for own, _ in found])):
        if len(set(names)) < len(names):
            raise UserError(f"got --fields {text}: a name stands twice on the {side}; {example}")
    return tuple(found)


class _File:
    """What is known of a file's format while its rows are read."""

    def __init__(self, rules: ReadingRules) -> None:
        self.format: Format | None = None if rules.format == "auto" else rules.format
        self._rules = rules
        self._told_by = 0
        """The row that told the format, 0 where it was named."""
        self._fields = (*rules.fields, *(_DOLLYS if rules.format == "dolly" else ()))

    def record(self, row: int, value: Any) -> Record:
        """The record of a row.

        Raises:
            Malformed: it is none.
        """
        if not isinstance(value, dict):
            raise Malformed(f"got {kind_of(value)}, expected an object with {_keys(_needs_of(self.format))}")
        notes: list[str] = []
        fields = {key: item if type(item) is str else plain(item, notes) for key, item in value.items()}
        if isinstance(value, RepeatedKeys):
            notes.append(REPEATED_KEY)
        if self._fields:
            _rename(fields, self._fields, notes)
        if "choices" in fields:
            fields["choices"] = from_text(fields["choices"])
        format = self._format_of(fields)
        if self._rules.format == "auto" and format == "alpaca":
            name_fields(fields, notes)
        record = _MAKERS[format](row, fields, self._rules, notes)
        if self.format is None:
            self.format, self._told_by = format, row
        return record

    def _format_of(self, fields: Mapping[str, Any]) -> Format:
        """The format of a row, by its keys where none was named.

        Raises:
            Malformed: they tell none, or two, or another one than that of the rows before.
        """
        found: tuple[Format, ...] = ()
        if self._rules.format == "auto":
            found = _told_by(tuple([key for key in _TELLING if fields.get(key) is not None]))
        if len(found) > 1:
            said = " and of ".join(f"{name} ({_keys(_NEEDS[name])})" for name in found)
            raise Malformed(f"has the keys of {said}; name the one to read with --format")
        if self.format is not None:
            if found not in ((), (self.format,)):
                raise Malformed(
                    f"has the keys of {found[0]} ({_keys(_NEEDS[found[0]])}), expected {self.format}, as row "
                    f"{self._told_by} has; a file is of one format"
                )
            if self._rules.format == "auto" and self.format == "alpaca" and not found:
                _check_any(fields, self._rules.fields)
            return self.format
        if not found:
            _check_any(fields, self._rules.fields)
            return "alpaca"
        return found[0]


def _needs_of(format: Format | None) -> Sequence[str]:
    return FIELDS if format in (None, "alpaca") else _NEEDS.get(format, _READS[format])


def _keys(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _rename(fields: dict[str, Any], names: Fields, notes: list[str]) -> None:
    """Puts what has other names under its own; what else stands there is not read, and that is noted."""
    here = [(own, theirs) for own, theirs in names if own not in INNER_KEYS and theirs in fields]
    taken = {own: fields.pop(theirs) for own, theirs in here}
    notes.extend(f"{NOT_READ}{own}" for own in taken if fields.get(own) is not None)
    fields.update(taken)


_TELLING = (*dict.fromkeys(key for keys in _NEEDS.values() for key in keys), "response")


@functools.cache
def _told_by(keys: tuple[str, ...]) -> tuple[Format, ...]:
    """The formats that are told by those of `_TELLING` that a row has. `text` counts alone: beside another format's key
    it is most often the example written out."""
    named = {"output" if key == "response" and "instruction" in keys else key for key in keys}
    return tuple(
        name for name, needed in _NEEDS.items() if named >= {*needed} and (name != "text" or named == {"text"})
    )


def _check_any(fields: Mapping[str, Any], mapped: Fields) -> None:
    """Looks at a row that tells no format.

    Args:
        fields: by their own names.
        mapped: those that had others, as the rules say.

    Raises:
        Malformed: it does not begin to be one of alpaca's, which will be said to lack something.
    """
    if any(fields.get(key) is not None for key in _PREFERENCES):
        raise Malformed(_OF_PREFERENCES)
    got = f"; got the keys {named_keys(dict(fields))}"
    halves = [key for key in _NEEDS["prompt_completion"] if fields.get(key) is not None]
    if halves and not any(key in fields for key in ("instruction", "output", "response")):
        (lacking,) = {*_NEEDS["prompt_completion"]} - {*halves}
        raise Malformed(f"`{lacking}` is missing beside `{halves[0]}`, expected text{got}{_proposed(fields, mapped)}")
    for key in ("instruction", "output"):
        if key not in fields and not (key == "output" and fields.get("response") is not None):
            raise Malformed(f"`{key}` is missing, expected text{got}{_proposed(fields, mapped)}")


def _proposed(fields: Mapping[str, Any], mapped: Fields) -> str:
    """The line that would read a row by its own names, where they are near to those of a format; what is mapped already
    stays in it."""
    known = {key for keys in _READS.values() for key in keys}
    for needed in _NEEDS.values():
        theirs = {key.casefold(): key for key in reversed([*fields]) if not set(key) & set(",=\n")}
        found = [(own, _meant(own, theirs, known)) for own in needed]
        if all(name is not None for _, name in found):
            if needed == _NEEDS["alpaca"]:
                found.insert(1, ("input", _meant("input", theirs, known)))
            others = [(own, name) for own, name in found if name not in (None, own)]
            line = ",".join(f"{name}={own}" for own, name in (*mapped, *others))
            return f"; --fields {line} reads them" if others else ""
    return ""


def _meant(own: str, theirs: dict[str, str], known: Collection[str]) -> str | None:
    """The key of a row that may be meant by one of a format's; it is taken out of `theirs`, which are by their names in
    lower case. What is `known` is no misspelt name."""
    name = next((name for name in (own, *_ALSO.get(own, ())) if name in theirs), None)
    name = name or nearest(own, [one for one in theirs if one not in known])
    return theirs.pop(name) if name else None


# What has a format of its own here


def _prompt_completion(row: int, fields: dict[str, Any], rules: ReadingRules, notes: list[str]) -> Record:
    if fields.get("chosen") is not None:
        raise Malformed(_OF_PREFERENCES)
    if isinstance(fields.get("label"), bool):
        raise Malformed(
            "has a `label` (is the completion wanted?), which is not read; leave out rows with false, and the key"
        )
    lists = [isinstance(fields.get(key), list) for key in ("prompt", "completion")]
    if all(lists):
        return prompt_and_completion(row, fields, rules, notes)
    if any(lists) and all(fields.get(key) is not None for key in ("prompt", "completion")):
        raise Malformed("one of `prompt` and `completion` is an array and one is not, expected two texts or two arrays")
    return pair(row, fields, rules, notes, ("prompt", None, "completion"))


def _text(row: int, fields: dict[str, Any], rules: ReadingRules, notes: list[str]) -> Record:
    """A document."""
    if "text" not in fields:
        raise Malformed(
            f"`text` is missing, expected text; got the keys {named_keys(fields)}{_proposed(fields, rules.fields)}"
        )
    text = without_end(check_text(fields["text"], "`text`"), rules, notes)
    check_no_end(text, "`text`", rules, "a document")
    if not text.strip() and not rules.allow_empty_output:
        raise Malformed("`text` is empty, expected text; --allow_empty_output takes it as a document of nothing")
    check_kindless(fields, None)
    return Record(
        instruction="",
        output=text,
        row=row,
        extra={key: item for key, item in fields.items() if key != "text"},
        notes=noted(notes),
        turns=(Turn("raw", text, True),),
        is_document=True,
    )


def _tokens(row: int, fields: dict[str, Any], _: ReadingRules, notes: list[str]) -> Record:
    """Token ids."""
    unread = next((key for key in _MASKS if fields.get(key) is not None), None)
    if unread is not None:
        raise Malformed(f"`{unread}` is not read; say what is learned by `labels`, and leave it out")
    ids = _integers(fields, "input_ids")
    labels = list(ids) if fields.get("labels") is None else _integers(fields, "labels", len(ids))
    if fields.get("attention_mask") is not None:
        ids, labels = _unpadded(ids, labels, _integers(fields, "attention_mask", len(ids)))
    wrong = next((at for at, token in enumerate(ids) if not 0 <= token <= _LARGEST_ID), None)
    if wrong is not None:
        raise Malformed(f"`input_ids` number {wrong + 1} is {ids[wrong]}, expected the number of a token")
    other = next((at for at, one in enumerate(labels) if one not in (ids[at], _NOT_LEARNED)), None)
    if other is not None:
        raise Malformed(
            f"`labels` number {other + 1} is {labels[other]}, expected {ids[other]}, as in `input_ids`, or "
            f"{_NOT_LEARNED}: labels are not shifted"
        )
    if all(one == _NOT_LEARNED for one in labels[1:]):
        raise Malformed("nothing of it is learned: expected two tokens or more, and a label behind the first")
    check_kindless(fields, None)
    return Record(
        instruction="",
        output="",
        row=row,
        extra={key: item for key, item in fields.items() if key not in _READS["tokens"]},
        notes=noted(notes),
        tokens=Tokens(tuple(ids), tuple(labels)),
    )


def _integers(fields: Mapping[str, Any], key: str, n: int | None = None) -> list[int]:
    """The whole numbers under a key, `n` of them.

    Raises:
        Malformed: they are not there, or something else.
    """
    if key not in fields:
        raise Malformed(
            f"`{key}` is missing, expected an array of whole numbers; got the keys {named_keys(dict(fields))}"
        )
    value = from_text(fields[key])
    if not isinstance(value, list):
        raise Malformed(f"`{key}` is {kind_of(value)}, expected an array of whole numbers")
    wrong = next((at for at, one in enumerate(value) if type(one) is not int), None)
    if wrong is not None:
        raise Malformed(f"`{key}` number {wrong + 1} is {kind_of(value[wrong])}, expected a whole number")
    if n is not None and len(value) != n:
        raise Malformed(f"`{key}` has {len(value)} numbers, expected {n}, as `input_ids`")
    return value


def _unpadded(ids: list[int], labels: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
    """Ids and labels without the padding in front and behind.

    Raises:
        Malformed: the mask leaves out something else.
    """
    if 1 not in mask:
        raise Malformed("`attention_mask` has no 1, expected it to leave out padding alone")
    begin, end = mask.index(1), len(mask) - mask[::-1].index(1)
    if any(one != 1 for one in mask[begin:end]) or any(one != 0 for one in (*mask[:begin], *mask[end:])):
        raise Malformed("`attention_mask` is not 0s, 1s and 0s, expected it to leave out padding alone")
    return ids[begin:end], labels[begin:end]


_MAKERS: dict[Format, Maker] = {
    "alpaca": pair,
    "dolly": pair,
    "prompt_completion": _prompt_completion,
    "messages": messages,
    "sharegpt": sharegpt,
    "segments": segments,
    "tokens": _tokens,
    "text": _text,
}
assert {*_MAKERS, "auto"} == {*typing.get_args(Format)}
