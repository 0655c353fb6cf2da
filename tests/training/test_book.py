"""What chapter 7 of the book computes, here to the digit: its data's figures, its batches, its training run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastft.batches.batch import IGNORE_INDEX, padded_batch
from fastft.data.audit import audit
from fastft.data.encode import EncodedSet, encode
from fastft.data.prompts import ALL, ALPACA, PHI3
from fastft.data.reading import load_records
from fastft.data.records import Record, Split, split
from fastft.data.sample import sample_records
from fastft.data.sources import Source
from fastft.data.tokenizer import END_OF_TEXT, gpt2_tokenizer
from fastft.engines.engine import Engine
from fastft.model.gpt2 import GPT2Config
from fastft.model.weights import load
from fastft.run.config import recipe_options
from fastft.run.data import Data
from fastft.run.folder import Run
from fastft.run.metrics_file import read_metrics
from fastft.training.book import BookOrder
from fastft.training.train import Trainer

LENGTHS = json.loads((Path(__file__).parents[1] / "fixtures" / "book_lengths.json").read_text())
WIDTHS_PRINTED = [61, 76, 73, 68]  # the first of the 116 shapes that the book's notebook prints


@pytest.fixture(scope="module")
def book_records(book_data: Path) -> list[Record]:
    return load_records(str(book_data)).good


def _train_lengths() -> np.ndarray:
    return np.array(LENGTHS["ids"])[split(1100).train] - 1


class TestFigures:
    def test_split(self) -> None:
        parts = split(1100)
        assert (len(parts.train), len(parts.test), len(parts.val)) == (935, 110, 55)
        assert np.array_equal(np.concatenate([parts.train, parts.test, parts.val]), np.arange(1100))

    def test_lengths(self) -> None:
        ids = np.array(LENGTHS["ids"])
        assert (len(ids), ids.min(), ids.max(), round(ids.mean(), 2)) == (1100, 41, 92, 57.39)

    def test_supervised_targets(self) -> None:
        ids, prompts = (np.array(LENGTHS[key])[split(1100).train] for key in ("ids", "prompt_ids"))
        assert (ids - 1).sum() == 52_760
        assert (ids - prompts).sum() == 17_876
        assert (ids - prompts - 6).sum() == 12_266  # without the six ids of the response header

    def test_widths_of_the_first_epoch(self) -> None:
        lengths = _train_lengths()
        order = BookOrder(935, batch_size=8, epochs=1).epoch_order(0)[: 116 * 8].reshape(116, 8)
        widths = lengths[order].max(axis=1)
        assert widths[:4].tolist() == WIDTHS_PRINTED
        assert (8 * widths.sum(), lengths[order].sum()) == (65_080, 52_335)

    def test_another_seed_gives_other_widths(self) -> None:
        order = BookOrder(935, batch_size=8, epochs=1, seed=124).epoch_order(0)[: 116 * 8].reshape(116, 8)
        assert _train_lengths()[order].max(axis=1)[:4].tolist() != WIDTHS_PRINTED

    def test_header_and_shared_prefix(self) -> None:
        tokenizer = gpt2_tokenizer()
        assert tokenizer.encode(ALPACA.response_header) == [198, 198, 21017, 18261, 25, 198]
        assert tokenizer.encode("<|user|>") == [27, 91, 7220, 91, 29]
        assert len(tokenizer.encode(ALPACA.prompt(""))) == 24
        assert len(tokenizer.encode(PHI3.prompt(""))) == 6


class TestBookFile:
    """Over the real file, which is not part of the project."""

    def test_records(self, book_records: list[Record]) -> None:
        assert len(book_records) == 1100
        assert sum(not record.input for record in book_records) == 775
        assert all(record.output for record in book_records)
        assert 1100 - len({record.instruction for record in book_records}) == 146

    @pytest.mark.parametrize(("template", "mean", "prefix"), [(ALPACA, 57.39, 24), (PHI3, 39.91, 6)])
    def test_encoding(self, book_records: list[Record], template, mean: float, prefix: int) -> None:
        encoded = encode(book_records, template, gpt2_tokenizer(), max_length=1024)
        assert round((encoded.lengths + 1).mean(), 2) == mean
        assert not encoded.report.encoded_apart
        first = np.array([encoded[i][:40] for i in range(1100) if len(encoded[i]) >= 40])
        same = (first == first[0]).all(axis=0)
        assert int(np.argmin(same)) == prefix

    def test_the_committed_lengths_are_the_files(self, book_records: list[Record]) -> None:
        encoded = encode(book_records, ALPACA, gpt2_tokenizer(), max_length=1024)
        assert (encoded.lengths + 1).tolist() == LENGTHS["ids"]
        assert encoded.first_target.tolist() == LENGTHS["prompt_ids"]

    def test_overlap(self, book_records: list[Record]) -> None:
        found = audit(book_records, split(1100), ALPACA)
        assert (len(found.test_in_train), len(found.val_in_train)) == (2, 4)
        prompts = [(book_records[row - 1].instruction, book_records[row - 1].input) for row in found.test_in_train]
        assert prompts[0] == prompts[1]  # the same prompt twice, with two references
        assert len({book_records[row - 1].output for row in found.test_in_train}) == 2


class TestCollate:
    def test_printed_vectors(self) -> None:
        rows = [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]]
        batch = padded_batch([np.array([*row, END_OF_TEXT], dtype=np.int32) for row in rows], [1, 1, 1])
        labels = torch.full((15,), IGNORE_INDEX)
        labels[batch.rows] = batch.targets
        e, x = END_OF_TEXT, IGNORE_INDEX
        assert batch.tokens.view(3, 5).tolist() == [[0, 1, 2, 3, 4], [5, 6, e, e, e], [7, 8, 9, e, e]]
        assert labels.view(3, 5).tolist() == [[1, 2, 3, 4, e], [6, e, x, x, x], [8, 9, e, x, x]]

    def test_ignored_target_changes_nothing(self) -> None:
        """The book's demonstration: 1.1269, 0.7936 with a third target, 1.1269 again when it is ignored."""
        logits = torch.tensor([[-1.0, 1.0], [-0.5, 1.5], [-0.5, 1.5]])
        loss = torch.nn.functional.cross_entropy
        assert round(loss(logits[:2], torch.tensor([0, 1])).item(), 4) == 1.1269
        assert round(loss(logits, torch.tensor([0, 1, 1])).item(), 4) == 0.7936
        assert round(loss(logits, torch.tensor([0, 1, IGNORE_INDEX])).item(), 4) == 1.1269

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.lists(st.integers(0, 50255), min_size=1, max_size=9), min_size=1, max_size=6), st.data())
    def test_equals_the_books_collate(self, rows: list[list[int]], data: st.DataObject) -> None:
        ch07 = pytest.importorskip("llms_from_scratch.ch07")
        inputs, targets = ch07.custom_collate_fn(rows)
        starts = [data.draw(st.integers(1, len(row))) for row in rows]
        for row, start in enumerate(starts):
            targets[row, : start - 1] = IGNORE_INDEX  # the book's masking of an instruction of `start` tokens
        batch = padded_batch([np.array([*row, END_OF_TEXT], dtype=np.int32) for row in rows], starts)
        labels = torch.full_like(batch.tokens, IGNORE_INDEX)
        labels[batch.rows] = batch.targets
        assert torch.equal(batch.tokens.view_as(inputs), inputs)
        assert torch.equal(labels.view_as(targets), targets)

    def test_padding_is_told_by_length(self) -> None:
        """The book looks for the first 50256; an id of that value inside a row would shift its mask."""
        row = np.array([1, END_OF_TEXT, 2, END_OF_TEXT], dtype=np.int32)
        longer = np.array([3, 4, 5, 6, 7, END_OF_TEXT], dtype=np.int32)
        batch = padded_batch([row, longer], [1, 1])
        assert batch.targets[batch.pair_examples == 0].tolist() == [END_OF_TEXT, 2, END_OF_TEXT]
        assert batch.tokens_real == 3 + 5


