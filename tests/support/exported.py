"""A run's folder made by hand, with a random model, for tests of what is exported: nothing is trained."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastft.data.chat_template import AnyTemplate, as_jinja, template_named
from fastft.data.folder_tokenizer import tokenizer_of, with_special_tokens
from fastft.data.prompts import Special
from fastft.data.records import Record, Turn
from fastft.data.tokenizer import Tokenizer
from fastft.model.gpt2 import GPT2, config_for
from fastft.model.lora import settle
from fastft.model.lora_spec import LoRA
from fastft.model.part import Part, sha256_of, trained
from fastft.model.peft_layout import save_adapter
from fastft.model.vocabulary import with_tokenizer
from fastft.model.weights import load, save_hf
from fastft.run.config import TrainOptions, to_yaml
from fastft.run.folder import Run

CONVERSATION = [
    Turn("user", 'Say {{ .X }} and "hé"\n<|im_end|>'),
    Turn("assistant", "héllo\\n 😀"),
    Turn("user", "And\u200b now?"),
    Turn("assistant", "ok"),
    Turn("user", "Last."),
]
"""With what a template's program could trip over, and letters of all lengths in UTF-8."""


def letters() -> list[str]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, the others for letters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@functools.cache
def small_tokenizer() -> Tokenizer:
    """A byte-level BPE of GPT-2's kind with 260 ids, the last one end-of-text: reading 50,257 takes its time."""
    merges = ["h e", "\u0120 t", "\u0120t he"]
    vocab = {token: number for number, token in enumerate([*letters(), *(pair.replace(" ", "") for pair in merges)])}
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "vocab.json").write_text(json.dumps({**vocab, "<|endoftext|>": len(vocab)}))
        (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        (place / "tokenizer_config.json").write_text(json.dumps(config))
        made = tokenizer_of(place)
    assert made is not None
    return made


def random_model(template: AnyTemplate, *, tie_head: bool = True, tokenizer: Tokenizer | None = None) -> GPT2:
    """A pico GPT-2 with a template's tokens, of which no two parameters are alike, biases and norms included."""
    torch.manual_seed(1)
    own = tokenizer or small_tokenizer()
    model = GPT2(replace(config_for("pico"), tie_head=tie_head, vocab_size=own.size(), tokenizer=own))
    model = with_tokenizer(model, with_special_tokens(own, template.special_tokens, template.end))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float(name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))), std=0.2)
    return model.eval()


def made_run(
    folder: Path, template: str = "chatml", *, tie_head: bool = True, tokenizer: Tokenizer | None = None, **options: Any
) -> Run:
    """The folder of a run with the files that `export` reads."""
    run, of = Run(folder), template_named(template)
    model = random_model(of, tie_head=tie_head, tokenizer=tokenizer)
    given = {"data": "sample", "model": "pico", "tie_head": tie_head, "template": template, "out": folder}
    save_hf(model, run.model, chat_template=as_jinja(of))
    run.config.write_text(to_yaml(TrainOptions(**{**given, **options})))
    facts = {"template": of.description(), "tokenizer_sha256": model.config.tokenizer.fingerprint()}
    run.data.write_text(json.dumps(facts))
    return run


def with_random_adapter(base: GPT2, lora: LoRA, template: AnyTemplate) -> GPT2:
    """A base with a template's tokens, and adapters and new rows of random values."""
    known, own = base.config.tokenizer.size(), base.config.tokenizer
    part = Part(lora=lora, train_only=None, new_rows=None, base_sha256=sha256_of(base))
    model = with_tokenizer(base, with_special_tokens(own, template.special_tokens, template.end))
    if model.config.tokenizer.size() > known:
        part = replace(part, new_rows=(known, model.config.vocab_size - known))
    part.take(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in trained(model).items():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight * (1 + 0.1 * noise) if "magnitude" in name else 0.1 * noise)
    settle(model)
    return model


def made_adapter_run(
    folder: Path, template: str = "alpaca", *, tie_head: bool = True, tied_base: bool | None = None, **lora: Any
) -> Run:
    """The same of a run that trained adapters of a base in the folder `base` beside it, which is tied as the run is
    unless it is said otherwise."""
    run, of = Run(folder), template_named(template)
    tied_base = tie_head if tied_base is None else tied_base
    save_hf(random_model(template_named("alpaca"), tie_head=tied_base), folder.parent / "base")
    base = load(folder.parent / "base", tie_head=tie_head)
    model = with_random_adapter(base, LoRA(**{"r": 3, "alpha": 4.0, **lora}), of)
    save_adapter(model, run.model, base_source=str(folder.parent / "base"), chat_template=as_jinja(of))
    given = {"data": "sample", "weights": str(folder.parent / "base"), "tie_head": tie_head, "template": template}
    run.config.write_text(to_yaml(TrainOptions(**given, lora_r=3, out=folder)))
    facts = {"template": of.description(), "tokenizer_sha256": model.config.tokenizer.fingerprint()}
    run.data.write_text(json.dumps(facts))
    return run


def prompt_text(template: AnyTemplate, turns: list[Turn], end_of_text: str) -> str:
    """Our prompt for the next answer of a conversation, with end-of-texts as they are written."""
    record = Record(instruction="", output="", turns=(*turns, Turn("assistant", "?")))
    parts = template.prompt_parts(record)
    return "".join(end_of_text if isinstance(text, Special) and not text else text for text, _ in parts)
