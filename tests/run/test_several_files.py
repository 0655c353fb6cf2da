"""Data of several files: each split by itself, one set of examples however they are held, rows told with their file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_records import made_records

from fastft.cli import main, parse
from fastft.common.errors import UserError
from fastft.data.encode import EncodedSet, EncodingReport
from fastft.data.reading import load_records
from fastft.data.records import digest_of, split
from fastft.data.sources import Places, first_of_each
from fastft.data.token_cache import TokenCache, joined
from fastft.model.gpt2 import config_for
from fastft.run.config import TrainOptions, changed_settings, from_yaml, to_yaml
from fastft.run.data import Data, load_data

PICO = config_for("pico")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a.json of 40 records, b.jsonl of 20, v.json of 5 and t.json of 6."""
    monkeypatch.chdir(tmp_path)
    for name, n in (("a.json", 40), ("b.jsonl", 20), ("v.json", 5), ("t.json", 6)):
        write(name, n)
    return tmp_path


def write(name: str, n: int, **third: Any) -> None:
    """`n` records that name their file; the third one with changes."""
    records = [{**record, "instruction": f"{name}: {record['instruction']}"} for record in made_records(n)]
    records[2] |= third
    Path(name).parent.mkdir(exist_ok=True)
    lines = "\n".join(map(json.dumps, records))
    Path(name).write_text(lines if name.endswith("l") else json.dumps(records))


def options(**given: Any) -> TrainOptions:
    return TrainOptions(**{"data": ["a.json", "b.jsonl"], "model": "pico", "token_cache": "none", **given})


def inputs(data: Data, part: str) -> list[tuple[str, int]]:
    """The file and the row of each record of a part."""
    return [(record.instruction.partition(":")[0], record.row) for record in data.part(part)]


def test_each_file_is_split_by_itself(folder: Path) -> None:
    data = load_data(options())
    assert inputs(data, "train") == [
        *(("a.json", row) for row in range(1, 35)),
        *(("b.jsonl", r) for r in range(1, 18)),
    ]
    assert inputs(data, "test") == [*(("a.json", row) for row in range(35, 39)), ("b.jsonl", 18), ("b.jsonl", 19)]
    assert inputs(data, "val") == [("a.json", 39), ("a.json", 40), ("b.jsonl", 20)]
    shuffled = load_data(options(split_seed=4))
    assert sorted(inputs(shuffled, "train")) != sorted(inputs(data, "train"))
    assert len(shuffled.part("train")) == 51
    halves = load_data(options(split="0.5,0.25,0.25"))
    assert [len(halves.part(part)) for part in ("train", "val", "test")] == [30, 15, 15]


def test_parts_with_files_of_their_own(folder: Path) -> None:
    data = load_data(options(val_data="v.json", test_data="t.json"))
    assert len(data.part("train")) == 60
    assert inputs(data, "val") == [("v.json", row) for row in range(1, 6)]
    assert inputs(data, "test") == [("t.json", row) for row in range(1, 7)]
    one = load_data(options(data="a.json", val_data="v.json"))
    assert inputs(one, "train") == [("a.json", row) for row in range(1, 37)]
    assert inputs(one, "test") == [("a.json", row) for row in range(37, 41)]
    assert [len(own.part("val")) for own in (one, load_data(options(data="a.json", test_data="t.json")))] == [5, 2]
    assert [line.rpartition("/")[2] for line in one.describe_parts()] == [
        "a.json: 36 training, 4 test, 0 validation",
        "v.json: 0 training, 0 test, 5 validation",
    ]


