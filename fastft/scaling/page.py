"""docs/scaling.md: gpt2-medium and gpt2-xl on 1 to 256 GPUs, and adapters, predicted; and what CPU ranks measured,
beside what is predicted for them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastft.batches.batch import Batch
from fastft.common.errors import UserError
from fastft.model.gpt2 import GPT2Config, config_for
from fastft.model.lora_spec import LoRA
from fastft.model.part import Part
from fastft.scaling import predict
from fastft.scaling.advice import COLUMNS, GB, GIB, number
from fastft.scaling.measured import Compared, Entry, config_of, memory_compared, setup_of, traffic_compared
from fastft.scaling.memory import memory
from fastft.scaling.setup import Buckets, Setup, Sizes, layout
from fastft.scaling.states import padded_groups
from fastft.scaling.traffic import traffic

DOCS = Path(__file__).parents[2] / "docs"
PAGE, MEASURED = DOCS / "scaling.md", DOCS / "scaling_measured.json"
MODELS = ("gpt2-medium", "gpt2-xl")
ADAPTED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
ADAPTERS = Part(lora=LoRA(r=16, alpha=32.0), train_only=None, new_rows=None, base_sha256="")
"""`--lora_r 16`."""
FEW_RANKS = (1, 8, 64)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
EXAMPLES = 64
LONG_PACK = 16_384
"""Tokens: `--pack_tokens` where it is not given."""
NODE = 8
"""GPUs of a machine."""


@dataclass(frozen=True, slots=True)
class Link:
    """What a GPU sends and receives at a time, bytes a second in each direction, by its maker's data sheets.

    Attributes:
        inside: to the other GPUs of its machine, by NVLink.
        across: a ring's between machines, of which each GPU has a network card, and NCCL a ring through each card.
    """

    inside: float
    across: float


LINKS = {
    # NVIDIA A100 Tensor Core GPU datasheet (2021): NVLink 600 GB/s, both directions together; NVIDIA DGX A100 (80 GB)
    # datasheet: 8 single-port ConnectX at 200 Gb/s InfiniBand for 8 GPUs
    "A100": Link(300e9, NODE * 25e9),
    # NVIDIA H100 Tensor Core GPU datasheet (2023): NVLink 900 GB/s, both directions together; NVIDIA DGX H100
    # datasheet: ConnectX-7 at 400 Gb/s InfiniBand for each of 8 GPUs
    "H100": Link(450e9, NODE * 50e9),
}


def page() -> str:
    """The whole of docs/scaling.md.

    Raises:
        UserError: the measured figures are not there, as in an installed package.
    """
    if not MEASURED.is_file():
        raise UserError(
            f"{MEASURED} is not there; run this in a checkout of fastft, after tests/support/scaling_ranks.py"
        )
    batch = _batch()
    parts = [_INTRODUCTION.replace("{remedy}", _remedy(batch)), _assumptions(batch)]
    for model in MODELS:
        parts += [f"## {model}\n", *_of_model(model, batch)]
    parts += _of_adapters(batch)
    return "\n".join([*parts, _measured()])


@functools.cache
def _batch() -> Batch:
    return predict.packed_batch(predict.training_set("sample"), EXAMPLES)


def _setup(ranks: int = 1) -> Setup:
    return Setup(ranks=ranks, dtype="bf16", impl="triton", cuda=True)


def _long(batch: Batch) -> Sizes:
    """A full pack, with as many loss rows a token as the batch."""
    return Sizes.given(LONG_PACK, LONG_PACK * batch.rows.numel() // batch.tokens.numel())


def _remedy(batch: Batch) -> str:
    """What giving weights back would bring."""
    sizes, ranks = Sizes.of(batch), RANKS[-3]
    usual = replace(_setup(ranks), stage=3)
    limited = replace(usual, buckets=Buckets(max_reuse=1, max_live=100_000_000))
    words = []
    for model in MODELS:
        before, after = (number(memory(config_for(model), sizes, one).peak / GIB) for one in (usual, limited))
        words.append(f"{model} {after} GiB in place of {before}")
    return f" With 1 and 10^8, on {ranks} GPUs as below:\n  {', '.join(words)}."


# Times


def step_seconds(model: str, setup: Setup, card: str) -> tuple[float, float, float]:
    """PREDICTED seconds of an optimizer step of one pack: of its forward and backward pass, of its update, and of what
    travels, one after the other: nothing that overlaps is taken off. For 16-bit arithmetic without offload.

    DeepSpeed's copies into its buckets are not counted.
    """
    config = config_for(model)
    passes, casts, update = _seconds_of_kernels(model, card)
    if setup.stage:
        tensors = layout(config)
        update *= sum(padded_groups(tensors, setup)) / setup.ranks / tensors.all
    else:
        passes += casts
    link = LINKS[card].inside if setup.ranks <= NODE else min(LINKS[card].inside, LINKS[card].across)
    travels = traffic(config, setup).wire / (predict.EFFICIENCY * link)
    return passes, update, travels


@functools.cache
def _seconds_of_kernels(model: str, card: str) -> tuple[float, float, float]:
    """Of the forward and backward pass, of the casts of gradients and weights, and of the whole update."""
    costs = dict(predict.step_costs(config_for(model), _batch()))
    update, casts = ([costs.pop(name)] for name in ("AdamW", "casts"))
    passes, of_casts, of_update = (predict.predicted_seconds(part, card) for part in (costs.values(), casts, update))
    return passes, of_casts, of_update


def _step(model: str, card: str, setup: Setup) -> str:
    if setup.offload:
        return "–"
    alone = sum(step_seconds(model, _setup(), card))
    seconds = sum(step_seconds(model, setup, card))
    return f"{1e3 * seconds:.1f} ({alone / seconds:.0%})"


# Tables


def _of_model(model: str, batch: Batch) -> list[str]:
    config = config_for(model)
    short, full = Sizes.of(batch), _long(batch)
    return [
        f"{layout(config).all:,} parameters.\n",
        f"GiB a GPU at its fullest moment, one pack of {EXAMPLES} examples:\n",
        _by_ranks(lambda setup: number(memory(config, short, setup).peak / GIB)),
        f"The same with packs of {full.tokens:,} tokens ({full.rows:,} loss rows), without and with "
        "`--activation_checkpointing true`:\n",
        _by_ranks(lambda setup: _with_and_without_checkpoints(model, full, setup)),
        f"GiB a GPU by kind on {NODE} GPUs, one pack of {EXAMPLES} examples (the kinds are not all there at once):\n",
        _by_kind(model, short, _setup(NODE)),
        "GB that a GPU sends in a step of one pack:\n",
        _by_ranks(lambda setup: number(traffic(config, setup).wire / GB)),
        "GB that a GPU sends in a step of four packs:\n",
        _by_ranks(lambda setup: number(traffic(config, replace(setup, packs=4)).wire / GB)),
        *(
            f"Milliseconds a step of one pack on {card}s (efficiency):\n\n"
            + _by_ranks(functools.partial(_step, model, card))
            for card in LINKS
        ),
    ]  # fmt: skip


def _with_and_without_checkpoints(model: str, sizes: Sizes, setup: Setup) -> str:
    config = config_for(model)
    saved, again = (replace(setup, activation_checkpointing=on) for on in (False, True))
    return " / ".join(number(memory(config, sizes, one).peak / GIB) for one in (saved, again))


def _by_ranks(cell: Callable[[Setup], str]) -> str:
    stages = [setup.name for setup in _setup().variants()]
    rows = [[str(ranks), *(cell(setup) for setup in _setup(ranks).variants())] for ranks in RANKS]
    return _markdown(["GPUs", *(f"stage {name}" for name in stages)], rows)


def _of_adapters(batch: Batch) -> list[str]:
    """The same of a few numbers of GPUs, for adapters of every matrix of a block."""
    short, full = Sizes.of(batch), _long(batch)
    counts = [(model, layout(config_for(model), part=ADAPTERS)) for model in ADAPTED]
    return [
        _ADAPTERS,
        _markdown(
            ["model", "trained", "frozen", "of all"],
            [[m, f"{one.trained:,}", f"{one.frozen:,}", f"{one.trained / one.all:.2%}"] for m, one in counts],
        ),
        f"GiB a GPU at its fullest moment, one pack of {EXAMPLES} examples (in brackets where all weights are "
        "trained):\n",
        _by_model(lambda config, setup: number(memory(config, short, setup).peak / GIB)),
        f"The same with packs of {full.tokens:,} tokens and `--activation_checkpointing true`:\n",
        _by_model(
            lambda config, setup: number(memory(config, full, replace(setup, activation_checkpointing=True)).peak / GIB)
        ),
        f"GiB a GPU by kind of gpt2-xl on one GPU, one pack of {EXAMPLES} examples:\n",
        _by_kind("gpt2-xl", short, replace(_setup(), part=ADAPTERS)),
        f"The same on {NODE} GPUs:\n",
        _by_kind("gpt2-xl", short, replace(_setup(NODE), part=ADAPTERS)),
        "GB that a GPU sends in a step of one pack:\n",
        _by_model(lambda config, setup: number(traffic(config, setup).wire / GB), FEW_RANKS[1:]),
    ]


def _by_model(cell: Callable[[GPT2Config, Setup], str], many: Sequence[int] = FEW_RANKS) -> str:
    rows = []
    for model in ADAPTED:
        config = config_for(model)
        for ranks in many:
            cells = [
                f"{cell(config, replace(setup, part=ADAPTERS))} ({cell(config, setup)})"
                for setup in _setup(ranks).variants()
            ]
            rows.append([model, str(ranks), *cells])
    return _markdown(["model", "GPUs", *(f"stage {setup.name}" for setup in _setup().variants())], rows)


def _by_kind(model: str, sizes: Sizes, setup: Setup) -> str:
    rows = []
    for variant in setup.variants():
        one = memory(config_for(model), sizes, variant)
        kinds = (one.parameters, one.gradients, one.moments, one.activations, one.logits, one.buffers, one.peak)
        rows.append([variant.name, *(number(size / GIB) for size in (*kinds, one.host))])
    return _markdown(["stage", *COLUMNS], rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# What was measured


def _measured() -> str:
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    entries: list[Entry] = found["entries"]
    of_memory = [(entry, memory_compared(entry)) for entry in entries if entry["memory"]]
    exact = sum(all(one.measured == one.predicted for one in traffic_compared(entry)) for entry in entries)
    text = _MEASURED.format(versions=found["versions"], exact=exact, count=len(entries))
    text += _markdown(
        ["ranks", "stage", "model", "dtype", "packs", "all-reduce", "reduce-scatter", "all-gather", "control"],
        [[*_case(entry), *(_bytes(one) for one in traffic_compared(entry))] for entry in entries],
    )
    text += f"\n{_MEMORY}\n" + _markdown(
        ["ranks", "stage", "model", "dtype", "packs", "between steps", "loss", "backward", "update"],
        [[*_case(entry), *(_megabytes(one) for one in compared)] for entry, compared in of_memory],
    )
    worst = max((abs(one.error), one.name) for _, compared in of_memory for one in compared)
    return text + f"\nThe largest difference is {worst[0]:.1%} ({worst[1]}).\n"


def _case(entry: Entry) -> list[str]:
    config = config_of(entry)
    model = entry["model"] if isinstance(entry["model"], str) else f"L {config.n_layer}, C {config.n_embd}"
    setup = setup_of(entry)
    buckets, usual = setup.buckets, Buckets()
    model += "" if setup.part is None else f", {_part(setup.part)}"
    model += ", checkpoints" if setup.activation_checkpointing else ""
    if setup.stage == 3:
        model += f", reuse {buckets.max_reuse:,}" if buckets.max_reuse != usual.max_reuse else ""
        model += f", live {buckets.max_live:,}" if buckets.max_live != usual.max_live else ""
        model += f", prefetch {buckets.prefetch:,}" if buckets.prefetch != usual.prefetch else ""
    return [str(setup.ranks), setup.name, model, setup.dtype, str(setup.packs)]


def _part(part: Part) -> str:
    """What is trained, in a table."""
    if part.lora is None:
        return f"`{part.train_only}`"
    words = "DoRA" if part.lora.dora else "LoRA"
    layers = "" if part.lora.layers is None else f" of layers {', '.join(map(str, part.lora.layers))}"
    return f"{words} {part.lora.r}{layers}{'' if part.new_rows is None else ', new rows'}"


def _bytes(one: Compared) -> str:
    if not one.measured and not one.predicted:
        return ""
    return f"{one.measured:,}" + ("" if one.measured == one.predicted else f" ({one.predicted:,} predicted)")


def _megabytes(one: Compared) -> str:
    return f"{one.measured / 1e6:.3f} ({one.error:+.1%})"


def _assumptions(batch: Batch) -> str:
    return _ASSUMPTIONS.format(
        examples=EXAMPLES,
        tokens=batch.tokens.numel(),
        rows=batch.rows.numel(),
        efficiency=f"{predict.EFFICIENCY:.0%}",
        node=NODE,
        links="\n".join(
            f"  {card} {link.inside / 1e9:.0f} GB/s within a machine, {link.across / 1e9:.0f} GB/s between machines."
            for card, link in LINKS.items()
        ),
    )


_INTRODUCTION = """\
# Memory, traffic and time on many ranks

