"""What travels between the ranks in an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from fastft.model.gpt2 import GPT2Config
from fastft.scaling.fetches import fetches
from fastft.scaling.setup import FLOAT32, Layout, Setup, layout, rounded
from fastft.scaling.states import FLOAT64, padded_groups, uses_bf16_optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What the collectives of an optimizer step are given on each rank: bytes of whole tensors. The whole of an
    all-gather is what comes out of it, and of a reduce-scatter what goes in (as nccl-tests count, doc/PERFORMANCE.md).

    Attributes:
        ranks: N.
        all_reduce, reduce_scatter, all_gather: by kind.
        control: the sums of gradient norms and flags. What `World.sum` adds up, a few numbers in host memory, is not
            counted.
    """

    ranks: int
    all_reduce: int = 0
    reduce_scatter: int = 0
    all_gather: int = 0
    control: int = 0

    @property
    def handed(self) -> int:
        """All of it."""
        return self.all_reduce + self.reduce_scatter + self.all_gather + self.control

    @property
    def wire(self) -> int:
        """Bytes that a rank sends by ring algorithms: (N - 1) / N of what is scattered or gathered, and twice that of
        an all-reduce, which is one after the other (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms
        for clusters of workstations")."""
        passed = 2 * (self.all_reduce + self.control) + self.reduce_scatter + self.all_gather
        return passed * (self.ranks - 1) // self.ranks


def traffic(config: GPT2Config, setup: Setup) -> Traffic:
    """What each rank hands to collectives in an optimizer step.

    Stages 1 and 2 reduce by an all-reduce, of which each rank keeps its part (DeepSpeed's
    `use_multi_rank_bucket_allreduce`): 2 Ψ elements on the wire where the paper's reduce-scatter has Ψ. Stage 1 does so
    once, stage 2 for every pack. Stage 3 scatters the gradients of every pack, and gathers the weights for it. What is
    not trained has no gradient to send; but stage 3 parts it too, and gathers it.

    Args:
        config: of the model.
        setup: stage, ranks, arithmetic, packs.
    """
    tensors, e = layout(config, setup.decay_all, setup.part), setup.element
    if setup.ranks == 1:
        return Traffic(ranks=1)
    if setup.stage == 0:
        return Traffic(ranks=setup.ranks, all_reduce=max(e, FLOAT32) * tensors.trained)
    if setup.stage == 3:
        return _of_stage_3(tensors, setup)
    padded = e * sum(padded_groups(tensors, setup))
    if uses_bf16_optimizer(setup):  # it has all gradients, and computes their norm by itself
        return Traffic(ranks=setup.ranks, all_reduce=padded, all_gather=padded)
    packs = setup.packs if setup.stage == 2 else 1
    flag = 1 if e < FLOAT32 else 0  # whether a gradient is not finite
    return Traffic(
        ranks=setup.ranks,
        all_reduce=packs * e * tensors.trained,
        all_gather=padded,
        control=FLOAT32 * len(tensors.groups) + flag,
    )


def _of_stage_3(tensors: Layout, setup: Setup) -> Traffic:
    e, N = setup.element, setup.ranks
    gathered = fetches(tensors, setup.buckets, setup.activation_checkpointing, setup.packs).gathered
    persistent = [size for size in tensors.each() if size <= setup.buckets.persistence]
    return Traffic(
        ranks=N,
        reduce_scatter=e * setup.packs * sum(rounded(size, N) for group in tensors.groups for size in group),
        all_gather=e * sum(rounded(size, N) for size in [*gathered, *persistent]),
        control=len(tensors.groups) * (FLOAT32 if setup.offload else FLOAT64),
    )
