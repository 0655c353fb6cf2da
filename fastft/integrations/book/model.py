"""The book's GPT: its classes, parameters and random draws by the same names in the same order.

So the same seed gives the same initial weights, and a state_dict of either goes into the other. What differs is what
is computed: attention, layer norm and GELU are fused, and a batch may be a pack (`fastft.batches.batch.Batch`), or the
tokens that a cache does not hold yet.

Letters: B sequences of W tokens, T tokens of a pack, R loss rows, H heads, D head dim, C = H D width, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastft.batches.batch import Batch
from fastft.common.errors import UserError
from fastft.model import ops

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v), each `[..., H, D]` -> `[..., H, D]`: how tokens see each other."""


class LayerNorm(nn.Module):
    """Layer norm with the book's names: `scale` and `shift`."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C]`."""
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, self.eps)


class GELU(nn.Module):
    """GELU in its tanh form."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """Two projections with a GELU between."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        C = cfg["emb_dim"]
        self.layers = nn.Sequential(nn.Linear(C, 4 * C), GELU(), nn.Linear(4 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C]`."""
        projected: Tensor = self.layers(x)
        return projected


class MultiHeadAttention(nn.Module):
    """The projections around attention, causal unless the caller says otherwise."""

    mask: Tensor

    def __init__(
        self, d_in: int, d_out: int, context_length: int, dropout: float, num_heads: int, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        if d_out % num_heads:
            raise UserError(f"got d_out = {d_out}, num_heads = {num_heads}; expected a multiple of num_heads")
        self.d_out = d_out
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        # Only read where dropout draws, but a state_dict of the book's has it.
        self.register_buffer("mask", torch.triu(torch.ones(context_length, context_length), diagonal=1))

    def forward(self, x: Tensor, attend: Callable[..., Tensor] | None = None, rows: Tensor | None = None) -> Tensor:
        """`[..., C]` -> `[..., C]`; with `rows` `[R]` these tokens alone have queries, and `[R, C]` comes out."""
        q = self.W_query(x if rows is None else x.index_select(0, rows))
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, self.W_key(x), self.W_value(x)))
        context = self._causal(q, k, v) if attend is None else attend(q, k, v)
        projected: Tensor = self.out_proj(context.flatten(-2))
        return projected

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, W, H, D]` each -> `[B, W, H, D]`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if not draws(self.dropout):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        # As the book has it, so that dropout draws for the same weights in the same order.
        W = q.shape[2]
        scores = (q @ k.transpose(2, 3)).masked_fill(self.mask.bool()[:W, :W], -torch.inf)
        weights: Tensor = self.dropout(torch.softmax(scores / self.head_dim**0.5, dim=-1))
        return (weights @ v).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a layer norm and beside a shortcut."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        self.att = MultiHeadAttention(
            d_in=cfg["emb_dim"],
            d_out=cfg["emb_dim"],
            context_length=cfg["context_length"],
            num_heads=cfg["n_heads"],
            dropout=cfg["drop_rate"],
            qkv_bias=cfg["qkv_bias"],
        )
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg["emb_dim"])
        self.norm2 = LayerNorm(cfg["emb_dim"])
        self.drop_resid = nn.Dropout(cfg["drop_rate"])

    def forward(self, x: Tensor, attend: Callable[..., Tensor] | None = None, rows: Tensor | None = None) -> Tensor:
        """`[..., C]` -> `[..., C]`, or `[R, C]` with the tokens `rows` that alone are asked."""
        attended = self.drop_resid(self.att(self.norm1(x), attend, rows))
        x = attended + (x if rows is None else x.index_select(0, rows))
        out: Tensor = self.drop_resid(self.ff(self.norm2(x))) + x
        return out


class GPTModel(nn.Module):
    """The book's `GPTModel(cfg)`, with the keys of its configuration dictionaries.

    `cfg`: `vocab_size`, `context_length`, `emb_dim`, `n_heads`, `n_layers`, `drop_rate`, `qkv_bias`.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, in_idx: Tensor) -> Tensor:
        """The logits of every token: `[B, W]` int64 -> `[B, W, V]`."""
        logits: Tensor = self.out_head(self.hidden(in_idx))
        return logits

    def hidden(self, in_idx: Tensor) -> Tensor:
        """The final hidden states of rows that see themselves causally: `[B, W]` -> `[B, W, C]`.

        Raises:
            UserError: rows longer than the context.
        """
        length = in_idx.shape[1]
        self.check_length(length)
        x = self._embedded(in_idx, torch.arange(length, device=in_idx.device))
        normed: Tensor = self.final_norm(self.trf_blocks(x))
        return normed

    def check_length(self, length: int) -> None:
        """Refuses rows that are longer than the context.

        Raises:
            UserError: they are.
        """
        most = self.pos_emb.num_embeddings
        if length > most:
            raise UserError(
                f"got {length} tokens, expected at most context_length = {most}; cut them, or make it larger"
            )

    def hidden_of_rows(self, batch: Batch, impl: str) -> Tensor:
        """The final hidden states of a pack's loss rows, `[R, C]`."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            last = layer == len(self.trf_blocks) - 1
            return (ops.attention_of_rows if last else ops.attention)(q, k, v, batch, impl)

        return self._through_blocks(batch.tokens, batch.positions, attend, batch.rows)

    def hidden_of_last(self, tokens: Tensor, first: int, attend: Attend) -> Tensor:
        """The final hidden state behind each sequence, `[B, C]`, of its tokens `[B, W]` from place `first` on."""
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        return self._through_blocks(tokens, positions, attend, None)[:, -1]

    def _through_blocks(self, tokens: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None) -> Tensor:
        x = self._embedded(tokens, positions)
        last = len(self.trf_blocks) - 1
        for layer, block in enumerate(self.trf_blocks):
            x = block(x, lambda q, k, v, at=layer: attend(at, q, k, v), rows if layer == last else None)
        normed: Tensor = self.final_norm(x)
        return normed

    def _embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        embedded: Tensor = self.drop_emb(self.tok_emb(tokens) + self.pos_emb(positions))
        return embedded


def draws(dropout: nn.Module) -> bool:
    """Whether a dropout layer draws random numbers."""
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def drops(model: nn.Module) -> bool:
    """Whether some dropout of the model does."""
    return any(draws(module) for module in model.modules())


def is_known(model: nn.Module) -> TypeGuard[GPTModel]:
    """Whether the model is a `GPTModel` whose own forward says all: then parts of it can be computed by themselves.

    Not where it is wrapped or overridden, where a part of it is another one than the book's, which might look at a
    token's neighbours in the rows, or where something listens to one, which would hear of a pack's tokens in place of
    rows. Its linear layers may be replaced (LoRA).
    """
    return (
        isinstance(model, GPTModel)
        and type(model).forward is GPTModel.forward
        and all(type(module) is kind for module, kind in _parts(model))
        and not any(_has_hooks(module) or "forward" in vars(module) for module in model.modules())
    )


def _parts(model: GPTModel) -> Iterator[tuple[nn.Module, type]]:
    """What a model is made of, linear layers aside, and what each part of it is in the book."""
    yield model.trf_blocks, nn.Sequential
    yield model.final_norm, LayerNorm
    for block in model.trf_blocks:
        yield block, TransformerBlock
        if type(block) is TransformerBlock:
            yield block.att, MultiHeadAttention
            yield block.ff, FeedForward
            yield block.norm1, LayerNorm
            yield block.norm2, LayerNorm


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
