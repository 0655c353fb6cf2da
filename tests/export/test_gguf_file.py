"""A GGUF file, read back by the package that llama.cpp's own tools read with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from exported import letters, random_model

from fastft.common.errors import UserError
from fastft.data.chat_template import as_jinja
from fastft.data.prompts import ALPACA, CHATML
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.export.gguf_file import Quantize, without_marks, write_gguf
from fastft.export.vocabulary import TokenType, vocabulary_of
from fastft.model.gpt2 import GPT2, GPT2Config

gguf = pytest.importorskip("gguf", reason="pip install gguf")

NAMES = {
    "token_embd.weight": "wte.weight", "position_embd.weight": "wpe.weight", "output.weight": "lm_head.weight",
    "output_norm.weight": "ln_f.weight", "output_norm.bias": "ln_f.bias",
    **{f"blk.{n}.{theirs}.{kind}": f"h.{n}.{ours}.{kind}" for n in range(2) for kind in ("weight", "bias")
       for theirs, ours in (("attn_norm", "ln_1"), ("attn_qkv", "attn.c_attn"), ("attn_output", "attn.c_proj"),
                            ("ffn_norm", "ln_2"), ("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj"))},
}  # fmt: skip


def written(path: Path, model: GPT2, quantize: Quantize, chat_template: str = "x") -> Any:
    write_gguf(model, path, quantize=quantize, chat_template=chat_template, name="tried")
    return gguf.GGUFReader(path)


def as_stored(weight: torch.Tensor, quantize: Quantize) -> npt.NDArray[np.float32]:
    """A matrix rounded as its kind says: q8_0 has blocks of 32 whole numbers with a half's scale."""
    if quantize in ("f16", "bf16"):
        return weight.to(torch.float16 if quantize == "f16" else torch.bfloat16).float().numpy()
    if quantize == "f32":
        return weight.numpy()
    blocks = weight.view(-1, 32).double()
    scale = (blocks.abs().amax(dim=1, keepdim=True).float() / 127).double()
    rounded = torch.where(scale > 0, blocks / scale, 0.0).round()
    return (rounded.float() * scale.half().float()).view(weight.shape).numpy()


@pytest.mark.parametrize("tie_head", [True, False])
@pytest.mark.parametrize("quantize", ["f32", "f16", "bf16", "q8_0"])
def test_what_is_read_back_is_exact_in_its_dtype(tmp_path: Path, quantize: Quantize, tie_head: bool) -> None:
    model = random_model(CHATML, tie_head=tie_head)
    read = {one.name: one for one in written(tmp_path / "m.gguf", model, quantize).tensors}
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert {NAMES[name] for name in read} == expected.keys()
    for name, tensor in read.items():
        own = expected[NAMES[name]]
        is_wide = own.ndim == 1 or name == "position_embd.weight"
        assert tensor.tensor_type.name == ("F32" if is_wide else quantize.upper()), name
        got = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert got.shape == tuple(own.shape)
        kind: Quantize = "f32" if is_wide else quantize
        if kind == "q8_0":  # halves between two whole numbers may go either way
            step = np.abs(own.numpy()).max() / 127
            assert np.abs(got - as_stored(own, kind)).max() <= step * 1.01
            assert np.mean(got != as_stored(own, kind)) < 1e-3
        else:
            assert np.array_equal(got, as_stored(own, kind)), name
    if quantize != "f32":
        assert not np.array_equal(as_stored(expected["wte.weight"], quantize), expected["wte.weight"].numpy())


