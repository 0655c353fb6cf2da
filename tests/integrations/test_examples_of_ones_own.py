"""The examples run as they stand, and what they claim is so."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import fastft_kernels
import pytest
import torch
from torch.nn import functional as F

import fastft
from fastft.integrations import book
from fastft.integrations.book import training
from fastft.model import ops

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


def count(monkeypatch: pytest.MonkeyPatch, *functions: tuple[Any, str]) -> Counter[str]:
    """How often each function of a module is called from now on."""
    calls: Counter[str] = Counter({name: 0 for _, name in functions})
    for module, name in functions:
        real = getattr(module, name)

        def counted(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted, raising=False)
    return calls


BOOKS_OPS = (
    (training, "pack_asked"),
    (ops, "attention"),
    (ops, "attention_of_rows"),
    (training, "linear_cross_entropy"),
)
PACKS = 3 + 6 + 2 * (3 + 1)
"""The chapter's first look at 3 batches, two epochs of them, and two evaluations of those and one of validation."""


class TestOwnLoop:
    def test_it_learns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By fastft's operations, each as often as it should run."""
        ops = ((fastft_kernels, "attention"), (fastft, "pack"), (fastft, "linear_cross_entropy"))
        calls = count(monkeypatch, *ops)
        losses = example("own_loop.py")["train"](steps=40)
        assert calls == {"attention": 2 * 40, "pack": 40, "linear_cross_entropy": 40}
        assert losses[0] > 5
        assert losses[-1] < 0.5 * losses[0]

    def test_its_loss_is_the_plain_one(self) -> None:
        own = example("own_loop.py")
        torch.manual_seed(0)
        model = own["GPT"](V=256).double()
        some = own["texts"]()[:5]
        batch = fastft.pack([ids[:-1] for ids in some], labels=[ids[1:] for ids in some], shifted=True)
        assert len(batch.tokens) < 0.7 * sum(map(len, some))  # the beginning is there once

        losses = []
        for ids in some:
            x = model.tokens(torch.tensor(ids[:-1])) + model.positions(torch.arange(len(ids) - 1))
            for block in model.blocks:
                q, k, v = block.qkv(block.ln_1(x)).unflatten(1, (3, block.H, -1)).permute(1, 2, 0, 3)
                attended = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
                x = x + block.proj(attended.transpose(0, 1).flatten(1))
                x = x + block.out(F.gelu(block.fc(block.ln_2(x)), approximate="tanh"))
            logits = model.norm(x) @ model.tokens.weight.T
            losses.append(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        expected = sum(losses) / sum(len(ids) - 1 for ids in some)
        assert abs(model(batch) - expected) < 1e-12
        assert abs(model(fastft.pack([some[0][:-1]], labels=[some[0][1:]], shifted=True)) - expected) > 1e-12


class TestChapter7:
    def test_it_gives_what_the_books_own_script_gives(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("llms_from_scratch")
        from llms_from_scratch import ch04, ch05, ch07

        calls = count(monkeypatch, *BOOKS_OPS)
        ours = example("book_chapter7.py")["main"](folder=tmp_path)
        assert calls == dict.fromkeys(calls, PACKS)  # of two layers, the last one's attention is of the loss rows
        for chapter in (ch04, ch05, ch07):
            for name in book.__all__:
                if hasattr(chapter, name):
                    monkeypatch.setattr(book, name, getattr(chapter, name))
        theirs = example("book_chapter7.py")["main"](folder=tmp_path)
        assert calls == dict.fromkeys(
            calls, PACKS
        )  # nothing of ours ran, as it would not if the import changed nothing
        for name in ("initial", "train", "val"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
        assert ours["train"][-1] < 0.9 * ours["initial"]
        assert (ours["tokens"], ours["test"]) == (theirs["tokens"], theirs["test"])

    def test_its_files(self, tmp_path: Path) -> None:
        found = example("book_chapter7.py")["main"](num_epochs=1, folder=tmp_path)
        assert json.loads((tmp_path / "instruction-data-with-response.json").read_text()) == found["test"]
        config = fastft.GPT2Config(n_layer=2, n_head=4, n_embd=48, n_ctx=256)
        assert fastft.load(tmp_path / "gpt2-sft.pth", config=config).config.tie_head is False
