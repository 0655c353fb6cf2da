"""Small models that say many things, and prompts for them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from fastft.decoding.decode import Answer, greedy_reference
from fastft.model.gpt2 import GPT2, GPT2Config

VOCAB = 24
SHAPES = {
    "pico": GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=24, vocab_size=VOCAB),
    "wider": GPT2Config(n_layer=2, n_head=3, n_embd=96, n_ctx=40, vocab_size=VOCAB, tie_head=False),
    "long": GPT2Config(n_layer=1, n_head=2, n_embd=16, n_ctx=190, vocab_size=VOCAB, tie_head=False),
}


@functools.cache
def model(shape: str, seed: int = 0) -> GPT2:
    """Weights so large that each token depends on all before it; float64, so that no two logits are too close."""
    torch.manual_seed(seed)
    model = GPT2(SHAPES[shape]).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.0 if name.startswith(("wte", "wpe", "lm_head")) else 0.4)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def expected(model: GPT2, prompts: list[list[int]], *, max_new_tokens: int, stop: int) -> list[list[int]]:
    """One prompt at a time without a cache, up to the context's end."""
    room = [min(max_new_tokens, model.config.n_ctx - len(prompt) + 1) for prompt in prompts]
    return [
        greedy_reference(model, prompt, max_new_tokens=most, stop=stop)
        for prompt, most in zip(prompts, room, strict=True)
    ]


def in_order(answers: Iterable[Answer]) -> list[list[int]]:
    return [answer.ids for answer in sorted(answers, key=lambda answer: answer.index)]


def with_beginning(beginning: int, lengths: Sequence[int], seed: int) -> list[list[int]]:
    common, *rest = prompts_of([beginning, *lengths], seed)
    return [common + own for own in rest]
