"""A cached set is the plain one, array for array, whatever happened while it was made."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_records import made_records
from token_cache_builder import build

from fastft.cli import main
from fastft.common.errors import FastftError, UserError
from fastft.data import token_cache
from fastft.data.audit import audit
from fastft.data.encode import EncodedSet, EncodingRules, TooLong, encode
from fastft.data.prompts import ALL, ALPACA, PHI3, RESPONSES, Template
from fastft.data.reading import load_records
from fastft.data.records import ReadingRules, Record, split
from fastft.data.token_cache import RecordFile, TokenCache, cache_for, encode_chunks, pick
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.run.config import TrainOptions
from fastft.run.data import load_data
from fastft.run.metrics_file import read_metrics
from fastft.training.train import train

TOKENIZER = gpt2_tokenizer()
RULES = EncodingRules(RESPONSES, max_length=1024)
BUILDER = Path(__file__).parents[1] / "support" / "token_cache_builder.py"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """60 records: 51 train, 6 test, 3 val."""
    return write_lines(tmp_path / "data.jsonl", made_records(60))


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return TokenCache(tmp_path / "cache")


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def cached(data: Path, cache: TokenCache, *, seed: int | None = 3, **changes: Any) -> EncodedSet:
    """The training split by way of the cache."""
    file = RecordFile.open(data, cache)
    options = {"template": ALPACA, "tokenizer": TOKENIZER, "rules": RULES, "workers": 1, **changes}
    return file.encode(split(len(file), seed).train, **options)


def plain(data: Path, *, seed: int | None = 3) -> EncodedSet:
    records = load_records(str(data)).good
    return encode([records[i] for i in split(len(records), seed).train], ALPACA, TOKENIZER, **rules_of(RULES))


def rules_of(rules: EncodingRules) -> dict[str, Any]:
    return {"learn": rules.learn, "max_length": rules.max_length, "too_long": rules.too_long}


def assert_same(some: EncodedSet, other: EncodedSet) -> None:
    for name in ("ids", "offsets", "spans", "span_offsets", "rows", "lengths", "supervised"):
        mine, others = getattr(some, name), getattr(other, name)
        assert mine.dtype == others.dtype
        assert np.array_equal(mine, others), name
    assert some.fingerprint() == other.fingerprint()
    assert some.report == other.report
    found_again = replace(some, known_fingerprint=None, known_common_prefix=None)
    for one in (some, found_again):
        assert one.fingerprint() == other.fingerprint()
        assert one.common_prefix() == other.common_prefix()
    assert len(some) == len(other)


def or_refusal(encoded: Callable[[], EncodedSet]) -> EncodedSet | str:
    try:
        return encoded()
    except UserError as error:
        return str(error)


def folders(cache: TokenCache, what: str = "tokens") -> list[Path]:
    return sorted(cache.folder.glob(f"{what}-*"))


# The same set

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
RECORD = st.builds(
    lambda instruction, input, output, n: {
        "instruction": instruction,
        "input": input + "\n" * (n % 2),  # a token would span the boundary
        "output": output + " word" * n,
    },
    TEXT.filter(str.strip),
    st.sampled_from(["", "cat", "é"]),
    TEXT.filter(str.strip),
    st.integers(0, 40),
)


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(RECORD, min_size=1, max_size=25),
    seed=st.none() | st.integers(0, 9),
    template=st.sampled_from([ALPACA, PHI3]),
    mask_prompt=st.booleans(),
    max_length=st.integers(1, 120),
    too_long=st.sampled_from(["raise", "drop", "truncate"]),
    chunk_records=st.integers(1, 9),
    name=st.sampled_from(["data.jsonl", "data.json", "data.jsonl.gz", "data.json.gz"]),
)
def test_a_cached_set_is_the_plain_one(
    records: list[dict[str, Any]],
    seed: int | None,
    template: Template,
    mask_prompt: bool,
    max_length: int,
    too_long: TooLong,
    chunk_records: int,
    name: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Ids, offsets, masks, rows and report, or the same refusal."""
    folder = tmp_path_factory.mktemp("same")
    lines = "\n".join(map(json.dumps, records)) if "jsonl" in name else json.dumps(records)
    (folder / name).write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    file = RecordFile.open(folder / name, TokenCache(folder / "cache"))
    indices = split(len(file), seed).train
    rules = EncodingRules(RESPONSES if mask_prompt else ALL, max_length, too_long)
    held = load_records(str(folder / name)).good
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "_CHUNK_RECORDS", chunk_records)
        patch.setattr(token_cache, "_EXAMPLES_AT_ONCE", chunk_records)
        patch.setattr("fastft.data.encode._EXAMPLES_AT_ONCE", chunk_records)
        patch.setattr(os, "fsync", lambda _: None)
        expected = or_refusal(lambda: encode([held[i] for i in indices], template, TOKENIZER, **rules_of(rules)))
        for _ in ("made", "found"):
            got = or_refusal(lambda: file.encode(indices, template, TOKENIZER, rules, workers=1))
            if isinstance(expected, str) or isinstance(got, str):
                assert got == expected
                assert not folders(file.cache)
            else:
                assert_same(got, expected)


