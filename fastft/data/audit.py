"""The audit of a data set: what was read otherwise than it is written, what is not read, and what makes scores lie.

`fastft train` warns of what it finds and writes it to `data.json`; `fastft inspect` shows all of it. Nothing that is
found here is refused: what must be is malformed, and `fastft.data.formats` refuses it.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fastft.data.chat_template import AnyTemplate
from fastft.data.json_rows import in_one_line
from fastft.data.records import (
    ALIASES,
    END_OF_TEXT_MARK,
    END_TAKEN,
    KINDLESS_KEYS,
    NOT_A_NUMBER,
    NOT_READ,
    REPEATED_KEY,
    Record,
    Split,
    letter_names_another,
)
from fastft.data.texts import end_mark_in

_FILLERS = {
    *("noinput", "no input", "no_input", "nooutput", "no output", "no_output"),
    *("n/a", "n.a", "na", "nan", "none", "null", "nil", "not applicable", "-", "--", "\N{EM DASH}"),
}
"""What people and programs write for nothing: in lower case, without brackets and full stops around."""
_LONGEST_FILLER = 24
"""Characters, brackets and full stops around it among them."""
_FILLED = {"input": "inputs", "output": "outputs", "category": "categories"}
_ROWS_SHOWN = 10
_KINDS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Findings:
    """What `audit` found. Lists hold rows of the data file, each in the order of the records but where said.

    Attributes:
        unknown_keys: keys that nothing reads, and the number of records that have them.
        aliases: keys that were read as a field of another name, and the number of records.
        fillers: of `input`, `output` and `category` what is written for nothing, and how often.
        filled: of the same the rows.
        repeated_keys: a key stands twice in an object; its last value was taken.
        not_numbers: holds NaN or an infinity; null was taken.
        end_taken: the text of an end-of-text at the end of the output was taken as the end.
        end_as_text: holds the text of an end-of-text, which is learned as text (`--end_of_text_in_data keep`).
        end_marks: the texts of end-of-texts that were looked for, where one was found.
        empty_outputs: has an answer of nothing (`--allow_empty_output`).
        empty_systems: begins with a system's turn of nothing.
        nothing_learned: a conversation of which no assistant's turn is learned, by the marks of the data.
        between_letters: a multiple-choice question whose output is the text of one choice and the letter of another.
        duplicates: is an earlier record again, word for word.
        duplicate_prompts: groups of rows with the same prompt, first seen first.
        test_in_train: test rows whose prompt stands in the training split too, in the split's order.
        val_in_train: the same for validation rows.
        holding_header: the output holds the template's response header, which extraction would remove.
    """

    unknown_keys: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    fillers: dict[str, dict[str, int]] = field(default_factory=dict)
    filled: dict[str, list[int]] = field(default_factory=dict)
    repeated_keys: list[int] = field(default_factory=list)
    not_numbers: list[int] = field(default_factory=list)
    end_taken: list[int] = field(default_factory=list)
    end_as_text: list[int] = field(default_factory=list)
    end_marks: list[str] = field(default_factory=list)
    empty_outputs: list[int] = field(default_factory=list)
    empty_systems: list[int] = field(default_factory=list)
    nothing_learned: list[int] = field(default_factory=list)
    between_letters: list[int] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)
    duplicate_prompts: list[list[int]] = field(default_factory=list)
    test_in_train: list[int] = field(default_factory=list)
    val_in_train: list[int] = field(default_factory=list)
    holding_header: list[int] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """What was found, for `data.json`: without what was not."""
        return {name: found for name, found in asdict(self).items() if found}

    def lines(self) -> list[str]:
        """One line for each thing that was found, with its count and its first rows."""
        return [line for line, found in self.said() if found]

    def said(self) -> Iterator[tuple[str, bool]]:
        """A line for each thing that is looked for, and whether it was found."""
        unknown = {f"`{in_one_line(key)}`": count for key, count in self.unknown_keys.items()}
        yield _counted("keys that are not read", unknown), bool(unknown)
        named = {f"`{alias}` as `{ALIASES[alias]}`": count for alias, count in self.aliases.items()}
        yield _counted("keys read by another name", named), bool(named)
        for name, rows in self.filled.items():
            kinds = _counted("such as", {repr(text[:40]): count for text, count in self.fillers[name].items()})
            yield f"{_FILLED[name]} that say that there is nothing, read as text: {_rows(rows)} ({kinds})", True
        mark = " or ".join(in_one_line(one) for one in self.end_marks or [END_OF_TEXT_MARK])
        for words, rows in (
            ("records with a key twice, of which the last counts", self.repeated_keys),
            ("records with NaN or an infinity, read as null", self.not_numbers),
            (f"outputs with {mark} at their end, taken as the end", self.end_taken),
            (f"records that hold {mark}, learned as text", self.end_as_text),
            ("empty outputs, learned as a response of nothing", self.empty_outputs),
            ("conversations with a system's turn that is empty", self.empty_systems),
            ("conversations of which no assistant's turn is learned, by their marks", self.nothing_learned),
            ("outputs that are one choice's text and another's letter, read as the text", self.between_letters),
            ("records that stand more than once, word for word", self.duplicates),
        ):
            yield f"{words}: {_rows(rows)}", bool(rows)
        repeated = sum(map(len, self.duplicate_prompts))
        groups = [_equal(rows) for rows in self.duplicate_prompts[:_ROWS_SHOWN]]
        count = f"{len(self.duplicate_prompts)} ({repeated} rows)"
        words = "prompts that stand more than once"
        yield f"{words}: {_rows(groups, len(self.duplicate_prompts), count)}", repeated > 0
        for words, rows in (
            ("test prompts that also stand in train", self.test_in_train),
            ("validation prompts that also stand in train", self.val_in_train),
            ("outputs that hold the response header, lost in extraction", self.holding_header),
        ):
            yield f"{words}: {_rows(rows)}", bool(rows)


def audit(
    records: Iterable[Record], parts: Split, template: AnyTemplate, end_marks: Sequence[str] = (END_OF_TEXT_MARK,)
) -> Findings:
    """Looks through records, in one pass and with some 24 bytes held of each.

    Args:
        records: all of a source, in its order.
        parts: which of them are in which split.
        template: makes the prompts that are compared.
        end_marks: the texts of end-of-texts, as the records were read by (`ReadingRules`).
    """
    found = Findings()
    header = template.response_header.strip()
    unknown: Counter[str] = Counter()
    aliases: Counter[str] = Counter()
    fillers: dict[str, Counter[str]] = {name: Counter() for name in _FILLED}
    rows, prompts, wholes, asking = array("q"), array("q"), array("q"), bytearray()
    for record in records:
        prompt, whole = _compared(record, template)
        rows.append(record.row)
        prompts.append(_hash(prompt))
        wholes.append(_hash(whole))
        asking.append(record.asks)
        unknown.update(key for key in record.extra if key not in KINDLESS_KEYS)
        unknown.update(note.removeprefix(NOT_READ) for note in record.notes if note.startswith(NOT_READ))
        aliases.update(note for note in record.notes if note in ALIASES)
        for name in _FILLED:
            text = getattr(record, name) or ""
            if record.asks and _is_filler(text, blank=name != "output"):
                fillers[name][text] += 1
                found.filled.setdefault(name, []).append(record.row)
        for is_so, named in (
            (REPEATED_KEY in record.notes, found.repeated_keys),
            (NOT_A_NUMBER in record.notes, found.not_numbers),
            (END_TAKEN in record.notes, found.end_taken),
            (end_mark_in(_said(record), end_marks) is not None, found.end_as_text),
            (record.tokens is None and not all(map(str.strip, _answers(record))), found.empty_outputs),
            (any(turn.role == "system" and not turn.text.strip() for turn in record.turns), found.empty_systems),
            (_learns_no_answer(record), found.nothing_learned),
            (letter_names_another(record), found.between_letters),
            (record.asks and bool(header) and header in record.output, found.holding_header),
        ):
            if is_so:
                named.append(record.row)
    if found.end_taken or found.end_as_text:
        found.end_marks.extend(end_marks)
    found.unknown_keys.update(unknown.most_common())
    found.aliases.update(aliases.most_common())
    found.fillers.update({name: dict(kinds.most_common()) for name, kinds in fillers.items() if kinds})
    _compare(found, np.array(rows), np.array(prompts), np.array(wholes), np.frombuffer(asking, np.bool_), parts)
    return found


def _said(record: Record) -> str:
    """All text of a record, and none of a template's."""
    own = (record.instruction, record.input, record.output)
    return "\0".join((*own, *(turn.text for turn in record.turns), *record.choices))