def _orders_of_dataloaders(n: int, n_val: int, epochs: int, batch_size: int) -> tuple[list, list]:
    """The book's loop with torch's own loaders, reading nothing but the indices."""
    train = DataLoader(range(n), batch_size=batch_size, shuffle=True, drop_last=True)
    val = DataLoader(range(n_val), batch_size=batch_size)
    seen, evaluated, step = [], [], -1
    torch.manual_seed(123)
    for _ in range(epochs):
        epoch = []
        for batch in train:
            epoch += batch.tolist()
            step += 1
            if step % 5 == 0:
                evaluated.append([b.tolist() for i, b in enumerate(train) if i < 5])
                list(val)
        seen.append(epoch)
    return seen, evaluated


@pytest.mark.parametrize("n", [24, 50, 61])
def test_order_is_that_of_torchs_loaders(n: int) -> None:
    with torch.random.fork_rng():
        seen, evaluated = _orders_of_dataloaders(n, 17, 3, 8)
    order = BookOrder(n, batch_size=8, epochs=3)
    used = n // 8 * 8
    assert [order.epoch_order(epoch)[:used].tolist() for epoch in range(3)] == seen
    got = [[b.tolist() for b in order.evaluation_batches(5 * i)] for i in range(len(evaluated))]
    assert got == evaluated


