"""What a rank holds of weights, gradients and moments, and how gradients come and go: of plain data parallelism, and of
DeepSpeed 0.19.8 as its files in `deepspeed/runtime` do it with fastft's settings (`fastft.engines.zero_config`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastft.engines.moments import BYTES_OF_A_WEIGHT, MOMENTS
from fastft.scaling.setup import FLOAT32, Layout, Setup, rounded, trained_of

FLOAT64 = 8
SCRATCH = 4 << 20
"""Of `fastft.engines.optim.CpuAdamW`: some weights' gradients in float32."""
ALL_REDUCED = 500_000_000
"""Elements that `bf16_optimizer.py` puts together for an all-reduce."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Bytes of a rank, between the passes of an optimizer step and within them.

    Attributes:
        parameters, moments, buffers: on the device, all the time.
        rests: gradients that are there between steps too.
        kept: gradients that are there when the last pack's forward pass begins.
        grows: an element's gradient that stays where the backward pass makes it; negative: that leaves where it was
            kept, for a bucket.
        part: this rank's part of the gradients, which the first reduction of a backward pass makes.
        buckets: of gradients to be reduced, in the backward pass; with `early` in the forward pass too.
        copy: an element's, where a reduction puts gradients together.
        at_end: what a reduction behind the backward pass puts together.
        left: gradients that the update begins with.
        update: what it makes beside them.
        host_parameters, host_gradients, host_moments: in host memory.
    """

    parameters: int
    moments: int
    buffers: int = 0
    rests: int = 0
    kept: int = 0
    grows: int = 0
    part: int = 0
    buckets: int = 0
    early: bool = False
    copy: int = 0
    at_end: int = 0
    left: int = 0
    update: int = 0
    host_parameters: int = 0
    host_gradients: int = 0
    host_moments: int = 0


def state_of(tensors: Layout, setup: Setup) -> State:
    """The state of the rank that holds the most."""
    return (_plain, _stages_1_and_2, _stages_1_and_2, _stage_3)[setup.stage](tensors, setup)


def _plain(tensors: Layout, setup: Setup) -> State:
    """`fastft.engines.engine.Engine`: all weights, gradients and moments on every rank. In 16 bits copies of the
    weights compute, whose gradients are summed in float32 over packs and ranks."""
    if setup.cuda:
        return _flat(tensors, setup)
    wide = max(setup.element, FLOAT32)
    copies = setup.element < FLOAT32
    copied = setup.element * tensors.copied if copies else 0
    whole = wide * tensors.trained
    of_a_pack = copied + wide * (tensors.trained - tensors.copied) if copies else whole
    summed = setup.packs > 1
    left = whole if summed or setup.ranks > 1 else of_a_pack
    return State(
        parameters=whole + copied + _base(tensors, setup),
        moments=len(MOMENTS) * whole,
        buffers=SCRATCH if copies else 0,
        kept=whole if summed else 0,
        grows=setup.element if copies else 0 if summed else wide,
        left=left + (of_a_pack if copies and summed else 0),  # which are still to be added
    )


def _base(tensors: Layout, setup: Setup) -> int:
    """What is not trained, which stage 0 has in the products' dtype alone, but for layer norms and positions; and the
    rows' lengths of DoRA, which the model that computes with the copies has too."""
    wide = max(setup.element, FLOAT32)
    lengths = wide * tensors.lengths * (2 if setup.element < wide else 1)
    return setup.element * tensors.narrow + wide * (tensors.frozen - tensors.narrow) + lengths


def _flat(tensors: Layout, setup: Setup) -> State:
    """`fastft.engines.gpu_engine.GpuEngine`: the same in flat tensors that are always there; narrow gradients stay
    where the backward pass makes them until a block's are complete."""
    wide = max(setup.element, FLOAT32)
    whole = wide * tensors.trained
    copies = setup.element * tensors.trained if setup.element < wide else 0
    return State(
        parameters=whole + copies + _base(tensors, setup),
        moments=len(MOMENTS) * whole,
        rests=whole,
        kept=whole,
        buckets=setup.element * max(map(trained_of, tensors.blocks)),
        left=whole,
    )


def padded_groups(tensors: Layout, setup: Setup) -> list[int]:
    """Elements of AdamW's groups as stages 1 and 2 lay them out: each in one buffer, a multiple of 2 N long."""
    return [rounded(sum(group), 2 * setup.ranks) for group in tensors.groups]


def _stages_1_and_2(tensors: Layout, setup: Setup) -> State:
    """`zero/stage_1_and_2.py`: of each group every rank has a part, with its masters and moments. The masters are a
    copy in fp32 too."""
    part = sum(padded_groups(tensors, setup)) // setup.ranks
    state = State(
        parameters=setup.element * (sum(padded_groups(tensors, setup)) + tensors.frozen) + FLOAT32 * tensors.lengths,
        moments=(FLOAT32 + BYTES_OF_A_WEIGHT) * part,
    )
    if uses_bf16_optimizer(setup):
        return _bf16_optimizer(tensors, setup, state)
    state = _reduced_in_16_bits(tensors, setup, state) if setup.element < FLOAT32 else _reduced(tensors, setup, state)
    state = replace(
        state,
        buckets=setup.element * setup.buckets.reduce * (2 if setup.buckets.overlap else 1),
        copy=setup.element if setup.ranks > 1 else 0,
    )
    return _offloaded(tensors, setup, state) if setup.offload else state


