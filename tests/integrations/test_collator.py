from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fastft.common.errors import UserError
from fastft.integrations.transformers import TreeCollator, accelerate, intervals, restore, speedup
from fastft.integrations.transformers.collator import check_isolation

Make = Callable[..., Any]
Feature = dict[str, list[int]]


def laid_out(features: list[Feature], least: int) -> dict[str, torch.Tensor]:
    """What the collator does, without a model."""
    free = object.__new__(TreeCollator)
    free.least_shared = least
    free._check_attention = lambda: None  # type: ignore[method-assign]
    return free(features)


def asked(features: list[Feature]) -> list[tuple[tuple[int, ...], int]]:
    """Every prediction that is asked for: what is before it, and the label."""
    return sorted(
        (tuple(f["input_ids"][:at]), label)
        for f in features
        for at, label in enumerate(f["labels"])
        if at and label != -100
    )


def asked_of(row: dict[str, torch.Tensor]) -> list[tuple[tuple[int, ...], int]]:
    """The same, read off a pack as a model would."""
    ids, labels, positions = (row[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
    seen = intervals.visible(row["visible_until"])[0, 0]
    found = []
    for at in range(len(ids) - 1):
        if labels[at + 1] != -100:
            before = seen[at].nonzero().flatten().tolist()
            assert [positions[k] for k in before] == list(range(positions[at] + 1))
            found.append((tuple(ids[k] for k in before), labels[at + 1]))
    assert labels[0] == -100
    return sorted(found)


@st.composite
def features(draw: st.DrawFn) -> list[Feature]:
    made = []
    for _ in range(draw(st.integers(1, 6))):
        ids = draw(st.lists(st.integers(1, 2), min_size=1, max_size=9))
        supervised = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        labels = [token if yes else -100 for token, yes in zip(ids, supervised, strict=True)]
        made.append({"input_ids": ids, "labels": labels})
    return made


@settings(max_examples=300, deadline=None)
@given(features(), st.integers(1, 4))
def test_a_pack_asks_for_what_its_examples_ask_for(given_features: list[Feature], least: int) -> None:
    row = laid_out(given_features, least)
    assert asked_of(row) == asked(given_features)
    assert sorted(row["example_lengths"].tolist()) == sorted(len(f["input_ids"]) for f in given_features)
    assert (row["labels"][:, 1:] != -100).sum() == len(asked(given_features))  # what a trainer counts


def test_beginnings_are_there_once() -> None:
    made = [{"input_ids": [5, 6, 7, 8, tail], "labels": [-100, -100, -100, -100, tail]} for tail in (11, 12, 13)]
    row = laid_out(made, 1)
    # The token that predicts a label stands before it: 8 is there three times.
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 11, 8, 12, 8, 13]]
    assert row["labels"].tolist() == [[-100, -100, -100, -100, 11, -100, 12, -100, 13]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 3, 4]]
    assert row["visible_until"].tolist() == [[9, 9, 9, 5, 5, 7, 7, 9, 9]]
    assert laid_out(made, 4)["input_ids"].shape == (1, 15)


