"""A model's vocabulary made larger, for tokens that a template needs and the model has not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastft.data.tokenizer import Tokenizer
from fastft.model.gpt2 import GPT2

ROWS = 64
"""The new number of rows is a multiple of this: matrix products of other sizes are slower."""


def with_tokenizer(model: GPT2, tokenizer: Tokenizer) -> GPT2:
    """The model with another tokenizer, whose ids are the model's own and perhaps some behind them.

    The embedding, and a head of its own, get a row for each id that they lack, and further ones up to a multiple of
    64, which the tokenizer has no token for, so that no answer holds them. All begin as the mean of the rows that have
    a token: of logits that nobody has trained, that is the one which changes the others' probabilities least
    (Hewitt, 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html).

    Returns:
        The model itself, where its rows suffice; else one whose other weights are the model's.
    """
    config, known, needed = model.config, model.config.tokenizer.size(), tokenizer.size()
    V = config.vocab_size if needed <= config.vocab_size else -(-needed // ROWS) * ROWS
    if config.vocab_size == V and needed <= known:
        model.config = replace(config, tokenizer=tokenizer)
        return model
    return with_tables(model, V, tokenizer, lambda weight: _with_means(weight[:known], V))


def with_tables(model: GPT2, V: int, tokenizer: Tokenizer, table: Callable[[Tensor], Tensor]) -> GPT2:
    """A model whose embedding, and head of its own, are what `table` makes of them: `[V before, C]` -> `[V, C]`; its
    other weights are the model's."""
    with torch.device("meta"):
        wider = GPT2(replace(model.config, vocab_size=V, tokenizer=tokenizer))
    weights = dict(model.named_parameters())
    for name in ("wte.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = nn.Parameter(table(weights[name].detach()))
    wider.load_state_dict(weights, assign=True)
    wider.checkpoint_activations = model.checkpoint_activations
    return wider


def _with_means(weight: Tensor, V: int) -> Tensor:
    """`[n, C]` -> `[V, C]`: further rows, the mean of these."""
    return torch.cat([weight, weight.mean(dim=0).expand(V - len(weight), -1)])