**Predicted, not measured**, but for the last section: bytes that CPU ranks measured, beside what is predicted for them.
No GPU has run any of this. Made by `python -m fastft.scaling --markdown`; `fastft train --dry_run` prints the same for
a run of yours, and which stage it needs.

## What DeepSpeed does, and the paper does not

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv:1910.02054), part
16 Ψ bytes of mixed precision among N ranks: 4 Ψ + 12 Ψ/N in stage 1, 2 Ψ + 14 Ψ/N in stage 2, 16 Ψ/N in stage 3; a rank
sends 2 Ψ elements a step, in stage 3 3 Ψ. DeepSpeed 0.19.8, with the settings that fastft gives it:

- **Stages 1 and 2 reduce by an all-reduce** (`use_multi_rank_bucket_allreduce`, on by default) and keep a part of what
  comes out: a rank sends 3 Ψ elements, not 2 Ψ.
- **Stage 2 reduces the gradients of every pack**, stage 1 once a step. With p packs of a rank in a step stage 2 sends
  (2 p + 1) Ψ where stage 1 sends 3 Ψ.
- **Stage 3 sends less than the paper's**, and with one pack a step less than stage 2: its reduce-scatter is one, and a
  block that at most `stage3_max_reuse_distance` (10^9) elements of blocks follow is not given back between the forward
  and the backward pass. That is all of gpt2-medium, which sends 2 Ψ for every pack, and most of gpt2-xl. But then they
  are all there when the loss is computed: at its fullest moment stage 3 saves little of the weights' memory.
