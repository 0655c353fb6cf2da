"""bf16 copies: they follow their weights, and their gradients are what they should be."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from fastft.batches.batch import Batch, pack
from fastft.engines.optim import CpuAdamW, adamw
from fastft.model.gpt2 import GPT2, GPT2Config
from fastft.model.precision import BF16Copies, total_norm


def make_model(*, tie_head: bool = True) -> GPT2:
    torch.manual_seed(0)
    return GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=64, vocab_size=500, tie_head=tie_head))


def make_batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    return pack([rng.integers(0, 500, 20).astype(np.int32) for _ in range(3)], [5, 9, 2])


def backward(copies: BF16Copies, batch: Batch) -> dict[str, Tensor]:
    copies.sum_up()
    loss, _ = copies(batch, row_weights=batch.weights / 100)
    loss.backward()
    return {name: gradient.clone() for name, gradient in copies.gradients().items()}


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize("tie_head", [True, False])
def test_gradients_are_float32s_to_bf16(tie_head: bool) -> None:
    model = make_model(tie_head=tie_head)
    batch = make_batch(0)
    loss, _ = model(batch, row_weights=batch.weights / 100, impl="reference")
    loss.backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    got = backward(BF16Copies(model), batch)
    assert {name: g.dtype for name, g in got.items()} == {
        name: torch.float32 if ".ln_" in f".{name}" or name.startswith("wpe.") else torch.bfloat16
        for name, _ in model.named_parameters()
    }
    close = torch.cat([got[name].float().flatten() for name, _ in model.named_parameters()])
    assert (close - exact).norm() / exact.norm() < 0.01  # bf16 keeps 8 bits: 0.004 a rounding
    assert not torch.equal(close, exact)


def test_a_steps_batches_are_summed_in_float32() -> None:
    model = make_model()
    batches = [make_batch(seed) for seed in range(3)]
    copies = BF16Copies(model)
    alone = []
    for batch in batches:
        alone.append(backward(copies, batch))
        copies.clear_gradients()
    for batch in batches:
        together = backward(copies, batch)
    for name, total in together.items():
        assert total.dtype == torch.float32
        assert torch.equal(total, sum(part[name].float() for part in alone)), name


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_an_update_is_adamws_and_refreshes_the_copies(scale: float) -> None:
    model = make_model()
    twin = copy.deepcopy(model)
    copies = BF16Copies(model)
    mixed = adamw(model, lr=1e-2, weight_decay=0.1, decay_all=False, copies=copies)
    plain = adamw(twin, lr=1e-2, weight_decay=0.1, decay_all=False)
    assert isinstance(mixed, CpuAdamW)
    mixed.scale = scale
    for seed in range(3):
        gradients = backward(copies, make_batch(seed))
        mixed.step()
        copies.clear_gradients()
        for name, parameter in twin.named_parameters():
            parameter.grad = gradients[name].float() * scale
        plain.step()
    for (name, got), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(got, expected), name
        assert torch.equal(mixed.state[got]["exp_avg_sq"], plain.state[expected]["exp_avg_sq"]), name
        assert mixed.state[got]["step"] == 3
    batch = make_batch(4)
    assert torch.equal(copies(batch)[0], BF16Copies(model)(batch)[0])


def test_weights_larger_than_a_block_are_updated_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for block in (1 << 20, 7):
        monkeypatch.setattr("fastft.engines.optim._BLOCK", block)
        model = make_model()
        copies = BF16Copies(model)
        optimizer = adamw(model, lr=1e-2, weight_decay=0.1, decay_all=False, copies=copies)
        backward(copies, make_batch(0))
        optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert error(results[1], results[0]) < 1e-7  # vector and scalar code round apart


def test_the_copies_follow_weights_that_somebody_else_wrote() -> None:
    model, batch = make_model(), make_batch(0)
    copies = BF16Copies(model)
    before = copies(batch)[0]
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight.mul_(3)
    after = copies(batch)[0]
    assert not torch.equal(before, after)
    assert torch.equal(after, BF16Copies(model)(batch)[0])


def test_total_norm_is_exact_where_one_sum_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3_000_001, generator=generator), torch.randn(7, generator=generator)]
    exact = torch.cat(gradients).double().norm().item()
    assert total_norm(gradients).item() == pytest.approx(exact, rel=1e-6)
    assert total_norm([g.bfloat16() for g in gradients]).item() == pytest.approx(exact, rel=2**-9)
    assert total_norm([g.double() for g in gradients]).item() == pytest.approx(exact, rel=1e-12)
    assert total_norm([]).item() == 0