def test_a_fingerprint_is_of_files_order_split_and_mix(folder: Path) -> None:
    some = {
        "plain": options(),
        "other order": options(data=["b.jsonl", "a.json"]),
        "one": options(data="a.json"),
        "mixed": options(mix=[2, 1]),
        "otherwise mixed": options(mix=[1, 2]),
        "split": options(split=[0.8, 0.1, 0.1]),
        "shuffled": options(split_seed=1),
        "validated": options(val_data="v.json"),
        "tested": options(test_data="v.json"),
        "both": options(val_data="v.json", test_data="t.json"),
        "swapped": options(val_data="t.json", test_data="v.json"),
    }
    assert len({load_data(one).fingerprint() for one in some.values()}) == len(some)
    before = load_data(some["mixed"]).fingerprint()
    write("moved/one.json", 40)
    Path("moved/one.json").write_text(Path("a.json").read_text())
    assert load_data(options(data=["moved/one.json", "b.jsonl"], mix=[2, 1])).fingerprint() == before


def test_of_one_file_it_is_what_runs_have_noted(folder: Path) -> None:
    """The split's indices behind the digest of the records: an older run goes on."""
    import hashlib

    records = load_records("a.json").good
    digest, parts = hashlib.sha256(digest_of(records).encode()), split(len(records))
    for indices in (parts.train, parts.test, parts.val):
        digest.update(b"split" + indices.tobytes())
    assert load_data(options(data="a.json")).fingerprint() == digest.hexdigest()


