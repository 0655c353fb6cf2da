"""Documents, segments and token ids as examples, in memory and through the token cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastft.common.errors import UserError
from fastft.data.encode import EncodedSet, EncodingRules, encode
from fastft.data.prompts import ALL, ALPACA, RESPONSES, Learn
from fastft.data.reading import load_records
from fastft.data.token_cache import RecordFile, TokenCache
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.run.config import TrainOptions
from fastft.run.data import load_data, warn_of_data

TOKENIZER = gpt2_tokenizer()
DOCUMENTS = [{"text": f"Document {n}: " + "owls fly by night. " * (n % 5)} for n in range(1, 40)]
SEGMENTS = [
    {
        "segments": [
            {"label": False, "text": "Q: "},
            {"label": False, "text": f"{n}?\nA:"},
            {"label": True, "text": " yes"},
        ]
    }
    for n in range(9)
]
IDS = [{"input_ids": [5, n, 7, 8], "labels": [-100, n, -100, 8]} for n in range(9)]


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def both(path: Path, cache: Path, learn: Learn = RESPONSES, max_length: int = 32) -> EncodedSet:
    """The encoded set, in memory and from the cache, held against each other in an order that is not the file's."""
    records = load_records(str(path)).good
    order = np.random.default_rng(0).permutation(len(records))
    some = encode([records[at] for at in order], ALPACA, TOKENIZER, learn=learn, max_length=max_length)
    file = RecordFile.open(path, TokenCache(cache))
    cached = file.encode(order, ALPACA, TOKENIZER, EncodingRules(learn, max_length))
    for name in ("ids", "offsets", "spans", "span_offsets", "rows"):
        assert np.array_equal(getattr(some, name), getattr(cached, name)), name
    assert some.fingerprint() == cached.fingerprint()
    return some


def test_documents_are_cut_into_contexts(tmp_path: Path) -> None:
    some = both(written(tmp_path / "some.jsonl", DOCUMENTS), tmp_path / "cache")
    whole = [token for row in DOCUMENTS for token in (*TOKENIZER.encode(str(row["text"])), TOKENIZER.end_of_text)]
    assert int(some.supervised.sum()) == len(whole) - 1
    assert [token for index in range(len(some)) for token in some[index][1:]] == whole[1:]
    assert set(some.lengths[:-1]) == {32}


def test_segments_are_learned_by_their_labels(tmp_path: Path) -> None:
    some = both(written(tmp_path / "some.jsonl", SEGMENTS), tmp_path / "cache")
    (begin, end), *others = some.spans_of(0).tolist()
    assert not others
    assert TOKENIZER.decode(some[0][begin:end].tolist()) == " yes<|endoftext|>"


def test_ids_are_learned_by_their_labels_and_nothing_is_put_behind_them(tmp_path: Path) -> None:
    some = both(written(tmp_path / "some.jsonl", IDS), tmp_path / "cache")
    assert some[1].shape == (4,)
    assert some.spans_of(1).tolist() == [[1, 2], [3, 4]]
    assert both(written(tmp_path / "other.jsonl", IDS), tmp_path / "cache", ALL).spans_of(1).tolist() == [
        [1, 2],
        [3, 4],
    ]


def test_ids_that_the_model_has_not_are_refused(tmp_path: Path) -> None:
    rows = [*IDS, {"input_ids": [5, 50257]}]
    with pytest.raises(UserError, match=r"row 10: .*50257"):
        both(written(tmp_path / "some.jsonl", rows), tmp_path / "cache")


@pytest.mark.parametrize("rows", [DOCUMENTS, SEGMENTS, IDS], ids=["documents", "segments", "ids"])
def test_options_of_conversations_are_said_to_have_no_effect(
    tmp_path: Path, rows: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(written(tmp_path / "some.jsonl", rows))
    for options, said in (
        (TrainOptions(data=path), []),
        (TrainOptions(data=path, template="chatml", train_on="last"), ["--template chatml", "--train_on last"]),
        (TrainOptions(data="sample", template="chatml", train_on="last"), []),
    ):
        warn_of_data(options, load_data(options))
        heard = capsys.readouterr().err
        assert heard.count("has no effect") == len(said)
        assert all(f"{one} has no effect" in heard for one in said)
