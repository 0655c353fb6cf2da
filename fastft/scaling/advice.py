"""Which stage to take, and the table that `--dry_run` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastft.model.gpt2 import GPT2Config
from fastft.scaling.memory import Memory, memory
from fastft.scaling.setup import Setup, Sizes, layout
from fastft.scaling.traffic import Traffic, traffic

GIB, GB = 1 << 30, 1e9
COLUMNS = ("weights", "gradients", "moments, masters", "activations", "logits", "buffers", "peak", "in host memory")
MARGIN = 0.15
"""Part of a device's memory that a recommendation leaves free, for what is not counted: the contexts and workspaces of
CUDA and its libraries, and what the allocator holds but cannot give out in one piece."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """A stage, and what it costs."""

    setup: Setup
    memory: Memory
    traffic: Traffic


def predicted(config: GPT2Config, sizes: Sizes, setup: Setup) -> list[Predicted]:
    """Each stage that a run could take, from the one with the most device memory to the one with the least."""
    return [Predicted(one, memory(config, sizes, one), traffic(config, one)) for one in setup.variants()]


def recommend(
    rows: Sequence[Predicted], device_bytes: int | None, host_bytes: int, *, margin: float = MARGIN
) -> Predicted | None:
    """The least stage that fits, then the least that offloads.

    Args:
        rows: of `predicted`.
        device_bytes: of a rank's device; None on a CPU, whose memory is the host's.
        host_bytes: of host memory, for each rank of a machine.
        margin: part of either that is left free.

    Returns:
        None where nothing fits.
    """
    for row in rows:
        on_device, on_host = row.memory.peak, row.memory.host
        if device_bytes is None:
            on_device, on_host = 0, on_device + on_host
        fits_device = device_bytes is None or on_device <= (1 - margin) * device_bytes
        if fits_device and on_host <= (1 - margin) * host_bytes:
            return row
    return None


def table(
    config: GPT2Config, sizes: Sizes, setup: Setup, device_bytes: int | None, *, local_ranks: int | None = None
) -> Table:
    """Memory by rank and traffic by optimizer step for each stage, and the recommendation below.

    Args:
        config: of the model.
        sizes: of the run's largest pack.
        setup: the run's; its own stage is marked.
        device_bytes: of a rank's device; None on a CPU.
        local_ranks: ranks that share this machine's memory; all of them where it is not given.
    """
    rows = predicted(config, sizes, setup)
    host_bytes = psutil.virtual_memory().total // (local_ranks or setup.ranks)
    shown = Table(
        *("ZeRO", *COLUMNS, "GB sent a step"),
        box=SIMPLE_HEAD,
        title=f"PREDICTED, GiB of each of {setup.ranks} ranks in {setup.dtype}; {_trained(config, setup)}"
        f"{setup.packs} packs a step, the largest of {sizes.tokens:,} tokens and {sizes.rows:,} loss rows",
        caption=advice(recommend(rows, device_bytes, host_bytes), device_bytes, host_bytes),
    )
    for row in rows:
        one = row.memory
        kinds = (one.parameters, one.gradients, one.moments, one.activations, one.logits, one.buffers)
        is_own = (row.setup.stage, row.setup.offload) == (setup.stage, setup.offload)
        shown.add_row(
            row.setup.name + (" (this run)" if is_own else ""),
            *(number(size / GIB) for size in (*kinds, one.peak, one.host)),
            number(row.traffic.wire / GB),
        )
    return shown


def _trained(config: GPT2Config, setup: Setup) -> str:
    """What is trained, where it is not all."""
    if setup.part is None:
        return ""
    tensors = layout(config, setup.decay_all, setup.part)
    return f"{setup.part.in_words()}, {tensors.trained:,} of {tensors.all:,} parameters trained; "


def advice(chosen: Predicted | None, device_bytes: int | None, host_bytes: int) -> str:
    """The recommendation in words."""
    host = f"{number(host_bytes / GIB)} GiB of host memory a rank"
    where = host if device_bytes is None else f"{number(device_bytes / GIB)} GiB a device and {host}"
    free = f"{where}, {MARGIN:.0%} left free"
    if chosen is None:
        words = f"no stage fits into {free}: more ranks, --activation_checkpointing true or fewer --pack_tokens do"
    elif chosen.setup.stage == 0:
        words = f"plain data parallelism fits into {free}: no --deepspeed_config is needed"
    else:
        file = f"launch/zero{chosen.setup.stage}{'_offload' if chosen.setup.offload else ''}.json"
        words = f"the least stage that fits into {free}: {chosen.setup.name} (--deepspeed_config {file})"
    if device_bytes is None:
        words += "; on a CPU the device's memory is the host's, and there is nowhere to offload to"
    return words


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