- **To have that memory back takes two settings**, and 3 Ψ: a small `stage3_max_reuse_distance`, and a small
  `stage3_max_live_parameters` (or `stage3_prefetch_bucket_size`). The first alone changes little, as fetching ahead
  meets the uses in the backward pass before the blocks are given back; nor does the second, which limits fetching ahead
  alone.{remedy}
- **Masters are a copy in fp32 too**, in all stages: 4 Ψ/N more. Stage 3 means to spare it and does not: it compares a
  `torch.device` with a string.
- **bf16 in stage 1 is another class** (`bf16_optimizer.py`, where gradients are summed in float32): every rank has all
  gradients in bf16 and in float32, 6 Ψ bytes that are not parted, and puts up to 6 Ψ more together to send them.
- **In fp32 stages 1 and 2 keep the whole gradient of each parameter that reaches into a rank's part.** On many ranks
  the token embedding reaches into nearly each: 4 V C bytes that no number of ranks makes less.
- **Buckets have their size whatever the model has**: 50 million elements with fastft's files (DeepSpeed's own default
  is 500 million: 2 GB in fp32), twice with `overlap_comm` in stages 1 and 2.
- **Offload in bf16 leaves gradients on the device**: a rank's part in float32. In fp32 with several packs the host
  holds the gradients of earlier packs beside.