def _compared(record: Record, template: AnyTemplate) -> tuple[str, str]:
    """What makes the prompts of two records the same, and what the whole of them: of what asks nothing, the whole is
    both."""
    if record.tokens is not None:
        whole = repr(record.tokens)
        return whole, whole
    if not record.turns:
        prompt = template.prompt_of(record)
        return prompt, f"{prompt}\0{record.output}"
    asked = json.dumps([[turn.role, turn.text] for turn in record.turns[:-1]] + [record.choices])
    whole = f"{asked}\0{record.output}"
    return asked if record.asks else whole, whole


def _answers(record: Record) -> list[str]:
    """The texts that a record's answers are."""
    answers = [turn.text for turn in record.turns if turn.role == "assistant"]
    return answers or [record.output]


def _learns_no_answer(record: Record) -> bool:
    marks = [turn.learned for turn in record.turns if turn.role == "assistant"]
    return bool(marks) and all(mark is False for mark in marks)


Numbers = npt.NDArray[np.int64]


def _compare(
    found: Findings, rows: Numbers, prompts: Numbers, wholes: Numbers, asking: npt.NDArray[np.bool_], parts: Split
) -> None:
    """Finds equal records and prompts by their hashes, `[n]` each; `asking`: whether there is a prompt."""
    found.duplicates.extend(sorted(row for group in _groups(wholes) for row in rows[group[1:]].tolist()))
    found.duplicate_prompts.extend(rows[group].tolist() for group in _groups(prompts) if asking[group[0]])
    for indices, named in ((parts.test, found.test_in_train), (parts.val, found.val_in_train)):
        named.extend(rows[indices[np.isin(prompts[indices], prompts[parts.train])]].tolist())


