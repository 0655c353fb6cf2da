"""What a rank holds in an optimizer step: its fullest moments, put together from what stays, what is saved, and what is
gathered and reduced on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastft.model.gpt2 import GPT2Config
from fastft.scaling.activations import activations, logits, passing, transient
from fastft.scaling.fetches import Fetches, fetches
from fastft.scaling.setup import Layout, Setup, Sizes, layout, trained_of
from fastft.scaling.states import state_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of a rank. The kinds do not add up to the peak: activations are given back as gradients come.

    Attributes:
        parameters: the weights that the model computes with; in stage 3 this rank's part, and those that are gathered
            when the loss is computed.
        gradients: at their most.
        moments: AdamW's two, with the float32 masters of the weights that DeepSpeed keeps.
        activations: saved for the backward pass.
        logits: at a time, with what the softmax makes of them.
        buffers: DeepSpeed's buckets, and what it puts together to send.
        phases: on the device, at the fullest moment `between steps`, up to the `loss`, in the `backward` pass and the
            `update`.
        host_parameters, host_gradients, host_moments: in host memory, where they are offloaded.
    """

    parameters: int
    gradients: int
    moments: int
    activations: int
    logits: int
    buffers: int
    phases: Mapping[str, int]
    host_parameters: int = 0
    host_gradients: int = 0
    host_moments: int = 0

    @property
    def peak(self) -> int:
        """On the device at its fullest moment."""
        return max(self.phases.values())

    @property
    def host(self) -> int:
        """In host memory."""
        return self.host_parameters + self.host_gradients + self.host_moments


def memory(config: GPT2Config, sizes: Sizes, setup: Setup) -> Memory:
    """What a rank holds in an optimizer step once the moments are there; of the rank that holds the most.

    Args:
        config: of the model.
        sizes: of the largest pack.
        setup: stage, ranks, arithmetic.
    """
    step = _Step(config, sizes, setup)
    state = step.state
    phases = {
        "between steps": step.always + state.rests,
        "loss": step.loss(),
        "backward": step.backward(),
        "update": step.always + state.left + max(state.update, setup.element * step.fetches.left),
    }
    return Memory(
        parameters=state.parameters + step.live,
        gradients=max(state.kept + max(state.part, step.head), state.left),
        moments=state.moments,
        activations=step.saved.all,
        logits=sum(step.logits),
        buffers=state.buffers + state.buckets + max(step.copied, state.at_end),
        phases=phases,
        host_parameters=state.host_parameters,
        host_gradients=state.host_gradients,
        host_moments=state.host_moments,
    )


BYTES_OF_A_TOKEN = 48
"""Of a batch: ids, positions, where they are seen and in which tiles; of a loss row: its token, target and weight."""


