"""Each format of rows: what is read of it, and ten rows that are none, each refused in one line that fits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.common.errors import UserError
from fastft.data.formats import checked, parse_fields
from fastft.data.json_rows import BadRecord
from fastft.data.records import END_TAKEN, NOT_READ, Format, ReadingRules, Record, Tokens, Turn

MARK = "<|endoftext|>"
USER, ASSISTANT = Turn("user", "q"), Turn("assistant", "a")


def read(*rows: Any, **rules: Any) -> list[Record | BadRecord]:
    """What the rows of a file become."""
    return list(checked(enumerate(rows, start=1), ReadingRules(**rules)))


def record(row: Any, **rules: Any) -> Record:
    (found,) = read(row, **rules)
    assert isinstance(found, Record), found
    return found


def reason(*rows: Any, **rules: Any) -> str:
    """Why the last of the rows is malformed."""
    found = read(*rows, **rules)[-1]
    assert isinstance(found, BadRecord), found
    assert "\n" not in found.reason
    return found.reason


def said(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    """A row of `messages`."""
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def shared(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    """A row of ShareGPT's."""
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


def parts(*of: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    """A row of segments."""
    return {"segments": [{"label": label, "text": text} for label, text in of], **more}


def marked(**marks: Any) -> dict[str, Any]:
    """A conversation whose second turn is marked."""
    row = said(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    row["messages"][1] |= marks
    return row


GOOD: list[tuple[Format, dict[str, Any], Record]] = [
    ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, Record(instruction="q", input="i", output="a")),
    ("dolly", {"instruction": "q", "context": "i", "response": "a"}, Record(instruction="q", input="i", output="a")),
    ("prompt_completion", {"prompt": "q", "completion": " a"}, Record(instruction="q", output=" a")),
    (
        "prompt_completion",
        {
            "prompt": said(("system", "s"), ("user", "p"), ("assistant", "b"), ("user", "q"))["messages"],
            "completion": said(("assistant", "a"))["messages"],
        },
        Record(
            instruction="q",
            output="a",
            turns=(Turn("system", "s"), Turn("user", "p"), Turn("assistant", "b", False), USER, ASSISTANT),
        ),
    ),
    ("messages", said(("user", "q"), ("assistant", "a")), Record(instruction="q", output="a", turns=(USER, ASSISTANT))),
    (
        "messages",
        said(("system", "s"), ("user", "p"), ("assistant", "b"), ("user", "q"), ("assistant", "a"), category="c"),
        Record(
            instruction="q",
            output="a",
            turns=(Turn("system", "s"), Turn("user", "p"), Turn("assistant", "b"), USER, ASSISTANT),
            extra={"category": "c"},
        ),
    ),
    (
        "messages",
        said(("user", [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]), ("assistant", "a")),
        Record(instruction="one two", output="a", turns=(Turn("user", "one two"), ASSISTANT)),
    ),
    (
        "messages",
        said(("user", "q"), ("assistant", "a"), system="s"),
        Record(instruction="q", output="a", turns=(Turn("system", "s"), USER, ASSISTANT)),
    ),
    (
        "sharegpt",
        shared(("system", "s"), ("human", "q"), ("gpt", "b"), ("user", "q"), ("bing", "a")),
        Record(
            instruction="q", output="a", turns=(Turn("system", "s"), USER, Turn("assistant", "b"), USER, ASSISTANT)
        ),
    ),
    (
        "sharegpt",
        {"conversations": said(("user", "q"), ("assistant", "a"))["messages"]},
        Record(instruction="q", output="a", turns=(USER, ASSISTANT)),
    ),
    (
        "segments",
        parts((True, "<s>Hello\n"), (False, " you "), (True, "Bye")),
        Record(
            instruction="<s>Hello\n you ",
            output="Bye",
            turns=(Turn("raw", "<s>Hello\n", True), Turn("raw", " you ", False), Turn("raw", "Bye", True)),
        ),
    ),
    (
        "text",
        {"text": "A page.\n", "id": 3},
        Record(instruction="", output="A page.\n", turns=(Turn("raw", "A page.\n", True),), extra={"id": 3}),
    ),
    ("tokens", {"input_ids": [5, 6, 7]}, Record(instruction="", output="", tokens=Tokens((5, 6, 7), (5, 6, 7)))),
    (
        "tokens",
        {"input_ids": [0, 5, 6, 7, 0], "labels": [-100, -100, 6, 7, -100], "attention_mask": [0, 1, 1, 1, 0]},
        Record(instruction="", output="", tokens=Tokens((5, 6, 7), (-100, 6, 7))),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "expected"), GOOD)
def test_a_row_is_read_by_its_keys_and_by_its_formats_name(
    format: Format, row: dict[str, Any], expected: Record
) -> None:
    for named in ("auto", format):
        found = record(row, format=named)
        for name in ("instruction", "input", "output", "turns", "tokens", "extra"):
            assert getattr(found, name) == getattr(expected, name), name
        assert found.row == 1


@pytest.mark.parametrize(("format", "row", "_"), GOOD)
def test_the_format_is_told_once(format: Format, row: dict[str, Any], _: Record) -> None:
    told: list[Format] = []
    list(checked(enumerate([{"nothing": 1}, row, row], start=1), ReadingRules(), told=told.append))
    assert told == ["alpaca" if format == "dolly" else format]


LONE = "half \ud800"
BAD: dict[Format, list[tuple[Any, str]]] = {
    "alpaca": [
        ("text", "got text, expected an object with `instruction`, `input`, `output`"),
        ({"instruction": "q"}, "`output` is missing, expected text; got the keys `instruction`"),
        ({"output": "a"}, "`instruction` is missing"),
        ({"instruction": "q", "output": ["a"]}, "`output` is an array, expected text"),
        ({"instruction": "q", "output": None}, "`output` is null"),
        ({"instruction": " ", "output": "a"}, "`instruction` is blank"),
        ({"instruction": "q", "output": " "}, "`output` is empty.*--allow_empty_output"),
        ({"instruction": "q", "input": LONE, "output": "a"}, "`input` holds half of a surrogate pair"),
        ({"instruction": f"q{MARK}", "output": "a"}, "`instruction` holds .*--end_of_text_in_data keep"),
        ({"instruction": "q", "output": "a", "choices": ["b", "c"]}, "`output` is none of `choices`"),
        ({"instruction": "q", "output": "a", "history": [["b", "c"]]}, "`history` .*use the chat format"),
    ],
    "dolly": [
        ([], "got an empty array, expected an object with `instruction`, `context`, `response`"),
        ({"instruction": "q"}, "`output` is missing"),
        ({"response": "a"}, "`instruction` is missing"),
        ({"instruction": "q", "response": 5}, "`output` is a number"),
        ({"instruction": "q", "response": "a", "system": "s"}, "`system` .a system text. is not read beside"),
        ({"instruction": "q", "response": LONE}, "`output` holds half of a surrogate pair"),
        ({"instruction": "", "response": "a"}, "`instruction` is blank"),
        ({"instruction": "q", "response": ""}, "`output` is empty"),
        ({"instruction": "q", "context": f"{MARK}", "response": "a"}, "`input` holds"),
        ({"instruction": "q", "response": "a", "category": {}}, "`category` is an object"),
    ],
    "prompt_completion": [
        ({"prompt": "q"}, "`completion` is missing beside `prompt`, expected text; got the keys `prompt`"),
        ({"completion": "a"}, "`prompt` is missing"),
        ({"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]}, "two texts or two arrays"),
        ({"prompt": "q", "completion": 1}, "`completion` is a number"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preferences .*--fields chosen=completion"),
        ({"prompt": "q", "completion": "a", "chosen": "a"}, "preferences"),
        ({"prompt": "q", "completion": "a", "label": False}, "is the completion wanted"),
        ({"prompt": " ", "completion": "a"}, "`prompt` is blank"),
        ({"prompt": "q", "completion": ""}, "`completion` is empty"),
        ({"prompt": "q", "completion": f"a{MARK}b"}, "`completion` holds"),
        (
            {"prompt": said(("user", "q"))["messages"], "completion": said(("user", "a"))["messages"]},
            "`completion` begins with the user",
        ),
        (
            {"prompt": said(("assistant", "q"))["messages"], "completion": said(("assistant", "a"))["messages"]},
            "begins with the assistant",
        ),
    ],
    "messages": [
        ({"messages": []}, "`messages` is an empty array"),
        ({"messages": "q"}, "`messages` is text, expected an array of objects; in a cell or a text, as JSON"),
        ({"messages": ["q", "a"]}, "`messages` number 1 is text, expected an object with `role` and `content`"),
        ({"messages": [{"from": "human", "value": "q"}]}, "number 1 has no `role`.*got `from`, `value`"),
        (said(("user", "q"), ("gpt", "a")), "`role` of `messages` number 2 is `gpt`.*it means assistant"),
        (said(("user", "q"), ("tool", "a")), "is `tool`, expected system, user or assistant; other roles"),
        (said(("user", "q"), (None, "a")), "`role` of `messages` number 2 is null"),
        (said(("user", "q"), ("assistant", None)), "`content` of `messages` number 2 is null"),
        (said(("user", [{"type": "image_url"}]), ("assistant", "a")), "has a part of type image_url"),
        (said(("user", ["q"]), ("assistant", "a")), "has a part of type text"),
        (said(("user", "q")), "ends with the user"),
        (said(("user", "q"), ("assistant", "a"), ("user", "r")), "ends with the user, expected the assistant's"),
        (said(("assistant", "a")), "begins with the assistant"),
        (said(("system", "s")), "a system's turn alone"),
        (said(("user", "q"), ("user", "r"), ("assistant", "a")), "turns 1 and 2 are both the user's; join them"),
        (said(("system", "s"), ("user", "q"), ("assistant", "a"), ("assistant", "b")), "turns 3 and 4 are both"),
        (said(("user", "q"), ("system", "s"), ("assistant", "a")), "turn 2 is a system's"),
        (said(("system", "s"), ("user", "q"), ("assistant", "a"), system="t"), "turn 2 is a system's"),
        (said(("user", " "), ("assistant", "a")), r"turn 1 \(the user's\) is empty, expected text$"),
        (said(("user", "q"), ("assistant", "")), "turn 2 .* is empty.*--allow_empty_output"),
        (said(("user", LONE), ("assistant", "a")), "`content` of `messages` number 1 holds half"),
        (said(("user", f"a{MARK}"), ("assistant", "a")), "`messages` number 1 holds .* end of an assistant's turn"),
        (said(("user", "q"), ("assistant", "a"), tools=[{"name": "f"}]), "`tools` is not read"),
        (marked(tool_calls=[{"id": 1}]), "number 2 has `tool_calls`, which is not read"),
        (marked(train="yes"), "`train` of `messages` number 2 is text, expected true or false"),
        (marked(weight=0.5), "`weight` of `messages` number 2 is 0.5, expected 0 or 1"),
        (marked(weight=True), "`weight` .* is True"),
        (marked(weight=1, train=False), "`train` false and `weight` 1"),
        (said(("user", "q"), ("assistant", "a"), choices=["b", "c"]), "`output` is none of `choices`"),
    ],
    "sharegpt": [
        ({"conversations": {}}, "`conversations` is an object"),
        ({"conversations": [{"from": "human"}]}, "number 1 has no `value`"),
        ({"conversations": [["human", "q"]]}, "number 1 is an array"),
        (shared(("human", "q"), ("function_call", "a")), "`from` .* `function_call`, expected human, gpt or system"),
        (shared(("human", "q"), (7, "a")), "`from` of `conversations` number 2 is a number"),
        (shared(("gpt", "hello"), ("human", "q"), ("gpt", "a")), "begins with the assistant.*leave that answer out"),
        (shared(("human", "q"), ("gpt", "a"), ("human", "r")), "ends with the user"),
        (shared(("human", "q"), ("gpt", "a"), ("chatgpt", "b")), "turns 2 and 3 are both the assistant's"),
        (shared(("human", "q"), ("gpt", {"a": 1})), "`value` of `conversations` number 2 is an object"),
        (shared(("human", "q"), ("gpt", " ")), r"turn 2 \(the assistant's\) is empty"),
        (shared(("human", "q"), ("gpt", "a"), images=["x.png"]), "`images` is not read"),
        (shared(("system", "s"), ("system", "t"), ("human", "q"), ("gpt", "a")), "turn 2 is a system's"),
    ],
    "segments": [
        ({"segments": []}, "`segments` is an empty array"),
        ({"segments": {"label": True, "text": "a"}}, "`segments` is an object"),
        ({"segments": ["a"]}, "`segments` number 1 is text, expected an object with `label` and `text`"),
        ({"segments": [{"text": "a"}]}, "number 1 has no `label`"),
        ({"segments": [{"label": True}]}, "number 1 has no `text`"),
        (parts((1, "a")), r"`label` of `segments` number 1 is a number, expected true \(learned\) or false"),
        (parts((True, 5)), "`text` of `segments` number 1 is a number"),
        (parts((False, "a"), (False, "b")), "nothing of `segments` is learned"),
        (parts((True, ""), (True, "b")), "`segments` number 1 is empty"),
        (parts((True, f"a{MARK}"), (True, "b")), "`segments` number 1 holds"),
        (parts((True, LONE)), "half of a surrogate pair"),
        (parts((True, "a"), choices=["a", "b"]), "`choices` .* nothing is asked here"),
    ],
    "text": [
        (5, "got a number, expected an object with `text`"),
        ({"content": "a page"}, "got the keys `content`; --fields content=text reads them"),
        ({"text": None}, "is missing|is null"),
        ({"text": ["a"]}, "`text` is an array, expected text"),
        ({"text": ""}, "`text` is empty"),
        ({"text": "\n \u3000"}, "`text` is empty"),
        ({"text": f"one{MARK}two"}, "`text` holds .* at the very end of a document"),
        ({"text": LONE}, "half of a surrogate pair"),
        ({"text": "a", "choices": ["a", "b"]}, "`choices` is an array, and nothing is asked"),
        ({"text": "a", "category": []}, "`category` is an empty array"),
    ],
    "tokens": [
        ({"input_ids": "five"}, "`input_ids` is text"),
        ({"input_ids": [1, "2"]}, "`input_ids` number 2 is text, expected a whole number"),
        ({"input_ids": [1, True]}, "`input_ids` number 2 is a boolean"),
        ({"input_ids": [1, 2.0]}, "`input_ids` number 2 is a number, expected a whole number"),
        ({"input_ids": [1, -2]}, "`input_ids` number 2 is -2, expected the number of a token"),
        ({"input_ids": [1]}, "nothing of it is learned"),
        ({"input_ids": []}, "nothing of it is learned"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "nothing of it is learned"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "`labels` number 1 is 2, expected 1.*not shifted"),
        ({"input_ids": [1, 2], "labels": [1]}, "`labels` has 1 numbers, expected 2"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "leave out padding alone"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "`attention_mask` has no 1"),
        ({"input_ids": [1, 2], "completion_mask": [0, 1]}, "`completion_mask` is not read; say what is learned by"),
    ],
}
CASES = [(format, row, why) for format, cases in BAD.items() for row, why in cases]


def test_each_format_has_ten_bad_rows() -> None:
    assert {format: len(cases) >= 10 for format, cases in BAD.items()} == {format: True for format, _, _ in GOOD}


@pytest.mark.parametrize(("format", "row", "why"), CASES)
def test_a_bad_row_is_refused_in_one_line(format: Format, row: Any, why: str) -> None:
    """Named; by its keys, which may tell another format; and behind a good row."""
    good = next(row for name, row, _ in GOOD if name == format)
    by_keys = [one.reason for one in (*read(row), *read(good, row)) if isinstance(one, BadRecord)]
    reasons = [reason(row, format=format), *by_keys]
    assert not any("\n" in one for one in reasons)
    assert any(re.search(why, one) for one in reasons), reasons


PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_rows_of_the_page_are_what_it_says() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \| `(\{.*\})` \|$", PAGE.read_text(encoding="utf-8"))
    assert [name for name, _ in rows] == [*dict.fromkeys(name for name, _, _ in GOOD)]
    for name, row in rows:
        assert usable(record(json.loads(row))) == usable(record(json.loads(row), format=name))


def usable(found: Record) -> Record:
    """A record without what was done to it: Dolly's keys are noted where the format was not named."""
    return replace(found, notes=())


# Which format it is


TWO = {**said(("user", "q"), ("assistant", "a")), "instruction": "q", "output": "a"}


def test_a_row_of_two_formats_is_refused_unless_one_is_named() -> None:
    assert reason(TWO) == (
        "has the keys of alpaca (`instruction`, `output`) and of messages (`messages`); name the one to read with "
        "--format"
    )
    assert record(TWO, format="messages").turns == (USER, ASSISTANT)
    assert record(TWO, format="messages").as_entry()["instruction"] == "q"
    assert record(TWO, format="alpaca").turns == ()


def test_text_beside_another_formats_keys_is_not_read() -> None:
    """Stanford's file has it: the example written out."""
    found = record({"instruction": "q", "input": "", "output": "a", "text": "Below is ..."})
    assert (found.output, found.turns, found.extra) == ("a", (), {"text": "Below is ..."})
    assert reason({"instruction": "q", "text": "a"}).startswith("`output` is missing")
    assert record({**said(("user", "q"), ("assistant", "a")), "prompt": "q", "text": None}).turns == (USER, ASSISTANT)


def test_a_file_has_one_format_and_the_first_usable_row_tells_it() -> None:
    chat = said(("user", "q"), ("assistant", "a"))
    assert reason({"text": ""}, chat, {"text": "a page"}) == (
        "has the keys of text (`text`), expected messages, as row 2 has; a file is of one format"
    )
    found = read({"text": ""}, chat, chat)
    assert [type(one) for one in found] == [BadRecord, Record, Record]
    assert reason(chat, {"id": 1}).startswith("`messages` is missing, expected an array of objects; got the keys `id`")
    assert isinstance(read(chat, {**chat, "text": "q a"})[1], Record)


# Other names


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"question": "q", "answer": "a"}, "--fields question=instruction,answer=output"),
        ({"Query": "q", "Context": "c", "Response": "r"}, "--fields Query=instruction,Context=input,Response=output"),
        ({"instrution": "q", "output": "a"}, "--fields instrution=instruction"),
        ({"prompt": "q", "answer": "a"}, "--fields prompt=instruction,answer=output"),
        ({"dialogue": [], "id": 1}, "--fields dialogue=messages"),
        ({"conversation": [], "id": 1}, "--fields conversation=messages"),
        ({"document": "a page"}, "--fields document=text"),
        ({"token_ids": [1, 2]}, "--fields token_ids=input_ids"),
    ],
)
def test_unknown_keys_propose_the_line_that_reads_them(row: dict[str, Any], line: str) -> None:
    why = reason(row)
    assert why.endswith(f"; {line} reads them")
    fields = parse_fields(line.removeprefix("--fields "))
    found = read(row, fields=fields)[0]
    assert isinstance(found, Record) or "missing" not in found.reason


