from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from fastft.batches.batch import Batch, padded_batch
from fastft.common.errors import UserError
from fastft.model.gpt2 import GPT2, SIZES, GPT2Config, config_for

TOLERANCE = 1e-5
CONV1D = ("c_attn.weight", "attn.c_proj.weight", "c_fc.weight", "mlp.c_proj.weight")
Results = dict[str, Tensor]


def randomised(model: GPT2, seed: int = 0) -> GPT2:
    """Random values for every parameter, biases and layer norms too: what starts at 0 or 1 hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
            if "ln_" in name and name.endswith("weight"):
                parameter.mul_(5).add_(1)
    return model


def twin_of(model: GPT2) -> GPT2LMHeadModel:
    """transformers' GPT-2 with the same tied weights, put there without fastft's loader."""
    config = model.config
    with torch.device("meta"):
        twin = GPT2LMHeadModel(
            HFConfig(
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_embd=config.n_embd,
                n_positions=config.n_ctx,
                vocab_size=config.vocab_size,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    state = {
        f"transformer.{name}": (p.detach().t() if name.endswith(CONV1D) else p.detach()).clone()
        for name, p in model.named_parameters()
    }
    twin.load_state_dict(state, strict=False, assign=True)
    twin.tie_weights()
    assert not any(parameter.is_meta for parameter in twin.parameters())
    return twin.eval()


def two_examples(vocab_size: int) -> Batch:
    """Two examples of 32 and 20 inputs, the second padded: 64 tokens."""
    rng = np.random.default_rng(0)
    return padded_batch([rng.integers(0, vocab_size, n).astype(np.int32) for n in (33, 21)], [12, 3])


def ours(model: GPT2, batch: Batch) -> Results:
    with torch.no_grad():
        logits = model.logits(batch)
    model.zero_grad()
    loss, _ = model(batch, row_weights=batch.weights / batch.count)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits, "loss": loss.detach(), **gradients}


def theirs(twin: GPT2LMHeadModel, batch: Batch) -> Results:
    twin.zero_grad()
    logits = twin(batch.tokens.view(-1, batch.row_length)).logits.flatten(0, 1)
    loss = F.cross_entropy(logits[batch.rows], batch.targets)
    loss.backward()
    gradients = {
        name.removeprefix("transformer."): p.grad.t() if name.endswith(CONV1D) else p.grad
        for name, p in twin.named_parameters()
    }
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients}


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """At 64 tokens a second thread helps little, and on a busy machine waiting for it costs many times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def compared(one_thread: None) -> tuple[Results, Results, Results, Tensor]:
    """At gpt2's size: ours, transformers', transformers' with the erf GELU, and its loss with c_proj untransposed."""
    with torch.device("meta"):
        model = GPT2(SIZES["gpt2"])
    model = randomised(model.to_empty(device="cpu"))
    batch = two_examples(model.config.vocab_size)
    mine = ours(model, batch)
    model.zero_grad()
    twin = twin_of(model)
    reference = theirs(twin, batch)
    for block in twin.transformer.h:
        block.mlp.act = nn.GELU()
    erf = theirs(twin, batch)
    for block in model.h:
        block.attn.c_proj.weight.data = block.attn.c_proj.weight.data.t()
    with torch.no_grad():
        untransposed_loss = model(batch)[0] / batch.count
    return mine, reference, erf, untransposed_loss


def test_logits_are_those_of_transformers_at_gpt2_size(compared: tuple[Results, Results, Results, Tensor]) -> None:
    mine, reference, erf, _ = compared
    assert mine["logits"].shape == (64, 50257)
    assert (mine["logits"] - reference["logits"]).abs().max() <= TOLERANCE
    assert (mine["logits"] - erf["logits"]).abs().max() > TOLERANCE


def test_loss_is_that_of_transformers_at_gpt2_size(compared: tuple[Results, Results, Results, Tensor]) -> None:
    mine, reference, _, untransposed_loss = compared
    assert relative_error(mine["loss"], reference["loss"]) <= TOLERANCE
    assert relative_error(mine["loss"], untransposed_loss) > TOLERANCE


def test_every_gradient_is_that_of_transformers_at_gpt2_size(
    compared: tuple[Results, Results, Results, Tensor],
) -> None:
    mine, reference, erf, _ = compared
    assert mine.keys() == reference.keys()
    gradients = mine.keys() - {"logits", "loss"}
    assert len(gradients) == 12 * 12 + 4
    errors = {name: relative_error(mine[name], reference[name]) for name in gradients}
    assert max(errors.values()) <= TOLERANCE, max(errors.items(), key=lambda item: item[1])
    assert min(relative_error(mine[name], erf[name]) for name in gradients) > TOLERANCE


@pytest.mark.parametrize(
    ("size", "tie_head", "parameters"),
    [
        ("gpt2", True, 124_439_808),
        ("gpt2-medium", True, 354_823_168),
        ("gpt2-large", True, 774_030_080),
        ("gpt2-xl", True, 1_557_611_200),
        ("gpt2-medium", False, 406_286_336),
        ("nano", True, 16_287_488),
        ("pico", True, 1_641_888),
    ],
)
def test_a_size_has_its_number_of_parameters(size: str, tie_head: bool, parameters: int) -> None:
    with torch.device("meta"):
        model = GPT2(config_for(size, tie_head=tie_head))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (model.head is model.wte.weight) == tie_head


def test_an_unknown_size_and_impossible_shapes_are_named() -> None:
    with pytest.raises(UserError, match="got --model gpt3, expected one of gpt2, "):
        config_for("gpt3")
    with pytest.raises(UserError, match="n_embd = 30, n_head = 4"):
        GPT2Config(n_layer=1, n_head=4, n_embd=30)
    with pytest.raises(UserError, match="n_layer = 0"):
        GPT2Config(n_layer=0, n_head=1, n_embd=8)


def test_initial_weights_are_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=8, n_head=4, n_embd=64, n_ctx=512, vocab_size=1000, tie_head=False))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "ln_" in name:
            assert (parameter == 1).all()
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
    assert torch.equal(model.head, model.wte.weight)
    assert model.head is not model.wte.weight


def test_recomputed_activations_change_no_gradient() -> None:
    kept, recomputed = (randomised(GPT2(SIZES["pico"], checkpoint_activations=c)) for c in (False, True))
    batch = two_examples(50257)
    expected, got = ours(kept, batch), ours(recomputed, batch)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_padding_changes_no_loss_and_no_gradient() -> None:
    model = randomised(GPT2(SIZES["pico"]))
    rng = np.random.default_rng(1)
    short, long = (rng.integers(0, 50257, n).astype(np.int32) for n in (7, 30))
    _, together = model(padded_batch([short, long], [2, 4]))
    apart = torch.cat([model(padded_batch([short], [2]))[1], model(padded_batch([long], [4]))[1]])
    assert relative_error(together, apart) <= TOLERANCE
    _, shifted = model(padded_batch([np.roll(short, 1), long], [2, 4]))
    assert relative_error(shifted, apart) > 10 * TOLERANCE