class _Step:
    """Bytes on the device at the fullest moments of an optimizer step."""

    def __init__(self, config: GPT2Config, sizes: Sizes, setup: Setup) -> None:
        self.config, self.sizes, self.setup = config, sizes, setup
        self.tensors = layout(config, setup.decay_all, setup.part)
        self.state = state_of(self.tensors, setup)
        self.saved = activations(config, sizes, setup)
        self.logits = logits(config, sizes, setup)
        self.fetches = _fetched(self.tensors, setup)
        self.table = setup.element * config.vocab_size * config.n_embd
        self.head = self.table if self.tensors.learns("wte." if config.tie_head else "lm_head.") else 0
        self.hidden = setup.element * sizes.rows * config.n_embd
        self.copied = 0
        state = self.state
        self.always = state.parameters + state.moments + state.buffers
        early = state.buckets if state.early else 0
        self.before = self.always + state.kept + early + self._batch

    @property
    def _batch(self) -> int:
        """The batch on the device (`fastft.gpu.staging`): its tensors of tokens and rows, and the masks of the torch
        path's tiles. The plain engine computes with the host's own."""
        if not self.setup.cuda and not self.setup.stage:
            return 0
        masks = self.sizes.pairs + self.sizes.row_pairs if self.setup.impl == "cpu" else 0
        return BYTES_OF_A_TOKEN * (self.sizes.tokens + self.sizes.rows) + masks

    @property
    def live(self) -> int:
        """The weights that stage 3 has gathered at the loss."""
        return self.setup.element * self.fetches.loss

    @property
    def head_comes_early(self) -> bool:
        """Whether the loss brings its gradients along, as the torch path's does."""
        return self.setup.impl == "cpu"

    def loss(self) -> int:
        """While a block computes; at the softmax of some rows' logits, or when they become the head's gradient: at both
        at a time, where there are more rows."""
        chunk, softmax = self.logits if self.setup.impl != "triton" else (0, 0)
        gradients = self.head + self.hidden if self.head_comes_early else 0
        is_one = chunk >= self.setup.element * self.sizes.rows * self.config.vocab_size
        at_loss = self.hidden + chunk + (max(softmax, gradients) if is_one else softmax + gradients)
        in_blocks = max(
            self.saved.up_to(layer) + self.setup.element * there for layer, there in enumerate(self.fetches.forward)
        )
        in_blocks += passing(self.config, self.sizes, self.setup)
        return self.before + self.tables + max(in_blocks, self.saved.all + self.live + at_loss)

    @property
    def tables(self) -> int:
        """The copies of the embedding and of the head that new rows are put into: a gathered weight cannot hold them
        (`GPT2.copies_tables`)."""
        return 2 * self.table if self.setup.stage == 3 and self.tensors.learns("new_rows.") else 0

    def backward(self) -> int:
        """Block after block, from the last: what was saved goes, gradients come, and are reduced by buckets."""
        setup, tensors, state = self.setup, self.tensors, self.state
        here = self.before + self.saved.all + self.head + self.hidden + (0 if state.early else state.buckets)
        here += 0 if self.head_comes_early else self.tables // 2  # the head's, which the loss saves
        peak = here + self.live + (0 if self.head_comes_early else sum(self.logits))
        waiting, part = 0, state.part
        layers = reversed(range(tensors.layers - len(self.fetches.backward), tensors.layers))
        for layer, there in zip(layers, self.fetches.backward, strict=True):
            gathered, within, made = setup.element * there, self._within(layer), trained_of(tensors.blocks[layer])
            waiting += made
            peak = max(peak, here + gathered + within)
            if setup.stage and waiting > setup.buckets.reduce:
                peak = max(peak, here + gathered + part + max(within, self._copy(waiting)))
                here, part, waiting = here + part, 0, 0
            here += state.grows * made - self.saved.of(layer)
        # Gradients that are kept take the head's in before the first reduction makes this rank's part.
        taken_in = self.head if part and state.grows < 0 and self.is_one else 0
        return max(peak, here + part - taken_in + self._behind_blocks(waiting + tensors.trained_of_root))

    @property
    def is_one(self) -> bool:
        """Whether the head's gradient and the embedding's are one (`fastft.model.tied`); elsewhere the lookup has its
        own."""
        return self.head_comes_early and self.config.tie_head

    def _within(self, layer: int) -> int:
        """What the backward pass of a block makes."""
        block, made = self.saved.blocks[layer], trained_of(self.tensors.blocks[layer])
        is_last = layer == self.tensors.layers - 1
        rows = self.sizes.rows if is_last and not self.sizes.padded else self.sizes.tokens
        within = transient(self.config, self.sizes, self.setup, rows, self.state.grows * made * 2 // 3, block)
        if self.setup.stage == 3:  # a block is reduced as one
            within += self.setup.element * made
        return within + (0 if self.saved.boundaries is None else block.saved)

    def _behind_blocks(self, waiting: int) -> int:
        """The embeddings' gradients, to which the head's belongs; and the last reduction."""
        element, tensors = self.setup.element, self.tensors
        rest = tensors.trained_of_root - self.head // element
        of_lookup = self.table if tensors.learns("wte.") and not self.is_one else 0
        root = sum(weight.elements for weight in tensors.root)
        here = self.state.grows * rest - self.hidden + element * min(self.fetches.loss, root)
        return here + max(of_lookup, self._copy(waiting) + self.state.at_end)

    def _copy(self, waiting: int) -> int:
        """Of the gradients that wait for a reduction, put together. One beyond the bucket's size is reduced by itself:
        by the ranks' pieces of it, or in stage 3 as it is where N divides it."""
        reduce, largest, N = self.setup.buckets.reduce, self._largest_of_root, self.setup.ranks
        together = min(waiting, reduce)
        if waiting > largest > reduce:
            piece = -(-largest // N)
            pieces = 0 if piece > reduce else reduce + piece
            together = max(together, pieces if self.setup.stage < 3 else largest if largest % N else 0)
        self.copied = max(self.copied, self.state.copy * together)
        return self.state.copy * together

    @property
    def _largest_of_root(self) -> int:
        return max((weight.elements for weight in self.tensors.root if weight.is_trained), default=0)


def _fetched(tensors: Layout, setup: Setup) -> Fetches:
    if setup.stage == 3 and (setup.ranks > 1 or (setup.offload and setup.cuda)):
        return fetches(tensors, setup.buckets, setup.activation_checkpointing, setup.packs)
    return Fetches([], [0] * tensors.layers, 0, [0] * (tensors.layers - tensors.lowest), 0)
