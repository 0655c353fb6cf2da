"""Folders of GPT-2s in other languages: small weights, and tokenizers of their own."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastft.data.prompts import ALPACA
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.model.gpt2 import GPT2, config_for
from fastft.model.weights import save_hf

SENTENCES = [
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "Schreibe die Zahl in Worten, und antworte in einem ganzen Satz.",
    ALPACA.prompt("Say the number 3 in words.", "n3") + ALPACA.response("number 3"),
]
Changes = Callable[[dict[str, Any]], object]


@functools.cache
def trained(vocab_size: int = 400, ends: str = "<|endoftext|>") -> str:
    """The `tokenizer.json` of byte-level BPE that was trained on a few sentences; its end-of-text has the id 0."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        SENTENCES * 3,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[ends], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made.to_str()


def description(change: Changes = lambda _: None, **given: Any) -> dict[str, Any]:
    """The same as an object, changed."""
    made: dict[str, Any] = json.loads(trained(**given))
    change(made)
    return made


def write_old_files(folder: Path, described: dict[str, Any]) -> None:
    """`vocab.json` and `merges.txt` of a description."""
    model = described["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


@functools.cache
def _gpt2_files() -> dict[str, bytes]:
    return gpt2_tokenizer().files(1024)


def permuted_gpt2(seed: int = 0) -> dict[str, bytes]:
    """GPT-2 of another language as far as sizes tell: 50,257 ids that mean other tokens, end-of-text the last."""
    files = dict(_gpt2_files())
    vocab = json.loads(files["vocab.json"])
    order = [*np.random.default_rng(seed).permutation(50256).tolist(), 50256]
    files["vocab.json"] = json.dumps({token: order[number] for token, number in vocab.items()}).encode()
    return files


def weights(folder: Path, vocab_size: int, *, n_ctx: int = 256, seed: int = 0) -> Path:
    """A folder of pico's weights, without a tokenizer."""
    torch.manual_seed(seed)
    config = replace(config_for("pico"), vocab_size=max(vocab_size, 50257), n_ctx=n_ctx)
    model = GPT2(config)
    save_hf(model, folder)
    for path in folder.iterdir():
        if path.name in _gpt2_files():
            path.unlink()
    if vocab_size < 50257:
        _cut(folder, vocab_size)
    return folder


def _cut(folder: Path, vocab_size: int) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "transformer.wte.weight"
    tensors[name] = tensors[name][:vocab_size].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": vocab_size}
    for key in ("bos_token_id", "eos_token_id"):
        config.pop(key)
    (folder / "config.json").write_text(json.dumps(config))


def put(folder: Path, files: dict[str, Any]) -> Path:
    """Writes files: bytes, text, or objects as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        written = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name).write_bytes(written if isinstance(written, bytes) else written.encode())
    return folder


def foreign_weights(kind: str, folder: Path) -> Path:
    """Weights of pico with a tokenizer of their own: as large as GPT-2's, or smaller."""
    if kind == "same size":
        return put(weights(folder, 50257, n_ctx=256), permuted_gpt2())
    files = {"tokenizer.json": trained(ends="</s>"), "tokenizer_config.json": {"eos_token": "</s>", "mine": 1}}
    return put(weights(folder, 420, n_ctx=512), files)


def texts() -> Iterable[str]:
    """What every tokenizer has to give back."""
    yield from SENTENCES
    yield from (
        "",
        " ",
        "\n",
        "  two  spaces ",
        "a<|endoftext|>b",
        "<|endoftext|>",
        "日本語 \U0001f600 é",
        "\x00\x07\r\n\t",
    )
