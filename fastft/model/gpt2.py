"""GPT-2 from scratch: learned positions, pre-layer-norm, tanh GELU, biases everywhere but the head.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). Parameters bear GPT-2's own checkpoint
names (`wte, wpe, h.N.ln_1, h.N.attn.c_attn, ...`), so that loading is a loop of checked copies.

Letters: T tokens, H heads, D head dim, C = H D width, L layers, V vocab, R loss rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastft.batches.batch import Batch
from fastft.common.errors import UserError
from fastft.data.tokenizer import VOCAB_SIZE, Tokenizer, gpt2_tokenizer
from fastft.model import ops
from fastft.model.new_rows import NewRows
from fastft.model.packed_linear import PackedLinear
from fastft.model.tied import Tie

if TYPE_CHECKING:
    from fastft.model.part import Part

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v), each `[T, H, D]` -> `[T, H, D]`: how tokens see each other, in training or with a cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config:
    """The shape of a GPT-2, and its tokenizer."""

    n_layer: int
    n_head: int
    n_embd: int
    n_ctx: int = 1024
    vocab_size: int = VOCAB_SIZE
    tie_head: bool = True
    """Read the head from the token embedding, as GPT-2 does. The book trains the head apart."""
    layer_norm_epsilon: float = 1e-5
    tokenizer: Tokenizer = field(default_factory=gpt2_tokenizer, compare=False, repr=False)
    """What the ids mean. It belongs to the model, and says nothing of its shape."""

    def shape(self) -> dict[str, int | float | bool]:
        """The fields that are no tokenizer, to be written down."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tokenizer"}

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "n_ctx", "vocab_size"):
            if getattr(self, name) < 1:
                raise UserError(f"GPT2Config: got {name} = {getattr(self, name)}, expected at least 1")
        if self.n_embd % self.n_head:
            raise UserError(
                f"GPT2Config: got n_embd = {self.n_embd}, n_head = {self.n_head}; expected a multiple of n_head"
            )


SIZES = {
    "gpt2": GPT2Config(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPT2Config(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPT2Config(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPT2Config(n_layer=48, n_head=25, n_embd=1600),
    "nano": GPT2Config(n_layer=4, n_head=4, n_embd=256),
    "pico": GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=256),
}
"""The sizes by name: GPT-2's four, `nano` for the demo, and `pico` for trying things out in seconds."""


def config_for(size: str, *, tie_head: bool = True) -> GPT2Config:
    """The configuration of a size by name.

    Raises:
        UserError: no such size.
    """
    if size not in SIZES:
        raise UserError(f"got --model {size}, expected one of {', '.join(SIZES)}")
    return replace(SIZES[size], tie_head=tie_head)


def number_of_parameters(config: GPT2Config) -> int:
    """How many a model has, counted without making it; a tied head once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT2(config).parameters())


class Attention(nn.Module):
    """The projections around attention; what the tokens see is the caller's affair."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn: ops.AnyLinear = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj: ops.AnyLinear = nn.Linear(config.n_embd, config.n_embd)

    def forward(
        self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor], rows: ops.Rows | None, impl: str
    ) -> Tensor:
        """`[T, C]` -> `[T, C]`, or `[R, C]` with the tokens `rows` that alone have queries."""
        if rows is None or isinstance(self.c_attn, PackedLinear):
            q, k, v = ops.split_heads(self.c_attn(x), 3, self.n_head, impl)
            q = q if rows is None else q.index_select(0, rows.at)
        else:
            C = x.shape[1]
            q, kv = ops.split_linear((ops.take_rows(x, rows, impl), x), self.c_attn, (C, 2 * C))
            q = q.unflatten(1, (self.n_head, -1))
            k, v = ops.split_heads(kv, 2, self.n_head, impl)
        projected: Tensor = self.c_proj(attend(q, k, v).flatten(1))
        return projected


class MLP(nn.Module):
    """Two projections with a GELU between."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc: ops.AnyLinear = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj: ops.AnyLinear = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor, impl: str) -> Tensor:
        """`[T, C]` -> `[T, C]`."""
        projected: Tensor = self.c_proj(ops.linear_gelu(x, self.c_fc, impl))
        return projected


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and beside a residual stream.

    What the MLP adds to the stream is given on by itself: the next layer norm adds it in the same pass over memory.
    """

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, stream: Tensor, branch: Tensor | None, attend: Attend, rows: ops.Rows | None, impl: str
    ) -> tuple[Tensor, Tensor]:
        """The stream and what is still to be added to it, `[T, C]` each (no branch before the first block) -> the same.

        With `rows`, the results of these tokens alone: `[R, C]`.
        """
        x, stream = ops.add_layer_norm(stream, branch, self.ln_1, self.attn.c_attn.weight.dtype, impl)
        attended = self.attn(x, lambda q, k, v: attend(self.layer, q, k, v), rows, impl)
        stream = stream if rows is None else ops.take_rows(stream, rows, impl)
        x, stream = ops.add_layer_norm(stream, attended, self.ln_2, self.mlp.c_fc.weight.dtype, impl)
        return stream, self.mlp(x, impl)