def test_what_llama_cpp_is_told(tmp_path: Path) -> None:
    model = random_model(CHATML)
    read = written(tmp_path / "m.gguf", model, "f16", as_jinja(CHATML))
    said = {name: field.contents() for name, field in read.fields.items()}
    config = model.config
    assert {key.removeprefix("gpt2."): value for key, value in said.items() if key.startswith("gpt2.")} == {
        "block_count": 2, "context_length": 256, "embedding_length": 32, "feed_forward_length": 128,
        "attention.head_count": 2, "attention.layer_norm_epsilon": pytest.approx(1e-5),
    }  # fmt: skip
    assert (said["general.architecture"], said["general.file_type"]) == ("gpt2", 1)
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert said["tokenizer.ggml.eos_token_id"] == config.tokenizer.end_of_text == 261
    assert said["tokenizer.ggml.add_bos_token"] is False
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == config.vocab_size == 320
    assert len(set(tokens)) == len(tokens)
    assert tokens[259:262] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert set(types[259:262]) == {TokenType.CONTROL}
    assert set(types[262:]) == {TokenType.UNUSED}
    assert set(types[:259]) == {TokenType.NORMAL}
    assert said["tokenizer.ggml.merges"] == ["h e", "\u0120 t", "\u0120t he"]
    assert "generation %" not in said["tokenizer.chat_template"]


def test_every_token_is_the_text_of_its_id() -> None:
    """Byte-level letters and merges are those that the encoding is made of: what they say is what we decode."""
    found = vocabulary_of(gpt2_tokenizer(), 50257)
    assert len(found.merges) == 50000
    assert set(found.types[:50256]) == {TokenType.NORMAL}
    assert (found.types[50256], found.end) == (TokenType.CONTROL, 50256)
    byte_of = {letter: byte for byte, letter in enumerate(letters())}
    for number in (*range(0, 50256, 97), 50255):
        text = bytes(byte_of[letter] for letter in found.tokens[number])
        assert text == gpt2_tokenizer().encoding.decode_single_token_bytes(number)


def test_marks_leave_a_program_that_writes_the_same() -> None:
    import jinja2

    from fastft.data.chat_template import _compiled

    messages = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "b"}]
    spaced = (
        "{% for m in messages %}\n  {{ m.content }}\n  {%- generation %}\n x {% endgeneration -%}\n y\n{% endfor %}"
    )
    for source in (as_jinja(CHATML), as_jinja(ALPACA), spaced):
        plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(without_marks(source))
        values = {"messages": messages, "eos_token": "E", "add_generation_prompt": True}
        marks = str.maketrans("", "", "\ue0f0\ue0f1<>")
        assert plain.render(values).translate(marks) == _compiled(source).render(values).translate(marks)


def test_what_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    model = random_model(ALPACA)
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight[3, 4] = 70000.0
    for kind in ("f16", "q8_0"):
        with pytest.raises(UserError, match=r"h\.0\.mlp\.c_fc\.weight holds 70000, beyond float16's 65504"):
            write_gguf(model, path, quantize=kind, chat_template="", name="")
    narrow = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, n_ctx=4))
    with pytest.raises(UserError, match=r"got --quantize q8_0 and a model of width 8, expected a multiple of 32"):
        write_gguf(narrow, path, quantize="q8_0", chat_template="", name="")
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight[3, 4] = float("nan")
    with pytest.raises(UserError, match="holds what is no finite number"):
        write_gguf(model, path, quantize="f32", chat_template="", name="")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from fastft.data.folder_tokenizer import tokenizer_of

    vocab = {letter: number for number, letter in enumerate(letters())}
    made = Tokenizer(models.BPE(vocab={**vocab, "<|endoftext|>": 256}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    for use_regex in (False, True):
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
        made.save(str(tmp_path / "tokenizer.json"))
        tokenizer = tokenizer_of(tmp_path)
        assert tokenizer is not None
        if not use_regex:
            with pytest.raises(UserError, match="not GPT-2's kind: it cuts texts by rules of its own"):
                vocabulary_of(tokenizer, 257)
            continue
        found = vocabulary_of(tokenizer, 260)
        assert found.tokens[256:] == ["<|endoftext|>", "[PAD257]", "[PAD258]", "[PAD259]"]
        assert found.types[255:258] == [TokenType.NORMAL, TokenType.CONTROL, TokenType.UNUSED]
