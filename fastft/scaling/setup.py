"""What a prediction is asked for: how a run is spread over ranks, its largest pack's sizes, the model's tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastft.batches.batch import Batch
from fastft.engines.optim import parameter_groups
from fastft.model.gpt2 import GPT2, GPT2Config

FLOAT32 = 4
ELEMENT = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}

# Of the kernels' torch path; tests/scaling/test_scaling.py holds them against fastft_kernels.
KEPT_PAIRS = 1 << 17
LARGEST_GROUP = 1 << 19
LOGIT_CHUNK_BYTES = 64 << 20
CACHED_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """DeepSpeed's settings that decide what it holds and sends, in elements; as fastft fills in `auto`.

    Attributes:
        reduce: gradients that are reduced at a time; the buffer for them is this large whatever the model.
        overlap: reduce while the backward pass goes on; in stages 1 and 2 with two such buffers.
        prefetch, max_live, max_reuse, persistence: of stage 3. Weights of up to `persistence` elements stay gathered,
            and so do those that are used again within the next `max_reuse` elements' worth of modules.
    """

    reduce: int = 50_000_000
    overlap: bool = True
    prefetch: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    persistence: int = 100_000

    @classmethod
    def of(cls, zero: Mapping[str, Any]) -> Buckets:
        """Those of a DeepSpeed file's section `zero_optimization`; what it leaves out, or to `auto`, is as above."""
        names = {
            "reduce": "reduce_bucket_size",
            "prefetch": "stage3_prefetch_bucket_size",
            "max_live": "stage3_max_live_parameters",
            "max_reuse": "stage3_max_reuse_distance",
            "persistence": "stage3_param_persistence_threshold",
        }
        given: dict[str, Any] = {
            ours: int(zero[theirs]) for ours, theirs in names.items() if zero.get(theirs, "auto") != "auto"
        }
        if zero.get("overlap_comm", "auto") != "auto":
            given["overlap"] = bool(zero["overlap_comm"])
        return cls(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How a run is spread over ranks and computed.

    Attributes:
        stage: 0 is fastft's own `Engine`, 1 to 3 are DeepSpeed's.
        offload: moments and masters lie in host memory, and in stage 3 the weights too.
        ranks: processes.
        packs: forward and backward passes of a rank in one optimizer step.
        dtype: fp32, bf16, fp16 (counted as bf16) or fp64 (stage 0 alone).
        impl: as in `fastft.model.ops`, resolved.
        cuda: whether the device is a GPU, where stage 0 is the `GpuEngine`.
        activation_checkpointing: blocks are computed again in the backward pass.
        decay_all: as in `fastft.run.config.TrainOptions`; it makes one group of AdamW's two.
        buckets: DeepSpeed's settings.
    """

    stage: int = 0
    offload: bool = False
    ranks: int = 1
    packs: int = 1
    dtype: str = "fp32"
    impl: str = "cpu"
    cuda: bool = False
    activation_checkpointing: bool = False
    decay_all: bool = False
    buckets: Buckets = Buckets()

    @property
    def element(self) -> int:
        """Of a weight that the model computes with, and of its gradient."""
        return ELEMENT[self.dtype]

    @property
    def name(self) -> str:
        """`2`, or `2 + offload`."""
        return f"{self.stage} + offload" if self.offload else str(self.stage)

    def variants(self) -> list[Setup]:
        """The stages that this run could take, in the order of `VARIANTS`; on a CPU there is nowhere to offload to."""
        if self.dtype == "fp64":
            return [replace(self, stage=0, offload=False)]
        return [replace(self, stage=stage, offload=offload) for stage, offload in VARIANTS if self.cuda or not offload]


VARIANTS = ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True))
"""(stage, offload), each with less device memory than the one before, and slower in return."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What decides the activations of the largest pack, in elements.

    Attributes:
        tokens: `T`.
        rows: `R`.
        pairs, row_pairs: of the score matrix that the torch path computes, of all tokens and of the loss rows.
        largest_group: the most pairs that it computes at a time.
        padded: rows of equal length, which torch's own attention computes, and the last block as the others.
    """

    tokens: int
    rows: int
    pairs: int
    row_pairs: int
    largest_group: int
    padded: bool = False

    @classmethod
    def given(cls, tokens: int, rows: int) -> Sizes:
        """Where no more is known: pairs as of plainly causal attention."""
        pairs, row_pairs = tokens * (tokens + 1) // 2, rows * (tokens + 1) // 2
        return cls(
            tokens=tokens,
            rows=rows,
            pairs=pairs,
            row_pairs=row_pairs,
            largest_group=min(max(pairs, row_pairs), LARGEST_GROUP),
        )

    @classmethod
    def of(cls, batch: Batch) -> Sizes:
        """Those of a batch."""
        sizes = cls.given(batch.tokens.numel(), batch.rows.numel())
        if batch.row_length is not None:
            return replace(sizes, pairs=0, row_pairs=0, largest_group=0, padded=True)
        if not isinstance(batch.tiles, tuple) or not isinstance(batch.row_tiles, tuple):
            return sizes
        pairs, row_pairs = ([group.mask.numel() for group in tiles] for tiles in (batch.tiles, batch.row_tiles))
        return replace(sizes, pairs=sum(pairs), row_pairs=sum(row_pairs), largest_group=max((0, *pairs, *row_pairs)))


@dataclass(frozen=True, slots=True)
class Layout:
    """Elements of a model's parameters, in its order.

    Attributes:
        groups: of each of AdamW's groups.
        root: of those outside the blocks: wte, wpe, ln_f and an untied head.
        block: of a block.
        copied: of those that have 16-bit copies in stage 0.
        layers: L.
    """

    groups: tuple[tuple[int, ...], ...]
    root: tuple[int, ...]
    block: tuple[int, ...]
    copied: int
    layers: int

    @property
    def all(self) -> int:
        """Ψ, of all parameters."""
        return sum(map(sum, self.groups))

    @property
    def of_block(self) -> int:
        """Of a whole block."""
        return sum(self.block)

    def each(self) -> Iterator[int]:
        """Of each parameter."""
        return (size for group in self.groups for size in group)


@functools.cache
def layout(config: GPT2Config, decay_all: bool = False) -> Layout:
    """The tensors of a model, without making it."""
    with torch.device("meta"):
        model = GPT2(config)
    groups = parameter_groups(model, weight_decay=1.0, decay_all=decay_all)
    inside = {id(parameter) for parameter in model.h.parameters()}
    copied = [p for name, p in model.named_parameters() if ".ln_" not in f".{name}" and not name.startswith("wpe.")]
    return Layout(
        groups=tuple(tuple(parameter.numel() for parameter in group["params"]) for group in groups),
        root=tuple(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside),
        block=tuple(parameter.numel() for parameter in model.h[0].parameters()),
        copied=sum(parameter.numel() for parameter in copied),
        layers=config.n_layer,
    )


def rounded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple
