from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_records import made_records

from fastft import files, json_rows, records
from fastft.errors import UserError
from fastft.records import Record, load_records, split

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
        rows = list(json_rows.json_rows(path))
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