def test_several_processes_make_the_same(data: Path, cache: TokenCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_CHUNK_RECORDS", 4)
    assert_same(cached(data, cache, workers=2), plain(data))


def test_the_arrays_are_mapped(data: Path, cache: TokenCache) -> None:
    some = cached(data, cache)
    for array in (some.ids, some.offsets, some.spans, some.span_offsets, some.rows):
        assert isinstance(array.base, np.memmap)
        assert not array.flags.writeable


def test_a_few_records_and_many_are_picked(data: Path, cache: TokenCache, monkeypatch: pytest.MonkeyPatch) -> None:
    file, held = RecordFile.open(data, cache), load_records(str(data)).good
    for indices in ([], [59], [30, 2, 7]):
        expected = [held[i] for i in indices]
        assert file.pick(np.array(indices, dtype=np.int64)) == expected == pick(held, np.array(indices, dtype=np.int64))
    monkeypatch.setattr(token_cache, "pick", lambda *_: pytest.fail("the cache has them"))
    assert file.pick(np.array([30, 2, 7])) == [held[30], held[2], held[7]]
    monkeypatch.undo()
    monkeypatch.setattr(token_cache, "_FEW", 2)
    assert file.pick(np.array([5, 2, 7])) == [held[5], held[2], held[7]]


# Keys


def test_what_changes_ids_changes_the_key(data: Path, cache: TokenCache) -> None:
    cached(data, cache)
    cached(data, cache)
    assert len(folders(cache)) == 1
    other = replace(ALPACA, before_instruction="Do this:\n")  # of the same name
    for number, changes in enumerate(
        [
            {"template": PHI3},
            {"template": other},
            {"rules": replace(RULES, learn=ALL)},
            {"rules": replace(RULES, max_length=1000)},
            {"rules": replace(RULES, too_long="drop")},
            {"seed": 4},
            {"seed": None},
        ],
        start=2,
    ):
        cached(data, cache, **changes)
        assert len(folders(cache)) == number, changes
    write_lines(data, made_records(60)[::-1])
    assert_same(cached(data, cache), plain(data))
    assert len(folders(cache)) == 9


def test_what_is_a_record_is_part_of_every_key(tmp_path: Path, cache: TokenCache) -> None:
    """The same content under other rules is other records, ids and findings."""
    entries = made_records(60)
    entries[1]["output"] += "<|endoftext|>"
    entries[2]["output"] = ""
    data = write_lines(tmp_path / "data.jsonl", entries)
    made = []
    for number, rules in enumerate(
        [ReadingRules("keep", True), ReadingRules("keep"), ReadingRules("refuse", True), ReadingRules()], start=1
    ):
        for _ in ("made", "found"):
            file = RecordFile.open(data, cache, rules)
            held = load_records(str(data), skip_bad_records=True, rules=rules).good
            assert list(file) == held
            parts = split(len(file))
            encoded = file.encode(parts.train, ALPACA, TOKENIZER, RULES, workers=1)
            assert_same(encoded, encode([held[i] for i in parts.train], ALPACA, TOKENIZER, **rules_of(RULES)))
            assert file.audit(parts, ALPACA) == audit(held, parts, ALPACA)
            assert file.pick(np.array([1, 0])) == [held[1], held[0]]
        made.append(encoded.fingerprint())
        for what in ("records", "tokens", "audit", "picked"):
            assert len(folders(cache, what)) == number, what
    assert len(set(made)) == 4


def test_the_audit_is_of_a_split_and_a_template(data: Path, cache: TokenCache) -> None:
    file = RecordFile.open(data, cache)
    for parts, template in ((split(60), ALPACA), (split(60, 1), ALPACA), (split(60), PHI3), (split(60), ALPACA)):
        file.audit(parts, template)
    assert len(folders(cache, "audit")) == 3


def test_the_name_decides_nothing_but_what_is_said(data: Path, cache: TokenCache, tmp_path: Path) -> None:
    expected = cached(data, cache)
    renamed = data.rename(tmp_path / "data.json")
    assert_same(cached(renamed, cache), expected)
    assert len(folders(cache)) == len(folders(cache, "records")) == 1
    said = RecordFile.open(renamed, cache).taken_for
    assert said == f"{renamed} is taken for JSON lines by its content, not by its name"


def test_the_same_content_elsewhere_is_the_same_key(data: Path, cache: TokenCache, tmp_path: Path) -> None:
    cached(data, cache)
    cached(data.rename(tmp_path / "moved.jsonl"), cache)
    assert len(folders(cache)) == len(folders(cache, "records")) == 1


def test_another_tokenizer_is_another_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = TOKENIZER.identity()
    assert mine == TOKENIZER.identity()
    monkeypatch.setattr("tiktoken.__version__", "0.0.1")
    assert TOKENIZER.identity() != mine


# What is torn


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def foreign(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


@pytest.mark.parametrize("damage", [cut, flip, foreign, Path.unlink])
@pytest.mark.parametrize(
    "name", ["ids.int32", "offsets.int64", "spans.int64", "span_offsets.int64", "rows.int64", "DONE"]
)
def test_a_torn_file_is_noticed_and_made_again(
    data: Path, cache: TokenCache, damage: Callable[[Path], None], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cached(data, cache)
    (folder,) = folders(cache)
    damage(folder / name)
    assert_same(cached(data, cache), plain(data))
    said = capsys.readouterr().err
    assert f"{folder} is made again: " in said
    assert name in said
    cached(data, cache)
    assert "made again" not in capsys.readouterr().err


def test_another_keys_folder_in_its_place_is_noticed(data: Path, cache: TokenCache) -> None:
    cached(data, cache, rules=replace(RULES, learn=ALL))
    (wrong,) = folders(cache)
    cached(data, cache)
    (right,) = set(folders(cache)) - {wrong}
    for path in right.iterdir():
        path.unlink()
    right.rmdir()
    wrong.rename(right)
    assert_same(cached(data, cache), plain(data))


def test_a_file_in_its_place_is_noticed(data: Path, cache: TokenCache) -> None:
    cached(data, cache)
    (folder,) = folders(cache)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("not a folder")
    assert_same(cached(data, cache), plain(data))


def test_data_that_changes_while_it_is_read_is_refused(
    data: Path, cache: TokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = RecordFile.open(data, cache)

    def changing(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield from encode_chunks(*arguments, **options)
        with data.open("a") as more:
            more.write(json.dumps(made_records(1)[0]) + "\n")

    monkeypatch.setattr(token_cache, "encode_chunks", changing)
    with pytest.raises(UserError, match="has changed while it was read"):
        file.encode(split(60).train, ALPACA, TOKENIZER, RULES)
    assert not folders(cache)


# Killed, and two at once


def builder(data: Path, cache: TokenCache, *how: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(BUILDER), str(data), str(cache.folder), *how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    result: dict[str, Any] = json.loads(said)
    return result


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
def test_killed_before_each_change_of_its_folder(data: Path, cache: TokenCache, tmp_path: Path) -> None:
    """Nothing that is used is left, or a whole set; and what is left over is removed by the next one."""
    result = result_of(builder(data, cache, "kills"))
    assert result["kills"] > 15
    assert result["fingerprints"] == [build(data, tmp_path / "other").fingerprint()]


@pytest.mark.long
def test_killed_with_its_workers_and_two_at_once(cache: TokenCache, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", made_records(12_000))
    with builder(data, cache, "2") as process:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size > 99_999 for path in cache.folder.glob(".tokens-*.tmp/ids.int32")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        workers = psutil.Process(process.pid).children()
        process.kill()
    assert len(workers) == 2
    assert not folders(cache)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive  # they end with the process that they work for

    both = [builder(data, cache, "1") for _ in range(2)]
    expected = plain(data, seed=7)
    assert {result_of(process)["fingerprint"] for process in both} == {expected.fingerprint()}
    assert not list(cache.folder.glob(".*.tmp"))
    assert_same(build(data, cache.folder), expected)


def test_a_worker_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(FastftError, match="has ended"):
        list(encode_chunks(iter([[(1, "a", "b")]] * 3), TOKENIZER, RULES, workers=2))


# Memory


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="needs a peak of memory that can begin anew")
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Peaks of processes of their own; what is held of a record is its place in the split and whether it is kept."""
    few, many = (write_lines(tmp_path / f"{n}.jsonl", wordy_records(n)) for n in (4_000, 24_000))
    grown = [result_of(builder(data, TokenCache(tmp_path / data.stem), "1"))["grown"] for data in (few, many)]
    in_memory = result_of(builder(many, TokenCache(tmp_path), "plain"))["grown"]
    assert grown[1] - grown[0] < MEMORY_SLACK < in_memory - grown[0], (grown, in_memory)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="needs a peak of memory that can begin anew")
def test_nor_beside_a_small_file(tmp_path: Path) -> None:
    """Also where their tokens are put together, which are some 30 MB here."""
    small = write_lines(
        tmp_path / "small.jsonl", [{**one, "instruction": f"s {one['output']}"} for one in made_records(99)]
    )
    few, many = (write_lines(tmp_path / f"{n}.jsonl", wordy_records(n, words=80)) for n in (12_000, 40_000))
    grown = [
        result_of(builder(data, TokenCache(tmp_path / data.stem), "beside", str(small)))["grown"]
        for data in (few, many)
    ]
    assert grown[1] - grown[0] < MEMORY_SLACK, grown
    tokens = sum(path.stat().st_size for path in (tmp_path / many.stem).glob("joined-*/ids.int32"))
    assert tokens > 1.5 * MEMORY_SLACK


MEMORY_SLACK = 16 << 20


def wordy_records(n: int, words: int = 40) -> list[dict[str, Any]]:
    return [{**record, "output": f"{record['output']} " * words} for record in made_records(n)]


# Training


def test_training_is_the_same_bit_for_bit(data: Path, tmp_path: Path) -> None:
    def lines(out: str, **options: Any) -> list[dict[str, Any]]:
        run = tmp_path / out
        values = {
            "data": str(data), "model": "pico", "out": run, "device": "cpu", "dtype": "fp32", "steps": 5,
            "eval_every": 2, "split_seed": 1, "seed": 5, "ledger": True, **options,
        }  # fmt: skip
        train(TrainOptions(**values))
        of_the_clock = {"seconds", "eval_seconds", "memory_bytes"}
        shown = [run / "metrics.jsonl", run / "ledger.jsonl"]
        return [
            {k: v for k, v in line.items() if k not in of_the_clock} for path in shown for line in read_metrics(path)
        ]

    folder = str(tmp_path / "cache")
    expected = lines("plain", token_cache="none")
    assert lines("cached", token_cache=folder) == expected
    assert lines("found", token_cache=folder) == expected
    assert len(list(Path(folder).glob("tokens-*"))) == 3  # of training, validation and test
    seen, expected_seen = (json.loads((tmp_path / out / "data.json").read_text()) for out in ("cached", "plain"))
    assert {**seen, "seconds": 0} == {**expected_seen, "seconds": 0}
    weights, expected_weights = ((tmp_path / out / "model/model.safetensors") for out in ("cached", "plain"))
    assert weights.read_bytes() == expected_weights.read_bytes()
    assert main(["train", "--resume", "--out", str(tmp_path / "cached"), "--token_cache", "none", "--steps", "6"]) == 0
    assert main(["generate", "--run", str(tmp_path / "cached"), "--max_new_tokens", "2"]) == 0


def test_no_record_is_held(data: Path, tmp_path: Path) -> None:
    options = TrainOptions(data=str(data), token_cache=str(tmp_path / "cache"))
    seen = load_data(options)
    held = load_data(replace(options, token_cache="none"))
    assert isinstance(seen.sources[0].records, RecordFile)
    assert isinstance(held.sources[0].records, list)
    assert len(seen) == len(held) == 60
    assert seen.fingerprint() == held.fingerprint()
    for name in ("train", "test", "val"):
        assert seen.part(name) == held.part(name)
        assert seen.part(name, 2) == held.part(name, 2) == held.part(name)[:2]


def test_malformed_records_are_said_in_the_same_way(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [*made_records(30), {"instruction": "no output"}, *[{}] * 11])
    for token_cache_option in ("none", str(tmp_path / "cache")) * 2:
        options = TrainOptions(data=str(data), token_cache=token_cache_option)
        with pytest.raises(UserError, match=r"12 of 42 records are malformed: row 31: `output` is missing.*and 2 more"):
            load_data(options)
        left_out = load_data(replace(options, skip_bad_records=True))
        assert [bad.row for bad in left_out.sources[0].bad] == list(range(31, 43))


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("data.json", '[{},\n{"a": 1,,}]', r"data.json is not JSON: .*line 2 column 9"),
        ("data.txt", "a,b", r"data.txt: unknown kind of file.*\.jsonl"),
        ("data.json", "[]", r"no usable record"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_leaves_nothing(
    name: str, content: str, fault: str, cache: TokenCache, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=fault):
        load_data(TrainOptions(data=str(tmp_path / name), token_cache=str(cache.folder)))
    assert not list(cache.folder.glob(".*.tmp"))
    assert not folders(cache)


def test_large_files_use_it_by_themselves(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTFT_CACHE", str(tmp_path / "own"))
    assert cache_for(data, "auto") is None
    monkeypatch.setattr(token_cache, "LARGE_FILE", data.stat().st_size)
    assert cache_for(data, "auto") == TokenCache(tmp_path / "own/tokens")
    assert cache_for(data, "none") is None
    assert cache_for(tmp_path / "nowhere.jsonl", "auto") is None
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(os.urandom(data.stat().st_size // 3))
    assert cache_for(packed, "auto") is not None


def test_a_folder_that_cannot_be_made_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--token_cache"):
        load_data(TrainOptions(data=str(data), token_cache=str(tmp_path / "file")))
    with pytest.raises(UserError, match="empty --token_cache"):
        TrainOptions(token_cache="")


def test_the_records_type_is_kept(data: Path, cache: TokenCache) -> None:
    assert all(isinstance(record, Record) for record in RecordFile.open(data, cache))
