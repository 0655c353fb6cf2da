"""The whole training step through the Triton kernels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastft_kernels import tables
from proofs import largest_error

from fastft.batches.batch import Batch, Batcher, few_sizes, pack
from fastft.common.errors import UserError
from fastft.data.encode import EncodedSet, encode
from fastft.data.prompts import ALPACA
from fastft.data.reading import load_records
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.engines.engine import Engine
from fastft.model import ops
from fastft.model.gpt2 import GPT2, SIZES
from fastft.model.lora_spec import LoRA
from fastft.model.part import Part, trained
from fastft.run.config import TrainOptions

VOCABULARY = {"BM": 64, "BN": 4096, "BK": 256, "G": 8, "num_warps": 8, "num_stages": 3}


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time is the number of tiles, so the real vocabulary takes few of them."""
    for name in ("lse_tiles", "logit_gradient"):
        monkeypatch.setitem(tables.TABLE, name, {"default": {None: VOCABULARY}})


@pytest.fixture(scope="module")
def encoded() -> EncodedSet:
    records = sorted(load_records("sample").good, key=lambda record: len(record.instruction))[:64]
    return encode(records, ALPACA, gpt2_tokenizer(), max_length=256, too_long="drop")


def batches(encoded: EncodedSet, impl: str, size: int, steps: int) -> Iterator[Batch]:
    batcher = Batcher(rounding=few_sizes, planner=ops.planner(impl, round_sizes=True))
    for step in range(steps):
        yield batcher(encoded, np.arange(step * size, (step + 1) * size) % len(encoded))


def losses(
    model: GPT2, encoded: EncodedSet, impl: str, *, dtype: str = "fp32", steps: int, size: int = 2
) -> list[float]:
    engine = Engine(copy.deepcopy(model), TrainOptions(device="cpu", dtype=dtype, impl=impl, lr=5e-5))
    found = []
    for batch in batches(encoded, impl, size, steps):
        loss, _ = engine.accumulate(batch, batch.count)
        engine.update(5e-5, loss)
        found.append(loss.item())
    return found


def small(layers: int = 2) -> GPT2:
    torch.manual_seed(0)
    return GPT2(replace(SIZES["pico"], n_layer=layers, n_embd=64, n_head=2))


def gradients(model: GPT2, batch: Batch, impl: str) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss, row_losses = model(batch, impl=impl)
    loss.backward()
    return {"loss": loss.detach(), "losses": row_losses} | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def test_loss_and_every_gradient_are_the_references(encoded: EncodedSet) -> None:
    model = small()
    for tied in (True, False):
        if not tied:
            model = GPT2(replace(model.config, tie_head=False))
        batch = next(batches(encoded, "triton", 2, 1))
        expected = gradients(model, batch, "reference")
        assert largest_error(gradients(model, batch, "triton"), expected) < 2e-5


def with_adapters(model: GPT2, *, dora: bool = False) -> GPT2:
    """Adapters that have left their beginning, and two trained rows of the embedding that the examples use."""
    part = Part(lora=LoRA(r=4, alpha=8.0, dora=dora), train_only=None, new_rows=(198, 2), base_sha256="")
    part.take(model)
    with torch.no_grad():
        for name, weight in trained(model).items():
            weight.add_(0.02 * torch.randn(weight.shape) if "magnitude" not in name else 0.1)
    return model


