from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_records import made_records

from fastft.common import files
from fastft.common.errors import UserError
from fastft.data import containers, json_rows, records
from fastft.data.json_rows import BadRecord
from fastft.data.reading import load_records, stream_records
from fastft.data.records import END_TAKEN, NOT_A_NUMBER, REPEATED_KEY, ReadingRules, Record, split

RECORDS = made_records(5)
ARRAY = json.dumps(RECORDS, ensure_ascii=False).encode()
LINES = "\n".join(json.dumps(record) for record in RECORDS).encode()
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.json", ARRAY),
        ("data.json", BOM + ARRAY),
        ("data.json.gz", gzip.compress(ARRAY)),
        ("data.jsonl", LINES),
        ("data.jsonl", BOM + LINES.replace(b"\n", b"\r\n") + b"\r\n"),
        ("data.jsonl.gz", gzip.compress(LINES)),
    ],
    ids=["json", "json with BOM", "json.gz", "jsonl", "jsonl of Windows", "jsonl.gz"],
)
def test_every_kind_of_file_gives_the_same_records(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = load_records(str(path))
    assert [record.as_entry() for record in found.good] == RECORDS
    assert [record.row for record in found.good] == [1, 2, 3, 4, 5]
    assert found.bad == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def parsed_whole(content: bytes) -> str:
    try:
        return repr(json.loads(content.decode()))
    except ValueError as error:
        return str(error)


def parsed_by_parts(path: Path) -> str:
    try:
        rows = list(containers.rows_of(path))
    except UserError as error:
        return str(error).removeprefix(f"{path} is not JSON: ").removesuffix("; expected an array of objects")
    assert [row for row, _ in rows] == list(range(1, len(rows) + 1))
    return repr([value for _, value in rows])


@given(
    values=st.lists(JSON, max_size=4),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
    spoil=st.none() | st.tuples(st.integers(0, 200), st.sampled_from(["", "x", "]", "\n", '"', ",", "\u00e9"])),
    read_bytes=st.integers(1, 40),
)
def test_an_array_read_by_parts_is_the_array_read_whole(
    values: list[Any],
    indent: int | None,
    ascii: bool,
    spoil: tuple[int, str] | None,
    read_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Values and, where the text is spoilt, the fault with its line and column, wherever the parts end."""
    text = json.dumps(values, indent=indent, ensure_ascii=ascii).replace("\n", "\r\n ")
    if spoil is not None:
        at = 1 + spoil[0] % len(text)  # the array's own bracket stays
        text = text[:at] + spoil[1] + text[at + 1 :]
    content = text.encode(errors="replace")
    path = tmp_path_factory.getbasetemp() / "parts.json"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_READ_BYTES", read_bytes)
        got, expected = parsed_by_parts(path), parsed_whole(content)
    assert got.replace("Expecting value", "Illegal trailing comma before end of array") == expected or got == expected


def test_lines_that_json_or_unicode_could_split_are_one_record(tmp_path: Path) -> None:
    """Only a newline ends a line of JSONL: not U+2028, not an escaped newline."""
    record = {"instruction": "a\u2028b\x85c", "input": "d\ne", "output": "f\rg"}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8", newline="")
    assert [found.as_entry() for found in load_records(str(path)).good] == [record]


def test_rows_count_blank_lines_and_bad_records(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps(RECORDS[0])
    path.write_text(f"{good}\n\n{{oops\n{good}\n[]\n")
    records = load_records(str(path), skip_bad_records=True)
    assert [record.row for record in records.good] == [1, 4]
    assert [bad.row for bad in records.bad] == [3, 5]
    assert records.describe_bad().startswith(f"{path}: 2 of 4 records are malformed: row 3: not JSON")


def test_bad_records_stop_unless_they_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([RECORDS[0], {"instruction": "no output"}, RECORDS[1]]))
    with pytest.raises(UserError, match=r"1 of 3 .*row 2: `output` is missing.*--skip_bad_records"):
        load_records(str(path))
    records = load_records(str(path), skip_bad_records=True)
    assert [record.row for record in records.good] == [1, 3]


@pytest.mark.parametrize("given_input", [{}, {"input": None}, {"input": ""}], ids=["missing", "null", "empty"])
def test_the_input_may_be_left_out(given_input: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"instruction": "a", "output": "b", **given_input}]))
    assert load_records(str(path)).good == [Record(instruction="a", output="b", row=1)]


def test_further_keys_are_kept_and_written_back(tmp_path: Path) -> None:
    entry = {"instruction": "a", "input": "b", "output": "c", "category": "x", "meta": {"id": [1, None]}}
    path = tmp_path / "data.json"
    path.write_text(json.dumps([entry]))
    (record,) = load_records(str(path)).good
    assert record.extra == {"category": "x", "meta": {"id": [1, None]}}
    assert record.as_entry() == entry


def test_category_and_choices_of_a_record(tmp_path: Path) -> None:
    entries = [
        {"instruction": "a", "input": "", "output": "B", "category": 7, "choices": ["x", "y"]},
        {"instruction": "a", "input": "", "output": "y ", "category": None, "choices": None},
        {"instruction": "a", "input": "", "output": "c"},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries))
    good = load_records(str(path)).good
    assert [(record.category, record.choices) for record in good] == [("7", ["x", "y"]), (None, []), (None, [])]
    assert [record.as_entry() for record in good] == entries


@pytest.mark.parametrize(
    ("output", "index"), [("y", 1), (" x\n", 0), ("A", 0), ("C", 2), ("B", 0), ("D", None), ("X", None), ("", None)]
)
def test_the_right_choice_is_named_by_its_text_before_its_letter(output: str, index: int | None) -> None:
    choices = ["B", "y", "z"] if output == "B" else ["x", "y", "z"]
    assert records.right_choice(output, choices) == index


def read_one(entry: dict[str, Any], tmp_path: Path, **rules: Any) -> Record | BadRecord:
    """The record that an entry becomes."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps([entry]))
    (found,) = stream_records(path, ReadingRules(**rules))
    return found


def reason(entry: dict[str, Any], tmp_path: Path, **rules: Any) -> str:
    found = read_one(entry, tmp_path, **rules)
    assert isinstance(found, BadRecord), found
    return found.reason


# Other names


@pytest.mark.parametrize(
    ("entry", "as_entry", "notes"),
    [
        ({"context": "c", "response": "r"}, {"input": "c", "output": "r"}, ("context", "response")),
        ({"context": "", "response": "r"}, {"output": "r"}, ("context", "response")),
        ({"input": "", "context": "", "output": "o"}, {"output": "o", "context": ""}, ()),
        ({"context": "c", "output": "o"}, {"input": "c", "output": "o"}, ("context",)),
        ({"input": "", "context": "c", "output": "o"}, {"input": "c", "output": "o"}, ("context",)),
        ({"input": "i", "context": "c", "output": "o"}, {"input": "i", "output": "o", "context": "c"}, ()),
        ({"output": "o", "response": "r"}, {"output": "o", "response": "r"}, ()),
    ],
    ids=[
        "Dolly",
        "Dolly without a context",
        "both empty",
        "context alone",
        "an empty input",
        "both inputs",
        "both outputs",
    ],
)
def test_dollys_names_are_read_where_alpacas_hold_nothing(
    entry: dict[str, Any], as_entry: dict[str, Any], notes: tuple[str, ...], tmp_path: Path
) -> None:
    found = read_one({"instruction": "q", **entry}, tmp_path)
    assert isinstance(found, Record)
    assert found.as_entry() == {"instruction": "q", "input": "", **as_entry}
    assert found.notes == notes


def test_an_alias_that_is_no_text_is_refused_as_its_field(tmp_path: Path) -> None:
    assert reason({"instruction": "q", "response": ["r"]}, tmp_path) == "`output` is an array, expected text"
    assert reason({"instruction": "q", "response": None}, tmp_path).startswith("`output` is missing")


@pytest.mark.parametrize(
    ("key", "value"),
    [("system", "You are a pirate."), ("history", [["hi", "hello"]]), ("history", "hi"), ("system", {"role": "x"})],
)
def test_what_only_a_chat_can_carry_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    entry = {"instruction": "a", "input": "", "output": "b", key: value}
    said = reason(entry, tmp_path)
    assert re.search(rf"`{key}` .* not read beside `instruction`; use the chat format.*`messages`", said)


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}])
@pytest.mark.parametrize("key", ["system", "history"])
def test_a_chats_key_that_carries_nothing_is_an_unknown_one(key: str, nothing: Any, tmp_path: Path) -> None:
    found = read_one({"instruction": "a", "input": "", "output": "b", key: nothing}, tmp_path)
    assert isinstance(found, Record)
    assert found.extra == {key: nothing}


