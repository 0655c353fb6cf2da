"""Whatever rows lie in, the records are the same; what is torn, mixed or unknown is named in one line."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_records import made_records

from fastft.common.errors import UserError
from fastft.data.containers import rows_of
from fastft.data.reading import load_records
from fastft.data.records import ReadingRules, Record
from fastft.data.sources import Places, read_source
from fastft.data.token_cache import RecordFile, TokenCache, cache_for

Rows = list[dict[str, Any]]

CHAT = [{"role": "user", "content": 'q "1",\n2'}, {"role": "assistant", "content": "é\U0001f600"}]
ROWS: dict[str, Rows] = {
    "alpaca": made_records(3),
    "dolly": [{"instruction": f"q{i}", "context": "", "response": "a;b,\tc"} for i in range(3)],
    "prompt_completion": [{"prompt": f"q{i}\r\n", "completion": f" a{i}"} for i in range(3)],
    "messages": [{"messages": CHAT * n, "category": "c"} for n in (1, 2, 3)],
    "sharegpt": [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": f"{i}"}]} for i in "ab"],
    "segments": [{"segments": [{"label": False, "text": "a"}, {"label": True, "text": f"b{i}"}]} for i in range(3)],
    "text": [{"text": f"{i} pages\n\nof text"} for i in range(3)],
    "tokens": [{"input_ids": [1, 2, i], "labels": [-100, 2, i]} for i in (3, 4)],
}


def array(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def lines(path: Path, rows: Rows) -> None:
    path.write_bytes("\n".join(map(json.dumps, rows)).encode())


def zipped(path: Path, rows: Rows) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def zstd_lines(path: Path, rows: Rows) -> None:
    """In two frames, as parallel compressors write."""
    content = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(zstd(content[:20]) + zstd(content[20:]))


def table(path: Path, rows: Rows) -> None:
    cells = [{key: item if isinstance(item, str) else json.dumps(item) for key, item in row.items()} for row in rows]
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, cells[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(cells)


def zstd_table(path: Path, rows: Rows) -> None:
    plain = path.with_name("plain.csv")
    table(plain, rows)
    path.write_bytes(zstd(plain.read_bytes()))
    plain.unlink()


def parquet(path: Path, rows: Rows) -> None:
    pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def arrow(path: Path, rows: Rows) -> None:
    made = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, made.schema) as file:
        file.write_table(made, max_chunksize=2)


def stream(path: Path, rows: Rows) -> None:
    made = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, made.schema) as file:
        file.write_table(made, max_chunksize=2)


def feather(path: Path, rows: Rows) -> None:
    pa.feather.write_feather(pa.Table.from_pylist(rows), path, compression="zstd")


def saved(path: Path, rows: Rows) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(path)


def folder(path: Path, rows: Rows) -> None:
    path.mkdir()
    lines(path / "a.jsonl", rows[:1])
    parquet(path / "b.parquet", rows[1:])
    (path / "README.md").write_text("# About")
    (path / ".hidden").write_text("no data")


CONTAINERS: dict[str, Callable[[Path, Rows], None]] = {
    "data.json": array,
    "data.jsonl": lines,
    "data.ndjson": lines,
    "data.jsonl.gz": zipped,
    "data.jsonl.zst": zstd_lines,
    "data.csv": table,
    "data.tsv": table,
    "data.csv.zst": zstd_table,
    "data.parquet": parquet,
    "data.arrow": arrow,
    "stream.arrow": stream,
    "data.feather": feather,
    "saved": saved,
    "folder": folder,
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache-of-datasets"))
    datasets.disable_progress_bars()


def usable(found: Record) -> dict[str, Any]:
    """What a record says, without what is nothing: a table has each column in each row."""
    extra = {key: item for key, item in found.extra.items() if item is not None}
    return {
        "said": (found.instruction, found.input, found.output),
        "more": (found.turns, found.tokens, found.row, extra),
    }


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("format", ROWS)
def test_a_format_comes_back_from_every_container(format: str, name: str, tmp_path: Path) -> None:
    rows = ROWS[format]
    lines(tmp_path / "plain.jsonl", rows)
    expected = load_records(str(tmp_path / "plain.jsonl")).good
    CONTAINERS[name](tmp_path / name, rows)
    found = load_records(str(tmp_path / name))
    assert [usable(one) for one in found.good] == [usable(one) for one in expected]
    assert len(found.good) == len(rows)
    assert found.taken_for is None
    assert {piece.format for piece in found.pieces} == {"alpaca" if format == "dolly" else format}
    kept = RecordFile.open(tmp_path / name, TokenCache(tmp_path / "cache"))
    indices = np.arange(len(rows))[::-1].copy()
    for _ in ("made", "found"):
        assert list(kept) == found.good
        assert kept.pick(indices) == found.good[::-1]
        assert kept.pieces == found.pieces


@pytest.mark.parametrize(
    ("name", "make", "kind"),
    [
        ("data.jsonl", parquet, "Parquet"),
        ("data.csv", parquet, "Parquet"),
        ("data.parquet", arrow, "Arrow"),
        ("data.parquet", lines, "JSON lines"),
        ("data.json", zstd_lines, "JSON lines, compressed by zstd,"),
        ("data.jsonl.zst", zipped, "JSON lines, gzipped,"),
        ("data.jsonl.zst", lines, "JSON lines, not compressed by zstd,"),
        ("data.csv", lines, "JSON lines"),
        ("data.tsv", array, "a JSON array"),
        ("data.txt", lines, "JSON lines"),
        ("data", parquet, "Parquet"),
    ],
)
def test_the_content_decides_and_it_is_said(
    name: str, make: Callable[[Path, Rows], None], kind: str, tmp_path: Path
) -> None:
    make(tmp_path / name, made_records(3))
    found = load_records(str(tmp_path / name))
    assert [record.as_entry() for record in found.good] == made_records(3)
    assert found.taken_for == f"{tmp_path / name} is taken for {kind} by its content, not by its name"


# Tables


def test_cells_are_texts_and_empty_categories_are_none(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('instruction,input,output,category,choices,n\nq,,1,,,\n"q ""2""\nmore",i,B,c,"[""x"", ""y""]",7\n')
    one, other = load_records(str(path)).good
    assert (one.output, one.category, one.choices, one.extra["n"]) == ("1", None, [], "")
    assert (other.instruction, other.input, other.category, other.choices) == ('q "2"\nmore', "i", "c", ["x", "y"])
    assert [one.row, other.row] == [1, 2]


@pytest.mark.parametrize(("name", "delimiter"), [("data.csv", ";"), ("data.csv", "\t"), ("data.tsv", ",")])
def test_another_delimiter_is_seen_in_the_header(name: str, delimiter: str, tmp_path: Path) -> None:
    content = f"instruction{delimiter}output\n\na{delimiter}b\r\n"
    (tmp_path / name).write_bytes(content.encode())
    (found,) = load_records(str(tmp_path / name)).good
    assert (found.instruction, found.output) == ("a", "b")


@given(
    rows=st.lists(st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)] * 2)),
    delimiter=st.sampled_from(",\t"),
    end=st.sampled_from(["\n", "\r\n"]),
    everything=st.booleans(),
)
def test_what_csv_writes_is_read(
    rows: list[tuple[str, str]], delimiter: str, end: str, everything: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Delimiters, quotes and ends of lines in cells."""
    if end == "\n" and not everything:  # csv.writer does not quote a lone return then
        rows = [(asked.replace("\r", ""), answered.replace("\r", "")) for asked, answered in rows]
    text = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if everything else csv.QUOTE_MINIMAL
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerow(["prompt", "completion"])
    writer.writerows((f"q{asked}", f"a{answered}") for asked, answered in rows)
    path = tmp_path_factory.getbasetemp() / ("written.csv" if delimiter == "," else "written.tsv")
    path.write_bytes(text.getvalue().encode())
    if rows:
        found = load_records(str(path)).good
        assert [(one.instruction, one.output) for one in found] == [(f"q{one}", f"a{other}") for one, other in rows]