def test_what_is_mapped_already_stays_in_the_line() -> None:
    why = reason({"frage": "q", "answer": "a"}, fields=parse_fields("frage=instruction"))
    assert why.endswith("; --fields frage=instruction,answer=output reads them")


def test_nothing_is_proposed_where_nothing_is_near() -> None:
    assert reason({"a": 1, "b": 2}) == "`instruction` is missing, expected text; got the keys `a`, `b`"
    assert "--fields" not in reason({"quest=ion": "q", "answer": "a"})
    assert "--fields" not in reason({"instruction": "q", "input": "i"})  # near to `output`


def test_fields_are_read_by_other_names() -> None:
    fields = parse_fields("question=instruction, answer=output,topic=category")
    found = record({"question": "q", "answer": "a", "topic": "t", "id": 1}, fields=fields)
    assert (found.instruction, found.output, found.category) == ("q", "a", "t")
    assert found.extra == {"category": "t", "id": 1}
    assert found.as_entry() == {"instruction": "q", "input": "", "output": "a", "category": "t", "id": 1}
    swapped = parse_fields("output=instruction,instruction=output")
    assert record({"instruction": "a", "output": "q"}, fields=swapped).instruction == "q"
    both = record({"question": "q", "instruction": "i", "answer": "a"}, fields=fields)
    assert (both.instruction, both.notes) == ("q", (f"{NOT_READ}instruction",))
    dolly = record({"instruction": "q", "response": "a", "output": "b"}, format="dolly")
    assert (dolly.output, dolly.notes) == ("a", (f"{NOT_READ}output",))


def test_keys_of_turns_have_other_names_too() -> None:
    row = {"dialog": [{"speaker": "user", "said": "q"}, {"speaker": "assistant", "said": "a", "learn": False}]}
    row["dialog"] += [{"speaker": "user", "said": "q"}, {"speaker": "assistant", "said": "a"}]
    fields = parse_fields("dialog=messages,speaker=role,said=content,learn=train")
    assert record(row, fields=fields).turns == (USER, Turn("assistant", "a", False), USER, ASSISTANT)


@pytest.mark.parametrize(
    ("text", "format", "why"),
    [
        ("", "auto", "expected THEIRS=OURS pairs"),
        ("question", "auto", "expected THEIRS=OURS pairs, such as question=instruction,answer=output"),
        ("question=", "auto", "expected THEIRS=OURS"),
        ("question=instruction,", "auto", "expected THEIRS=OURS"),
        ("question=instrution", "auto", r"instrution is no key that is read \(did you mean instruction\?\)"),
        ("question=instruction", "messages", "instruction is no key of messages that is read"),
        ("a=instruction,a=output", "auto", "a name stands twice on the left"),
        ("a=instruction,b=instruction", "auto", "a name stands twice on the right"),
    ],
)
def test_fields_that_are_no_pairs_are_refused(text: str, format: Format, why: str) -> None:
    with pytest.raises(UserError, match=rf"^got --fields [^\n]*{why}[^\n]*$"):
        parse_fields(text, format)