def test_a_missing_key_is_named_beside_those_that_are_there(tmp_path: Path) -> None:
    said = reason({"Instruction": "a", "Output": "b"}, tmp_path)
    assert said == (
        "`instruction` is missing, expected text; got the keys `Instruction`, `Output`; "
        "--fields Instruction=instruction,Output=output reads them"
    )


# The text of an end-of-text


@pytest.mark.parametrize("tail", ["<|endoftext|>", "<|endoftext|>\n", " <|endoftext|><|endoftext|> "])
def test_an_end_of_text_at_the_end_of_an_output_is_the_end(tail: str, tmp_path: Path) -> None:
    entry = {"instruction": "a", "output": "b" + tail}
    found = read_one(entry, tmp_path)
    assert isinstance(found, Record)
    assert found.output.strip() == "b"
    assert found.notes == (END_TAKEN,)
    kept = read_one(entry, tmp_path, end_of_text_in_data="keep")
    assert isinstance(kept, Record)
    assert (kept.output, kept.notes) == (entry["output"], ())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("instruction", "a <|endoftext|>"),
        ("input", "<|endoftext|>"),
        ("output", "b<|endoftext|>c"),
        ("output", "b<|endoftext|>c<|endoftext|>"),
        ("choices", ["b", "c<|endoftext|>"]),
        ("context", "<|endoftext|>"),
    ],
)
def test_an_end_of_text_elsewhere_is_refused_unless_it_is_kept(key: str, value: Any, tmp_path: Path) -> None:
    entry = {"instruction": "a", "output": "b", key: value}
    name = {"context": "input"}.get(key, key)
    said = reason(entry, tmp_path)
    assert said.startswith(f"`{name}` holds <|endoftext|>")
    assert "--end_of_text_in_data keep" in said
    assert isinstance(read_one(entry, tmp_path, end_of_text_in_data="keep"), Record)