# Parquet's and Arrow's types


def test_values_that_json_has_not_are_text(tmp_path: Path) -> None:
    day = datetime.datetime(2024, 2, 3, 4, 5)
    more = {"at": day, "price": decimal.Decimal("1.50"), "picture": b"\xff\xd8", "name": "é".encode(), "n": 2**40}
    row = {"instruction": "q", "output": "a", **more, "x": float("nan"), "tags": [{"on": day.date()}], "none": None}
    parquet(tmp_path / "data.parquet", [row])
    (found,) = load_records(str(tmp_path / "data.parquet")).good
    assert found.extra == {
        "at": "2024-02-03T04:05:00", "price": "1.50", "picture": "2 bytes", "name": "é", "n": 2**40, "x": None,
        "tags": [{"on": "2024-02-03"}], "none": None,
    }  # fmt: skip
    json.dumps(found.as_entry())


def test_text_in_parquet_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    wrong = pa.array([b"a", b"b\xff", b"c"]).view(pa.string())
    made = pa.table({"prompt": ["p", "q", "r"], "completion": wrong})
    pa.parquet.write_table(made, tmp_path / "data.parquet")
    found = load_records(str(tmp_path / "data.parquet"), skip_bad_records=True)
    assert [one.output for one in found.good] == ["a", "c"]
    assert str(found.bad[0]).startswith("row 2: holds what cannot be read: 'utf-8' codec can't decode")


