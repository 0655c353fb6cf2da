"""What the forward pass of a pack saves for the backward pass, and what both have at a time: counted from the tensors
that autograd saves, and held against them in tests/scaling/test_scaling.py.

For the torch path the count is within 2% of what is measured on a CPU. For the Triton kernels it is a PREDICTION: their
saved tensors were counted in Triton's interpreter, and no GPU has measured it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastft.model.gpt2 import GPT2Config
from fastft.scaling.setup import CACHED_BYTES, FLOAT32, KEPT_PAIRS, LOGIT_CHUNK_BYTES, Setup, Sizes, Weight, layout


@dataclass(frozen=True, slots=True)
class Block:
    """What a block saves, in bytes.

    Attributes:
        saved: all of it.
        of_mlp: of that what the MLP and its layer norm save.
        keeps_gelu: whether what comes out of the GELU is saved too.
        attends_back: whether its attention has a backward pass.
        goes_back: whether the block has one, so that all behind it has.
    """

    saved: int
    of_mlp: int
    keeps_gelu: bool
    attends_back: bool
    goes_back: bool


@dataclass(frozen=True, slots=True)
class Activations:
    """What is saved, in bytes.

    Attributes:
        blocks: of each block.
        end: behind the last block.
        boundaries: of each block in its place, where they are computed again; else None.
    """

    blocks: tuple[Block, ...]
    end: int
    boundaries: tuple[int, ...] | None = None

    @property
    def all(self) -> int:
        """At the loss."""
        return self.up_to(len(self.blocks) - 1) + self.end

    def up_to(self, layer: int) -> int:
        """When a block computes: of those before it, and its own."""
        return sum(map(self.of, range(layer + 1)))

    def of(self, layer: int) -> int:
        """Of one block, until its backward pass."""
        return self.blocks[layer].saved if self.boundaries is None else self.boundaries[layer]


def activations(config: GPT2Config, sizes: Sizes, setup: Setup) -> Activations:
    """What a forward pass saves.

    Of a token and a block, in units of C: the two sums that its layer norms read, in the residual stream's dtype; and
    in the products' dtype what they made of them (2), q, k and v (3), attention's result (1), and what goes into and
    comes out of the GELU (8). The torch path has scaled queries beside (1), and the probabilities of few pairs, where
    the kernels and compiled code have a log-sum-exp of each query's scores. The last block has keys and values of all
    tokens and the rest of its rows, and saves the rows that it picks.

    A product whose weight is frozen does not save what goes into it, but in stage 3, where DeepSpeed has a product of
    its own in place of torch's (`zero/linear.py`); with an adapter it does, and x A^T beside. Nothing is saved before
    the first weight that is trained.
    """
    C, T, R, e = config.n_embd, sizes.tokens, sizes.rows, setup.element
    stream = max(e, FLOAT32)
    tensors = layout(config, setup.decay_all, setup.part)
    whole = sizes.padded or setup.impl == "reference"  # the last block runs on all tokens
    goes_back = tensors.learns("wte.", "wpe.", "new_rows.wte")
    blocks: list[Block] = []
    for layer, weights in enumerate(tensors.blocks):
        of_rows = not whole and layer == tensors.layers - 1
        block = _Block(config, sizes, setup, weights, of_rows=of_rows).saves(goes_back)
        goes_back = block.goes_back
        blocks.append(block)
    end = 0
    if goes_back or tensors.learns("ln_f."):
        end += (T if whole else R) * (stream * C + 2 * stream)
    if setup.impl == "triton":
        end += R * e * C
    if setup.impl == "reference":
        end += R * config.vocab_size * stream
    if not setup.activation_checkpointing:
        return Activations(tuple(blocks), end)
    between = T * (stream + e) * C  # the stream, and a branch to be added
    kept = [(between if layer else T * stream * C) if block.goes_back else 0 for layer, block in enumerate(blocks)]
    return Activations(tuple(blocks), end, tuple(kept))


class _Block:
    """A block's tensors, counted."""

    def __init__(
        self, config: GPT2Config, sizes: Sizes, setup: Setup, weights: Sequence[Weight], *, of_rows: bool
    ) -> None:
        self.config, self.sizes, self.setup, self.of_rows = config, sizes, setup, of_rows
        self.names = {weight.name for weight in weights if weight.is_trained}
        self.lora = None if setup.part is None else setup.part.lora
        self.unit = setup.element * config.n_embd
        self.queries = sizes.rows if of_rows else sizes.tokens

    def saves(self, goes_back: bool) -> Block:
        """What it saves, where a gradient is asked for of what goes into it, or not."""
        T, R, unit = self.sizes.tokens, self.queries, self.unit
        saved, goes_back = self._norm("ln_1", T, goes_back)
        saves_input = self._saves_input("attn.c_attn", goes_back)
        saved += (T + R if self.of_rows else T) * unit if saves_input else 0
        saved += self._of_adapter("attn.c_attn", T, 2 if self.of_rows else 3)
        saved += self._of_adapter("attn.c_attn", R, 1) if self.of_rows else 0
        attends_back = goes_back = goes_back or self._learns("attn.c_attn")
        saved += self._attention() if attends_back else 0
        saves_result = attends_back and self._attention_saves_its_result
        saved += R * unit if saves_result or self._saves_input("attn.c_proj", goes_back) else 0
        saved += self._of_adapter("attn.c_proj", R, 1)
        goes_back = goes_back or self._learns("attn.c_proj")
        of_mlp, goes_back = self._norm("ln_2", R, goes_back)
        of_mlp += R * unit if self._saves_input("mlp.c_fc", goes_back) else 0
        of_mlp += self._of_adapter("mlp.c_fc", R, 4)
        goes_back = goes_back or self._learns("mlp.c_fc")
        of_mlp += R * 4 * unit if goes_back else 0
        keeps_gelu = self._saves_input("mlp.c_proj", goes_back)
        of_mlp += R * 4 * unit if keeps_gelu else 0
        of_mlp += self._of_adapter("mlp.c_proj", R, 1)
        goes_back = goes_back or self._learns("mlp.c_proj")
        return Block(saved + of_mlp, of_mlp, keeps_gelu, attends_back, goes_back)

    def _learns(self, name: str) -> bool:
        """Whether any weight of a layer is trained."""
        return any(one.startswith(f"{name}.") for one in self.names)

    def _saves_input(self, name: str, goes_back: bool) -> bool:
        """Whether a linear layer saves what goes into it, where that has a gradient or not."""
        if self.setup.stage == 3 and (goes_back or self._learns(name)):
            return True
        return f"{name}.weight" in self.names or f"{name}.lora_A" in self.names

    def _norm(self, name: str, rows: int, goes_back: bool) -> tuple[int, bool]:
        """What a layer norm saves; whether it has a backward pass."""
        stream = max(self.setup.element, FLOAT32)
        goes_back = goes_back or self._learns(name)
        return rows * (stream * self.config.n_embd + 2 * stream) if goes_back else 0, goes_back

    def _of_adapter(self, name: str, rows: int, outputs: int) -> int:
        """What a layer saves for its adapter: x A^T, and with DoRA the product that it scales, `outputs` C wide."""
        if self.lora is None or f"{name}.lora_A" not in self.names:
            return 0
        scaled = outputs * rows * self.unit if self.lora.dora else 0
        return rows * self.lora.r * self.setup.element + scaled

    @property
    def _attention_saves_its_result(self) -> bool:
        return self.setup.runs_at_once or self.sizes.padded

    def _attention(self) -> int:
        """What attention saves but for its result: q, k and v, and of the scores."""
        T, R, sizes, setup = self.sizes.tokens, self.queries, self.sizes, self.setup
        # The torch path saves scaled queries; in one tensor with keys and values, the queries stay as they are beside.
        copies = 2 if setup.impl == "cpu" and not (setup.runs_at_once or sizes.padded or self.of_rows) else 1
        pairs = sizes.row_pairs if self.of_rows else sizes.pairs
        return (2 * T + copies * R) * self.unit + _scores(setup, sizes, self.config.n_head, R, pairs)


