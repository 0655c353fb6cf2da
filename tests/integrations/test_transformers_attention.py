"""The attention implementation `fastft` against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionMaskInterface, DataCollatorWithFlattening

from fastft.common.errors import UserError
from fastft.integrations.transformers import attention, counted, register

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
MODELS = ("gpt2", "llama", "qwen3", "mistral")
Results = dict[str, Tensor]
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def examples(n: int = 3, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in (7, 12, 5, 9, 1)[:n]]


def padded(side: str) -> dict[str, Tensor]:
    rows = examples()
    width = max(map(len, rows))
    batch = {"input_ids": torch.zeros(len(rows), width, dtype=torch.long)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for row, ids in enumerate(rows):
        at = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        batch["input_ids"][row, at] = torch.tensor(ids)
        batch["attention_mask"][row, at] = 1
    if side == "hole":
        batch["attention_mask"][1, 4:6] = 0
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**batch, "position_ids": positions} if side != "right" else batch


def flattened(*, flash: bool) -> dict[str, Any]:
    collator = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=flash)
    batch = dict(collator([{"input_ids": ids} for ids in examples()]))
    return {name: value for name, value in batch.items() if name != "labels"}


BATCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "whole rows": lambda: {"input_ids": torch.tensor([examples(4)[3]] * 2)},
    "padded right": lambda: padded("right"),
    "padded left": lambda: padded("left"),
    "a hole": lambda: padded("hole"),
    "flattened": lambda: flattened(flash=False),
}


def results(model: Any, batch: dict[str, Any], implementation: str) -> Results:
    """Logits of real tokens, the loss of the next tokens, and every gradient."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(**batch, use_cache=False).logits
    ids, real = batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    labels = ids.masked_fill(~real, -100)[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"logits": logits[real].detach(), "loss": loss.detach(), **gradients}


def error(found: Results, expected: Results) -> float:
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_plain_model(make_model: Make, name: str, dtype: torch.dtype) -> None:
    model = make_model(name, dtype)
    for what, batch in BATCHES.items():
        expected = results(model, batch(), "sdpa")  # eager computes the softmax in float32 always
        with counted() as ran:
            found = results(model, batch(), "fastft")
        assert ran == {"attention": 2}, what
        assert error(found, expected) < LIMITS[dtype], what


def test_the_limit_rejects_padding_that_is_seen(make_model: Make) -> None:
    """What happens where the mask half is not registered."""
    model = make_model()
    expected = results(model, padded("left"), "sdpa")
    own = AttentionMaskInterface._global_mapping.pop("fastft")
    AttentionMaskInterface.register("fastft", lambda **_: None)
    try:
        found = results(model, padded("left"), "fastft")
    finally:
        AttentionMaskInterface.register("fastft", own)
    assert error(found, expected) > 100 * LIMITS[torch.float32]


@pytest.mark.parametrize("name", MODELS)
def test_cu_seq_lens_are_as_good_as_positions(make_model: Make, name: str) -> None:
    model = make_model(name)
    expected = results(model, flattened(flash=False), "sdpa")
    assert error(results(model, flattened(flash=True), "fastft"), expected) < LIMITS[torch.float32]


@pytest.mark.parametrize("name", MODELS)
def test_shared_beginnings_equal_examples_by_themselves(make_model: Make, name: str) -> None:
    model = make_model(name, torch.float64).eval()
    prefix, a, b, c = [5, 6, 7, 8], [9, 10], [11], [12, 13, 14]
    ids = torch.tensor([prefix + a + b + c])
    tree = {
        "input_ids": ids,
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 4, 4, 5, 6]]),
        "visible_until": torch.tensor([[10, 10, 10, 10, 6, 6, 7, 10, 10, 10]]),
    }
    model.set_attn_implementation("fastft")
    with torch.no_grad():
        shared = model(**tree).logits[0]
        for own, at in ((a, slice(4, 6)), (b, slice(6, 7)), (c, slice(7, 10))):
            alone = model(input_ids=torch.tensor([prefix + own])).logits[0]
            assert (shared[at] - alone[4:]).abs().max() < 1e-10 * alone.abs().max()
            assert (shared[:4] - alone[:4]).abs().max() < 1e-10 * alone.abs().max()