@pytest.mark.parametrize("name", [name for name in CONTAINERS if name not in ("saved", "folder")])
def test_bytes_that_are_read_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    CONTAINERS[name](tmp_path / name, made_records(3000))
    seen: list[int] = []
    rows = list(rows_of(tmp_path / name, read=seen.append))
    assert len(rows) == 3000
    size = (tmp_path / name).stat().st_size
    assert 0.9 * size <= sum(seen) <= size


# Folders


def test_rows_of_a_folder_count_on_and_are_named_by_their_file(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.mkdir()
    lines(path / "b.jsonl", [*made_records(2), {"instruction": "q"}])
    table(path / "a.csv", made_records(2))
    (path / "c.jsonl").write_text(json.dumps(ROWS["messages"][0]))
    with pytest.raises(UserError, match=r"1 of 6 records are malformed: b\.jsonl:3: `output` is missing"):
        load_records(str(path))
    found = load_records(str(path), skip_bad_records=True)
    assert [record.row for record in found.good] == [1, 2, 3, 4, 6]
    source = read_source(str(path), ReadingRules(), token_cache="none", skip_bad_records=True)
    places = Places.of([source])
    assert [places.called(row) for row in (1, 2, 3, 5, 6)] == [
        "a.csv:1",
        "a.csv:2",
        "b.jsonl:1",
        "b.jsonl:3",
        "c.jsonl:1",
    ]
    assert places.said([1, 2, 6]) == "a.csv rows 1, 2; c.jsonl row 1"
    assert Places.of([source, source]).called(6).endswith("data/c.jsonl:1")
    assert source.describe_pieces() == [
        f"{path}: rows from 1: a.csv is read as alpaca",
        f"{path}: rows from 3: b.jsonl is read as alpaca",
        f"{path}: rows from 6: c.jsonl is read as messages",
    ]
    kept = RecordFile.open(path, TokenCache(tmp_path / "cache"))
    assert (kept.bad, kept.pieces, list(kept)) == (found.bad, found.pieces, found.good)
    one = read_source(str(path / "b.jsonl"), ReadingRules(), token_cache="none", skip_bad_records=True)
    assert Places.of([one]).called(3) == 3


def test_a_folders_content_is_that_of_its_files(tmp_path: Path) -> None:
    path, cache = tmp_path / "folder", TokenCache(tmp_path / "cache")
    folder(path, made_records(3))
    first = RecordFile.open(path, cache)
    (path / "README.md").write_text("# More about")
    assert RecordFile.open(path.rename(tmp_path / "elsewhere"), cache).content == first.content
    path = tmp_path / "elsewhere"
    lines(path / "a.jsonl", made_records(2))
    changed = RecordFile.open(path, cache)
    assert (changed.content == first.content, len(changed)) == (False, 4)
    (path / "a.jsonl").rename(path / "c.jsonl")
    assert RecordFile.open(path, cache).content != changed.content


# What is part of a key


def test_the_kind_of_a_table_is_part_of_its_content(tmp_path: Path) -> None:
    """The same bytes are other columns under the other name."""
    read = []
    for name in ("data.csv", "data.tsv"):
        (tmp_path / name).write_bytes(b"prompt,completion\ttext,more\na,b\tc,d\n")
        rules = ReadingRules(fields=(("completion", "completion\ttext"), ("text", "text,more")))
        kept = RecordFile.open(tmp_path / name, TokenCache(tmp_path / "cache"), rules)
        read += [record.output for record in kept]
    assert read == ["b\tc", "c,d"]


def test_the_format_and_the_fields_are_part_of_every_key(tmp_path: Path) -> None:
    path, cache = tmp_path / "data.jsonl", TokenCache(tmp_path / "cache")
    lines(path, [{"prompt": f"q{i}", "completion": f"a{i}", "text": f"t{i}", "other": f"o{i}"} for i in range(3)])
    read = []
    for rules in (
        ReadingRules(),
        ReadingRules(format="text"),
        ReadingRules(format="text", fields=(("text", "other"),)),
        ReadingRules(fields=(("completion", "other"),)),
    ):
        for _ in ("made", "found"):
            kept = RecordFile.open(path, cache, rules)
            assert list(kept) == load_records(str(path), rules=rules).good
        read.append("".join(record.output for record in kept))
    assert read == ["a0a1a2", "t0t1t2", "o0o1o2", "o0o1o2"]


def test_large_files_go_through_the_cache_by_the_text_that_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastft.data.token_cache.LARGE_FILE", 4000)
    sizes = {"a.jsonl": 3999, "b.jsonl": 4000, "a.jsonl.zst": 999, "b.jsonl.zst": 1000, "b.parquet": 1334}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
        assert (cache_for(tmp_path / name, "auto") is not None) == name.startswith("b"), name
    assert cache_for(tmp_path, "auto") is not None
    assert cache_for(tmp_path / "none.jsonl", "auto") is None


# Data sets


def test_a_data_set_is_named_by_its_id_and_its_split(tmp_path: Path) -> None:
    rows = ROWS["messages"]
    path = tmp_path / "files"
    path.mkdir()
    lines(path / "train.jsonl", rows)
    lines(path / "test.jsonl", rows[:1])
    for name, n in ((f"hf:{path}", 3), (f"hf:{path}:train", 3), (f"hf:{path}:test", 1)):
        found = load_records(name)
        assert [record.turns for record in found.good] == [
            record.turns for record in load_records(str(path / "train.jsonl")).good
        ][:n]
        assert found.source == name
    kept = RecordFile.open(Path(f"hf:{path}"), TokenCache(tmp_path / "cache"))
    assert list(kept) == load_records(f"hf:{path}").good
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    )
    both.save_to_disk(tmp_path / "both")
    assert [len(load_records(f"{prefix}{tmp_path / 'both'}").good) for prefix in ("", "hf:")] == [3, 3]
    assert len(load_records(f"hf:{tmp_path / 'both'}:test").good) == 1


