"""The book's generation (chapters 4 and 5): the same tokens, each computed once.

The book computes the whole text again for each new token. Here keys and values are kept, until the text outgrows the
context: from then on every position moves with each token, and all is computed again, as in the book.

Letters: B sequences, W new tokens, S places of the cache, H heads, D head dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastft.common.errors import UserError
from fastft.integrations.book.model import GPTModel, drops, is_known


def generate_text_simple(model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """Greedy: `[B, T]` int64 -> `[B, T + max_new_tokens]`."""
    return generate(model, idx, max_new_tokens, context_size)


@torch.no_grad()
def generate(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
) -> Tensor:
    """Continues sequences.

    Args:
        model: a `GPTModel`; any other model that gives logits is called for each token, as the book calls it.
        idx: `[B, T]` int64 token ids.
        max_new_tokens: how many to add.
        context_size: the most tokens that the model looks back on.
        temperature: 0 takes the likeliest token; else one is drawn from the logits divided by it, by torch's generator.
        top_k: keep so many of the logits.
        eos_id: the id that ends the text and is not appended; for one sequence.

    Returns:
        `[B, T + n]`, n at most `max_new_tokens`.

    Raises:
        UserError: `eos_id` with several sequences.
    """
    if eos_id is not None and idx.shape[0] != 1:
        raise UserError(f"generate: got eos_id with {idx.shape[0]} sequences, expected 1: they end at different places")
    logits_behind = _logits_behind(model, idx.shape[1] + max_new_tokens, context_size)
    for _ in range(max_new_tokens):
        following = _chosen(logits_behind(idx), temperature, top_k)
        if eos_id is not None and int(following) == eos_id:
            break
        idx = torch.cat((idx, following), dim=1)
    return idx


def generate_and_print_sample(model: nn.Module, tokenizer: Any, device: torch.device | str, start_context: str) -> None:
    """Prints 50 greedy tokens behind `start_context` on one line; the model is left in training mode."""
    model.eval()
    positions: Any = model.pos_emb
    token_ids = generate_text_simple(
        model=model,
        idx=text_to_token_ids(start_context, tokenizer).to(device),
        max_new_tokens=50,
        context_size=positions.weight.shape[0],
    )
    print(token_ids_to_text(token_ids, tokenizer).replace("\n", " "))
    model.train()


def text_to_token_ids(text: str, tokenizer: Any) -> Tensor:
    """`[1, T]` int64; `<|endoftext|>` in the text is the special token."""
    return torch.tensor(tokenizer.encode(text, allowed_special={"<|endoftext|>"})).unsqueeze(0)


def token_ids_to_text(token_ids: Tensor, tokenizer: Any) -> str:
    """The text of `[1, T]` or `[T]` ids."""
    text: str = tokenizer.decode(token_ids.squeeze(0).tolist())
    return text


def _chosen(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """The next tokens `[B, 1]`, of logits `[B, V]`."""
    if top_k is not None:
        least = torch.topk(logits, top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if temperature > 0.0:
        return torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1)
    return torch.argmax(logits, dim=-1, keepdim=True)


def _logits_behind(model: nn.Module, longest: int, context_size: int) -> Callable[[Tensor], Tensor]:
    """What gives the logits `[B, V]` behind sequences `[B, T]` that grow by a token with each call."""
    if is_known(model) and not drops(model) and context_size > 0:
        return _Cached(model, longest, context_size)

    def plain(idx: Tensor) -> Tensor:
        logits: Tensor = model(idx[:, -context_size:])[:, -1, :]
        return logits

    return plain


class _Cached:
    """The logits behind growing sequences, their keys and values kept."""

    def __init__(self, model: GPTModel, longest: int, context_size: int) -> None:
        self._model = model
        self._context_size = context_size
        self._places = min(longest, context_size, model.pos_emb.num_embeddings)
        self._seen = 0  # tokens that the cache holds
        self._keys: list[Tensor] = []  # of each layer [B, H, S, D]
        self._values: list[Tensor] = []

    def __call__(self, idx: Tensor) -> Tensor:
        """`[B, T]` -> `[B, V]`."""
        if idx.shape[1] > self._places:
            hidden = self._model.hidden(idx[:, -self._context_size :])[:, -1]
        else:
            hidden = self._model.hidden_of_last(idx[:, self._seen :], self._seen, self._attend)
            self._seen = idx.shape[1]
        logits: Tensor = self._model.out_head(hidden)
        return logits

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, W, H, D]` each -> `[B, W, H, D]`: over the cache, which gets `k` and `v`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if len(self._keys) == layer:
            B, H, _, D = k.shape
            self._keys.append(k.new_empty(B, H, self._places, D))
            self._values.append(v.new_empty(B, H, self._places, D))
        end = self._seen + k.shape[2]
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, self._seen : end], values[:, :, self._seen : end] = k, v
        # The first call has all tokens so far, which see themselves causally; each later one a single token.
        is_causal = self._seen == 0
        out = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], is_causal=is_causal)
        return out.transpose(1, 2)
