"""Adapters and new rows beside PEFT's, which knows nothing of packs, shared prefixes or rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.batches.batch import Batch, pack
from fastft.common.errors import UserError
from fastft.model.gpt2 import GPT2, GPT2Config
from fastft.model.lora import LoRALinear, adapters, attach, merge, settle
from fastft.model.lora_spec import LoRA, layers_named
from fastft.model.new_rows import NewRows
from fastft.model.part import of_base, saved, train_only, trained
from tests.model.test_model import randomised, twin_of

SHAPE = GPT2Config(n_layer=3, n_head=2, n_embd=16, n_ctx=64, vocab_size=61)
KINDS = [
    pytest.param({}, id="plain"),
    pytest.param({"rslora": True}, id="rslora"),
    pytest.param({"dora": True}, id="dora"),
    pytest.param({"dora": True, "rslora": True, "targets": ("mlp.c_proj", "c_attn"), "layers": (0, 2)}, id="some"),
]


def adapted(lora: LoRA, *, dtype: torch.dtype = torch.float64, tie_head: bool = True) -> GPT2:
    config = SHAPE if tie_head else GPT2Config(**{**SHAPE.shape(), "tie_head": False})
    model = randomised(GPT2(config)).to(dtype)
    attach(model, lora)
    return moved(model)


def moved(model: GPT2) -> GPT2:
    """Adapters away from where they begin: with B at zero many mistakes are not seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in trained(model).items():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(weight * (1 + 0.1 * noise) if "magnitude" in name else 0.05 * noise)
    settle(model)
    return model


def peft_twin(model: GPT2, lora: LoRA, **more: object) -> peft.PeftModel:
    """The same model and adapters in PEFT, put there without fastft's files."""
    base = GPT2(model.config)
    base.load_state_dict({name: p.detach() for name, p in model.named_parameters() if "lora_" not in name
                          and "new_rows" not in name}, assign=True)  # fmt: skip
    twin = twin_of(base).to(next(model.parameters()).dtype)
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.targets), use_rslora=lora.rslora, use_dora=lora.dora,
        layers_to_transform=None if lora.layers is None else list(lora.layers), layers_pattern="h" if lora.layers else
        None, fan_in_fan_out=True, lora_dropout=0.0, **more,  # type: ignore[arg-type] # PEFT's own names
    )  # fmt: skip
    wrapped = peft.get_peft_model(twin, config)
    theirs = dict(wrapped.named_parameters())
    for name, module in adapters(model):
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            if getattr(module, part) is not None:
                peer = theirs[peer_name(f"{name}.{part}")]
                peer.data = getattr(module, part).detach().clone()
    return wrapped


def peer_name(name: str) -> str:
    suffix = ".default" if "magnitude" in name else ".default.weight"
    suffix = ".default.weight" if "magnitude" in name else suffix
    return f"base_model.model.transformer.{name}{suffix}"


def some_examples() -> tuple[list[np.ndarray], list[int]]:
    """Four, which share beginnings of ten ids and are asked for what follows them."""
    rng = np.random.default_rng(3)
    shared = rng.integers(0, 61, 10)
    return [np.concatenate([shared, rng.integers(0, 61, n)]) for n in (5, 9, 3, 12)], [10, 11, 10, 12]