- The norm of the gradients is computed in float64, of the largest piece 8 bytes an element; parts are padded, to 2 N
  elements a group or, in stage 3, to N elements a parameter.

At stage 0 fastft's own engine runs: fp32 weights, one all-reduce of fp32 gradients a step.
"""

_ASSUMPTIONS = """\
## What is assumed

- bf16 by the Triton kernels. Every stage has bf16 weights that compute and fp32 masters.
- A step is one pack of {examples} examples of the embedded sample on each GPU: {tokens:,} tokens, {rows:,} loss rows.
  So a step of twice the GPUs trains twice the examples.
- Memory is what tensors hold, without the contexts of CUDA and NCCL, workspaces and fragmentation: leave 15% free.
  Pinned host memory may take up to twice its size, as torch rounds it up to a power of two.
- Kernels at {efficiency} of the cards' peak rates (`fastft.scaling.predict`), links at {efficiency} of theirs, by
rings, with
  {node} GPUs a machine. A GPU's links in each direction:
{links}
  From NVIDIA's data sheets of the cards and of DGX A100 and DGX H100.
- Nothing overlaps, and DeepSpeed's copies cost nothing. With `overlap_comm` reductions do overlap with the backward
  pass, so that real steps may be faster than these, or, for the copies, slower.
- Efficiency is the examples a second and GPU, relative to one GPU at stage 0. It is above 100% where a parted update
  saves more than traffic costs. With offload the host's processors decide, and nothing is predicted.