@pytest.mark.parametrize("tail", ["</s>", " </s>\n", "</s><|endoftext|>", "<|endoftext|></s></s>"])
def test_a_models_own_end_of_text_is_the_end_too(tail: str, tmp_path: Path) -> None:
    entry = {"instruction": "a", "output": "b" + tail}
    rules = {"end_marks": ReadingRules().with_end("</s>").end_marks}
    found = read_one(entry, tmp_path, **rules)
    assert isinstance(found, Record)
    assert (found.output.strip(), found.notes) == ("b", (END_TAKEN,))
    kept = read_one(entry, tmp_path, **rules, end_of_text_in_data="keep")
    assert isinstance(kept, Record)
    assert kept.output == entry["output"]


@pytest.mark.parametrize("key", ["instruction", "input", "output", "context"])
def test_a_models_own_end_of_text_elsewhere_is_named(key: str, tmp_path: Path) -> None:
    """`</s>` ends HTML's crossed-out text: for GPT-2, which has another end, it is text."""
    entry = {"instruction": "a", "output": "b", key: "<s>a</s> b"}
    rules = ReadingRules().with_end("</s>")
    assert reason(entry, tmp_path, end_marks=rules.end_marks).startswith(
        f"`{ {'context': 'input'}.get(key, key) }` holds </s>, which would be learned as text"
    )
    assert isinstance(read_one(entry, tmp_path), Record)


@pytest.mark.parametrize("text", ["", " \n", "<|endoftext|>"])
def test_what_is_blank_or_known_is_no_further_mark(text: str) -> None:
    assert ReadingRules().with_end(text) == ReadingRules()


# Nothing


