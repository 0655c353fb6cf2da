"""What the forward pass of a pack saves for the backward pass, and what both have at a time: counted from the tensors
that autograd saves, and held against them in tests/scaling/test_scaling.py.

For the torch path the count is within 2% of what is measured on a CPU. For the Triton kernels it is a PREDICTION: their
saved tensors were counted in Triton's interpreter, and no GPU has measured it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastft.model.gpt2 import GPT2Config
from fastft.scaling.setup import CACHED_BYTES, FLOAT32, KEPT_PAIRS, LOGIT_CHUNK_BYTES, Setup, Sizes


@dataclass(frozen=True, slots=True)
class Activations:
    """What is saved, in bytes.

    Attributes:
        block, last: of a block, and of the last one.
        end: behind the last block.
        layers: L.
        boundary, first: of a block in its place, and of the first block, where they are computed again; else 0.
    """

    block: int
    last: int
    end: int
    layers: int
    boundary: int = 0
    first: int = 0

    @property
    def all(self) -> int:
        """At the loss."""
        return self.up_to(self.layers - 1) + self.end

    def up_to(self, layer: int) -> int:
        """Of the blocks up to one."""
        if self.boundary:
            return self.first + self.boundary * layer
        return self.block * layer + self.computed(layer)

    def of(self, layer: int) -> int:
        """Of one block, until its backward pass."""
        if self.boundary:
            return self.boundary if layer else self.first
        return self.computed(layer)

    def computed(self, layer: int) -> int:
        """Of one block while its backward pass runs."""
        return self.last if layer == self.layers - 1 else self.block


def activations(config: GPT2Config, sizes: Sizes, setup: Setup) -> Activations:
    """What a forward pass saves.

    Of a token and a block, in units of C: the two sums that its layer norms read, in the residual stream's dtype; and
    in the products' dtype what they made of them (2), q, k and v (3), attention's result (1), and what goes into and
    comes out of the GELU (8). The torch path has scaled queries beside (1), and the probabilities of few pairs. The
    last block has keys and values of all tokens and the rest of its rows, and saves the rows that it picks.
    """
    C, H, T, e = config.n_embd, config.n_head, sizes.tokens, setup.element
    R = sizes.rows
    stream = max(e, FLOAT32)
    scaled = 1 if setup.impl == "cpu" and not sizes.padded else 0
    statistics = 2 * stream  # of a row's layer norm
    block = T * ((14 + scaled) * e * C + 2 * (stream * C + statistics)) + _scores(setup, sizes, H, T, sizes.pairs)
    last = T * (3 * e * C + stream * C + statistics) + R * ((12 + scaled) * e * C + stream * C + statistics)
    last += _scores(setup, sizes, H, R, sizes.row_pairs)
    end = R * (stream * C + statistics)
    if sizes.padded or setup.impl == "reference":  # the last block runs on all tokens
        last, end = block, T * (stream * C + statistics)
    if setup.impl == "triton":
        end += sizes.rows * e * C
    if setup.impl == "reference":
        end += sizes.rows * config.vocab_size * stream
    saved = Activations(block, last, end, config.n_layer)
    if not setup.activation_checkpointing:
        return saved
    return replace(saved, first=T * stream * C, boundary=T * (stream + e) * C)  # the stream, and a branch to be added


def _scores(setup: Setup, sizes: Sizes, H: int, queries: int, pairs: int) -> int:
    """What attention saves of the scores."""
    if setup.impl == "reference":
        return queries * sizes.tokens * (2 * H * setup.element + 1)
    if setup.impl == "triton" or sizes.padded:  # each query's log-sum-exp
        return FLOAT32 * H * queries
    return H * pairs * setup.element if pairs <= KEPT_PAIRS else 0


def logits(config: GPT2Config, sizes: Sizes, setup: Setup) -> tuple[int, int]:
    """Logits at a time, and what the softmax makes of them. The torch path goes through a chunk by `CACHED_BYTES`, in
    float32; the Triton kernels have the logits' gradient alone, by columns."""
    V, e = config.vocab_size, setup.element
    wide = max(e, FLOAT32)
    if setup.impl == "reference":
        return sizes.tokens * V * e, sizes.rows * V * (e + wide)
    if setup.impl == "triton":
        return min(sizes.rows * V * e, LOGIT_CHUNK_BYTES), 0
    rows = min(sizes.rows, max(1, LOGIT_CHUNK_BYTES // (V * e)))
    at_a_time = min(rows, max(1, CACHED_BYTES // (V * wide)))
    copies = 1 + (e < wide) + (at_a_time < rows)  # the wide logits, and the last rows' softmax while the next is made
    return rows * V * e, at_a_time * V * wide * copies


def passing(config: GPT2Config, sizes: Sizes, setup: Setup) -> int:
    """What a checkpointed block makes and forgets in the forward pass, around the GELU."""
    return sizes.tokens * config.n_embd * (9 * setup.element + FLOAT32) if setup.activation_checkpointing else 0


def transient(config: GPT2Config, sizes: Sizes, setup: Setup, rows: int, made: int) -> int:
    """What the backward pass of a block of `rows` has beyond what was saved: gradients around the GELU; or of scores,
    when what the MLP had saved is gone and its weights' gradients are `made`."""
    C, e = config.n_embd, setup.element
    stream = max(e, FLOAT32)
    around_gelu = rows * C * (4 * e + 2 * stream)
    scores = 0 if setup.impl == "triton" else 3 * config.n_head * sizes.largest_group * e
    in_attention = scores + made + rows * C * (2 * e + 3 * FLOAT32) - rows * C * (9 * e + stream)
    return max(around_gelu, in_attention)
