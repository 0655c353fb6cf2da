"""`accelerate` against the plain model, and what must stay as it was."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastft.common.errors import UserError
from fastft.integrations.transformers import (
    Report,
    TreeCollator,
    accelerate,
    accelerated,
    counted,
    ops,
    restore,
    speedup,
    zero_dropout,
)
from fastft.integrations.transformers.loss import CausalLM

Make = Callable[..., Any]
ROTARY = {"attention": 2, "loss": 1, "rms_norm": 5}
OPS = {
    "gpt2": {"attention": 2, "gelu": 2, "loss": 1},
    "llama": ROTARY,
    "mistral": ROTARY,
    "qwen3": {**ROTARY, "rms_norm": 9},  # of each head's queries and keys too
}
"""What runs in a step on a CPU; layer norm and SwiGLU are torch's there."""
ON_A_GPU = {name: {"layer_norm"} if name == "gpt2" else {"swiglu"} for name in OPS}
MODELS = ("gpt2", "llama", "qwen3", "mistral")


def batch(seed: int = 1) -> dict[str, Tensor]:
    """Right-padded rows, whose prompts have no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return {
        "loss": loss.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)


def state(thing: Any) -> list[Any]:
    """Everything that a model holds, with its classes."""
    found: list[Any] = []
    for name, module in thing.named_modules():
        held = {key: value for key, value in vars(module).items() if key not in ("_modules", "_parameters", "_buffers")}
        config = held.pop("config", None)
        found.append((name, type(module), held, None if config is None else vars(config).copy()))
        found.append([(key, id(value)) for key, value in module._parameters.items()])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models_own(make_model: Make, name: str) -> None:
    model = make_model(name).train()
    shifted = {"shift_labels": batch()["labels"].roll(-1, 1)}
    cases = ({}, {"num_items_in_batch": 40}, {"num_items_in_batch": torch.tensor(7)}, shifted)
    expected = [step(model, {**batch(), **case}) for case in cases]
    report = accelerate(model)
    assert set(report.accelerated) == set(OPS[name]) | ON_A_GPU[name]
    for case, wanted in zip(cases, expected, strict=True):
        with counted() as ran:
            assert error(step(model, {**batch(), **case}), wanted) < 1e-5
        assert ran == OPS[name]
    assert error(step(model, {**batch(), "num_items_in_batch": 41}), expected[1]) > 1e-3  # what the limit rejects


def test_in_float64_the_loss_is_not_rounded(make_model: Make) -> None:
    """transformers computes it in float32 always."""
    model = make_model("llama", torch.float64).train()
    model.set_attn_implementation("sdpa")
    inputs = batch()
    logits = model(**{**inputs, "labels": None}).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    accelerate(model)
    found = model(**inputs).loss
    assert abs(found - expected) < 1e-10 * expected


def test_logits_are_real_wherever_they_may_be_read(make_model: Make) -> None:
    model = make_model().train()
    inputs = batch()
    expected = model(**inputs).logits
    accelerate(model)
    assert model(**inputs).logits is None
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    ids = inputs["input_ids"]
    evaluated = (
        model(**unlabelled).logits,
        model(**inputs, return_dict=False)[1],
        model.eval()(**inputs).logits,
        model(ids, None, inputs["attention_mask"]).logits,
    )
    for logits in evaluated:
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    kept = model(**unlabelled, logits_to_keep=3).logits
    assert (kept - expected[:, -3:]).abs().max() < 1e-5 * expected.abs().max()
    model.train()
    with counted() as ran:
        assert model(ids, attention_mask=inputs["attention_mask"], labels=inputs["labels"]).logits is None
        seen: list[Any] = []
        handle = model.lm_head.register_forward_hook(lambda _module, _args, out: seen.append(out))
        assert model(**inputs).logits is seen[0]
        handle.remove()
    assert (ran["loss"], ran["loss_of_logits"]) == (1, 1)


def test_evaluation_without_logits_is_an_option(make_model: Make) -> None:
    model = make_model().eval()
    expected = model(**batch()).loss
    accelerate(model, skip_logits=True)
    outputs = model(**batch())
    assert outputs.logits is None
    assert abs(outputs.loss - expected) < 1e-5 * expected


def test_nothing_supervised_is_a_loss_of_zero_that_has_a_gradient(make_model: Make) -> None:
    model = make_model().train()
    accelerate(model)
    found = step(model, {**batch(), "labels": torch.full((3, 12), -100)})
    assert all((value == 0).all() for value in found.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_restore_gives_back_the_original_bit_for_bit(make_model: Make, name: str, training: bool) -> None:
    model = make_model(name).train(training)
    next(model.children()).train(not training)  # a part that goes its own way
    inputs = batch()
    outputs, before = model(**inputs), state(model)
    accelerate(model)
    assert state(model) != before
    restore(model)
    assert state(model) == before
    assert "forward" not in vars(model)
    again = model(**inputs)
    assert torch.equal(again.logits, outputs.logits)
    assert torch.equal(again.loss, outputs.loss)
    with accelerated(model) as report:
        assert "loss" in report.accelerated
    assert state(model) == before
    restore(model)  # of what is not accelerated changes nothing
    assert state(model) == before


def test_a_forward_that_was_wrapped_meanwhile_runs_the_original_after_restore(make_model: Make) -> None:
    """accelerate keeps a forward in the instance under bf16."""
    model = make_model().train()
    expected = model(**batch())
    accelerate(model)
    held = model.forward
    restore(model)
    with counted() as ran:
        outputs = held(**batch())
    assert torch.equal(outputs.logits, expected.logits)
    assert not ran


def test_a_second_model_is_untouched(make_model: Make) -> None:
    first, second = make_model().train(), make_model().train()
    before = state(second)
    accelerate(first)
    assert state(second) == before
    with counted() as ran:
        assert second(**batch()).logits is not None
    assert not ran


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_accelerated_and_runs_its_own_weights(make_model: Make, how: Callable[[Any], Any]) -> None:
    model = make_model().train()
    accelerate(model)
    before = model(**batch()).loss
    twin = how(model)
    with torch.no_grad():
        twin.transformer.wte.weight.mul_(1.5)
    with counted() as ran:
        changed = twin(**batch()).loss
    assert ran == OPS["gpt2"]
    assert changed != before
    assert model(**batch()).loss == before
    restore(twin)
    assert twin(**batch()).logits is not None
    assert model(**batch()).logits is None


def test_a_replica_runs_its_own_weights(make_model: Make) -> None:
    """What DataParallel makes of each module."""
    model = make_model().train()
    accelerate(model)
    replica = model._replicate_for_data_parallel()
    assert type(replica) is type(model)
    assert replica.forward.__self__ is replica


def test_signature_class_name_and_checkpoint_stay(make_model: Make, tmp_path: Any) -> None:
    model = make_model()
    own = type(model)
    signature, keys = inspect.signature(model.forward), list(model.state_dict())
    accelerate(model)
    assert inspect.signature(model.forward) == signature
    assert isinstance(model, own)
    assert (type(model).__name__, list(model.state_dict())) == (own.__name__, keys)
    model.save_pretrained(tmp_path)
    again = own.from_pretrained(tmp_path)
    assert type(again) is own
    assert again.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(make_model: Make, reentrant: bool) -> None:
    model = make_model().train()
    model.enable_input_require_grads()
    expected = step(model, batch())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    accelerate(model)
    with counted() as ran:
        assert error(step(model, batch()), expected) < 1e-5
    assert ran == {"attention": 4, "gelu": 4, "loss": 1}


def test_autocast(make_model: Make) -> None:
    model = make_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, batch())
        accelerate(model)
        found = step(model, batch())
    assert abs(found["loss"] - expected["loss"]) < 1e-2 * expected["loss"]
    assert found["loss"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "changes", "op", "why"),
    [
        ("granite", {}, "loss", "HeadInput"),
        ("gemma2", {}, "attention", "soft caps of the scores"),
        ("mistral", {"sliding_window": 4}, "attention", "the model computes it elsewhere"),
    ],
)
def test_what_cannot_be_accelerated_is_left_alone_and_said(
    make_model: Make, name: str, changes: dict[str, Any], op: str, why: str
) -> None:
    model = make_model(name, **changes).train()
    expected = step(model, batch())
    report = accelerate(model)
    assert op not in report.accelerated
    line = next(line for line in report.lines if line.op == op)
    assert why in line.why
    assert "left alone" in str(report)
    assert error(step(model, batch()), expected) < 1e-5


def test_a_planted_no_op_is_caught(make_model: Make) -> None:
    """A model that computes its loss past the head is not said to be accelerated."""
    model = make_model()
    own = type(model).forward

    class PastTheHead(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            outputs = own(self, input_ids, **kwargs)
            if labels is not None:
                outputs["loss"] = nn.functional.cross_entropy(
                    outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
                )
            return outputs

    model.__class__ = PastTheHead
    report = accelerate(model)
    assert "loss" not in report.accelerated
    assert "attention" in report.accelerated


def test_norms_that_are_never_called_are_not_said_to_be_accelerated(make_model: Make) -> None:
    model = make_model("llama").train()
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = nn.Identity(), nn.Identity()
    model.model.unused, model.model.norm = model.model.norm, nn.Identity()
    before = state(model)
    report = accelerate(model)
    assert next(line for line in report.lines if "RMSNorm" in line.of).why == "the model computes it elsewhere"
    assert "rms_norm" not in report.accelerated
    restore(model)
    assert state(model) == before


def test_nothing_to_accelerate_is_an_error(make_model: Make) -> None:
    model = make_model()
    before = state(model)
    with pytest.raises(UserError, match="nothing can be accelerated"):
        accelerate(model, attention=False, norms=False, activations=False, loss=False)
    assert state(model) == before
    with pytest.raises(UserError, match="got Linear, expected a causal language model"):
        accelerate(nn.Linear(2, 2))
    with torch.device("meta"), pytest.raises(UserError, match="meta device"):
        accelerate(type(model)(model.config))


def test_zero_dropout(make_model: Make) -> None:
    model = make_model("gpt2", attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1).train()
    report = accelerate(model)
    assert "dropout 0.1" not in str(report)
    assert "dropout is 0.1: zero_dropout(model)" in str(report)
    zero_dropout(model)
    assert "dropout" not in str(accelerate(model))
    with counted() as ran:
        assert model(**batch()).loss == model(**batch()).loss
    assert ran == {"attention": 4, "gelu": 4, "loss": 2}


def test_the_report_is_a_table(make_model: Make) -> None:
    report = accelerate(make_model())
    assert isinstance(report, Report)
    first, head, *lines, memory = str(report).splitlines()
    assert "keep_memory=False" in memory
    assert first == "GPT2LMHeadModel"
    assert [line.split()[0] for line in lines] == ["attention", "layer_norm", "gelu", "loss"]
    assert all(line[head.index("computed by") - 2 :].startswith("  ") for line in lines)


@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_kept_and_said_so_or_not_touched(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    asked = []
    monkeypatch.setattr(speedup, "keep_freed_memory", lambda: asked.append(True))
    report = accelerate(make_model(), keep_memory=keep)
    assert asked == [True] * keep
    assert ("keep_memory=False" in str(report)) is keep


@pytest.fixture
def everywhere() -> Iterator[None]:
    """What torch computes as fast on a CPU is computed here all the same."""
    with ops.everywhere():
        yield


WHOLE = {
    "gpt2": {"attention": 2, "gelu": 2, "layer_norm": 5, "loss": 1},
    **{name: {**OPS[name], "swiglu": 2} for name in MODELS[1:]},
    "gemma": {"attention": 2, "gelu": 2, "loss": 1, "rms_norm": 5},  # the weight is added to 1
    "phi3": {**ROTARY, "swiglu": 2},  # gate and up are halves of one product
}


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", WHOLE)
def test_all_at_once_as_on_a_gpu(make_model: Make, name: str) -> None:
    model = make_model(name).train()
    expected, before = step(model, batch()), state(model)
    accelerate(model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for one in (model, twin):
        with counted() as ran:
            assert error(step(one, batch()), expected) < 1e-5
        assert ran == WHOLE[name]
    restore(model)
    assert state(model) == before
    assert error(step(model, batch()), expected) == 0
    twin.enable_input_require_grads()
    for reentrant in (False, True):
        twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert error(step(twin, batch()), expected) < 1e-5


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("first", ["adapter", "accelerate"])
def test_an_adapter_of_the_gate_goes_on_working(make_model: Make, first: str) -> None:
    peft = pytest.importorskip("peft")
    model = make_model("llama").train()
    if first == "accelerate":
        accelerate(model)
    config = peft.LoraConfig(r=4, target_modules=["gate_proj", "down_proj", "q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    if first == "adapter":
        accelerate(model)
    with counted() as ran:
        found = step(model, batch())
    assert ran == WHOLE["llama"]
    assert found["base_model.model.model.layers.0.mlp.gate_proj.lora_A.default.weight"].abs().max() > 0
    restore(model)
    expected = step(model, batch())
    assert error(found, expected) < 1e-5
    with model.disable_adapter():
        assert abs(model(**batch()).loss - expected["loss"]) > 1e-3 * expected["loss"]  # the adapter counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.usefixtures("everywhere")
def test_values_and_dtypes_of_each_module(
    make_model: Make, dtype: torch.dtype, weights: torch.dtype, autocast: bool
) -> None:
    mixed = weights == torch.bfloat16 != dtype
    for name in ("gpt2", "llama", "gemma"):
        model = make_model(name)
        x = torch.randn(5, 32).to(dtype)
        kinds = ("RMSNorm", "GELUActivation", "GELUTanh") + ("LayerNorm",) * (not mixed)  # torch's own refuses that
        modules = {key: module for key, module in model.named_modules() if type(module).__name__.endswith(kinds)}
        model.to(weights)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = {key: module(x) for key, module in modules.items()}
            accelerate(model)
            for key, own in expected.items():
                with counted() as ran:
                    found = modules[key](x)
                assert sum(ran.values()) == 1, key
                assert found.dtype == own.dtype, key
                limit = 1e-5 if dtype == weights == torch.float32 else 2e-2
                assert (found - own).abs().max() <= limit * own.abs().max(), key


@pytest.mark.parametrize("name", MODELS)
def test_autocast_around_every_model(make_model: Make, name: str) -> None:
    """Rotary embeddings leave queries and keys in float32, next to values in bf16."""
    model = make_model(name).train()
    exact = step(model, batch())
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, batch())
        accelerate(model)
        with counted() as ran:
            found = step(model, batch())
    assert ran == OPS[name]
    assert error(found, exact) < 2 * error(expected, exact)
    assert error(found, exact) > 1e-4  # it was in 16 bits


class CentredRMSNorm(nn.Module):
    """An RMS norm by its name, which takes the mean away."""

    def __init__(self, other: Any, how: str) -> None:
        super().__init__()
        self.weight, self.eps, self.how = nn.Parameter(torch.ones_like(other.weight)), 1e-6, how

    def forward(self, x: Tensor) -> Tensor:
        s = x.float()
        s = s - s.mean(-1, keepdim=True) if self.how == "mean" else s
        scale = torch.rsqrt(s.square().mean(-1, keepdim=True) + (1e-5 if self.how == "eps" else self.eps))
        scale = scale.detach() if self.how == "gradient" else scale
        weight = self.weight.square() if self.how == "weight" else self.weight
        return (weight * (s * scale)).to(x.dtype)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("mean", "its output would have other values"),
        ("eps", "its output would have other values"),
        ("weight", "its output would have other values"),
        ("gradient", "its gradient of input would have other values"),
        ("forward", "its forward is replaced already"),
        ("none", ""),
    ],
)
def test_a_norm_is_known_by_what_it_computes(make_model: Make, how: str, why: str) -> None:
    """Of ones, as its weights are, squares are not told from them: they are tried with others."""
    model = make_model("llama").train()
    model.model.norm = CentredRMSNorm(model.model.norm, how)
    if how == "forward":
        model.model.norm.forward = lambda x: 2 * x
    expected = step(model, batch())
    line = next(line for line in accelerate(model).lines if "CentredRMSNorm" in line.of)
    assert why in line.why
    assert bool(line.by) == (not why)
    with counted() as ran:
        assert error(step(model, batch()), expected) < 1e-5
    assert ran["rms_norm"] == (4 if why else 5)


@pytest.mark.parametrize("changes", [{"bias": False}, {"elementwise_affine": False}])
def test_layer_norms_without_weights_are_left_alone(make_model: Make, changes: dict[str, Any]) -> None:
    model = make_model().train()
    model.transformer.ln_f = nn.LayerNorm(32, **changes)
    expected = step(model, batch())
    lines = [line for line in accelerate(model).lines if "LayerNorm" in line.of]
    assert [(line.of, bool(line.by)) for line in lines] == [("4 LayerNorm", True), ("1 LayerNorm", False)]
    assert error(step(model, batch()), expected) < 1e-5


@pytest.mark.usefixtures("everywhere")
def test_what_listens_to_a_gate_hears_it(make_model: Make) -> None:
    """Before, it is left alone; after, it is given what it would have been given."""
    model = make_model("llama").train()
    expected, heard = step(model, batch()), []
    first, second = (layer.mlp.act_fn for layer in model.model.layers)
    first.register_forward_hook(lambda _module, args, out: heard.append((args[0], out)))
    line = next(line for line in accelerate(model).lines if line.why == "something listens to its SiLU")
    assert line.of == "1 LlamaMLP"
    second.register_forward_hook(lambda _module, args, out: heard.append((args[0], out)))
    heard.clear()
    with counted() as ran:
        assert error(step(model, batch()), expected) < 1e-5
    assert ran["swiglu"] == 0
    assert len(heard) == 2
    assert all(torch.equal(nn.functional.silu(given), out) for given, out in heard)


@pytest.mark.usefixtures("everywhere")
def test_a_silu_that_is_no_gate_is_left_alone(make_model: Make) -> None:
    model = make_model("llama").train()

    class Plain(type(model.model.layers[0].mlp)):  # type: ignore[misc] # a base that is known when this runs
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)))

    model.model.layers[0].mlp.__class__ = Plain
    expected = step(model, batch())
    report = accelerate(model)
    assert "Gate" in next(line for line in report.lines if line.of == "1 Plain").why
    with counted() as ran:
        assert error(step(model, batch()), expected) < 1e-5
    assert ran["swiglu"] == 1


def test_on_a_cpu_torchs_own_runs_where_it_is_no_slower(make_model: Make) -> None:
    """Bit for bit."""
    for name, dtype in (("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32)):
        model = make_model(name, dtype).eval()
        report = accelerate(model, attention=False, activations=False, loss=False)
        assert "on a CPU torch's own" in str(report)
        with counted() as ran, torch.set_grad_enabled(dtype == torch.bfloat16):
            found = model(**batch()).logits
        assert not {"rms_norm", "layer_norm"} & set(ran)
        restore(model)
        assert torch.equal(found, model(**batch()).logits)


def test_frozen_and_tied_weights(make_model: Make) -> None:
    model = make_model("llama").train()
    layers = model.model.layers
    layers[0].input_layernorm.weight = layers[1].input_layernorm.weight
    layers[0].post_attention_layernorm.weight.requires_grad_(False)
    expected = step(model, batch())
    accelerate(model)
    found = step(model, batch())
    assert "model.layers.0.post_attention_layernorm.weight" not in found
    assert error(found, expected) < 1e-5


def test_the_compiler_gets_the_models_own_operations(make_model: Make) -> None:
    """Which it fuses, and nothing breaks its graph."""
    model = make_model("llama").eval()
    x = torch.randn(4, 32)
    parts = (model.model.norm, model.model.layers[0].mlp)
    expected = [part(x) for part in parts]
    accelerate(model)
    torch.compiler.reset()
    for part, own in zip(parts, expected, strict=True):
        found = torch.compile(part, backend="eager", fullgraph=True)(x)
        assert torch.equal(found, own)


@pytest.mark.long
def test_compiled_models_give_the_same(make_model: Make) -> None:
    model = make_model().train()
    expected = step(model, batch())
    accelerate(model)
    torch.compiler.reset()
    model.compile(backend="aot_eager")
    assert error(step(model, batch()), expected) < 1e-5


def test_a_model_that_is_accelerated_already_is_not_given_back_plain(make_model: Make) -> None:
    model = make_model()
    accelerate(model)
    with pytest.raises(UserError, match="accelerated already"), accelerated(model):
        pass
    assert isinstance(model, CausalLM)


def test_a_head_that_came_later_makes_no_logits_either(make_model: Make) -> None:
    model, plain = make_model("llama", tie_word_embeddings=False).train(), make_model("llama").train()
    accelerate(model)
    head = nn.Linear(32, 97, bias=False)
    model.set_output_embeddings(head)
    plain.load_state_dict(model.state_dict())
    with counted() as ran:
        assert error(step(model, batch()), step(plain, batch())) < 1e-5
    assert ran == OPS["llama"]
    restore(model)
    assert type(model.lm_head) is nn.Linear
    accelerate(model)
    torch.manual_seed(0)
    model.resize_token_embeddings(103)
    torch.manual_seed(0)
    plain.resize_token_embeddings(103)
    with counted() as ran:
        assert error(step(model, batch()), step(plain, batch())) < 1e-5
    assert ran == OPS["llama"]


@pytest.mark.parametrize("accelerated_first", [True, False])
def test_restore_keeps_parametrizations(make_model: Make, accelerated_first: bool) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = make_model("llama").train()
    for change in (accelerate, parametrized) if accelerated_first else (parametrized, accelerate):
        change(model, Double()) if change is parametrized else change(model)
    plain = parametrized(make_model("llama").train(), Double())
    expected = step(plain, batch())
    assert error(step(model, batch()), expected) < 1e-5
    restore(model)
    with counted() as ran:
        assert error(step(model, batch()), expected) < 1e-6
    assert not ran
    assert [type(x).__mro__[1:] for x in model.modules()] == [type(x).__mro__[1:] for x in plain.modules()]


def parametrized(model: Any, how: nn.Module) -> Any:
    for module in (model.lm_head, model.model.norm):
        parametrize.register_parametrization(module, "weight", how)
    return model


def test_a_number_of_items_keeps_its_shape(make_model: Make) -> None:
    model = make_model().train()
    inputs = {**batch(), "num_items_in_batch": torch.tensor([7])}
    expected = model(**inputs).loss.detach()
    accelerate(model)
    found = model(**inputs).loss.detach()
    assert found.shape == expected.shape == (1,)
    assert abs(found - expected) < 1e-5
    with pytest.raises(UserError, match="one number"):
        model(**{**inputs, "num_items_in_batch": torch.tensor([7, 8])})


class Logits(nn.Module):
    """A model with tensors in and out, as `torch.jit.trace` takes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize("how", ["jit", "export"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_is_recorded_reads_the_mask_it_is_given(make_model: Make, name: str, how: str) -> None:
    """Not the one that it was recorded with, whose plan would be a constant."""
    model = Logits(make_model(name).eval())
    ids = batch()["input_ids"]
    first, second = torch.ones_like(ids), torch.ones_like(ids)
    first[1, 8:] = 0
    second[:, 2:5] = 0
    with torch.no_grad():
        expected = model(ids, second)
        accelerate(model.model)
        if how == "jit":
            recorded: Any = torch.jit.trace(model, (ids, first), check_trace=False)
        else:
            recorded = torch.export.export(model, (ids, first), strict=False).module()
        found = recorded(ids, second)
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(recorded(ids, first), expected, atol=1e-2)  # what the first mask gives


def test_transforms_of_functions_get_the_models_own_operations(make_model: Make) -> None:
    """`torch.func` has no rules for the fused operations: each operation is the model's own there, or torch's."""
    model = make_model("llama").train()
    accelerate(model)
    expected = step(model, batch())
    parameters = {name: x.detach() for name, x in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, kwargs={**batch(), "use_cache": False}).loss

    gradients, value = torch.func.grad_and_value(loss)(parameters)
    assert error({"loss": value, **gradients}, expected) < 1e-5


@pytest.mark.parametrize("name", ["visible_until", "cu_seq_lens_q"])
def test_what_no_transform_can_have_is_refused(make_model: Make, name: str) -> None:
    model = make_model("llama").eval()
    accelerate(model)
    says = {"visible_until": torch.full((1, 12), 12), "cu_seq_lens_q": torch.tensor([0, 5, 12], dtype=torch.int32)}

    def summed(weights: dict[str, Tensor]) -> Tensor:
        given = {"input_ids": torch.arange(12)[None], name: says[name], "use_cache": False}
        return torch.func.functional_call(model, weights, kwargs=given).logits.sum()

    with pytest.raises(UserError, match="expected rows that are padded"):
        torch.func.grad(summed)(dict(model.named_parameters()))


def test_what_sees_an_image_keeps_its_attention() -> None:
    """Of a model of images and text, the text's attention alone is causal."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        text_config=LlamaConfig(**sizes, vocab_size=97), image_token_id=90, image_seq_length=4,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).train()
    ids = torch.tensor([[5, 90, 90, 90, 90, 6, 7, 8]])
    given = {"input_ids": ids, "labels": ids.masked_fill(ids == 90, -100), "pixel_values": torch.randn(1, 3, 16, 16)}
    expected, before = step(model, given), state(model)
    accelerate(model)
    with counted() as ran:
        found = step(model, given)
    assert (ran["attention"], ran["loss"]) == (2, 1)
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-5
    assert float((found["loss"] - expected["loss"]).abs()) < 1e-5
    with pytest.raises(UserError, match="pixel_values, which the model reads"):
        TreeCollator(model)([{name: x[0].numpy() for name, x in given.items()}])
    restore(model)
    assert state(model) == before


def test_a_loss_function_that_was_read_and_set_back_is_the_models_own(make_model: Make) -> None:
    model = make_model().train()
    own = model.loss_function
    expected = step(model, batch())
    accelerate(model)
    before, model.loss_function = model.loss_function, lambda **given: given["logits"].sum()
    model.loss_function = before
    with counted() as ran:
        assert error(step(model, batch()), expected) < 1e-5
    assert (ran["loss"], ran["loss_of_logits"]) == (1, 0)
    restore(model)
    assert model.loss_function is own
