"""Twenty steps of adapters beside PEFT on transformers, in an ordinary loop with torch's AdamW."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastft.batches.batch import pack
from fastft.engines.engine import Engine
from fastft.engines.gpu_engine import GpuEngine
from fastft.model.gpt2 import GPT2
from fastft.model.lora import merge
from fastft.model.lora_spec import LoRA
from fastft.model.part import Part
from fastft.run.config import TrainOptions
from tests.model.test_lora import SHAPE, peft_twin
from tests.model.test_model import randomised

RATE, DECAY, CLIP = 1e-2, 0.1, 0.7
LIMIT = {"fp32": 1e-5, "fp64": 1e-10}
KINDS = [
    pytest.param({}, id="plain"),
    pytest.param({"rslora": True}, id="rslora"),
    pytest.param({"dora": True}, id="dora"),
]


def examples(step: int) -> list[tuple[np.ndarray, int]]:
    """Four, of which the first two share a beginning."""
    rng = np.random.default_rng(step)
    shared = rng.integers(0, SHAPE.vocab_size, 10)
    own = [rng.integers(0, SHAPE.vocab_size, n) for n in (4, 9, 15, 8)]
    return [(np.concatenate([shared, own[0]]), 10), (np.concatenate([shared, own[1]]), 11), (own[2], 4), (own[3], 3)]


def ours(engine_class: Any, model: GPT2, dtype: str, steps: int) -> tuple[list[float], list[float], GPT2]:
    """Losses, norms, and the merged model."""
    engine = engine_class(
        model, TrainOptions(device="cpu", dtype=dtype, lr=RATE, weight_decay=DECAY, clip=CLIP, model="pico")
    )
    losses, norms = [], []
    for step in range(steps):
        ids, first = zip(*examples(step), strict=True)
        batch = pack(list(ids), list(first))
        loss, _ = engine.accumulate(batch, batch.count)
        update = engine.update(RATE, loss)()
        losses.append(update.loss)
        norms.append(update.grad_norm)
    return losses, norms, merge(copy.deepcopy(engine.model))


def theirs(peer: Any, steps: int) -> tuple[list[float], list[float], Any]:
    learns = {name: weight for name, weight in peer.named_parameters() if weight.requires_grad}
    matrices = [weight for name, weight in learns.items() if "magnitude" not in name]
    others = [weight for name, weight in learns.items() if "magnitude" in name]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=RATE)
    losses, norms = [], []
    for step in range(steps):
        of_step = examples(step)
        count = sum(len(ids) - first for ids, first in of_step)
        total = 0.0
        for ids, first in of_step:
            tokens = torch.as_tensor(ids)[None]
            logits = peer(tokens).logits[0, first - 1 : -1]
            loss = F.cross_entropy(logits, tokens[0, first:], reduction="sum") / count
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(learns.values(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, peer.merge_and_unload()


# `GpuEngine` in float64 has its rate as a float32 number on the device, 1e-8 from the one that PEFT's loop has.
@pytest.mark.parametrize(
    ("engine_class", "dtype", "steps"), [(Engine, "fp32", 20), (GpuEngine, "fp32", 20), (Engine, "fp64", 1)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_norms_and_merged_weights_are_pefts(
    kind: dict[str, Any], dtype: str, steps: int, engine_class: Any
) -> None:
    lora = LoRA(r=3, alpha=6.0, **kind)
    model = randomised(GPT2(SHAPE)).to(torch.float64 if dtype == "fp64" else torch.float32)
    Part(lora=lora, train_only=None, new_rows=None, base_sha256="").take(model, torch.Generator().manual_seed(5))
    peer = peft_twin(model, lora)
    found, expected = ours(engine_class, model, dtype, steps), theirs(peer, steps)
    for got, wanted in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=LIMIT[dtype])
    assert expected[0][-1] != pytest.approx(expected[0][0], abs=100 * LIMIT[dtype]) or steps == 1
    weights = dict(expected[2].named_parameters())
    for name, weight in found[2].named_parameters():
        peers = weights[f"transformer.{name}"]
        peers = peers.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else peers
        torch.testing.assert_close(weight, peers, rtol=0, atol=LIMIT[dtype], msg=name)


def test_the_limit_rejects_another_scaling() -> None:
    """Of a thousandth: alpha 6.006."""
    model = randomised(GPT2(SHAPE))
    results = []
    for alpha in (6.0, 6.006):
        one = copy.deepcopy(model)
        part = Part(lora=LoRA(r=3, alpha=alpha), train_only=None, new_rows=None, base_sha256="")
        part.take(one, torch.Generator().manual_seed(5))
        results.append(ours(Engine, one, "fp32", 20)[0])
    assert np.abs(np.subtract(*results)).max() > 2 * LIMIT["fp32"]
