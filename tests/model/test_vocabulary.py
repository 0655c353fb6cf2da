"""Rows for tokens that a template needs and the model has not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastft.data.folder_tokenizer import with_special_tokens
from fastft.data.prompts import CHATML, LLAMA3
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.decoding.sampling import ids_without_text
from fastft.model.gpt2 import GPT2, SIZES
from fastft.model.vocabulary import with_tokenizer


@pytest.mark.parametrize("tie_head", [True, False])
def test_new_rows_are_the_mean_and_the_rest_is_the_models_own(tie_head: bool) -> None:
    torch.manual_seed(0)
    model = GPT2(replace(SIZES["pico"], tie_head=tie_head))
    if model.lm_head is not None:
        torch.nn.init.normal_(model.lm_head.weight)
    tokenizer = with_special_tokens(gpt2_tokenizer(), CHATML.special_tokens, CHATML.end)
    wider = with_tokenizer(model, tokenizer)
    assert wider.config.vocab_size == 50_304
    assert wider.config.tokenizer is tokenizer
    for mine, own in ((wider.wte.weight, model.wte.weight), (wider.head, model.head)):
        assert mine.shape == (50_304, 32)
        assert torch.equal(mine[:50_257], own)
        assert torch.allclose(mine[50_257:], own.mean(dim=0).expand(47, -1))
        assert mine.requires_grad
    others = [name for name, _ in model.named_parameters() if name not in ("wte.weight", "lm_head.weight")]
    for name in others:
        assert wider.get_parameter(name) is model.get_parameter(name)


def test_rows_that_no_token_has_are_never_chosen() -> None:
    tokenizer = with_special_tokens(gpt2_tokenizer(), CHATML.special_tokens, CHATML.end)
    without = ids_without_text(with_tokenizer(GPT2(SIZES["pico"]), tokenizer))
    assert without is not None
    chosen = (~without).nonzero().flatten().tolist()
    assert chosen[-2:] == [50_255, tokenizer.end_of_text]  # neither <|endoftext|>, <|im_start|> nor the rows behind
    assert len(chosen) == 50_257


def test_rows_that_pad_the_vocabulary_are_used_before_it_grows() -> None:
    padded = GPT2(replace(SIZES["pico"], vocab_size=50_304))
    tokenizer = with_special_tokens(gpt2_tokenizer(), LLAMA3.special_tokens, LLAMA3.end)
    before = padded.wte.weight[:50_257].clone()
    model = with_tokenizer(padded, tokenizer)
    assert model.config.vocab_size == 50_304
    assert torch.equal(model.wte.weight[:50_257], before)
    assert torch.allclose(model.wte.weight[50_257], before.mean(dim=0))


def test_a_tokenizer_with_the_same_ids_changes_nothing() -> None:
    model = GPT2(SIZES["pico"])
    weight = model.wte.weight
    assert with_tokenizer(model, gpt2_tokenizer()) is model
    assert model.wte.weight is weight