def _reduced(tensors: Layout, setup: Setup, state: State) -> State:
    """Parameters that reach into a rank's part keep their whole gradient. Stage 1 keeps all until the last pack."""
    held, piece = _held_by_a_rank(tensors, setup.ranks)
    several, first = setup.packs > 1, setup.stage == 1
    part, flat = setup.element * held, FLOAT32 * max(padded_groups(tensors, setup)) // setup.ranks
    return replace(
        state,
        kept=(setup.element * tensors.trained if first else part) if several else 0,
        grows=-setup.element if first and several else 0,
        part=part,
        early=first and several,
        left=part,
        update=max(FLOAT64 * piece, flat),  # for the norm, or to put a group's gradients together
    )


def _reduced_in_16_bits(tensors: Layout, setup: Setup, state: State) -> State:
    """What is reduced is added to a rank's part in float32."""
    _, piece = _held_by_a_rank(tensors, setup.ranks)
    part = FLOAT32 * sum(padded_groups(tensors, setup)) // setup.ranks
    several = setup.packs > 1
    return replace(state, kept=part if several else 0, part=0 if several else part, left=part, update=FLOAT64 * piece)


def _offloaded(tensors: Layout, setup: Setup, state: State) -> State:
    """Masters, moments and fp32 gradients of the part go to the host, and so do the fp32 gradients of earlier packs;
    16-bit ones are summed on the device. A buffer for the largest gradient is on either side."""
    e, wide = setup.element, setup.element == FLOAT32
    part = sum(padded_groups(tensors, setup)) // setup.ranks
    largest = max(map(max, tensors.groups))
    earlier = e * _held_by_a_rank(tensors, setup.ranks)[0] if wide and setup.packs > 1 else 0
    return replace(
        state,
        moments=0,
        buffers=e * largest,
        kept=0 if wide else state.kept,
        grows=0,
        part=0 if wide else state.part,
        early=False,
        left=0 if wide else state.left,
        update=0,
        host_parameters=e * (part + largest),
        host_gradients=FLOAT32 * part + earlier,
        host_moments=state.moments,
    )


def uses_bf16_optimizer(setup: Setup) -> bool:
    """Whether DeepSpeed takes `bf16_optimizer.py`: for stage 1 where 16-bit gradients are summed in float32."""
    return setup.stage == 1 and setup.element < FLOAT32 and not setup.offload


def _bf16_optimizer(tensors: Layout, setup: Setup, state: State) -> State:
    """All gradients in both, on every rank: what stage 1 saves is masters and moments alone."""
    groups, several = padded_groups(tensors, setup), setup.packs > 1
    summed, made = FLOAT32 * sum(groups), setup.element * tensors.trained
    together = len(groups) > 1 and groups[0] <= ALL_REDUCED
    return replace(
        state,
        rests=summed,
        kept=summed + (made if several else 0),
        grows=0 if several else setup.element,
        at_end=(FLOAT32 + setup.element) * sum(groups) if together else setup.element * max(groups),
        left=summed + made,
    )


def _held_by_a_rank(tensors: Layout, N: int) -> tuple[int, int]:
    """Elements of the parameters that reach into a rank's part of the groups, of the rank that has the most; and the
    largest piece that a rank has of one."""
    held = [0] * N
    largest = 0
    for group in tensors.groups:
        part = rounded(sum(group), 2 * N) // N
        begin = 0
        for size in group:
            end = begin + size
            for rank in range(begin // part, (end - 1) // part + 1):
                held[rank] += size
                largest = max(largest, min(end, (rank + 1) * part) - max(begin, rank * part))
            begin = end
    return max(held), largest


def _stage_3(tensors: Layout, setup: Setup) -> State:
    """`zero/stage3.py`: each parameter is parted by itself, and the small ones stay gathered beside. The masters are a
    copy in fp32 too: the file would spare it where the weights are float32 and on the same device, but compares a
    device with a string, which are never equal."""
    e, N, threshold = setup.element, setup.ranks, setup.buckets.persistence
    parts = [[rounded(size, N) // N for size in group] for group in tensors.groups]
    part = sum(map(sum, parts))
    held = sum(rounded(size, N) // N for size in tensors.each())
    lengths = FLOAT32 * tensors.lengths
    persistent = e * sum(rounded(size, N) for size in tensors.each() if size <= threshold)
    made = max(FLOAT64 * max(map(max, parts)), FLOAT32 * max(map(sum, parts)))
    state = State(
        parameters=e * held + persistent + lengths,
        moments=(FLOAT32 + BYTES_OF_A_WEIGHT) * part,
        buffers=e * setup.buckets.reduce,
        rests=FLOAT32 * part,
        kept=FLOAT32 * part,
        copy=e,
        left=FLOAT32 * part,
        update=made - persistent,  # the small ones are given back for the update
    )
    if not setup.offload:
        return state
    return replace(
        state,
        parameters=persistent + lengths,
        moments=0,
        rests=0,
        kept=0,
        left=0,
        update=0,
        host_parameters=e * held,
        host_gradients=2 * FLOAT32 * part,
        host_moments=state.moments,
    )
