"""What a prediction is asked for: how a run is spread over ranks, its largest pack's sizes, the model's tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from fastft.batches.batch import Batch
from fastft.engines.optim import parameter_groups
from fastft.model.gpt2 import GPT2, GPT2Config
from fastft.model.lora import adapters
from fastft.model.part import Part, of_base, trained
from fastft.model.precision import is_narrowed

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
        compiled: whether a CPU has compiled code (`fastft.model.ops.why_no_compiled`).
        activation_checkpointing: blocks are computed again in the backward pass.
        decay_all: as in `fastft.run.config.TrainOptions`; it makes one group of AdamW's two.
        part: what is trained, where it is not all.
        buckets: DeepSpeed's settings.
    """

    stage: int = 0
    offload: bool = False
    ranks: int = 1
    packs: int = 1
    dtype: str = "fp32"
    impl: str = "cpu"
    cuda: bool = False
    compiled: bool = False
    activation_checkpointing: bool = False
    decay_all: bool = False
    part: Part | None = None
    buckets: Buckets = Buckets()

    @property
    def element(self) -> int:
        """Of a weight that the model computes with, and of its gradient."""
        return ELEMENT[self.dtype]

    @property
    def runs_at_once(self) -> bool:
        """Whether attention keeps no scores, and the softmax no copy of logits: Triton kernels, and compiled code."""
        on_cpu = self.impl == "cpu" and not self.cuda and self.dtype in ("fp32", "bf16")
        return self.impl == "triton" or (on_cpu and self.compiled)

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


class Weight(NamedTuple):
    """A parameter: its name in the model, or in its block; its elements; whether it is trained."""

    name: str
    elements: int
    is_trained: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """A model's parameters, in its order. Sizes are elements.

    Attributes:
        groups: of what is trained, of each of AdamW's groups.
        root: those outside the blocks: wte, wpe, ln_f, an untied head, and rows of new tokens.
        blocks: of each block.
        copied: of those trained that have 16-bit copies in stage 0.
        narrow: of those frozen that are in 16 bits alone there.
        lengths: of the rows' lengths that DoRA keeps.
    """

    groups: tuple[tuple[int, ...], ...]
    root: tuple[Weight, ...]
    blocks: tuple[tuple[Weight, ...], ...]
    copied: int
    narrow: int
    lengths: int

    @property
    def layers(self) -> int:
        """L."""
        return len(self.blocks)

    @property
    def all(self) -> int:
        """Ψ, of all parameters."""
        return sum(self.each())

    @property
    def trained(self) -> int:
        """Of those that are trained: all of them in full training."""
        return sum(map(sum, self.groups))

    @property
    def frozen(self) -> int:
        """Of the others."""
        return self.all - self.trained

    @property
    def trained_of_root(self) -> int:
        """Of those trained outside the blocks."""
        return trained_of(self.root)

    @property
    def lowest(self) -> int:
        """The first block that has a backward pass; L where none has."""
        if self.learns("wte.", "wpe.", "new_rows.wte"):
            return 0
        return next((layer for layer, block in enumerate(self.blocks) if trained_of(block)), self.layers)

    def learns(self, *begins: str) -> bool:
        """Whether something outside the blocks is trained whose name begins so."""
        return any(weight.is_trained and weight.name.startswith(begins) for weight in self.root)

    def each(self) -> Iterator[int]:
        """Of each parameter."""
        return (weight.elements for weights in (self.root, *self.blocks) for weight in weights)


def trained_of(weights: Iterable[Weight]) -> int:
    """Elements of those that are trained."""
    return sum(weight.elements for weight in weights if weight.is_trained)


@functools.cache
def layout(config: GPT2Config, decay_all: bool = False, part: Part | None = None) -> Layout:
    """The tensors of a model, without making it; of `part`, where it is given, what is trained."""
    with torch.device("meta"):
        model = GPT2(config)
        if part is not None:
            part.take(model)
    groups = parameter_groups(model, weight_decay=1.0, decay_all=decay_all)
    narrow = [
        {name: p.numel() for name, p in some.items() if is_narrowed(name)} for some in (trained(model), of_base(model))
    ]
    magnitudes = [module.lora_magnitude_vector for _, module in adapters(model)]
    return Layout(
        groups=tuple(tuple(parameter.numel() for parameter in group["params"]) for group in groups),
        root=tuple(one for one in _weights(model) if not one.name.startswith("h.")),
        blocks=tuple(tuple(_weights(block)) for block in model.h),
        copied=sum(narrow[0].values()),
        narrow=sum(narrow[1].values()),
        lengths=sum(one.numel() for one in magnitudes if one is not None),
    )


def _weights(module: nn.Module) -> Iterator[Weight]:
    return (Weight(name, weight.numel(), weight.requires_grad) for name, weight in module.named_parameters())


def rounded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple
