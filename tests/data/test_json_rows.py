"""How a data file is read is decided by its content, and no row is held that is longer than a record can be."""

from __future__ import annotations

import codecs
import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_records import made_records

from fastft.common.errors import UserError
from fastft.data import containers, json_rows
from fastft.data.reading import load_records

RECORDS = made_records(4)
ARRAY = json.dumps(RECORDS).encode()
PRETTY = json.dumps(RECORDS, indent=2).encode()
LINES = "\n".join(map(json.dumps, RECORDS)).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 204603\n"


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("data.json", LINES, "JSON lines"),
        ("data.json", b"\n \n" + LINES, "JSON lines"),
        ("data.json", codecs.BOM_UTF8 + LINES.replace(b"\n", b"\r\n"), "JSON lines"),
        ("data.json", json.dumps(RECORDS[0]).encode(), "JSON lines"),
        ("data.jsonl", ARRAY, "a JSON array"),
        ("data.jsonl", PRETTY, "a JSON array"),
        ("data.jsonl", codecs.BOM_UTF8 + b"\n " + PRETTY + b"\n\n", "a JSON array"),
        ("data.json.gz", gzip.compress(LINES), "JSON lines, gzipped,"),
        ("data.jsonl.gz", gzip.compress(ARRAY), "a JSON array, gzipped,"),
        ("data.json", gzip.compress(LINES), "JSON lines, gzipped,"),
        ("data.json", gzip.compress(ARRAY), "a JSON array, gzipped,"),
        ("data.jsonl", gzip.compress(LINES), "JSON lines, gzipped,"),
        ("data.json.gz", ARRAY, "a JSON array, not gzipped,"),
        ("data.jsonl.gz", LINES, "JSON lines, not gzipped,"),
    ],
)
def test_the_content_decides_and_it_is_said(name: str, content: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = load_records(str(path))
    n = 1 if content.startswith(b"{") and b"\n" not in content else 4
    assert [record.as_entry() for record in found.good] == RECORDS[:n]
    assert found.taken_for == f"{path} is taken for {kind} by its content, not by its name"


@pytest.mark.parametrize("name", ["data.json", "DATA.JSON", "data.json.gz", "data.jsonl", "data.jsonl.gz"])
def test_nothing_is_said_of_a_file_that_is_what_its_name_says(name: str, tmp_path: Path) -> None:
    content = LINES if "jsonl" in name else ARRAY
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = load_records(str(tmp_path / name))
    assert len(found.good) == 4
    assert found.taken_for is None


def test_a_first_line_that_is_an_array_is_a_bad_row_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"[1]\n" + LINES)
    found = load_records(str(path), skip_bad_records=True)
    assert [bad.row for bad in found.bad] == [1]
    assert [record.as_entry() for record in found.good] == RECORDS


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        (
            "data.json",
            json.dumps({"train": RECORDS}).encode(),
            r"an object at the top with the keys `train`; expected an",
        ),
        ("data.json", json.dumps({"train": RECORDS}, indent=1).encode(), r"line 1 does not hold whole"),
        ("data.json", b"\n".join(json.dumps(one, indent=1).encode() for one in RECORDS), r"line 1 does not hold whole"),
        ("data.json", b'"text"', r"got text at the top, expected an array of objects, or one object a line"),
        ("data.json", b" \n", r"not JSON: it is empty"),
        ("data.json", ARRAY + b"\n" + ARRAY, r"Extra data: line 2"),
        ("data.json", "[]".encode("utf-16"), r"not UTF-8 but UTF-16"),
        ("data.json", "[]".encode("utf-32"), r"not UTF-8 but UTF-32"),
        ("data.jsonl", codecs.BOM_UTF16_BE + "{}".encode("utf-16-be"), r"not UTF-8 but UTF-16"),
        ("data.json", gzip.compress(gzip.compress(ARRAY)), r"gzipped twice"),
        ("data.jsonl.gz", gzip.compress(gzip.compress(LINES)), r"gzipped twice"),
        ("data.json.gz", gzip.compress(ARRAY)[:-9], r"not a whole gzip file"),
        ("data.json", POINTER, r"a pointer of Git LFS, .*`git lfs pull`"),
        ("data.jsonl.gz", POINTER, r"a pointer of Git LFS, .*`git lfs pull`"),
        ("data.jsonl", PRETTY[:-9], r"not JSON"),
        ("data.jsonl", LINES.replace(b"\n", b"\r"), r"row 1: not JSON \(Extra data"),
        ("data.jsonl", LINES.replace(b"\n", b",\n"), r"3 of 4 .*row 1: not JSON \(Extra data"),
        ("data.json", b'[{"instruction": "a", "output": "b", "n": ' + b"9" * 5000 + b"}]", r"not JSON: .*4300"),
    ],
)
def test_what_is_neither_is_refused_in_words_that_fit(name: str, content: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=fault):
        load_records(str(tmp_path / name))