def peer_loss(logits: Callable[[Tensor], Tensor], weight: float = 1.0) -> Tensor:
    """The same examples one by one: the sum of their targets' losses."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, first in zip(*some_examples(), strict=True):
        tokens = torch.as_tensor(ids)[None]
        out = logits(tokens)[0, first - 1 : -1]
        total = total + weight * F.cross_entropy(out, tokens[0, first:], reduction="sum")
    return total


def packed() -> Batch:
    return pack(*some_examples())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradients_are_pefts(kind: dict[str, object], impl: str) -> None:
    lora = LoRA(**{"r": 3, "alpha": 7.0, **kind})  # type: ignore[arg-type] # any field
    model = adapted(lora)
    loss, _ = model(packed(), impl=impl)
    loss.backward()
    twin = peft_twin(model, lora)
    theirs = peer_loss(lambda tokens: twin(tokens).logits)
    theirs.backward()
    torch.testing.assert_close(loss.detach(), theirs.detach(), rtol=1e-12, atol=1e-10)
    peers = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    ours = trained(model)
    assert {peer_name(name) for name in ours} == set(peers)
    for name, weight in ours.items():
        peer = peers[peer_name(name)].grad
        assert peer is not None
        assert weight.grad is not None
        assert peer.abs().max() > 1e-6
        torch.testing.assert_close(weight.grad, peer, rtol=0, atol=1e-10 * float(peer.abs().max()))
        assert not torch.allclose(1.001 * weight.grad, peer, rtol=0, atol=1e-10 * float(peer.abs().max()))
    assert all(weight.grad is None for weight in of_base(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_pefts(kind: dict[str, object]) -> None:
    lora = LoRA(**{"r": 3, "alpha": 7.0, **kind})  # type: ignore[arg-type] # any field
    model = adapted(lora)
    before = model(packed())[0]
    twin = peft_twin(model, lora).merge_and_unload()
    merge(model)
    assert not list(adapters(model))
    assert not of_base(model)
    torch.testing.assert_close(model(packed())[0], before, rtol=1e-12, atol=0)
    theirs = dict(twin.named_parameters())
    for name, weight in model.named_parameters():
        peer = theirs[f"transformer.{name}"]
        torch.testing.assert_close(weight, peer.t() if weight.shape != peer.shape or "c_proj.weight" in name
                                   else peer, rtol=0, atol=1e-14)  # fmt: skip


def test_a_row_of_zeros_stays_one_with_dora() -> None:
    """Its length is none to divide by: the merged row was nan, where a step computes with zeros."""
    base = randomised(GPT2(SHAPE)).double()
    with torch.no_grad():
        base.h[1].mlp.c_fc.weight[3] = 0.0
    before = base(packed())[0]
    attach(base, LoRA(r=2, alpha=4.0, dora=True))
    settle(base)
    torch.testing.assert_close(base(packed())[0], before, rtol=1e-12, atol=0)
    merge(base)
    torch.testing.assert_close(base(packed())[0], before, rtol=1e-12, atol=0)


def test_each_adapter_runs_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that reads a layer's weight itself would pass its adapter by, and nothing else would tell."""
    model = adapted(LoRA(r=2, alpha=4.0))
    ran: dict[str, int] = {}
    names = {id(module): name for name, module in adapters(model)}
    product = LoRALinear.product

    def counted(self: LoRALinear, x: Tensor, outputs: slice = slice(None), *, with_bias: bool = True) -> Tensor:
        share = len(range(*outputs.indices(self.weight.shape[0]))) / self.weight.shape[0]
        ran[names[id(self)]] = ran.get(names[id(self)], 0) + round(3 * share)
        return product(self, x, outputs, with_bias=with_bias)

    monkeypatch.setattr(LoRALinear, "product", counted)
    model(packed())
    assert ran == dict.fromkeys(names.values(), 3)  # thirds of a layer's outputs: the last block asks q by itself


def test_frozen_weights_cost_no_product() -> None:
    """Only adapters of the last block: nothing is computed backwards below it, and no frozen matrix gets a gradient."""
    model = adapted(LoRA(r=2, alpha=4.0, layers=(2,)))
    loss, _ = model(packed())
    with torch.profiler.profile(record_shapes=True) as profile:
        loss.backward()
    C = SHAPE.n_embd
    made = [[*event.input_shapes[0][:1], *event.input_shapes[1][1:]] for event in profile.events()
            if event.name == "aten::mm" and len(event.input_shapes[1]) == 2]  # fmt: skip
    assert made
    full = ([C, C], [3 * C, C], [4 * C, C], [C, 4 * C], [2 * C, C], [SHAPE.vocab_size, C])
    assert not [shape for shape in made if shape in full]
    assert model.h[0].ln_1.weight.grad is None