class GPT2(nn.Module):
    """GPT-2. `forward` takes a `Batch` and gives the loss of each of its rows."""

    def __init__(self, config: GPT2Config, *, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = checkpoint_activations
        self.reentrant_checkpoints = False
        self.copies_tables = False
        """Whether new rows go into copies of the frozen tables: what is written into a gathered weight is lost when it
        is gathered again for the backward pass."""
        self.part: Part | None = None
        """What is trained, where it is not all: see `fastft.model.part`."""
        self.new_rows: NewRows | None = None
        """Rows that are trained where the rest of the embedding stays."""
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = None if config.tie_head else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.packed_head: PackedLinear | None = None  # of a model that answers: `fastft.decoding.inference`
        self._initialise()

    def _initialise(self) -> None:
        """Normal with standard deviation 0.02; residual projections divided by sqrt(2 L). An untied head starts as a
        copy of the token embedding, as in the book."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif ".ln_" not in f".{name}":
                nn.init.normal_(parameter, std=residual_std if name.endswith("c_proj.weight") else 0.02)
        if self.lm_head is not None:
            with torch.no_grad():
                self.lm_head.weight.copy_(self.wte.weight)

    @property
    def head(self) -> Tensor:
        """`[V, C]`: the weight of the head, the token embedding where they are tied."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(
        self, tokens: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None, impl: str = "auto"
    ) -> Tensor:
        """The final hidden states, layer-normed: `[T]` int64 tokens and positions -> `[T, C]`.

        With `rows` `[R]` only these tokens' states are asked for, `[R, C]`: the last block then computes keys and
        values for all tokens, and all else for these.
        """
        impl = ops.resolve(impl, tokens.device)
        asked = None if rows is None else ops.Rows(rows)
        return self._hidden(ops.Rows(tokens), ops.Rows(positions), attend, asked, impl)

    def _hidden(
        self, tokens: ops.Rows, positions: ops.Rows, attend: Attend, rows: ops.Rows | None, impl: str
    ) -> Tensor:
        return self._through_blocks(self._embedded(self._tables(impl)[0], tokens, positions, impl), attend, rows, impl)

    def _embedded(self, table: Tensor, tokens: ops.Rows, positions: ops.Rows, impl: str) -> Tensor:
        # Read by the model itself, like the head, and not through modules: what stage 3 of ZeRO gathers for the model's
        # own use, a call of the module would give away again.
        found = ops.lookup(table, tokens, impl)
        if self._learns_new_rows(impl) and self.new_rows is not None:
            found = self.new_rows.looked_up(found, tokens.at)
        stream = found + ops.lookup(self.wpe.weight, positions, impl)
        wide = torch.promote_types(stream.dtype, torch.float32)  # sums of many branches lose the small ones in bf16
        return stream.to(wide)

    def _tables(self, impl: str) -> tuple[Tensor, Tensor]:
        """The embedding and the head, `[V, C]` each, with the new rows in them."""
        new = self.new_rows
        if new is None:
            return self.wte.weight, self.head
        learns = torch.is_grad_enabled()
        if learns and (self.copies_tables or not self._learns_new_rows(impl)):
            with contextlib.nullcontext() if not self._learns_new_rows(impl) else torch.no_grad():
                return new.into(self.wte.weight, new.wte), new.into(self.head, new.of_head)
        new.write(self.wte.weight, None if self.lm_head is None else self.lm_head.weight)
        return self.wte.weight, self.head

    def _learns_new_rows(self, impl: str) -> bool:
        """Whether new rows get gradients of their own; else, by the reference, those of whole tables."""
        return self.new_rows is not None and impl != "reference" and not torch.compiler.is_compiling()

    def _through_blocks(self, stream: Tensor, attend: Attend, rows: ops.Rows | None, impl: str) -> Tensor:
        branch: Tensor | None = None
        again, learns = self.reentrant_checkpoints, torch.is_grad_enabled()
        for block in self.h:
            asked = rows if block.layer == self.config.n_layer - 1 else None
            if again and learns and not stream.requires_grad and _learns(block):
                # Stage 3 of ZeRO, and a reentrant checkpoint, go by the gradient of what goes into a block, for which
                # frozen embeddings do not ask: the first would reduce a block's gradients before they are there.
                stream = stream.requires_grad_()
            if self.checkpoint_activations and learns and (stream.requires_grad or not again):
                # There is no dropout, whose random state would have to be kept, which no CUDA graph allows.
                stream, branch = checkpoint(
                    block, stream, branch, attend, asked, impl, use_reentrant=again, preserve_rng_state=False
                )
            else:
                stream, branch = block(stream, branch, attend, asked, impl)
        return ops.add_layer_norm(stream, branch, self.ln_f, self.head.dtype, impl)[0]

    def forward(self, batch: Batch, *, row_weights: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
        """The loss of the batch, and of each of its rows.

        Args:
            batch: on the model's device.
            row_weights: `[R]` floating; `batch.weights` where they are not given. A trainer divides them by the count
                of the whole optimizer step, and so its gradient needs no further pass.
            impl: see `fastft.model.ops`.

        Returns:
            The sum of the rows' losses by their weights, a scalar, and the losses themselves, `[R]` without gradient;
            float32 (float64 in a float64 model).
        """
        impl = ops.resolve(impl, batch.tokens.device)
        row_weights = batch.weights if row_weights is None else row_weights
        rows_only = impl != "reference" and batch.row_length is None
        attend = _attend(batch, impl, self.config.n_layer - 1 if rows_only else None)
        rows = ops.Rows(batch.rows, batch.row_plan) if rows_only else None
        tokens, positions = ops.Rows(batch.tokens, batch.token_plan), ops.Rows(batch.positions, batch.position_plan)
        # torch.compile does not see what one backward pass leaves for another: there each use has a gradient.
        is_fast = impl != "reference" and not torch.compiler.is_compiling()
        if self.lm_head is None and self.wte.weight.requires_grad and is_fast:
            tie = Tie(self.wte.weight)
            looked_up = tie.lookup(batch.tokens, lambda total, grad: ops.add_rows_(total, grad, tokens, impl))
            stream = looked_up + ops.lookup(self.wpe.weight, positions, impl)
            hidden = self._through_blocks(stream, attend, rows, impl)
            head = tie.head()
        else:
            table, head = self._tables(impl)
            hidden = self._through_blocks(self._embedded(table, tokens, positions, impl), attend, rows, impl)
        loss, losses = ops.linear_cross_entropy(hidden, head, batch, row_weights, impl, rows_only=rows_only)
        if self.new_rows is not None and self._learns_new_rows(impl) and torch.is_grad_enabled():
            picked = hidden.detach() if rows_only else hidden.detach().index_select(0, batch.rows)
            loss = self.new_rows.judged(loss, losses, picked, head, batch.targets, row_weights)
        return loss, losses

    def logits(self, batch: Batch, *, impl: str = "auto") -> Tensor:
        """The logits of every token of the batch: `[T, V]`."""
        impl = ops.resolve(impl, batch.tokens.device)
        return self.logits_of(self.hidden(batch.tokens, batch.positions, _attend(batch, impl, None), impl=impl))

    def logits_of(self, hidden: Tensor) -> Tensor:
        """The logits of final hidden states: `[T, C]` -> `[T, V]`."""
        return F.linear(hidden, self.head) if self.packed_head is None else self.packed_head.product(hidden)


def _learns(block: nn.Module) -> bool:
    return any(weight.requires_grad for weight in block.parameters())


def _attend(batch: Batch, impl: str, layer_of_rows: int | None) -> Attend:
    """Training's attention; in the layer `layer_of_rows` only the loss rows have queries."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        of_rows = layer == layer_of_rows
        return (ops.attention_of_rows if of_rows else ops.attention)(q, k, v, batch, impl)

    return attend