# What cannot be read


def cut(make: Callable[[Path, Rows], None]) -> Callable[[Path], None]:
    def made(path: Path) -> None:
        make(path, made_records(300))
        path.write_bytes(path.read_bytes()[:-40])

    return made


def content(data: bytes) -> Callable[[Path], None]:
    def made(path: Path) -> None:
        path.write_bytes(data)

    return made


def holding(**files: bytes) -> Callable[[Path], None]:
    def made(path: Path) -> None:
        path.mkdir()
        for name, data in files.items():
            (path / name.replace("_", ".")).write_bytes(data)
        (path / "inner").mkdir()

    return made


LINE = json.dumps(made_records(1)[0]).encode()
FAULTS: list[tuple[str, Callable[[Path], None], str]] = [
    ("data.bin", content(b"\x00\x01\x02"), "unknown kind of file; expected .json, .jsonl, .csv or .tsv"),
    ("data.jsonl.gz", cut(zipped), "is not a whole gzip file"),
    ("data.jsonl.zst", cut(zstd_lines), "is not a whole zstd file"),
    ("data.jsonl.zst", content(zstd(LINE)[:12] + b"\0\0\0\0" + zstd(LINE)[16:]), "is not a whole zstd file"),
    ("data.jsonl.zst", content(zstd(zstd(LINE))), "compressed twice, expected once; `unzstd` it once"),
    ("data.jsonl.gz", content(gzip.compress(zstd(LINE))), "compressed twice"),
    ("data.parquet.gz", content(gzip.compress(b"PAR1")), "Parquet within gzip"),
    ("data.parquet", cut(parquet), "is not whole Parquet"),
    ("data.parquet", content(b"PAR1"), "is not whole Parquet"),
    ("data.parquet", content(b"<html>"), "is not Parquet: it does not begin as such a file"),
    ("data.parquet", content(b"version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS"),
    ("data.arrow", cut(arrow), "is not whole Arrow"),
    ("data.arrow", cut(stream), "is not whole Arrow"),
    ("data.arrow", content(b"instruction,output\n"), "is not Arrow"),
    ("data.feather", content(b"FEA1\0\0"), "Feather of version 1"),
    ("data.csv", content(b""), "has no header"),
    ("data.csv", content(b"a,b,a\n"), "two columns have the name `a`"),
    (
        "data.csv",
        content(b"instruction,output\nq,a\nq\nq,a,b\n"),
        "2 of 3 .*row 2: has 1 cell, expected 2.*line 3.*row 3",
    ),
    (
        "data.csv",
        content(b'instruction,output\nq,a\n"q,a\n'),
        "row 2, which ends in line 3, is not CSV: unexpected end",
    ),
    ("data.csv", content(b'instruction,output\n"q"x,a\n'), "row 1, .* is not CSV: ',' expected after '\"'"),
    ("data.csv", content(b'"instruction,output\n'), "is not CSV"),
    ("data.csv", content("instruction,output\n".encode("utf-16")), "is not UTF-8 but UTF-16"),
    ("data.csv", content(b"instruction,output\nq,\xff\n"), "not UTF-8: byte 2 of line 2"),
    ("data.csv", content(b"question,answer\nq,a\n"), "row 1: .*--fields question=instruction,answer=output"),
    ("data.csv", content(b"instruction,output\n"), "no usable record"),
    ("folder", holding(), r"holds no data file; expected .*; name one of its folders: inner/"),
    ("folder", holding(a_jsonl=LINE, b_txt=b"?"), r"holds b\.txt, which is no data file"),
    ("folder", holding(train_jsonl=LINE, test_jsonl=LINE), r"several splits \(test, train\).*hf:.*:train"),
    ("hf:", lambda _: None, "expected hf:ID, hf:ID:SPLIT or hf:ID:CONFIG:SPLIT"),
    ("hf:a:b:c:d", lambda _: None, "expected hf:ID"),
]


@pytest.mark.parametrize(("name", "make", "fault"), FAULTS)
def test_what_cannot_be_read_is_named_in_one_line(
    name: str, make: Callable[[Path], None], fault: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(UserError, match=rf"^[^\n]*{fault}[^\n]*$"):
        load_records(name if name.startswith("hf:") else str(path))


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "saved", made_records(3))
    with pytest.raises(UserError, match=r"has no split test, expected one of train: hf:.*:SPLIT"):
        load_records(f"hf:{tmp_path / 'saved'}:test")


def test_an_id_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match=r"^cannot load the data set a/b: no route to host; expected an id of the Hub.*$"
    ):
        load_records("hf:a/b")


