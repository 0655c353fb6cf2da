"""Models of transformers through the Triton kernels, as on a GPU: attention, norms, activations and loss at once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from fastft.integrations.transformers import TreeCollator, accelerate, counted, restore

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="pip install 'fastft[transformers]'")

LIMIT = 1e-5
VOCAB = 97
SMALL = {"num_hidden_layers": 2, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
ROTARY = {**SMALL, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {**SMALL, **NO_DROPOUT, "n_positions": 64, "n_embd": 32, "n_head": 2}),
    "llama": ("llama", ROTARY),
    "qwen3": ("qwen3", {**ROTARY, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
                        "head_dim": 16}),
    "smollm2": ("llama", {**ROTARY, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1,
                          "tie_word_embeddings": True}),
}  # fmt: skip
GATED = {"attention": 2, "rms_norm": 5, "swiglu": 2, "loss": 1}
RUN = {
    "gpt2": {"attention": 2, "layer_norm": 5, "gelu": 2, "loss": 1},
    "llama": GATED,
    "qwen3": {**GATED, "rms_norm": 9},
    "smollm2": GATED,
}
KERNELS = {
    "attention": ("attention_forward", "attention_dq", "attention_dkv"),
    "layer_norm": ("layer_norm_forward", "layer_norm_backward"),
    "rms_norm": ("rms_norm_forward", "rms_norm_backward"),
    "gelu": ("gelu_forward", "gelu_backward"),
    "swiglu": ("swiglu_forward", "swiglu_backward"),
    "loss": ("lse_tiles", "logit_gradient"),
}
"""The kernels that each operation launches once, forward and backward."""

PROMPT = [5, 6, 7, 8, 9]
EXAMPLES = [[*PROMPT, 10, 11, 12, 13], [*PROMPT, 20, 21], [*PROMPT, 30, 31, 32]]
FEATURES = [{"input_ids": ids, "labels": [-100] * len(PROMPT) + ids[len(PROMPT) :]} for ids in EXAMPLES]
Batch = dict[str, Any]


def padded(side: str) -> Batch:
    width = max(map(len, EXAMPLES))
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for feature in FEATURES:
        more = width - len(feature["input_ids"])
        held = {**feature, "attention_mask": [1] * len(feature["input_ids"])}
        for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
            rows[name].append(held[name] + [fill] * more if side == "right" else [fill] * more + held[name])
    batch = {name: torch.tensor(value) for name, value in rows.items()}
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def flattened() -> Batch:
    return dict(transformers.DataCollatorWithFlattening(return_tensors="pt")([dict(one) for one in FEATURES]))


LAYOUTS: dict[str, Callable[[], Batch]] = {
    "padded right": lambda: padded("right"),
    "padded left": lambda: padded("left"),
    "flattened": flattened,
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the interpreter ran each kernel."""
    counter: Counter[str] = Counter()
    run = interpreter.GridExecutor.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)
    return counter


def make(name: str) -> Any:
    """Every parameter random, as what starts at 0 or 1 hides mistakes."""
    torch.manual_seed(0)
    kind, config = CONFIGS[name]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def step(model: Any, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad.clone() for name, parameter in model.named_parameters()}}


def logits(model: Any, batch: Batch) -> Tensor:
    """Of the real tokens, `[N, V]`."""
    with torch.no_grad():
        found = model(**{**batch, "labels": None}, use_cache=False).logits
    mask = batch.get("attention_mask")
    return found.flatten(0, 1) if mask is None else found[mask.bool()]


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)


SHORT = {"gpt2": "padded right", "llama": "padded left", "qwen3": "flattened", "smollm2": "padded left"}
"""The layouts that are not left to the long tests."""


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if SHORT[name] == layout else pytest.mark.long)
        for name in CONFIGS
        for layout in LAYOUTS
    ],
)
def test_a_model_is_itself_through_the_kernels(name: str, layout: str, launched: Counter[str]) -> None:
    model, batch = make(name), LAYOUTS[layout]()
    plain = {**step(model, batch), "logits": logits(model, batch)}
    assert not launched
    report = accelerate(model)
    assert set(report.accelerated) == set(RUN[name])
    launched.clear()
    with counted() as ran:
        found = step(model, batch)
    assert ran == RUN[name]
    for op, times in ran.items():
        assert {kernel: launched[kernel] for kernel in KERNELS[op]} == dict.fromkeys(KERNELS[op], times)
    assert error({**found, "logits": logits(model, batch)}, plain) < LIMIT
    restore(model)
    launched.clear()
    assert error({**step(model, batch), "logits": logits(model, batch)}, plain) == 0
    assert not launched


@pytest.mark.parametrize(
    "name", ["gpt2", "qwen3", *(pytest.param(n, marks=pytest.mark.long) for n in ("llama", "smollm2"))]
)
def test_shared_beginnings_give_the_gradients_of_padded_rows(name: str, launched: Counter[str]) -> None:
    model = make(name)
    expected = step(model, padded("right"))
    accelerate(model)
    tree = TreeCollator(model, least_shared=3)([dict(one) for one in FEATURES])
    assert tree["input_ids"].numel() < sum(map(len, EXAMPLES))
    launched.clear()
    assert error(step(model, tree), expected) < LIMIT
    assert launched["attention_dkv"] == 2
    if name == "gpt2":  # what the limit rejects: neighbours that are seen
        blind = {**tree, "visible_until": torch.full_like(tree["visible_until"], tree["input_ids"].numel())}
        assert error(step(model, blind), expected) > 100 * LIMIT


def test_an_example_changes_no_other() -> None:
    """Bit for bit."""
    model = make("smollm2").eval()
    accelerate(model)
    pack = TreeCollator(model, least_shared=3)([dict(one) for one in FEATURES])
    places = [(pack["input_ids"][0] == ids[-1]).nonzero().item() for ids in EXAMPLES]
    before = logits(model, pack)
    changed = {**pack, "input_ids": pack["input_ids"].clone()}
    changed["input_ids"][0, places[1]] += 1
    after = logits(model, changed)
    same = (before == after).all(-1)
    assert (~same).nonzero().flatten().tolist() == [places[1]]