@pytest.mark.parametrize("cached", [["a.json", "b.jsonl", "t.json"], ["b.jsonl"]])
def test_large_files_and_small_ones_make_the_set_of_small_ones(
    cached: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By way of the cache, where a file is large; of it no more than its arrays."""
    from fastft.data import sources

    given: dict[str, Any] = {"test_data": "t.json", "split_seed": 3, "mix": [1, 2]}
    held = load_data(options(**given))
    choose = sources.cache_for
    monkeypatch.setattr(
        sources, "cache_for", lambda path, cache: choose(path, cache if path.name in cached else "none")
    )
    mapped = load_data(options(**given, token_cache=str(folder / "cache")))
    assert sum(source.cache is not None for source in mapped.sources) == len(cached)
    assert mapped.fingerprint() == held.fingerprint()
    for time in ("made", "found"):
        for part in ("train", "val", "test"):
            some, other = (data.encode(part, options(), PICO) for data in (mapped, held))
            for name in ("ids", "offsets", "spans", "span_offsets", "rows"):
                assert np.array_equal(getattr(some, name), getattr(other, name)), (part, name)
                assert getattr(some, name).dtype == getattr(other, name).dtype
            assert some.fingerprint() == other.fingerprint()
            assert some.common_prefix() == other.common_prefix() > 20
            assert mapped.part(part) == held.part(part)
        assert mapped.audit() == held.audit(), time
    assert len(list((folder / "cache").glob("joined-*"))) == 2  # the test examples are of one file


def one_set(*examples: list[int], dropped: list[int] | None = None) -> EncodedSet:
    ends = np.cumsum([0, *map(len, examples)])
    made = EncodedSet.of_suffixes(
        ids=np.array([token for one in examples for token in one], dtype=np.int32),
        offsets=ends.astype(np.int64),
        first_target=np.ones(len(examples), dtype=np.int64),
        rows=np.arange(1, len(examples) + 1),
    )
    return replace(made, report=EncodingReport(dropped=dropped or []))


def test_joined_sets_keep_spans_reports_and_what_all_begin_with(tmp_path: Path) -> None:
    sets = [one_set([5, 6, 7, 8], [5, 6, 7, 9], dropped=[2]), one_set([5, 6, 1]), one_set([5, 6, 7, 8, 9], dropped=[1])]
    sets[1] = replace(sets[1], spans=np.array([[1, 2], [2, 3]]), span_offsets=np.array([0, 2]))
    for whole in (joined(sets, None), joined(sets, TokenCache(tmp_path)), joined(sets, TokenCache(tmp_path))):
        assert [whole[index].tolist() for index in range(4)] == [[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 1], [5, 6, 7, 8, 9]]
        assert [whole.spans_of(index).tolist() for index in range(4)] == [
            [[1, 4]], [[1, 4]], [[1, 2], [2, 3]], [[1, 5]]
        ]  # fmt: skip
        assert whole.report.dropped == [2, 1]
        assert whole.common_prefix() == replace(whole, known_common_prefix=None).common_prefix() == 2
        assert whole.fingerprint() == replace(whole, known_fingerprint=None).fingerprint()
    assert joined(sets[:1], TokenCache(tmp_path)) is sets[0]


def test_places_are_told_by_file_where_there_are_several() -> None:
    one, two = Places(("a.json",), ((),)), Places(("a.json", "b.json"), ((), ()))
    assert (one.called(3), one.said([3, 9])) == (3, "rows 3, 9")
    places = [*two.of_file(0, [3, 9]), *two.of_file(1, [3])]
    assert [two.called(place) for place in places] == ["a.json:3", "a.json:9", "b.json:3"]
    assert two.said(places) == "a.json rows 3, 9; b.json row 3"
    assert two.said(places, most=1) == "a.json row 3 and 1 more; b.json row 3".replace("row 3 and", "rows 3 and")
    assert two.files(np.array(places)).tolist() == [0, 0, 1]
    assert two.lines(EncodingReport(dropped=places), 50) == [
        "a.json: 2 examples longer than 50 tokens and dropped: rows 3, 9",
        "b.json: 1 examples longer than 50 tokens and dropped: row 3",
    ]


def test_files_of_one_name_are_told_by_their_paths(folder: Path) -> None:
    write("x/a.json", 30)
    data = load_data(options(data=["a.json", "x/a.json"]))
    assert data.places.names == ("a.json", "x/a.json")


def test_the_first_of_each_are_in_proportion() -> None:
    assert first_of_each([40, 20], 6) == [4, 2]
    assert first_of_each([5], 3) == [3]
    assert first_of_each([2, 1], 9) == [2, 1]
    assert first_of_each([100, 1], 1) == [1, 0]
    assert first_of_each([3, 0, 3], 2) == [1, 0, 1]


def test_a_few_records_are_of_all_files(folder: Path) -> None:
    """The samples of an evaluation, and what it reads."""
    assert inputs(load_data(options()), "train")[:3] == [("a.json", 1), ("a.json", 2), ("a.json", 3)]
    few = [(record.instruction.partition(":")[0], record.row) for record in load_data(options()).part("train", 3)]
    assert few == [("a.json", 1), ("a.json", 2), ("b.jsonl", 1)]


def test_the_records_of_a_part_have_places(folder: Path) -> None:
    data = load_data(options(test_data="t.json"))
    places = data.places_of("train", data.part("train"))
    assert places == data.encode("train", options(), PICO).rows.tolist()
    assert data.places.said(places[-2:]) == "b.jsonl rows 18, 19"
    with pytest.raises(ValueError, match="longer"):
        data.places_of("train", data.part("train", 3) + data.part("train"))


@pytest.mark.parametrize("token_cache", ["none", "cache"])
def test_what_is_wrong_is_told_with_its_file(token_cache: str, folder: Path) -> None:
    long = "word " * 300
    write("bad.json", 20, output=5)
    write("long.json", 20, input=long)
    now = options(token_cache=token_cache)
    with pytest.raises(UserError, match=r"bad.json: 1 of 20 records are malformed: row 3: `output` is a number"):
        load_data(replace(now, data=["a.json", "bad.json"]))
    with pytest.raises(UserError, match=r"^--val_data: bad.json: 1 of 20"):
        load_data(replace(now, val_data="bad.json"))
    left_out = load_data(replace(now, data=["a.json", "bad.json"], skip_bad_records=True))
    assert left_out.as_json()["left_out"] == [{"row": "bad.json:3", "reason": "`output` is a number, expected text"}]
    assert "bad.json: 1 of 20 records are malformed: row 3" in left_out.describe_bad()
    several = replace(now, data=["a.json", "long.json"])
    with pytest.raises(UserError, match=r"long.json: 1 examples are longer than 256 tokens: row 3;"):
        load_data(several).encode("train", several, PICO)
    dropped = replace(several, too_long="drop")
    assert load_data(dropped).encode("train", dropped, PICO).report.dropped == Places.of_file(1, [3])
    tested = replace(now, test_data="long.json")
    with pytest.raises(UserError, match=r"1 test examples are longer than .* 256 tokens: long.json row 3;"):
        load_data(tested).longer_than(PICO, tested)


@pytest.mark.parametrize("token_cache", ["none", "cache"])
def test_leaks_between_files_are_found(token_cache: str, folder: Path) -> None:
    same = made_records(3)[2] | {"instruction": "The same in all."}
    for name in ("a.json", "b.jsonl", "v.json", "t.json"):
        write(name, 20, **same)
    data = load_data(options(val_data="v.json", test_data="t.json", token_cache=token_cache))
    found = data.audit()
    assert (found.test_in_train, found.val_in_train) == (["t.json:3"], ["v.json:3"])
    assert found.duplicates == ["b.jsonl:3", "v.json:3", "t.json:3"]
    assert found.duplicate_prompts == [["a.json:3", "b.jsonl:3", "v.json:3", "t.json:3"]]
    assert "test prompts that also stand in train: 1: rows t.json:3" in found.lines()
    assert found.as_json()["duplicates"] == found.duplicates


@pytest.mark.parametrize("token_cache", ["none", "cache"])
def test_the_same_records_twice_are_refused(token_cache: str, folder: Path) -> None:
    Path("copy.jsonl").write_text("\n".join(map(json.dumps, json.loads(Path("a.json").read_text()))))
    for given, words in (
        ({"data": ["a.json", "a.json"]}, "got --data a.json and --data a.json, which hold the same records"),
        ({"data": ["a.json", "b.jsonl", "copy.jsonl"]}, "got --data a.json and --data copy.jsonl"),
        ({"test_data": "copy.jsonl"}, "got --data a.json and --test_data copy.jsonl"),
        ({"val_data": "v.json", "test_data": "v.json"}, "got --val_data v.json and --test_data v.json"),
    ):
        with pytest.raises(UserError, match=words):
            load_data(options(token_cache=token_cache, **given))


# Options


@pytest.mark.parametrize("given", ["a b", ["a", "b"], ("a", "b"), [Path("a"), Path("b")]])
def test_lists_from_the_command_line_yaml_and_python_are_one(given: Any, tmp_path: Path) -> None:
    config = tmp_path / "options.yaml"
    if isinstance(given, str):
        made = parse("train", ["--data", *given.split(), "--mix", "2,1", "--split", "0.9,0.05,0.05"])
    else:
        some: dict[str, Any] = {"mix": (2, 1), "split": [0.9, 0.05, 0.05]}  # a tuple, as a program may give it
        made = TrainOptions(data=given, **some)
    config.write_text("data: [a, b]\nmix: 2,1\nsplit: [0.9, 0.05, 0.05]\n")
    assert parse("train", ["--config", str(config)]) == made
    assert (made.data, made.mix, made.split) == (["a", "b"], [2.0, 1.0], [0.9, 0.05, 0.05])
    config.write_text(to_yaml(made))
    assert from_yaml(config) == made
    assert parse("train", ["--config", str(config), "--data", "c", "--mix", "null"]).data == "c"
    assert TrainOptions(data=["a"]).data == parse("train", ["--data=a"]).data == "a"


def test_config_yaml_of_an_older_run_is_read(tmp_path: Path) -> None:
    lines = to_yaml(TrainOptions(data="sample")).splitlines()
    new = ("val_data:", "test_data:", "split:", "mix:")
    (tmp_path / "config.yaml").write_text("\n".join(line for line in lines if not line.startswith(new)))
    assert from_yaml(tmp_path / "config.yaml") == TrainOptions(data="sample")


def test_a_resumed_run_may_find_its_files_elsewhere_and_no_other_split(folder: Path) -> None:
    saved = folder / "config.yaml"
    now = options(mix=[2, 1], val_data="v.json", split=[0.9, 0, 0.1])
    saved.write_text(to_yaml(now))
    was = from_yaml(saved)
    assert was.data == [str(folder / "a.json"), str(folder / "b.jsonl")]
    assert was.val_data == str(folder / "v.json")
    assert changed_settings(was, now) == []
    assert changed_settings(was, replace(now, data=["x", "y"], val_data="z")) == []
    assert changed_settings(was, replace(now, mix=[1, 1])) == ["mix: [2.0, 1.0] then, [1.0, 1.0] now"]
    assert changed_settings(was, replace(now, split=None)) == ["split: [0.9, 0.0, 0.1] then, None now"]


def test_inspect_shows_the_same_parts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("v.json", 5, output="")
    write("a.json", 40, input="word " * 300)
    argv = ["inspect", "--data", "a.json", "b.jsonl", "--val_data", "v.json", "--model", "pico", "--too_long", "drop"]
    assert main([*argv, "--example", "20"]) == 0
    said = capsys.readouterr().out
    for line in (
        "v.json row 3: `output` is empty",
        "a.json: 36 training, 4 test, 0 validation",
        "v.json: 0 training, 0 test, 4 validation",
        "train: a.json: 1 examples longer than 256 tokens and dropped: row 3",
        "a.json row 20 in its padded batch",
    ):
        assert line in said, line
    assert main([*argv, "--split", "0.5,0,0.5", "--example", "3"]) == 0
    said = capsys.readouterr().out
    assert "b.jsonl: 10 training, 10 test, 0 validation" in said
    assert "b.jsonl row 3 in its padded batch" in said  # of a.json it is dropped


def test_a_large_file_that_changes_while_it_is_audited_is_refused(folder: Path) -> None:
    data = load_data(options(token_cache="cache"))
    write("b.jsonl", 20, output="another")
    with pytest.raises(UserError, match=r"b.jsonl has changed while it was read"):
        data.audit()
    assert not list(Path("cache").glob("audit-*"))


def test_a_run_says_where_to_find_what_was_moved(folder: Path) -> None:
    from fastft.run.folder import Run
    from fastft.run.trained import data_of

    Path("run").mkdir()
    now = options(test_data="t.json")
    Path("run/config.yaml").write_text(to_yaml(now))
    Path("run/data.json").write_text(json.dumps({"split_sha256": load_data(now).fingerprint()}))
    everything = ["a.json", "b.jsonl", "t.json"]
    for moved in (None, everything[:2], everything):
        assert len(data_of(Run(Path("run")), moved).part("test")) == 6
    Path("t.json").rename("u.json")
    with pytest.raises(UserError, match=r"t.json is not there any more either; give --data all 3 files"):
        data_of(Run(Path("run")), everything[:2])
    assert len(data_of(Run(Path("run")), [*everything[:2], "u.json"]).part("test")) == 6
    with pytest.raises(UserError, match=r"--data with 1 files, of a run with .*t.json; expected 2, or all 3 in this"):
        data_of(Run(Path("run")), "a.json")


@pytest.mark.parametrize("token_cache", ["none", "cache"])
@pytest.mark.parametrize("names", [("a.jsonl", "b.jsonl"), ("b.jsonl", "a.jsonl")], ids=["first", "last"])
def test_a_folder_of_documents_and_of_others_is_refused(folder: Path, names: tuple[str, str], token_cache: str) -> None:
    """The others would be cut into contexts with the documents, all of them learned."""
    (folder / "many").mkdir()
    rows = ({"text": "A document."}, {"prompt": "Which?", "completion": "That."})
    for name, row in zip(names, rows, strict=True):
        (folder / "many" / name).write_text(json.dumps(row))
    with pytest.raises(UserError, match=rf"documents \({names[0]}\) and prompt_completion \({names[1]}\)"):
        load_data(options(data="many", token_cache=token_cache))