@pytest.mark.parametrize(
    ("name", "make", "package"),
    [
        ("data.parquet", parquet, "pyarrow"),
        ("data.arrow", arrow, "pyarrow"),
        ("data.jsonl.zst", zstd_lines, "pyarrow"),
        ("saved", saved, "datasets"),
    ],
)
def test_what_is_not_installed_is_asked_for(
    name: str, make: Callable[[Path, Rows], None], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / name, made_records(3))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}, which is not installed: pip install 'fastft\[data\]'$"):
        load_records(str(tmp_path / name))
    lines(tmp_path / "plain.jsonl", made_records(3))
    assert len(load_records(str(tmp_path / "plain.jsonl")).good) == 3


# Memory

GROWTH = (
    "import re, sys; from pathlib import Path\n"
    "from fastft.data.reading import stream_records\n"
    "from fastft.data.records import ReadingRules\n"
    # Not ru_maxrss, which begins with that of the process that started this one.
    "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
    "small, path, hold = sys.argv[1:]\n"
    "for _ in stream_records(Path(small), ReadingRules()): pass\n"
    "before, held, n = peak(), [], 0\n"
    "for record in stream_records(Path(path), ReadingRules()):\n"
    "    n += 1\n"
    "    if hold == 'true': held.append(record)\n"
    "print(n, (peak() - before) >> 10)"
)
MOST_MIB = 48


