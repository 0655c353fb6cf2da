"""Examples of any number of supervised spans: packed and shared they are what padded rows with a mask are, exactly."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastft.batches.batch import Batch, Batcher, few_sizes
from fastft.batches.plan import make_plan
from fastft.common.errors import UserError
from fastft.data.encode import EncodedSet, EncodingRules, Text, encoded_set
from fastft.data.prompts import ALPACA, END, PLAIN, RESPONSES, VICUNA, Template
from fastft.data.records import Record, Turn
from fastft.data.token_cache import _open_arrays, _write_arrays, encode_chunks
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.model.gpt2 import GPT2, GPT2Config

FLOAT64 = 1e-10
VOCAB = 257
TOKENIZER = gpt2_tokenizer()
RULES = EncodingRules(RESPONSES, max_length=200)

torch.manual_seed(0)
MODEL = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_ctx=256, vocab_size=VOCAB)).double()
for _parameter in MODEL.parameters():
    torch.nn.init.normal_(_parameter, mean=0.1, std=0.2)

PARTS = st.lists(st.sampled_from(["Hello", " you", "\n\n", " 1", "Ünï", " you you", "?"]), min_size=1, max_size=3)


@st.composite
def conversations(draw: st.DrawFn) -> list[Text]:
    """Texts of several turns, of few words and with common beginnings, each with some turn that is learned: bare parts,
    or what a template writes around them."""
    beginnings = draw(st.lists(PARTS, min_size=1, max_size=2))
    template = draw(st.sampled_from([None, ALPACA, VICUNA, PLAIN]))
    texts = []
    for row in range(1, draw(st.integers(1, 5)) + 1):
        turns = ["".join(turn) for turn in (draw(st.sampled_from(beginnings)), *draw(st.lists(PARTS, max_size=5)))]
        if template is not None:
            texts.append(draw(written(template, row, turns)))
            continue
        before = ["Hello you"] * draw(st.integers(0, 1))  # then the first thing that is learned has one before it
        spoken = [*before, *turns] if len(turns) > 1 else [*before, *turns, " you"]
        parts = tuple((turn, bool(k % 2) != bool(before)) for k, turn in enumerate(spoken))
        texts.append(Text(row, (*parts, (END, parts[-1][1]))))
    return texts


@st.composite
def written(draw: st.DrawFn, template: Template, row: int, texts: list[str]) -> Text:
    """A conversation of these texts, any turns of which are learned, the last answer always."""
    asked = texts if len(texts) % 2 else texts[:-1]  # the last one is a question
    turns = [Turn("assistant" if k % 2 else "user", text, draw(st.booleans())) for k, text in enumerate(asked)]
    answer = Turn("assistant", draw(PARTS.map("".join)), True)
    record = Record(instruction=texts[0], output=answer.text, turns=(*turns, answer), row=row)
    return Text(row, template.parts(record), template.as_transformers)


def renumbered(encoded: EncodedSet) -> EncodedSet:
    """The same with its different ids counted from 0, for a model of few: what a batch is has nothing to do with the
    size of the vocabulary, which is most of what GPT-2's would compute."""
    different, ids = np.unique(encoded.ids, return_inverse=True)
    assert len(different) <= VOCAB
    return replace(encoded, ids=ids.astype(np.int32))


def labels_of(encoded: EncodedSet, index: int) -> Tensor:
    """`[n - 1]`: what each input is asked for, -100 where nothing is."""
    ids = encoded[index]
    labels = np.full(len(ids), -100, dtype=np.int64)
    for begin, end in encoded.spans_of(index):
        labels[begin:end] = ids[begin:end]
    return torch.from_numpy(labels[1:])


def by_torch(encoded: EncodedSet) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients, and the loss of each example, from the model's logits of one example at a time."""
    MODEL.zero_grad()
    losses = []
    for index in range(len(encoded)):
        one = Batcher(packed=False)(encoded, np.array([index]))
        logits = MODEL.logits(one)
        losses.append(F.cross_entropy(logits, labels_of(encoded, index), ignore_index=-100, reduction="sum"))
    loss = torch.stack(losses).sum() / int(encoded.supervised.sum())
    loss.backward()
    return [loss.detach(), *gradients()], [one.detach() for one in losses]


def gradients() -> list[Tensor]:
    return [p.grad.clone() for p in MODEL.parameters() if p.grad is not None]


def by_batch(batch: Batch, impl: str) -> tuple[list[Tensor], Tensor]:
    MODEL.zero_grad()
    loss, rows = MODEL(batch, row_weights=batch.weights.double() / batch.count, impl=impl)
    loss.backward()
    return [loss.detach(), *gradients()], batch.example_losses(rows.detach())