# Turns


@pytest.mark.parametrize(
    ("marks", "learned"),
    [
        ({}, None),
        ({"train": None, "weight": None}, None),
        ({"train": False}, False),
        ({"train": True}, True),
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"weight": 1.0, "train": True}, True),
    ],
)
def test_marks_say_whether_a_turn_is_learned(marks: dict[str, Any], learned: bool | None) -> None:
    assert [turn.learned for turn in record(marked(**marks)).turns] == [None, learned, None, None]
    row = shared(("human", "q"), ("gpt", "a"))
    row["conversations"][1] |= marks
    if learned is not False:
        assert [turn.learned for turn in record(row).turns] == [None, learned]


def test_a_conversation_of_which_nothing_can_be_learned_is_refused() -> None:
    row = said(("user", "q"), ("assistant", "a"))
    for message in row["messages"]:
        message["weight"] = 0
    assert reason(row).startswith("nothing of it is learned")


def test_keys_of_turns_that_nothing_reads_are_noted() -> None:
    row = marked(name="Ann", id=None, tool_calls=[])
    assert record(row).notes == (f"{NOT_READ}messages.name",)


def test_an_end_of_text_ends_each_answer_and_nothing_else() -> None:
    found = record(said(("user", "q"), ("assistant", f"a{MARK}"), ("user", "q"), ("assistant", f"a {MARK}")))
    assert found.turns == (USER, ASSISTANT, USER, Turn("assistant", "a "))
    assert found.notes == (END_TAKEN,)
    kept = record(said(("user", f"q{MARK}"), ("assistant", f"a{MARK}")), end_of_text_in_data="keep")
    assert [turn.text for turn in kept.turns] == [f"q{MARK}", f"a{MARK}"]
    assert record({"text": f"a page{MARK}"}).output == "a page"
    assert record(parts((True, "a"), (True, f"b{MARK}"))).output == "b"