def chats(n: int, begin: int = 0) -> Rows:
    """Each of some 8,000 characters, that compress little."""
    rng = np.random.default_rng(begin)
    texts = ["".join(map(chr, 97 + rng.integers(0, 26, 4000))) for _ in range(2 * n)]
    return [
        {"messages": [{"role": "user", "content": texts[2 * i]}, {"role": "assistant", "content": texts[2 * i + 1]}]}
        for i in range(n)
    ]


def write_large(path: Path, mib: int, *, in_one_group: bool = False) -> int:
    """A file of at least so many MiB of text; how many rows it has."""
    some = chats(256)
    times = -(-mib * (1 << 20) // sum(len(json.dumps(row)) + 1 for row in some))
    if path.suffix == ".jsonl":
        block = b"".join(json.dumps(row).encode() + b"\n" for row in some)
        with path.open("wb") as file:
            for _ in range(times):
                file.write(block)
    else:
        made = pa.Table.from_pylist(some)
        with pa.parquet.ParquetWriter(path, made.schema, use_dictionary=False, compression="none") as writer:
            if in_one_group:
                writer.write_table(pa.concat_tables([made] * times), row_group_size=times * len(some))
            for _ in range(0 if in_one_group else times):
                writer.write_table(made)
    return times * len(some)


def growth(path: Path, tmp_path: Path, *, hold: bool = False) -> tuple[int, int]:
    """Records of a file, and MiB that a process grows by while it reads them."""
    small = tmp_path / f"small{path.suffix}"
    write_large(small, 4)
    command = [sys.executable, "-c", GROWTH, str(small), str(path), str(hold).lower()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    n, mib = map(int, done.stdout.split())
    return n, mib


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process its peak")
@pytest.mark.parametrize(
    ("name", "mib"),
    [
        *(pytest.param(name, 1024, marks=pytest.mark.long) for name in ("data.jsonl", "data.parquet", "one.parquet")),
        ("data.jsonl", 64),
        ("one.parquet", 64),
    ],
)
def test_memory_does_not_grow_with_a_file(name: str, mib: int, tmp_path: Path) -> None:
    """Also not where all rows of Parquet are one group."""
    path = tmp_path / name
    n = write_large(path, mib, in_one_group=name.startswith("one"))
    assert path.stat().st_size > 0.9 * mib * (1 << 20)
    read, grown = growth(path, tmp_path)
    assert read == n
    assert grown < MOST_MIB


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process its peak")
def test_records_that_are_held_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_large(path, 64)
    assert growth(path, tmp_path, hold=True)[1] > MOST_MIB