@pytest.mark.parametrize("batch", ["padded left", "padded right", "flattened"])
def test_perturbing_one_example_changes_no_other(make_model: Make, batch: str) -> None:
    model = make_model("llama").eval()
    model.set_attn_implementation("fastft")
    inputs = BATCHES[batch]()
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    place = (0, 8) if batch == "flattened" else (1, 8)  # in the second example
    changed["input_ids"][place] += 1
    with torch.no_grad():
        before, after = model(**inputs).logits, model(**changed).logits
    differs = (before != after).any(dim=-1)
    own = torch.zeros_like(differs)
    if batch == "flattened":
        own[0, 8 : len(examples()[0]) + len(examples()[1])] = True
    else:
        own[1, 8:] = True
    assert differs[place]
    assert not (differs & ~own).any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(make_model: Make, reentrant: bool) -> None:
    model = make_model("llama").train()
    expected = results(model, padded("left"), "sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert error(results(model, padded("left"), "fastft"), expected) < LIMITS[torch.float32]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.filterwarnings("ignore")
def test_generation_is_sdpas(make_model: Make, name: str, side: str) -> None:
    model = make_model(name).eval()
    prompts = {key: padded(side)[key] for key in ("input_ids", "attention_mask")}
    said = {}
    for implementation in ("sdpa", "fastft"):
        model.set_attn_implementation(implementation)
        with counted() as ran:
            said[implementation] = model.generate(**prompts, max_new_tokens=6, do_sample=False)
    assert torch.equal(said["sdpa"], said["fastft"])
    assert ran == {"attention": 2, "attention_sdpa": 10}


def test_a_window_that_bites_goes_to_torch_and_one_that_does_not_stays(make_model: Make) -> None:
    model = make_model("mistral", torch.float64, sliding_window=6)
    for batch, op in (
        (padded("left"), "attention_sdpa"),
        ({"input_ids": padded("left")["input_ids"][:, :6]}, "attention"),
    ):
        expected = results(model, batch, "sdpa")
        with counted() as ran:
            found = results(model, batch, "fastft")
        assert ran == {op: 2}
        assert error(found, expected) < LIMITS[torch.float64]


def test_dropout_of_probabilities_is_torchs(make_model: Make) -> None:
    model = make_model("gpt2", attn_pdrop=0.3).train()
    losses = {}
    for implementation in ("sdpa", "fastft"):
        torch.manual_seed(3)
        losses[implementation] = results(model, padded("left"), implementation)["loss"]
    assert torch.equal(losses["sdpa"], losses["fastft"])


@pytest.mark.parametrize(
    ("name", "changes", "inputs", "said"),
    [
        ("gemma2", {}, {}, "soft caps of the scores"),
        ("gpt2", {"reorder_and_upcast_attn": True}, {}, "reorder_and_upcast_attn"),
        ("gpt2", {"attn_pdrop": 0.1}, {"visible_until": torch.full((1, 8), 8)}, "attention dropout 0.1 with visible"),
        ("gpt2", {}, {"visible_until": torch.full((1, 7), 7)}, r"expected \[1, 8\] integers"),
        ("gpt2", {}, {"visible_until": torch.full((1, 8), 9)}, r"expected \[1, 8\] integers"),
        ("gpt2", {}, {"visible_until": torch.zeros(1, 8).long()}, r"expected \[1, 8\] integers"),
        ("gpt2", {}, {"cu_seq_lens_q": torch.tensor([0, 9])}, "expected to rise from 0 to T = 8"),
        ("mistral", {"sliding_window": 4}, {"visible_until": torch.full((1, 8), 8)}, "visible_until with a cache"),
        ("llama", {}, {"s_aux": torch.zeros(4)}, "attention sinks"),
    ],
)
def test_what_it_cannot_compute_is_refused(
    make_model: Make, name: str, changes: dict[str, Any], inputs: dict[str, Any], said: str
) -> None:
    model = make_model(name, **changes).train()
    model.set_attn_implementation("fastft")
    with pytest.raises(ValueError, match=said):
        model(input_ids=torch.arange(8)[None], use_cache=False, **inputs)


def test_cross_attention_is_refused(make_model: Make) -> None:
    model = make_model("gpt2", add_cross_attention=True)
    model.set_attn_implementation("fastft")
    with pytest.raises(UserError, match="not causal self-attention"):
        model(input_ids=torch.arange(8)[None], encoder_hidden_states=torch.zeros(1, 3, 32))


def test_a_model_made_bidirectional_is_refused(make_model: Make) -> None:
    model = make_model("llama", is_causal=False)
    model.set_attn_implementation("fastft")
    with pytest.raises(UserError, match="not causal self-attention"):
        model(input_ids=torch.arange(8)[None])


@pytest.mark.parametrize(
    "write", [lambda x: x, lambda x: x.data, lambda x: x.numpy()], ids=["in place", "through data", "through numpy"]
)
def test_a_mask_that_was_written_to_is_read_again(make_model: Make, write: Callable[[Tensor], Any]) -> None:
    model = make_model("gpt2").eval()
    model.set_attn_implementation("fastft")
    until = torch.full((1, 8), 8)
    ids = torch.arange(8)[None] + 5
    with torch.no_grad():
        whole = model(input_ids=ids, visible_until=until).logits
        write(until)[:, :4] = 4
        cut = model(input_ids=ids, visible_until=until).logits
        again = model(input_ids=ids, visible_until=until.clone()).logits
    assert not torch.equal(whole, cut)
    assert torch.equal(cut, again)


def test_what_was_planned_without_autograd_serves_a_training_step(make_model: Make) -> None:
    """Evaluation in inference mode, then a step over the same padding: its plan is no inference tensor."""
    model = make_model("gpt2")
    given = padded("left")
    given["labels"] = given["input_ids"].masked_fill(given["position_ids"] == 0, -100)  # no padding predicts one

    def step() -> list[Tensor]:
        loss = model(**given).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    expected = step()
    model.set_attn_implementation("fastft")
    attention._memory.clear()
    with torch.inference_mode():
        model(**given)
    for found, own in zip(step(), expected, strict=True):
        assert torch.allclose(found, own, atol=1e-5)
