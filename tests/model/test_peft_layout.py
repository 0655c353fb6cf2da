"""Adapters' files cross over between fastft and PEFT, both ways; what would be another model in silence is refused."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from exported import small_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from fastft.batches.batch import from_padded
from fastft.common.errors import UserError
from fastft.data.folder_tokenizer import with_special_tokens
from fastft.model.based import load_adapted
from fastft.model.gpt2 import GPT2, GPT2Config
from fastft.model.lora import merge
from fastft.model.lora_spec import LoRA
from fastft.model.part import Part, saved, sha256_of
from fastft.model.peft_layout import save_adapter
from fastft.model.peft_reading import read_adapter
from fastft.model.vocabulary import with_tokenizer
from fastft.model.weights import config_of, files_of, load, save_hf, save_weights
from tests.model.test_lora import moved
from tests.model.test_model import randomised

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True, "targets": ("attn.c_proj", "c_fc")},
    "dora": {"dora": True, "targets": ("c_attn", "mlp.c_proj"), "layers": (0, 2)},
}
ROWS = ("<|a|>", "<|b|>")
SOME = {("plain", torch.float32, ROWS, True), ("rslora", torch.float64, (), True), ("dora", torch.float32, ROWS, False)}
"""Of kinds, dtypes, new tokens and tied heads; all others are long tests."""
ALL = list(itertools.product(KINDS, TOLERANCE, [(), ROWS], [True, False]))


def shape(*, tie_head: bool = True) -> GPT2Config:
    own = small_tokenizer()
    return GPT2Config(n_layer=3, n_head=2, n_embd=16, n_ctx=64, vocab_size=own.size(), tokenizer=own, tie_head=tie_head)


def base_in(folder: Path, *, tie_head: bool = True) -> GPT2:
    base = randomised(GPT2(shape(tie_head=tie_head)))
    save_hf(base, folder)
    return base


def with_part(base: GPT2, lora: LoRA, dtype: torch.dtype, *tokens: str) -> GPT2:
    """A model with adapters, and new rows for tokens, all of them away from where they begin."""
    part = Part(lora=lora, train_only=None, new_rows=None, base_sha256=sha256_of(base))
    known = base.config.vocab_size
    model = with_tokenizer(base, with_special_tokens(base.config.tokenizer, tokens, "")).to(dtype)
    if tokens:
        part = replace(part, new_rows=(known, model.config.vocab_size - known))
    part.take(model)
    return moved(model)


def in_peft(base: Path, adapter: Path, dtype: torch.dtype, V: int) -> peft.PeftModel:
    twin = GPT2LMHeadModel.from_pretrained(base, dtype=dtype)
    if twin.config.vocab_size != V:
        twin.resize_token_embeddings(V, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of tensors that it does not find, or does not know
        warnings.simplefilter("ignore", FutureWarning)  # of transformers' names
        return peft.PeftModel.from_pretrained(twin, adapter).eval()


def some_ids(V: int) -> Tensor:
    return torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: GPT2) -> Tensor:
    ids = some_ids(model.config.vocab_size)
    return model.logits(from_padded(ids, torch.full_like(ids, -100))).unflatten(0, ids.shape)


@torch.no_grad()
def peer_logits(twin: Any, V: int) -> Tensor:
    found: Tensor = twin(some_ids(V)).logits
    return found


def assert_equal(got: Tensor, expected: Tensor) -> None:
    limit = TOLERANCE[expected.dtype]
    assert expected.abs().max() > 1000 * limit
    torch.testing.assert_close(got, expected, rtol=0, atol=limit)
    assert not torch.allclose(got + 2 * limit, expected, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("kind", "dtype", "tokens", "tie_head"),
    [pytest.param(*case, marks=[] if case in SOME else [pytest.mark.long]) for case in ALL],
)
def test_peft_reads_ours(
    tmp_path: Path, kind: str, dtype: torch.dtype, tokens: tuple[str, ...], tie_head: bool
) -> None:
    base = base_in(tmp_path / "base", tie_head=tie_head)
    without = logits(base)
    model = with_part(base, LoRA(r=3, alpha=7.0, **KINDS[kind]), dtype, *tokens)
    V = model.config.vocab_size
    save_adapter(model, tmp_path / "adapter", base_source=str(tmp_path / "base"))
    twin = in_peft(tmp_path / "base", tmp_path / "adapter", dtype, V)
    assert_equal(logits(model), peer_logits(twin, V))
    if dtype == torch.float32:
        assert bool(tokens) or (logits(model) - without).abs().max() > 100 * TOLERANCE[dtype]
        own = load(tmp_path / "adapter")
        assert own.config == config_of(tmp_path / "adapter") == model.config
        assert_equal(logits(own), peer_logits(twin, V))
        theirs = dict(twin.merge_and_unload().named_parameters())
        for (name, weight), merged in zip(own.named_parameters(), merge(model).parameters(), strict=True):
            torch.testing.assert_close(weight, merged, rtol=0, atol=0)
            peer = theirs.get(f"transformer.{name}", theirs.get(name))
            assert peer is not None
            is_conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            torch.testing.assert_close(weight, peer.t() if is_conv1d else peer, rtol=0, atol=1e-5)


THEIRS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "target_modules": ["c_proj"]},
    "dora": {"use_dora": True, "target_modules": ["c_attn", "c_fc"]},
    "pattern": {"target_modules": r".*\.(0|2)\.(attn|mlp)\.c_proj"},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["h.1.mlp.c_fc"]},
    "patterns": {
        "target_modules": ["c_attn", "c_proj"],
        "rank_pattern": {"attn.c_proj": 4, r"h\.1\.mlp\.c_proj": 1},
        "alpha_pattern": {r"h\.0\..*": 9},
        "use_rslora": True,
    },
    "layers": {"target_modules": ["c_attn"], "layers_to_transform": [2], "layers_pattern": "h"},
    "one layer": {"target_modules": ["c_attn"], "layers_to_transform": 1},
    "lora_bias": {"target_modules": ["c_fc"], "lora_bias": True},
    "bias of adapted": {"target_modules": ["c_fc"], "bias": "lora_only"},
    "all biases": {"target_modules": ["c_fc"], "bias": "all"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "rows": {"target_modules": ["c_attn"], "trainable_token_indices": [7, 3]},
    "rows by name": {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [7, 3]}},
    "kept norm": {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wpe"]},
    "kept matrix": {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj"]},
    "kept embedding": {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
    "kept head": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
    "kept both": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head", "wte"]},
}  # fmt: skip
SHORT = {"patterns", "rows", "kept embedding"}


def made_by_peft(base: Path, folder: Path, dtype: torch.dtype = torch.float32, V: int = 0, **options: Any) -> Any:
    """An adapter of theirs, with random values in all that it trains."""
    twin = GPT2LMHeadModel.from_pretrained(base, dtype=dtype)
    if V:
        twin.resize_token_embeddings(V, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, ties, and a folder as a base's name
        wrapped = peft.get_peft_model(twin, peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **options}))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, weight in wrapped.named_parameters():
                if weight.requires_grad:
                    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                    weight.add_(weight * 0.1 * noise if "magnitude" in name else 0.05 * noise)
        wrapped.save_pretrained(folder)
    return wrapped.eval()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.long), torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[] if name in SHORT else [pytest.mark.long])
        for name, options in THEIRS.items()
    ],
)
@pytest.mark.parametrize("tie_head", [True, pytest.param(False, marks=pytest.mark.long)], ids=["tied", "untied"])
def test_we_read_pefts(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype, tie_head: bool) -> None:
    base = base_in(tmp_path / "base", tie_head=tie_head).to(dtype)
    twin = made_by_peft(tmp_path / "base", tmp_path / "adapter", dtype, **options)
    expected = peer_logits(twin, base.config.vocab_size)

    def loaded(source: str | Path, *, tie_head: bool | None) -> GPT2:
        return load(source, tie_head=tie_head).to(dtype)

    model = load_adapted(read_adapter(tmp_path / "adapter"), None, None, loaded)
    assert (logits(base) - expected).abs().max() > 100 * TOLERANCE[torch.float32]
    assert_equal(logits(model), expected)
    assert model.config == config_of(tmp_path / "adapter")


@pytest.mark.parametrize("tie_head", [True, False], ids=["tied", "untied"])
def test_we_read_a_vocabulary_that_peft_has_made_larger(tmp_path: Path, tie_head: bool) -> None:
    V = base_in(tmp_path / "base", tie_head=tie_head).config.vocab_size
    twin = made_by_peft(tmp_path / "base", tmp_path / "adapter", V=V + 3, target_modules=["c_attn"])
    assert_equal(logits(load(tmp_path / "adapter")), peer_logits(twin, V + 3))
    assert load(tmp_path / "adapter", tie_head=tie_head).config.vocab_size == V + 3


@pytest.mark.parametrize("options", [{}, {"ensure_weight_tying": True}])
def test_rows_of_a_vocabulary_that_peft_has_made_larger(tmp_path: Path, options: dict[str, Any]) -> None:
    V = base_in(tmp_path / "base").config.vocab_size
    given = {"target_modules": ["c_attn"], "trainable_token_indices": [V, V + 1], **options}
    twin = made_by_peft(tmp_path / "base", tmp_path / "adapter", V=V + 2, **given)
    assert_equal(logits(load(tmp_path / "adapter")), peer_logits(twin, V + 2))


def test_what_gives_some_rows_no_value_is_refused(tmp_path: Path) -> None:
    """A head of its own, and new rows of the embedding alone; and rows with a gap between."""
    V = base_in(tmp_path / "base", tie_head=False).config.vocab_size
    place = tmp_path / "adapter"
    made_by_peft(tmp_path / "base", place, target_modules=["c_attn"], trainable_token_indices=[V - 2, V - 1])
    change(place / "adapter_config.json", trainable_token_indices=[V, V + 1])
    with pytest.raises(UserError, match="no values for all of them in both embedding and head"):
        load(place)
    change(place / "adapter_config.json", trainable_token_indices=[V - 1, V + 1])
    with pytest.raises(UserError, match=f"has no row {V} of wte.weight"):
        load(place)


def test_a_tokenizer_that_is_not_the_bases_is_refused(tmp_path: Path) -> None:
    base_in(tmp_path / "base")
    made_by_peft(tmp_path / "base", tmp_path / "adapter")
    for name, content in small_tokenizer().files().items():
        (tmp_path / "adapter" / name).write_bytes(content)
    assert load(tmp_path / "adapter").config.tokenizer.size() == 260
    vocab = json.loads((tmp_path / "adapter" / "vocab.json").read_text())
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "adapter" / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(UserError, match=r"in which id \d+ is 'b', and its base's says 'a'"):
        load(tmp_path / "adapter")


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        ({"target_modules": ["lm_head"]}, {}, "has an adapter of lm_head"),
        ({"target_modules": ["wte"]}, {}, "has an adapter of wte"),
        ({}, {"peft_type": "IA3"}, "kind \"IA3\""),
        ({}, {"init_lora_weights": "pissa"}, "changes the base's weights too"),
        ({}, {"alora_invocation_tokens": [3]}, "says alora_invocation_tokens"),
        ({}, {"of_a_later_peft": 2}, "says of_a_later_peft = 2"),
        ({}, {"r": 3}, r"expected lora_A \[3, I\]"),
        ({}, {"target_modules": ["c_attn", "c_fc"]}, "c_fc has an adapter"),
        ({}, {"layers_to_transform": [0, 2]}, r"holds an adapter of h.1.attn.c_attn"),
        ({}, {"target_modules": "("}, "pattern that is none"),
        ({}, {"use_dora": True}, "lacks h.0.attn.c_attn.lora_magnitude_vector"),
        ({"use_dora": True}, {"use_dora": False}, "holds h.0.attn.c_attn.lora_magnitude_vector"),
        ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": [1]}, "with 1 rows of wte"),
        ({}, {"trainable_token_indices": [1]}, "names rows of wte"),
        ({}, {"base_model_name_or_path": None}, "names no base"),
        ({}, {"base_model_name_or_path": "./nowhere"}, "the base of .* no weights at ./nowhere"),
        ({"modules_to_save": ["wte"]}, {"ensure_weight_tying": True}, "keeps an embedding with ensure_weight_tying"),
        ({}, {"revision": "v2"}, "revision v2"),
        ({}, {"lora_alpha": "many"}, "lora_alpha"),
    ],
)  # fmt: skip
def test_what_would_be_another_model_is_refused(
    tmp_path: Path, options: dict[str, Any], changed: Mapping[str, Any], message: str
) -> None:
    base_in(tmp_path / "base")
    made_by_peft(tmp_path / "base", tmp_path / "adapter", **{"target_modules": ["c_attn"], **options})
    change(tmp_path / "adapter" / "adapter_config.json", **changed)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "adapter")


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    base_in(tmp_path / "base")
    made_by_peft(tmp_path / "base", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(path)
    for old, new, message in [
        ("attn.c_attn", "attn.q_proj", r"holds h.0.attn.q_proj.lora_A.weight .* expected adapters of a GPT-2's"),
        ("h.2.", "h.7.", "says that h.2.attn.c_attn has an adapter"),
        ("lora_B", "lora_C", "holds h.0.attn.c_attn.lora_C.weight"),
    ]:
        save_file({name.replace(old, new): tensor for name, tensor in whole.items()}, path)
        with pytest.raises(UserError, match=message):
            load(tmp_path / "adapter")
    save_file({name: tensor[:, :-1].contiguous() if "lora_A" in name else tensor for name, tensor in whole.items()},
              path)  # fmt: skip
    with pytest.raises(UserError, match=re.escape("it changes h.0.attn.c_attn.weight [48, 15], and the base has [48")):
        load(tmp_path / "adapter")
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"but adapter_model.bin; only safetensors"):
        load(tmp_path / "adapter")


def ours_in(tmp_path: Path, *tokens: str) -> GPT2:
    model = with_part(base_in(tmp_path / "base"), LoRA(r=2, alpha=4.0), torch.float32, *tokens)
    save_adapter(model, tmp_path / "adapter", base_source=str(tmp_path / "base"), chat_template="{{ 1 }}")
    return model


def test_a_base_is_found_or_named_and_is_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(ours_in(tmp_path, "<|a|>"))
    assert (tmp_path / "adapter" / "chat_template.jinja").read_text() == "{{ 1 }}"
    assert [path.name for path in files_of(tmp_path / "adapter")] == ["adapter_model.safetensors", "model.safetensors"]
    config = tmp_path / "adapter" / "adapter_config.json"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for named in ("../base", str(tmp_path / "base")):  # seen from here, which is beside it
        change(config, base_model_name_or_path=named)
        assert_equal(logits(load(tmp_path / "adapter")), expected)
    (tmp_path / "base").rename(tmp_path / "adapter" / "mine")
    change(config, base_model_name_or_path="mine")  # seen from the adapter
    assert_equal(logits(load(tmp_path / "adapter")), expected)
    moved_to = (tmp_path / "adapter" / "mine").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"the base of .*--model BASE --adapter"):
        load(tmp_path / "adapter")
    assert_equal(logits(load(moved_to, adapter=tmp_path / "adapter")), expected)
    assert config_of(moved_to, adapter=tmp_path / "adapter") == load(moved_to, adapter=tmp_path / "adapter").config
    other = load(moved_to)
    with torch.no_grad():
        other.h[1].mlp.c_fc.bias[3] += 1e-6
    save_hf(other, tmp_path / "other")
    with pytest.raises(UserError, match=r"got SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}; put back"):
        load(tmp_path / "other", adapter=tmp_path / "adapter")
    change(config, base_model_name_or_path=str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="names itself"):
        load(tmp_path / "adapter")
    second = shutil.copytree(tmp_path / "adapter", tmp_path / "second")
    change(config, base_model_name_or_path=str(second))  # and that one names the first
    for read in (load, config_of, files_of):
        with pytest.raises(UserError, match=r"over 2 names; correct one"):
            read(second)
    save_hf(other, tmp_path / "adapter")
    with pytest.raises(UserError, match="a model and an adapter"):
        load(tmp_path / "adapter")


def test_an_adapter_is_a_base_of_another(tmp_path: Path) -> None:
    ours_in(tmp_path)
    second = with_part(load(tmp_path / "adapter"), LoRA(r=1, alpha=1.0, targets=("c_fc",)), torch.float32)
    save_adapter(second, tmp_path / "second", base_source=str(tmp_path / "adapter"))
    assert_equal(logits(load(tmp_path / "second")), logits(second))


def checkpoint_of(model: GPT2, run: Path, name: str) -> Path:
    """As training writes it."""
    place = run / "checkpoints" / name
    place.mkdir(parents=True)
    assert model.part is not None
    save_weights(saved(model), place / "model.safetensors")
    state = {"model": model.config.shape(), "part": model.part.as_json()}
    (place / "state.json").write_text(json.dumps(state))
    (place / "DONE").write_text("{}")
    (run / "config.yaml").write_text(f"weights: {run.parent / 'base'}\nmodel: pico\n")
    (run / "tokenizer").mkdir(exist_ok=True)
    for file, content in model.config.tokenizer.files().items():
        (run / "tokenizer" / file).write_bytes(content)
    return place


def test_a_checkpoint_of_a_part_is_a_model(tmp_path: Path) -> None:
    model = with_part(base_in(tmp_path / "base"), LoRA(r=2, alpha=4.0, dora=True), torch.float32, "<|a|>")
    place = checkpoint_of(model, tmp_path / "run", "step-3")
    assert len(files_of(place)) == 2
    assert_equal(logits(load(place)), logits(model))
    assert load(place, tie_head=False).lm_head is not None
    some = load(tmp_path / "base")
    Part(lora=None, train_only="h.1,ln_f", new_rows=None, base_sha256=sha256_of(some)).take(some)
    place = checkpoint_of(moved(some), tmp_path / "run", "best-2")
    own = load(place)
    assert all(weight.requires_grad for weight in own.parameters())
    assert_equal(logits(own), logits(some))
    away = place.rename(tmp_path / "away")
    with pytest.raises(UserError, match="copied out of"):
        load(away)
    away.rename(place)
    save_hf(own, tmp_path / "base")
    with pytest.raises(UserError, match="belongs to other weights"):
        load(place)