def error(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in zip(got, expected, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(
    conversations(), st.sampled_from(["packed", "apart", "rounded", "padded"]), st.sampled_from(["cpu", "reference"])
)
def test_every_batch_is_the_masked_rows(texts: list[Text], kind: str, impl: str) -> None:
    encoded = renumbered(encoded_set(texts, TOKENIZER, RULES))
    batcher = Batcher(
        packed=kind != "padded", share_prefix=kind != "apart", rounding=few_sizes if kind == "rounded" else None
    )
    batch = batcher(encoded, np.arange(len(encoded)))
    assert (
        batch.count
        == encoded.supervised.sum()
        == sum(int((labels_of(encoded, i) >= 0).sum()) for i in range(len(encoded)))
    )
    expected, each = by_torch(encoded)
    got, examples = by_batch(batch, impl)
    assert error(got, expected) < FLOAT64
    assert error([examples], [torch.stack(each)]) < FLOAT64


def test_a_span_that_is_missed_would_be_seen() -> None:
    text = Text(1, (("Hello", False), (" you", True), ("?", False), (" you you", True), (END, True)))
    encoded = renumbered(encoded_set([text], TOKENIZER, RULES))
    last_alone = EncodedSet.of_suffixes(encoded.ids, encoded.offsets, encoded.spans[-1:, 0], encoded.rows)
    got, _ = by_batch(Batcher()(last_alone, np.array([0])), "cpu")
    expected, _ = by_torch(encoded)
    assert error(got, expected) > 1e-3


def test_what_each_part_becomes() -> None:
    text = Text(7, (("Hello", False), (" you", True), ("?", False), (" you you", True), (END, True)))
    encoded = encoded_set([text], TOKENIZER, RULES)
    hello, you, mark = (TOKENIZER.encode(part) for part in ("Hello", " you", "?"))
    assert encoded[0].tolist() == [*hello, *you, *mark, *you, *you, TOKENIZER.end_of_text]
    assert encoded.spans.tolist() == [[1, 2], [3, 6]]
    assert encoded.supervised.tolist() == [4]
    assert not encoded.are_suffixes
    with pytest.raises(ValueError, match="several supervised spans"):
        _ = encoded.first_target


def test_nothing_is_kept_behind_the_last_thing_that_is_learned() -> None:
    encoded = encoded_set([Text(1, (("Hello you", True), ("?", False)))], TOKENIZER, RULES)
    assert encoded[0].tolist() == TOKENIZER.encode("Hello you")
    assert encoded.spans.tolist() == [[1, 2]]


def test_the_first_token_is_never_asked_for() -> None:
    with pytest.raises(UserError, match=r"1 examples have no supervised token.* row 3"):
        encoded_set([Text(3, (("Hello", True), ("Hello", False)))], TOKENIZER, RULES)


def test_cut_to_length_a_span_is_cut_and_one_behind_is_gone() -> None:
    text = Text(1, (("Hello", False), (" you you", True), ("?", False), (" you", True), (END, True)))
    rules = EncodingRules(RESPONSES, max_length=1, too_long="truncate")
    encoded = encoded_set([text], TOKENIZER, rules)
    assert encoded.spans.tolist() == [[1, 2]]
    assert encoded.report.truncated == [1]


@settings(max_examples=20, deadline=None)
@given(texts=conversations())
def test_the_cache_has_the_same_in_any_order(tmp_path_factory: pytest.TempPathFactory, texts: list[Text]) -> None:
    order = np.random.default_rng(0).permutation(len(texts))
    expected = encoded_set([texts[i] for i in order], TOKENIZER, RULES)
    folder: Path = tmp_path_factory.mktemp("cache")
    facts = _write_arrays(folder, encode_chunks([texts], TOKENIZER, RULES, workers=1), order, RULES.max_length, "test")
    got = _open_arrays(folder, facts)
    for name in ("ids", "offsets", "spans", "span_offsets", "rows"):
        assert np.array_equal(getattr(got, name), getattr(expected, name)), name
    assert got.fingerprint() == expected.fingerprint()
    assert got.common_prefix() == expected.common_prefix()


def test_a_set_of_suffixes_keeps_the_fingerprint_that_runs_have_noted() -> None:
    encoded = encoded_set([Text.of_pair(1, "Hello", " you"), Text.of_pair(2, "Hello?", " you")], TOKENIZER, RULES)
    digest = hashlib.sha256()
    for part in (encoded.ids, encoded.offsets, np.array([1, 2], dtype=np.int64)):
        digest.update(part.tobytes())
    assert encoded.fingerprint() == digest.hexdigest()


def test_the_fingerprint_tells_spans_apart() -> None:
    def of(*learned: bool) -> str:
        parts = tuple(zip(("Hello", " you", "?", " you"), learned, strict=True))
        return encoded_set([Text(1, (*parts, (END, True)))], TOKENIZER, RULES).fingerprint()

    assert len({of(False, True, False, True), of(False, False, False, True), of(False, True, True, True)}) == 3


def test_a_plan_counts_every_span() -> None:
    encoded = encoded_set(
        [Text(1, (("Hello", False), (" you", True), ("?", False), (" you", True), (END, True)))], TOKENIZER, RULES
    )
    assert make_plan(encoded, batch_size=1).step(0).count == 3