def test_without_a_usable_record_it_is_said_why(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([RECORDS, RECORDS]))
    with pytest.raises(UserError, match=r"no usable record; expected objects.*2 of 2 .*row 1: got an array"):
        load_records(str(path), skip_bad_records=True)


# Bounds


def long_line(n: int) -> bytes:
    return json.dumps({"instruction": "a", "output": "b" * n}).encode()


def test_a_line_over_the_bound_is_named_and_the_next_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "LONGEST_ROW", 1 << 20)
    monkeypatch.setattr(json_rows, "_READ_BYTES", 1 << 10)
    path = tmp_path / "data.jsonl"
    fits = (1 << 20) - len(long_line(0))
    path.write_bytes(b"\n".join([long_line(fits), long_line(fits + 1), long_line(3 << 20), long_line(3)]))
    found = load_records(str(path), skip_bad_records=True)
    assert [record.row for record in found.good] == [1, 4]
    assert [str(bad) for bad in found.bad] == [
        f"row {row}: longer than 1 MiB, expected one object a line" for row in (2, 3)
    ]


@pytest.mark.parametrize("rest", ["", '"}]'], ids=["a quote that is not closed", "a long text"])
def test_an_element_over_the_bound_is_named(rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "LONGEST_ROW", 1 << 20)
    path = tmp_path / "data.json"
    path.write_text('[{"instruction": "a", "output": "b"}, {"instruction": "' + "a" * (5 << 20) + rest)
    with pytest.raises(UserError, match="row 2 is longer than 1 MiB, or a quote is not closed"):
        load_records(str(path))


def sparse(path: Path) -> None:
    """A line of a gigabyte that takes no room on the disk."""
    with path.open("wb") as file:
        file.write(b'{"instruction": "')
        file.truncate(1 << 30)


def bomb(path: Path) -> None:
    """Half a gigabyte of one text in half a megabyte, in an array where the name says so."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"instruction": "' if "jsonl" in path.name else b'[{"instruction": "')
        for _ in range(512):
            file.write(b"a" * (1 << 20))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS bounds memory on Linux")
@pytest.mark.parametrize(("name", "make"), [("data.jsonl", sparse), ("data.json.gz", bomb), ("data.jsonl.gz", bomb)])
def test_a_gigabyte_in_one_line_does_not_come_into_memory(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    """In a process that may take 256 MiB more than it has when it starts to read."""
    path = tmp_path / name
    make(path)
    program = (
        "import resource, sys; from fastft.data.reading import load_records\n"
        "own = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (256 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (own, own))\n"
        "try: load_records(sys.argv[1])\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=120)
    assert "row 1" in done.stdout, done.stderr
    assert "longer than 16 MiB" in done.stdout


def rows(text: str, tmp_path: Path) -> list[Any]:
    (tmp_path / "data.json").write_text(text)
    return [value for _, value in containers.rows_of(tmp_path / "data.json")]


def test_keys_that_stand_twice_are_known(tmp_path: Path) -> None:
    once, twice, within = rows('[{"a": 1, "b": 2}, {"a": 1, "a": 2}, {"a": [{"c": 1, "c": 3}]}]', tmp_path)
    assert type(once) is dict
    assert isinstance(twice, json_rows.RepeatedKeys)
    assert twice == {"a": 2}
    assert isinstance(within["a"][0], json_rows.RepeatedKeys)