def test_turns_of_nothing_are_read_where_they_are_allowed() -> None:
    row = said(("system", ""), ("user", "q"), ("assistant", " "), ("user", "q"), ("assistant", ""))
    assert [turn.text for turn in record(row, allow_empty_output=True).turns] == ["", "q", " ", "q", ""]
    assert "is empty" in reason(said(("user", ""), ("assistant", "a")), allow_empty_output=True)


def test_arrays_may_be_written_in_a_text() -> None:
    """As in a cell of a table, and in columns that hold JSON."""
    row = said(("user", "q"), ("assistant", "a"))
    for written in (json.dumps(row["messages"]), [json.dumps(one) for one in row["messages"]]):
        assert record({"messages": written}).turns == (USER, ASSISTANT)
    asked = {"instruction": "q", "output": "B", "choices": '["x", "y"]'}
    assert record(asked).choices == ["x", "y"]
    assert reason({"messages": "[1, 2"}).startswith("`messages` is text, expected an array of objects; in a cell")


def test_what_asks_for_an_answer() -> None:
    assert [record(row).asks for _, row, _ in GOOD] == [format not in ("text", "tokens") for format, _, _ in GOOD]
    assert not record(parts((True, "a"))).asks
    assert not record(parts((True, "a"), (False, "b"))).asks


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(str.strip)