def _book_config() -> dict[str, object]:
    return {
        "vocab_size": 50257, "context_length": 128, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0,
        "qkv_bias": True,
    }  # fmt: skip


def _train_as_the_book(model, entries: list[dict], parts) -> tuple[list[float], list[float]]:
    """The book's own functions, as its script calls them."""
    from functools import partial

    from llms_from_scratch.ch05 import train_model_simple
    from llms_from_scratch.ch07 import InstructionDataset, custom_collate_fn

    class Ordinary:
        """tiktoken's encoding as the book uses it."""

        encoding = gpt2_tokenizer().encoding

        def encode(self, text: str, **_: object) -> list[int]:
            return self.encoding.encode_ordinary(text)

        def decode(self, ids: list[int]) -> str:
            return self.encoding.decode(ids)

    collate = partial(custom_collate_fn, device="cpu", allowed_max_length=128)

    def loader(indices, *, train: bool) -> DataLoader:
        data = InstructionDataset([entries[i] for i in indices], Ordinary())
        return DataLoader(data, batch_size=8, collate_fn=collate, shuffle=train, drop_last=train)

    torch.manual_seed(123)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1)
    train_losses, val_losses, _ = train_model_simple(
        model,
        loader(parts.train, train=True),
        loader(parts.val, train=False),
        optimizer,
        torch.device("cpu"),
        num_epochs=2,
        eval_freq=5,
        eval_iter=5,
        start_context="An instruction",
        tokenizer=Ordinary(),
    )
    return train_losses, val_losses


def shared_out(n: int) -> Split:
    """At least six whole batches of 8 to train on, one more than are evaluated, and two to validate with, the second
    of which is not whole."""
    val = max(9, n // 20)
    return Split(*np.split(np.arange(n), [n - val - 4, n - val]))


@pytest.mark.parametrize("n", [64, pytest.param(220, marks=pytest.mark.long)])
def test_recipe_follows_the_books_own_training(tmp_path: Path, n: int) -> None:
    """Same weights, same records: every training and validation loss that the book's loop reports."""
    ch04 = pytest.importorskip("llms_from_scratch.ch04")
    entries = sample_records()[:n]
    torch.manual_seed(0)
    book_model = ch04.GPTModel(_book_config())
    torch.save(book_model.state_dict(), tmp_path / "book.pth")
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_ctx=128, tie_head=False)
    model = load(tmp_path / "book.pth", config=config)

    options = recipe_options("book", model="pico", out=tmp_path / "run", device="cpu")
    records = [Record(**{key: e[key] for key in ("instruction", "input", "output")}) for e in entries]
    parts = shared_out(len(records))
    data = Data((Source("sample", records, [], parts),), ALPACA)
    Trainer(Run(options.out), options, data, Engine(model, options)).run_all()
    mine = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_loss" in line and line["step"]]

    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    per_epoch = len(parts.train) // 8
    assert [line["step"] for line in lines if "sample" in line] == [per_epoch, 2 * per_epoch]

    train_losses, val_losses = _train_as_the_book(book_model, entries, parts)
    assert [line["step"] for line in mine] == [1 + 5 * i for i in range(len(train_losses))]
    np.testing.assert_allclose([line["train_loss"] for line in mine], train_losses, rtol=2e-6)
    np.testing.assert_allclose([line["val_loss"] for line in mine], val_losses, rtol=2e-6)


def test_the_tolerance_rejects_a_token_weighted_mean() -> None:
    """The book's mean of means and the mean over tokens differ by far more than the tolerance above."""
    encoded: EncodedSet = encode(
        [Record(**{k: e[k] for k in ("instruction", "input", "output")}) for e in sample_records()[:40]],
        ALPACA,
        gpt2_tokenizer(),
        learn=ALL,
        max_length=128,
    )
    losses = np.linspace(10.0, 11.0, 5)
    counts = [int(encoded.supervised[i * 8 : i * 8 + 8].sum()) for i in range(5)]
    weighted = float(np.average(losses, weights=counts))
    assert abs(weighted - losses.mean()) / losses.mean() > 2e-5