def _groups(keys: Numbers) -> list[Numbers]:
    """The places of equal keys, where there is more than one: rising, and by their first."""
    order = np.argsort(keys, kind="stable")
    inner = np.flatnonzero(np.diff(keys[order])) + 1
    begins, ends = np.append(0, inner), np.append(inner, len(keys))
    several = ends - begins > 1
    groups = [order[begin:end] for begin, end in zip(begins[several], ends[several], strict=True)]
    return sorted(groups, key=lambda group: int(group[0]))


def _hash(text: str) -> int:
    """64 bits of a text: two of a million different ones agree once in 37 million data sets."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _is_filler(text: str, *, blank: bool) -> bool:
    """Whether a text that is there says that nothing is; white space alone does where `blank` says so."""
    said = text.strip()
    if not said:
        return blank and bool(text)
    if len(said) > _LONGEST_FILLER:
        return False
    return said.strip("<>[](){}. ").casefold() in _FILLERS


def _counted(words: str, counts: Mapping[str, int]) -> str:
    """`WORDS: NAME 3, OTHER 1`, the most frequent ones."""
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:_KINDS_SHOWN])
    more = len(counts) - _KINDS_SHOWN
    return f"{words}: {shown or '0'}" + (f" and {more} more" if more > 0 else "")


def _equal(rows: Sequence[int]) -> str:
    """`2 = 9 = 36`."""
    more = len(rows) - _ROWS_SHOWN
    return " = ".join(map(str, rows[:_ROWS_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _rows(rows: Sequence[int | str], n: int | None = None, count: str | None = None) -> str:
    """`12: rows 3, 9, ... and 2 more`."""
    n = len(rows) if n is None else n
    shown = ", ".join(map(str, rows[:_ROWS_SHOWN]))
    more = f" and {n - _ROWS_SHOWN} more" if n > _ROWS_SHOWN else ""
    return f"{n if count is None else count}" + (f": rows {shown}{more}" if n else "")
