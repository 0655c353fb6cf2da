"""A model's step on a CPU with compiled passes between its products: in each arithmetic no less exact than torch's."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from compiled import needs_compiled
from torch import Tensor

from fastft.batches.batch import pack
from fastft.model import ops
from fastft.model.gpt2 import GPT2, GPT2Config
from fastft.model.precision import BF16Copies

pytestmark = needs_compiled


def gradients(arithmetic: str, monkeypatch: pytest.MonkeyPatch, few: float, seen: list[str]) -> Tensor:
    """Of all weights, end to end; `seen` are the passes that ran."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=48, n_ctx=64, vocab_size=501))
    rng = np.random.default_rng(0)
    batch = pack([rng.integers(0, 501, 20).astype(np.int32) for _ in range(3)], [5, 9, 2])
    monkeypatch.setattr(ops, "FEW", few)
    for name in ("layer_norm", "gelu"):
        fused = getattr(ops.fastft_kernels, name)
        monkeypatch.setattr(
            ops.fastft_kernels, name, lambda *a, _name=name, _fused=fused, **k: (seen.append(_name), _fused(*a, **k))[1]
        )
    if arithmetic == "copies":
        copies = BF16Copies(model)
        copies(batch, row_weights=batch.weights / 100)[0].backward()
        return torch.cat([copies.gradients()[name].float().flatten() for name, _ in model.named_parameters()])
    model = model.double() if arithmetic == "float64" else model
    autocast = torch.autocast("cpu", torch.bfloat16) if arithmetic == "autocast" else contextlib.nullcontext()
    with autocast:
        loss, _ = model(batch, row_weights=batch.weights / 100, impl="cpu")
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("arithmetic", "limit"), [("float32", 2e-6), ("copies", 0.01), ("autocast", 0.01)])
def test_gradients_are_those_of_float64(arithmetic: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for few, passes in ((0, {"layer_norm", "gelu"}), (1e9, set())):
        seen: list[str] = []
        with monkeypatch.context() as patch:
            found[few] = gradients(arithmetic, patch, few, seen).double()
        assert set(seen) == passes
    with monkeypatch.context() as patch:
        exact = gradients("float64", patch, 0, seen := [])
    assert not seen  # there is no code for float64
    compiled, torchs = ((found[few] - exact).norm() / exact.norm() for few in (0, 1e9))
    assert compiled < limit
    assert compiled < 1.25 * torchs
    assert not torch.equal(found[0], found[1e9])