def test_padding_told_by_a_mask_is_left_out() -> None:
    feature = {"input_ids": [0, 0, 5, 6], "labels": [-100, -100, -100, 6], "attention_mask": [0, 0, 1, 1]}
    assert laid_out([feature], 1)["input_ids"].tolist() == [[5, 6]]


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        ({"input_ids": [1, 2]}, "expected input_ids and labels"),
        ({}, "got an example with nothing"),
        ({"input_ids": [1, 2], "labels": [1]}, "expected one length"),
        ({"input_ids": [], "labels": []}, "expected one length"),
    ],
)
def test_examples_that_say_too_little(feature: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        laid_out([feature], 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_implementations_are_refused_and_would_be_wrong(make_model: Make, implementation: str) -> None:
    model = make_model("llama")
    model.set_attn_implementation(implementation)
    with pytest.raises(UserError, match=f"attn_implementation='{implementation}'"):
        TreeCollator(model)
    with pytest.raises(UserError, match="not see the beginning"):
        check_isolation(model)
    accelerate(model)
    collate = TreeCollator(model)
    model.set_attn_implementation(implementation)
    with pytest.raises(UserError, match=f"attn_implementation='{implementation}'"):
        collate([{"input_ids": [1, 2], "labels": [1, 2]}])


def test_a_model_that_swallows_visible_until_is_refused(make_model: Make) -> None:
    model = make_model("llama")
    accelerate(model)
    own = type(model.model).forward

    class Swallows(type(model.model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return own(self, *args, **{name: value for name, value in kwargs.items() if name != "visible_until"})

    model.model.__class__ = Swallows
    with pytest.raises(UserError, match="not see the beginning"):
        TreeCollator(model)

    class Leaks(Swallows):  # every key until the end
        def forward(self, *args: Any, visible_until: Any, **kwargs: Any) -> Any:
            return own(self, *args, visible_until=torch.full_like(visible_until, visible_until.shape[1]), **kwargs)

    model.model.__class__ = Leaks
    with pytest.raises(UserError, match="see its neighbour"):
        TreeCollator(model)


def test_dropout_is_refused_where_beginnings_are_shared(make_model: Make) -> None:
    model = make_model("gpt2", resid_pdrop=0.2)
    accelerate(model)
    with pytest.raises(UserError, match=r"dropout 0\.2"):
        TreeCollator(model)
    TreeCollator(model, share=False)


def test_it_goes_to_a_worker_without_the_model(make_model: Make) -> None:
    model = make_model()
    accelerate(model)
    sent = pickle.dumps(TreeCollator(model))
    assert len(sent) < 20_000
    assert pickle.loads(sent)([{"input_ids": [1, 2], "labels": [1, 2]}])["labels"].tolist() == [[-100, 2]]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_and_gradients_are_those_of_padded_rows(make_model: Make, name: str, dtype: torch.dtype) -> None:
    model = make_model(name, dtype).train()
    model.set_attn_implementation("sdpa")
    made = shared_features()
    width = max(len(f["input_ids"]) for f in made)
    ids = torch.tensor([f["input_ids"] + [0] * (width - len(f["input_ids"])) for f in made])
    labels = torch.tensor([f["labels"] + [-100] * (width - len(f["labels"])) for f in made])
    mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (width - len(f["input_ids"])) for f in made])
    logits = model(input_ids=ids, attention_mask=mask).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / 17
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    accelerate(model)
    row = TreeCollator(model, least_shared=2)(made)
    assert row["input_ids"].numel() < mask.sum()
    found = model(**row, num_items_in_batch=17).loss
    found.backward()
    limit = 1e-5 if dtype == torch.float32 else 1e-10
    assert abs(found - expected) < limit * expected
    for n, p in model.named_parameters():
        assert (p.grad - gradients[n]).abs().max() < limit * gradients[n].abs().max(), n


def shared_features() -> list[Feature]:
    """Two groups of equal beginnings, one within the other; labels in the middle, too."""
    start, more = [5, 6, 7, 8, 9], [10, 11, 12]
    rows = [(start + more, [20, 21]), (start + more, [20, 22, 23]), (start, [30]), (start, [31, 32]), ([40, 41], [42])]
    made = [{"input_ids": p + r, "labels": [-100] * len(p) + r} for p, r in rows]
    made[1]["labels"][3] = made[1]["input_ids"][3]  # two turns: a label within what others share
    return made


class TestWhatABreakerFound:
    """Each was wrong in silence."""

    def test_a_convolution_that_reaches_a_little_way_is_refused(self) -> None:
        from transformers import Lfm2Config, Lfm2ForCausalLM

        torch.manual_seed(0)
        config = Lfm2Config(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, layer_types=["conv", "full_attention"], conv_L_cache=3,
        )  # fmt: skip
        model = Lfm2ForCausalLM(config).eval()
        accelerate(model)
        with pytest.raises(UserError, match="see its neighbour"):
            TreeCollator(model)

    def test_a_model_that_counts_positions_itself_is_refused(self) -> None:
        """Its second example would stand behind the first: of this one, the loss was 4e-2 off."""
        from transformers import BartConfig, BartForCausalLM

        torch.manual_seed(0)
        config = BartConfig(
            vocab_size=97, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, dropout=0.0,
            max_position_embeddings=64, attention_dropout=0.0, activation_dropout=0.0, is_decoder=True,
        )  # fmt: skip
        model = BartForCausalLM(config).eval()
        accelerate(model)
        with pytest.raises(UserError, match="other logits than by itself"):
            TreeCollator(model, share=False)

    @pytest.mark.parametrize("name", ["token_type_ids", "inputs_embeds"])
    def test_what_a_model_reads_is_not_left_out(self, make_model: Make, name: str) -> None:
        model = make_model("gpt2")
        accelerate(model)
        collator = TreeCollator(model)
        example: dict[str, Any] = {"input_ids": [1, 2], "labels": [1, 2], "text": "of no model", "use_cache": None}
        assert collator([example])["input_ids"].tolist() == [[1, 2]]
        with pytest.raises(UserError, match=f"{name}, which the model reads"):
            collator([example, {**example, name: [1, 1]}])

    def test_noise_of_embeddings_is_refused(self, make_model: Make) -> None:
        """NEFTune's, as a trainer puts it there: in a pack of n rows it would be weaker by the root of n."""
        model = make_model("llama").train()
        accelerate(model)
        collator = TreeCollator(model, share=False)
        pack = collator([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2)
        del pack["example_lengths"]
        model.get_input_embeddings().neftune_noise_alpha = 5.0
        with pytest.raises(UserError, match="neftune_noise_alpha 5"):
            model(**pack)
        del model.get_input_embeddings().neftune_noise_alpha
        assert torch.isfinite(model(**pack).loss)

    def test_a_loss_that_balances_experts_is_refused_where_tokens_are_shared(self) -> None:
        """It counts routed tokens: the loss was 4e-3 off, and a gradient by half."""
        from transformers import MixtralConfig, MixtralForCausalLM

        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.5,
        )  # fmt: skip
        model = MixtralForCausalLM(config).train()
        accelerate(model)
        examples = [{"input_ids": [*range(9, 20), last], "labels": [-100] * 11 + [last]} for last in (5, 6)]
        collator = TreeCollator(model)
        assert collator(examples)["input_ids"].shape == (1, 14)
        model.config.output_router_logits = True
        for refused in (lambda: collator(examples), lambda: TreeCollator(model)):
            with pytest.raises(UserError, match="balances its experts"):
                refused()
        pack = TreeCollator(model, share=False)(examples)
        found = model(**{name: x for name, x in pack.items() if name != "example_lengths"}).loss
        rows = {name: torch.tensor([one[name] for one in examples]) for name in ("input_ids", "labels")}
        assert abs(float(found - model(**rows).loss)) < 1e-5

    def test_dropout_that_comes_after_the_collator_is_refused(self, make_model: Make) -> None:
        model = make_model("llama")
        accelerate(model)
        collator = TreeCollator(model, least_shared=1)
        examples = [{"input_ids": [1, 2, 3, 4, last], "labels": [-100] * 4 + [last]} for last in (5, 6)]
        batch = {key: value for key, value in collator(examples).items() if key != "example_lengths"}
        model.train()
        assert torch.isfinite(model(**batch).loss)
        model.model.layers[0].mlp.dropout = nn.Dropout(0.5)
        with pytest.raises(UserError, match=r"got a model with dropout 0\.5"):
            model(**batch)
        apart = TreeCollator(model, share=False)(examples)
        assert torch.isfinite(model(**{key: value for key, value in apart.items() if key != "example_lengths"}).loss)

    def test_noise_of_a_name_that_nobody_knows_is_refused(self, make_model: Make) -> None:
        class Noisy(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + torch.randn_like(x) if self.training else x

        model = make_model("llama")
        accelerate(model)
        model.model.norm = nn.Sequential(model.model.norm, Noisy())
        state = torch.get_rng_state()
        with pytest.raises(UserError, match="answers at random in training"):
            TreeCollator(model)
        assert torch.equal(torch.get_rng_state(), state)
        TreeCollator(model, share=False)

    @pytest.mark.parametrize(
        ("feature", "said"),
        [
            ({"input_ids": [1, -2], "labels": [1, 2]}, "negative id"),
            ({"input_ids": [1.0, 5.7], "labels": [1, 5]}, "input_ids of float64, expected integers"),
            ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [0, 0]}, "of padding alone"),
        ],
    )
    def test_what_is_no_token_is_refused(self, make_model: Make, feature: dict[str, Any], said: str) -> None:
        model = make_model("llama")
        accelerate(model)
        with pytest.raises(UserError, match=said):
            TreeCollator(model)([feature])

    def test_padding_beside_visible_until_is_refused(self, make_model: Make) -> None:
        model = make_model("llama")
        accelerate(model)
        ids = torch.tensor([[1, 2, 3, 4]])
        until = torch.full((1, 4), 4)
        model(ids, attention_mask=torch.ones(1, 4), visible_until=until, use_cache=False)
        with pytest.raises(UserError, match="visible_until beside an attention_mask with padding"):
            model(ids, attention_mask=torch.tensor([[0, 1, 1, 1]]), visible_until=until, use_cache=False)


def test_what_raises_midway_leaves_the_model_as_it_was(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    before = (type(model), model.config._attn_implementation, {name: type(m) for name, m in model.named_modules()})
    monkeypatch.setattr(speedup, "_loss", lambda *_: (_ for _ in ()).throw(ValueError("of its own")))
    with pytest.raises(ValueError, match="of its own"):
        accelerate(model)
    assert before == (
        type(model), model.config._attn_implementation, {name: type(m) for name, m in model.named_modules()}
    )  # fmt: skip


def test_an_implementation_that_was_set_meanwhile_stays(make_model: Make) -> None:
    model = make_model("llama")
    accelerate(model)
    model.set_attn_implementation("eager")
    restore(model)
    assert model.config._attn_implementation == "eager"


def test_a_loss_of_ones_own_gets_what_the_model_gives_and_no_more(make_model: Make) -> None:
    def own(logits: Tensor, labels: Tensor, vocab_size: int, ignore_index: int = 0, **_: Any) -> Tensor:
        return logits.sum() * 0 + ignore_index

    model = make_model("llama")
    accelerate(model)
    model.loss_function = own
    ids = torch.tensor([[1, 2, 3]])
    assert float(model(ids, labels=ids).loss) == 0


def test_a_head_that_is_listened_to_backward_gives_logits(make_model: Make) -> None:
    model = make_model("llama").train()
    accelerate(model)
    heard = []
    model.lm_head.register_full_backward_hook(lambda *_: heard.append(True))
    ids = torch.tensor([[1, 2, 3]])
    model(ids, labels=ids).loss.backward()
    assert heard == [True]
