"""The tokens that all prompts begin with: their keys and values, computed once and kept once.

Letters: P tokens of the common beginning, n prompts, W own tokens of the longest of them, T own tokens of all, laid end
to end, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.model import ops
from fastft.model.gpt2 import GPT2


def common_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; at least one of each is left to be its own."""
    if len(prompts) < 2:
        return 0
    first, last = min(map(list, prompts)), max(map(list, prompts))  # in lexical order all others lie between them
    least = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(least) if first[i] != last[i]), least)


class Prefix:
    """The common beginning, as the prompts' own tokens see it.

    Attributes:
        length: P; 0 where the prompts have none in common.
    """

    def __init__(self, model: GPT2, tokens: Tensor, impl: str) -> None:
        """Computes the keys and values of the tokens `[P]`, which are on the model's device."""
        self.length = len(tokens)
        self._layers: list[tuple[Tensor, Tensor]] = []  # of each layer two [P, H, D]
        if self.length:
            model.hidden(tokens, torch.arange(self.length, device=tokens.device), self._attend, impl=impl)

    def of(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of a layer, `[P, H, D]` each; None without a common beginning."""
        return self._layers[layer] if self._layers else None

    def visible(self, W: int, device: torch.device) -> Tensor:
        """`[W, P + W]`: an own token sees the common beginning, and its own prompt up to itself."""
        own = torch.ones(W, W, dtype=torch.bool, device=device).tril()
        return torch.cat([own.new_ones(W, self.length), own], dim=1)

    def prompt_attention(
        self, layer: int, q: Tensor, keys: Tensor, values: Tensor, row: Tensor, place: Tensor, visible: Tensor
    ) -> Tensor:
        """Attention of new prompts' own tokens over the common beginning and their own keys and values.

        Args:
            layer: whose beginning they see.
            q: `[T, H, D]`.
            keys, values: `[n, H, W, D]`, finite throughout.
            row, place: `[T]`, which prompt each token is of, and where in its own part.
            visible: see `visible`.

        Returns:
            `[T, H, D]`.
        """
        n, H, W, D = keys.shape
        if (prefix := self.of(layer)) is not None:
            k, v = (x.transpose(0, 1).expand(n, H, self.length, D) for x in prefix)
            keys, values = torch.cat([k, keys], dim=2), torch.cat([v, values], dim=2)
        queries = padded(q, row, place, n, W).transpose(1, 2)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
        return out.transpose(1, 2)[row, place]

    def packed_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, until: Tensor) -> Tensor:
        """The same by compiled code, without padding.

        Args:
            layer: whose beginning they see.
            q, k, v: `[T, H, D]`.
            until: `[P + T]` int32: until which token each is visible, the beginning's first.
        """
        if (prefix := self.of(layer)) is not None:
            k, v = torch.cat([prefix[0], k]), torch.cat([prefix[1], v])
        return ops.attention_of_prompts(q, k, v, until)

    def _attend(self, _layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # A head's keys beside each other: every answer's every token reads them.
        self._layers.append((_by_heads(k), _by_heads(v)))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)


def _by_heads(x: Tensor) -> Tensor:
    """x, `[P, H, D]`, laid out as `[H, P, D]`."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def padded(x: Tensor, row: Tensor, place: Tensor, n: int, W: int) -> Tensor:
    """`[T, H, D]` -> `[n, W, H, D]`, zero where no token stands."""
    out = x.new_zeros(n, W, *x.shape[1:])
    out[row, place] = x
    return out