"""

_ADAPTERS = """\
## Adapters

What `--lora_r 16` takes: adapters of all four matrices of every block. What is frozen has no gradient, no moments and
no float32 master, and the product that would make its gradient is left out:

- **Stages 0 to 2 have the frozen weights on every rank**, 2 bytes each in bf16. Of what is trained they part and send
  what they part and send of a whole model, which is so little that stage 0 is the one to take where it fits: stages 1
  and 2 add DeepSpeed's buckets, which have their size whatever is trained.
- **Stage 3 parts the frozen weights too**, and gathers them as often as those of a whole model, while of gradients it
  sends the adapters' alone. It is the only stage that still sends gigabytes.
- **Activations are what is left.** An adapted layer saves what goes into it, as a trained one does, and r numbers a
  token beside. Fewer targets save less, but for stage 3, where DeepSpeed has a product of its own that saves its input
  whether its weight is trained or not. Blocks below the lowest that is trained save nothing (`--lora_layers`,
  `--train_only`); in stage 3 they stay gathered until the update.

Times of adapters are not predicted.
"""

_MEASURED = """\
## What CPU ranks measured

Measured by `python tests/support/scaling_ranks.py` ({versions}): ranks of one thread over gloo train
three steps through `fastft.engines.zero.ZeroEngine`, or `fastft.engines.engine.Engine` at stage 0, and the third is
measured. The tests measure some of it again each time, `make test-long` all of it. Buckets are small, so that they fill
several times; models are small, so that it takes seconds.

Bytes of whole tensors that a rank handed to collectives in a step; {exact} of {count} cases are predicted to the byte
(L layers, C width; `reuse`, `live` and `prefetch` are other settings of stage 3 than fastft's files have):

"""

_MEMORY = """\
Megabytes in tensors of the rank that held the most, host memory included, at the fullest moment between steps, up to
the loss, in the backward pass and in the update, as torch's profiler saw the allocator; and how far the prediction is
off:
"""
