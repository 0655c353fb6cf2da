"""Bytes that real ranks measured, beside what is predicted for them. `tests/support/scaling_ranks.py` measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastft.model.gpt2 import SIZES, GPT2Config
from fastft.model.part import Part
from fastft.scaling.memory import memory
from fastft.scaling.setup import Buckets, Setup, Sizes
from fastft.scaling.traffic import traffic

Entry = Mapping[str, Any]
"""What `tests/support/scaling_ranks.py` writes of a case: what was run, and what was measured of all ranks' most."""


class Compared(NamedTuple):
    """A figure in bytes."""

    name: str
    measured: int
    predicted: int

    @property
    def error(self) -> float:
        """Of the prediction, relative."""
        return self.predicted / self.measured - 1 if self.measured else float(self.predicted)


def config_of(entry: Entry) -> GPT2Config:
    """The model that was run."""
    model = entry["model"]
    return SIZES[model] if isinstance(model, str) else GPT2Config(**model)


def setup_of(entry: Entry) -> Setup:
    """How it was run: on CPU ranks, by the torch path or compiled code."""
    return Setup(
        stage=entry["stage"],
        offload=entry["offload"],
        ranks=entry["ranks"],
        packs=entry["packs"],
        dtype=entry["dtype"],
        compiled=entry.get("compiled", False),  # older ones were without
        activation_checkpointing=entry["checkpointing"],
        part=None if entry["part"] is None else Part.of_json(entry["part"]),
        buckets=Buckets.of(entry["zero"]),
    )


def traffic_compared(entry: Entry, setup: Setup | None = None) -> list[Compared]:
    """Traffic by kind, predicted for the entry's setup, or for another one."""
    predicted = traffic(config_of(entry), setup or setup_of(entry))
    kinds = ("all_reduce", "reduce_scatter", "all_gather", "control")
    unknown = set(entry["traffic"]) - set(kinds)
    assert not unknown, unknown
    return [Compared(kind, entry["traffic"].get(kind, 0), getattr(predicted, kind)) for kind in kinds]


def memory_compared(entry: Entry, setup: Setup | None = None) -> list[Compared]:
    """Memory by phase. CPU ranks have device and host in one, so that both are added up."""
    predicted = memory(config_of(entry), Sizes(**entry["sizes"]), setup or setup_of(entry))
    return [Compared(name, entry["memory"][name], size + predicted.host) for name, size in predicted.phases.items()]
