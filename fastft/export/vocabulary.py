"""A tokenizer as GGUF holds it: `tokenizer.ggml.model = gpt2`, byte-level BPE with GPT-2's own way of cutting text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fastft.common.errors import UserError
from fastft.data.tokenizer import Tokenizer


class TokenType(IntEnum):
    """What llama.cpp calls kinds of tokens (`llama_token_type`)."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What llama.cpp needs to know.

    Attributes:
        tokens: `[V]` by id; those of the vocabulary in the letters that byte-level BPE writes bytes with.
        types: `[V]`.
        merges: in their order, each two tokens with a space between.
        begin, end, pad: ids.
    """

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    begin: int
    end: int
    pad: int


def vocabulary_of(tokenizer: Tokenizer, V: int) -> Vocabulary:
    """The vocabulary of a model with `V` rows; rows that no token has are UNUSED.

    Raises:
        UserError: the tokenizer cuts text in another way than GPT-2's, or its files are not installed.
    """
    contents = tokenizer.files()
    vocab, merges, added = _of_one_file(contents) if "tokenizer.json" in contents else _of_several(contents)
    special = tokenizer.special_tokens()
    tokens = [f"[PAD{number}]" for number in range(V)]
    types = [TokenType.UNUSED] * V
    for token, number in vocab.items():
        _set(tokens, types, number, token, TokenType.CONTROL if token in special else TokenType.NORMAL)
    for token in added | special:
        _set(tokens, types, tokenizer.special(token), token,
             TokenType.CONTROL if token in special else TokenType.USER_DEFINED)  # fmt: skip
    ids = tokenizer.special_ids()
    types[tokenizer.end_of_text] = TokenType.CONTROL
    return Vocabulary(tokens, types, merges, ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"])


def _set(tokens: list[str], types: list[TokenType], number: int, token: str, kind: TokenType) -> None:
    if number < len(tokens):  # a tokenizer may know special tokens that its model has no row for
        tokens[number], types[number] = token, kind


_Read = tuple[dict[str, int], list[str], frozenset[str]]
"""Ids by token, merges, and the tokens that were added beside them."""


def _of_one_file(contents: Mapping[str, bytes]) -> _Read:
    whole: dict[str, Any] = json.loads(contents["tokenizer.json"])
    model, cut = whole["model"], whole.get("pre_tokenizer") or {}
    odd = [
        (model.get("type") != "BPE", f"its kind is {model.get('type')}"),
        (whole.get("normalizer") is not None, "it changes texts before they are cut"),
        ((cut.get("type"), cut.get("use_regex", True)) != ("ByteLevel", True), "it cuts texts by rules of its own"),
        (bool(cut.get("add_prefix_space")), "it puts a space in front of texts"),
        (any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")),
         "its merges have rules of their own"),
    ]  # fmt: skip
    for is_odd, why in odd:
        if is_odd:
            raise _refusal(why)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return model["vocab"], merges, frozenset(token["content"] for token in whole.get("added_tokens") or [])


def _of_several(contents: Mapping[str, bytes]) -> _Read:
    config: dict[str, Any] = json.loads(contents.get("tokenizer_config.json", b"{}"))
    if config.get("add_prefix_space"):
        raise _refusal("it puts a space in front of texts")
    added = {*json.loads(contents.get("added_tokens.json", b"{}"))}
    added |= {token["content"] for token in config.get("added_tokens_decoder", {}).values()}
    lines = contents["merges.txt"].decode().replace("\r\n", "\n").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    return json.loads(contents["vocab.json"]), merges, frozenset(added)


def _refusal(why: str) -> UserError:
    return UserError(
        f"this model's tokenizer is not GPT-2's kind: {why}, which GGUF has no name for that fastft knows; expected "
        "byte-level BPE; --to hf exports it"
    )