@pytest.mark.parametrize("dora", [pytest.param(False, marks=pytest.mark.long), True])
def test_adapters_and_new_rows_get_the_references_gradients(encoded: EncodedSet, dora: bool) -> None:
    """The fused operations read a layer's bias and product apart: an adapter that one passes by has no gradient."""
    model = with_adapters(small(), dora=dora)
    batch = next(batches(encoded, "triton", 2, 1))
    expected = gradients(model, batch, "reference")
    assert expected.keys() == {"loss", "losses", *trained(model)}
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    found = gradients(model, batch, "triton")
    assert found.keys() == expected.keys()
    assert largest_error(found, expected) < 2e-5
    without = dict(expected) | {"h.1.mlp.c_fc.lora_B": torch.zeros_like(expected["h.1.mlp.c_fc.lora_B"])}
    assert largest_error(without, expected) > 1e-3
    if dora:
        return
    compiled = torch.compile(model, fullgraph=True)
    model.zero_grad(set_to_none=True)
    loss, _ = compiled(batch, impl="triton")
    loss.backward()
    whole = {name: weight.grad for name, weight in trained(model).items() if weight.grad is not None}
    assert largest_error(whole, {name: expected[name] for name in trained(model)}) < 2e-5


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_autocast_reaches_the_kernels(encoded: EncodedSet, dtype: torch.dtype, limit: float) -> None:
    """As on a GPU: float32 weights and stream, narrow products."""
    model = small(1)
    batch = next(batches(encoded, "triton", 2, 1))
    with torch.autocast("cpu", dtype=dtype):
        expected, found = gradients(model, batch, "reference"), gradients(model, batch, "triton")
    assert limit / 100 < largest_error(found, expected) < limit
    assert all(x.dtype == torch.float32 for x in found.values())


def test_a_batch_without_a_plan_is_planned_on_the_way(encoded: EncodedSet) -> None:
    model = small(1)
    ids = [encoded[index] for index in range(3)]
    batch = pack(ids, encoded.first_target[:3].tolist())
    expected = gradients(model, batch, "reference")
    assert largest_error(gradients(model, replace(batch, tiles=None, row_tiles=None), "triton"), expected) < 2e-5


def test_activations_can_be_computed_again(encoded: EncodedSet) -> None:
    model = small(1)
    batch = next(batches(encoded, "triton", 2, 1))
    expected = gradients(model, batch, "triton")
    model.checkpoint_activations = True
    found = gradients(model, batch, "triton")
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_a_few_steps_follow_the_reference(encoded: EncodedSet) -> None:
    model = small(1)
    reference = losses(model, encoded, "reference", steps=2)
    assert np.abs(np.subtract(losses(model, encoded, "triton", steps=2), reference)).max() < 1e-4
    narrow = losses(model, encoded, "triton", dtype="bf16", steps=2)
    assert 1e-5 < np.abs(np.subtract(narrow, reference)).max() < 3e-2


@pytest.mark.long
def test_ten_steps_of_nano_follow_the_reference(encoded: EncodedSet) -> None:
    torch.manual_seed(0)
    model = GPT2(SIZES["nano"])
    reference = losses(model, encoded, "reference", steps=10, size=4)
    assert np.abs(np.subtract(losses(model, encoded, "triton", steps=10, size=4), reference)).max() < 1e-4
    assert max(reference) - min(reference) > 1e-2  # it does train


def test_the_whole_step_is_one_graph(encoded: EncodedSet) -> None:
    model = small(1)
    batch = next(batches(encoded, "triton", 2, 1))
    expected = gradients(model, batch, "triton")
    compiled = torch.compile(model, fullgraph=True)
    model.zero_grad(set_to_none=True)
    loss, _ = compiled(batch, impl="triton")
    loss.backward()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert largest_error(found, expected) < 2e-5


def test_triton_is_chosen_where_it_is_asked_for() -> None:
    assert ops.resolve("triton", torch.device("cpu")) == "triton"
    assert ops.resolve("auto", torch.device("cpu")) == "cpu"
    with pytest.raises(UserError, match="expected one of"):
        ops.resolve("cuda", torch.device("cpu"))


@pytest.mark.long
def test_the_compiled_engine_compiles_once_for_all_further_sizes(encoded: EncodedSet) -> None:
    model = small(1)
    batcher = Batcher(rounding=few_sizes, planner=ops.planner("triton", round_sizes=True))
    made = [batcher(encoded, np.arange(begin, begin + size)) for begin, size in ((0, 2), (2, 3), (5, 1), (6, 4))]
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        engine = Engine(copy.deepcopy(model), TrainOptions(device="cpu", dtype="fp32", impl="triton", compile=compiled))
        losses_of = []
        for batch in made:
            loss, _ = engine.accumulate(batch, batch.count)
            engine.update(5e-5, loss)
            losses_of.append(loss.item())
        found.append([*losses_of, engine.evaluate(made[0]).item()])
    assert np.abs(np.subtract(*found)).max() < 1e-3
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] <= 3, frames  # one size, all further sizes, and evaluation