@pytest.mark.parametrize("key", ["output", "response"])
@pytest.mark.parametrize("output", ["", " \n", "<|endoftext|>", "\u3000"])
def test_an_empty_output_is_malformed_unless_it_is_allowed(output: str, key: str, tmp_path: Path) -> None:
    entry = {"instruction": "a", key: output}
    assert reason(entry, tmp_path) == (
        "`output` is empty, expected text; --allow_empty_output takes it as a response of nothing"
    )
    assert isinstance(read_one(entry, tmp_path, allow_empty_output=True), Record)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_not_a_number_is_null(number: str, tmp_path: Path) -> None:
    """As a category it had figures of its own, under the name nan; written back it was no JSON."""
    path = tmp_path / "data.json"
    path.write_text(
        f'[{{"instruction": "a", "input": {number}, "output": "b", "category": {number}, "meta": [{{"n": {number}}}]}}]'
    )
    (record,) = load_records(str(path)).good
    assert record.category is None
    assert record.as_entry() == {
        "instruction": "a", "input": "", "output": "b", "category": None, "meta": [{"n": None}],
    }  # fmt: skip
    assert record.notes == (NOT_A_NUMBER,)
    assert records.category_of({"category": float(number)}) is None


@pytest.mark.parametrize(
    "text",
    [
        '{"instruction": "a", "output": "b", "output": "c"}',
        '{"instruction": "x", "instruction": "a", "output": "c"}',
        '{"instruction": "a", "output": "c", "meta": {"n": 1, "n": 2}}',
    ],
)
def test_a_key_that_stands_twice_is_noted(text: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    (record,) = load_records(str(path)).good
    assert (record.instruction, record.output, record.notes) == ("a", "c", (REPEATED_KEY,))


# Choices


@pytest.mark.parametrize(
    ("output", "answers"),
    [
        ("owl", ["owl", "tool"]),
        (" tool\n", [" owl\n", " tool\n"]),
        ("B", ["A", "B"]),
        ("A ", ["A ", "B "]),
    ],
)
def test_a_choice_is_said_as_the_output_says_the_right_one(output: str, answers: list[str]) -> None:
    record = Record(instruction="a", output=output, extra={"choices": ["owl", "tool"]})
    assert records.answers_of(record) == answers
    assert record.output in answers


def test_a_choice_that_is_anothers_letter() -> None:
    def ambiguous(output: str, *choices: str) -> bool:
        return records.letter_names_another(Record(instruction="a", output=output, extra={"choices": list(choices)}))

    assert ambiguous("B", "B", "C")
    assert not ambiguous("A", "A", "B")
    assert not ambiguous("A", "owl", "tool")
    assert not ambiguous("owl", "owl", "tool")


@given(text=st.text(st.characters(), max_size=20))  # halves of surrogate pairs among them
def test_json_that_is_written_is_read_back_the_same(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "text.json"
    files.write_json(path, [text])
    assert files.read_json(path, what="the text") == [text]


@pytest.mark.parametrize(
    ("n", "counts"),
    [(1100, (935, 110, 55)), (52002, (44201, 5200, 2601)), (1, (0, 0, 1)), (10, (8, 1, 1))],
)
def test_the_books_split_is_in_file_order(n: int, counts: tuple[int, int, int]) -> None:
    parts = split(n)
    assert (len(parts.train), len(parts.test), len(parts.val)) == counts
    assert np.array_equal(np.concatenate([parts.train, parts.test, parts.val]), np.arange(n))


@given(n=st.integers(0, 3000), seed=st.integers(0, 2**63 - 1))
def test_a_seeded_split_is_a_permutation_with_the_same_counts(n: int, seed: int) -> None:
    parts, in_order = split(n, seed), split(n)
    everything = np.concatenate([parts.train, parts.test, parts.val])
    assert np.array_equal(np.sort(everything), np.arange(n))
    assert [len(parts.train), len(parts.test)] == [len(in_order.train), len(in_order.test)]
    assert np.array_equal(split(n, seed).train, parts.train)


def test_seeds_give_different_splits() -> None:
    assert not np.array_equal(split(100, 0).train, split(100).train)
    assert not np.array_equal(split(100, 0).train, split(100, 1).train)


def test_the_books_file(book_data: Path) -> None:
    records = load_records(str(book_data)).good
    assert len(records) == 1100
    assert sum(not record.input for record in records) == 775
    assert all(record.output for record in records)