@pytest.mark.parametrize("tie_head", [True, False])
@pytest.mark.parametrize("copies", [False, True])
def test_new_rows_get_the_gradient_of_whole_tables(tie_head: bool, copies: bool) -> None:
    """Against autograd through whole tables (the reference), with new rows looked up, asked for, and neither."""
    results = []
    for impl in ("cpu", "reference"):
        model = adapted(LoRA(r=2, alpha=4.0), tie_head=tie_head)
        head = None if model.lm_head is None else model.lm_head.weight
        model.new_rows = NewRows(50, 7, model.wte.weight, head)
        with torch.no_grad():
            for row in model.new_rows.parameters():
                row.add_(0.3)
        model.copies_tables = copies
        batch = packed()
        assert ((batch.tokens >= 50) & (batch.tokens < 57)).any()
        assert ((batch.targets >= 50) & (batch.targets < 57)).any()
        loss, _ = model(batch, row_weights=batch.weights * 0.7, impl=impl)
        (2 * loss).backward()
        results.append((loss.detach(), {name: weight.grad for name, weight in trained(model).items()}))
    (ours, gradients), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert gradients.keys() == expected.keys()
    assert any(name.startswith("new_rows.") for name in gradients)
    for name, gradient in gradients.items():
        assert gradient is not None
        assert expected[name] is not None
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_adapters_of_bf16_weights_learn_in_float32() -> None:
    """The base in bf16, A and B in float32: products in bf16, gradients in A's and B's own dtype."""
    model = adapted(LoRA(r=4, alpha=8.0, dora=True), dtype=torch.float32)
    wanted = model(packed())[0].item()
    for name, weight in of_base(model).items():
        if ".ln_" not in f".{name}" and not name.startswith("wpe."):
            weight.data = weight.data.bfloat16()
    settle(model)
    loss, _ = model(packed())
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=5e-3)
    assert loss.item() != wanted
    assert {weight.grad.dtype for weight in trained(model).values() if weight.grad is not None} == {torch.float32}
    assert all(weight.grad is not None for weight in trained(model).values())


def test_names_that_are_none_are_refused() -> None:
    model = GPT2(SHAPE)
    with pytest.raises(UserError, match="expected some of c_attn"):
        LoRA(r=2, alpha=4.0, targets=("q_proj",))
    with pytest.raises(UserError, match="expected 0 to 2"):
        attach(model, LoRA(r=2, alpha=4.0, layers=(3,)))
    assert not of_base(model)  # an error leaves the model as it was
    for named, reason in (("h.2-4", "h.3"), ("ln_g", "ln_f"), ("lm_head", "tied"), ("h.2-1", "lower to the higher"),
                          ("h.0-999999999999", "beginnings")):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            train_only(model, named)
    for named in ("20-", "3-1", "a", "", "0-999999999999"):  # the last one would fill the memory
        with pytest.raises(UserError, match="lora_layers"):
            layers_named(named)
    assert layers_named("0,2-4") == (0, 2, 3, 4)
    assert layers_named("all") is None


def test_train_only_leaves_the_rest() -> None:
    model = randomised(GPT2(SHAPE))
    train_only(model, "h.1-2.mlp,ln_f")
    assert set(trained(model)) == set(saved(model)) == {
        *(f"h.{layer}.mlp.{layer_name}.{part}" for layer in (1, 2) for layer_name in ("c_fc", "c_proj")
          for part in ("weight", "bias")), "ln_f.weight", "ln_f.bias",
    }  # fmt: skip
    model(packed())[0].backward()
    assert all(weight.grad is not None for weight in trained(model).values())
    assert all(weight.grad is None for weight in of_base(model).values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_get_their_gradients(reentrant: bool) -> None:
    """Behind frozen embeddings a reentrant checkpoint would give none, without a word."""
    gradients = []
    for recomputes in (False, True):
        model = adapted(LoRA(r=2, alpha=4.0))
        model.checkpoint_activations, model.reentrant_checkpoints = recomputes, reentrant
        model(packed())[0].backward()
        gradients.append({name: weight.grad for name, weight in trained(model).items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.equal(gradient, gradients[1][name])