@given(turns=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=7))
def test_turns_are_taken_as_they_are_or_refused(turns: list[tuple[str, str]]) -> None:
    """A conversation is good if it is what a grammar makes, and both ways of writing it are the same."""
    letters = "".join(role[0] for role, _ in turns)
    others = {"user": "human", "assistant": "gpt", "system": "system"}
    found = read(said(*turns))[0]
    same = read(shared(*((others[role], text) for role, text in turns)))[0]
    if re.fullmatch("s?(ua)+", letters):
        assert isinstance(found, Record)
        assert isinstance(same, Record)
        assert [(turn.role, turn.text) for turn in found.turns] == turns
        assert same.turns == found.turns
        assert (found.instruction, found.output) == (turns[-2][1], turns[-1][1])
        assert found.as_entry()["messages"] == said(*turns[:-1])["messages"]
    else:
        assert isinstance(found, BadRecord)
        assert isinstance(same, BadRecord)


@given(
    ids=st.lists(st.integers(0, 9), min_size=2, max_size=8), mask=st.lists(st.booleans(), min_size=8, max_size=8),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)  # fmt: skip
def test_tokens_are_what_is_not_padding(ids: list[int], mask: list[bool], padding: tuple[int, int]) -> None:
    labels = [token if is_learned else -100 for token, is_learned in zip(ids, mask, strict=False)]
    before, behind = padding
    row = {
        "input_ids": [0] * before + ids + [0] * behind,
        "labels": [-100] * before + labels + [-100] * behind,
        "attention_mask": [0] * before + [1] * len(ids) + [0] * behind,
    }
    found = read(row)[0]
    if any(mask[1 : len(ids)]):
        assert isinstance(found, Record)
        assert found.tokens == Tokens(tuple(ids), tuple(labels))
    else:
        assert isinstance(found, BadRecord)


def test_another_tools_marks_of_turns_are_not_passed_over() -> None:
    """What they keep from being learned would be learned."""
    row = marked(training=False)
    assert "--fields training=train reads it" in reason(row)
    assert record(row, fields=(("train", "training"),)).turns == record(marked(train=False)).turns
    assert "make `segments` of the row" in reason(marked(train_detail=[{"begin_offset": 0, "train": False}]))
    assert record(marked(training=None)).turns == record(marked()).turns
