"""Batches, and the model on them: what a token sees, which rows count, what each example's loss is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.batches.batch import Batch, from_padded, padded_batch
from fastft.model.gpt2 import GPT2, GPT2Config


def tiny_model(*, n_ctx: int = 32, vocab_size: int = 50257) -> GPT2:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_ctx=n_ctx, vocab_size=vocab_size)
    model = GPT2(config).double()
    for parameter in model.parameters():  # biases and layer norms away from 0 and 1, so that a lost one is seen
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch_of(rows: list[list[int]], starts: list[int] | None = None) -> Batch:
    return padded_batch([np.array(row, dtype=np.int32) for row in rows], starts or [1] * len(rows))


examples = st.lists(st.lists(st.integers(0, 99), min_size=2, max_size=12), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(examples)
def test_fields(rows: list[list[int]]) -> None:
    batch = batch_of(rows)
    B, W = len(rows), max(len(row) - 1 for row in rows)
    assert batch.tokens.shape == batch.positions.shape == batch.visible_until.shape == (B * W,)
    assert batch.positions.view(B, W).tolist() == [list(range(W))] * B
    assert batch.visible_until.view(B, W).tolist() == [[(b + 1) * W] * W for b in range(B)]
    assert batch.count == sum(len(row) - 1 for row in rows) == batch.tokens_real
    assert torch.equal(batch.weights, torch.bincount(batch.pair_rows, minlength=len(batch.rows)).float())
    assert batch.weights.dtype == torch.float32
    assert batch.visible_until.dtype == torch.int32
    assert batch.example_losses(torch.ones(batch.count)).tolist() == [len(row) - 1 for row in rows]


@settings(max_examples=20, deadline=None)
@given(examples, st.sampled_from(["auto", "reference"]))
def test_an_examples_losses_do_not_depend_on_its_batch(rows: list[list[int]], impl: str) -> None:
    model = tiny_model(vocab_size=100)
    batch = batch_of(rows)
    batch = Batch(
        **{name: getattr(batch, name) for name in Batch.__dataclass_fields__} | {"tokens": batch.tokens % 100}
    )
    together = batch.example_losses(model(batch, impl=impl)[1])
    for index, row in enumerate(rows):
        alone, _ = model(batch_of([row]), impl=impl)
        assert (together[index] - alone).abs() <= 1e-10 * alone.abs()


def test_implementations_agree_and_the_tolerance_can_fail() -> None:
    """Loss and gradients of the saving path equal the reference's; those of a mask that leaks do not."""
    model = tiny_model()
    batch = batch_of([[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]], [3, 1, 2])

    def gradients(batch: Batch, impl: str) -> list[torch.Tensor]:
        model.zero_grad()
        loss, losses = model(batch, impl=impl)
        loss.backward()
        return [loss.detach(), losses, *(p.grad.clone() for p in model.parameters())]

    def error(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(a, b, strict=True))

    expected = gradients(batch, "reference")
    assert error(gradients(batch, "auto"), expected) < 1e-12
    by_mask = replace(batch, row_length=None)
    for impl in ("auto", "reference"):  # the same batch by its visible_until alone
        assert error(gradients(by_mask, impl), expected) < 1e-12
    leaking = replace(by_mask, visible_until=torch.full_like(batch.visible_until, len(batch.tokens)))
    assert error(gradients(leaking, "auto"), expected) > 1e-4


def test_no_example_sees_another() -> None:
    model = tiny_model()
    a, b = [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]
    before = model.logits(batch_of([a, b]))[:5]
    after = model.logits(batch_of([a, [50, 51, 52, 53, 54, 55]]))[:5]
    assert torch.equal(before, after)


def test_no_supervised_row_gives_a_connected_zero() -> None:
    model = tiny_model()
    batch = from_padded(torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), -100))
    loss, losses = model(batch)
    assert losses.shape == (0,)
    assert loss.item() == 0
    loss.backward()
    assert model.wte.weight.grad is not None
    assert not model.wte.weight.grad.any()


def test_activation_checkpointing_changes_no_gradient() -> None:
    model = tiny_model()
    batch = batch_of([[5, 6, 7, 8, 9, 10], [11, 12, 13]])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(batch)[0].backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    model.checkpoint_activations = True
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"got inputs \(2, 3\) and labels \(2, 4\), expected the same shape"):
        from_padded(torch.zeros(2, 3), torch.zeros(2, 4))