def _scores(setup: Setup, sizes: Sizes, H: int, queries: int, pairs: int) -> int:
    """What attention saves of the scores."""
    if setup.impl == "reference":
        return queries * sizes.tokens * (2 * H * setup.element + 1)
    if setup.runs_at_once or sizes.padded:  # each query's log-sum-exp
        return FLOAT32 * H * queries
    return H * pairs * setup.element if pairs <= KEPT_PAIRS else 0


def logits(config: GPT2Config, sizes: Sizes, setup: Setup) -> tuple[int, int]:
    """Logits at a time, and what the softmax makes of them. The torch path goes through a chunk by `CACHED_BYTES`, in
    float32; compiled code needs no more memory; the Triton kernels have the logits' gradient alone, by columns."""
    V, e = config.vocab_size, setup.element
    wide = max(e, FLOAT32)
    if setup.impl == "reference":
        return sizes.tokens * V * e, sizes.rows * V * (e + wide)
    if setup.impl == "triton":
        return min(sizes.rows * V * e, LOGIT_CHUNK_BYTES), 0
    rows = min(sizes.rows, max(1, LOGIT_CHUNK_BYTES // (V * e)))
    if setup.runs_at_once:
        return rows * V * e, 0
    at_a_time = min(rows, max(1, CACHED_BYTES // (V * wide)))
    copies = 1 + (e < wide) + (at_a_time < rows)  # the wide logits, and the last rows' softmax while the next is made
    return rows * V * e, at_a_time * V * wide * copies


def passing(config: GPT2Config, sizes: Sizes, setup: Setup) -> int:
    """What a checkpointed block makes and forgets in the forward pass, around the GELU."""
    return sizes.tokens * config.n_embd * (9 * setup.element + FLOAT32) if setup.activation_checkpointing else 0


def transient(config: GPT2Config, sizes: Sizes, setup: Setup, rows: int, made: int, block: Block) -> int:
    """What the backward pass of a block of `rows` has beyond what was saved: gradients around the GELU; or of scores,
    when what the MLP had saved is gone and its weights' gradients are `made`."""
    C, e = config.n_embd, setup.element
    stream = max(e, FLOAT32)
    around_gelu = rows * C * ((4 if block.keeps_gelu else 8) * e + 2 * stream)
    if not block.attends_back:
        return around_gelu
    scores = 0 if setup.runs_at_once else 3 * config.n_head * sizes.largest_group * e
    return max(around_gelu, scores + made + rows * C * (2 * e + 3 * FLOAT32) - block.of_mlp)
