"""Which matrices have low-rank adapters, and of what kind; what computes with them is `fastft.model.lora`.

Names are PEFT's. Imports no torch: a command line is read by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastft.common.errors import UserError
from fastft.common.ranges import range_named

TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""The matrices of a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """Which matrices have an adapter, and of what kind.

    Attributes:
        r: the rank, at least 1.
        alpha: see the formulas above.
        targets: names of matrices, or their ends: `c_proj` is the attention's and the MLP's, `mlp.c_proj` this one's.
        layers: the blocks that have adapters; None for all.
        rslora: divide alpha by the root of the rank.
        dora: learn the rows' lengths apart from their directions.
    """

    r: int
    alpha: float
    targets: tuple[str, ...] = ("c_attn", "c_proj", "c_fc")
    layers: tuple[int, ...] | None = None
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1 or not 0 < self.alpha < math.inf:
            raise UserError(f"LoRA: got r = {self.r}, alpha = {self.alpha}; expected at least 1, and above 0")
        if odd := [one for one in self.targets if not any(_ends_with(name, one) for name in TARGETS)]:
            raise UserError(
                f"LoRA: got the target {odd[0]}, expected some of c_attn, c_proj, c_fc, attn.c_proj, mlp.c_proj"
            )
        if not self.targets or self.layers == ():
            raise UserError("LoRA: got no targets, or no layers; expected at least one of each")

    @property
    def scaling(self) -> float:
        """`s` in the formulas above."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def chosen(self, n_layer: int) -> list[str]:
        """The names of the matrices that have an adapter in a model of so many blocks, such as `h.0.attn.c_attn`.

        Raises:
            UserError: a layer is not there.
        """
        layers = range(n_layer) if self.layers is None else self.layers
        if odd := [layer for layer in layers if not 0 <= layer < n_layer]:
            raise UserError(f"LoRA: got layer {odd[0]}, expected 0 to {n_layer - 1}: the model has {n_layer} layers")
        return [
            f"h.{layer}.{name}"
            for layer in sorted(set(layers))
            for name in TARGETS
            if any(_ends_with(name, one) for one in self.targets)
        ]


def _ends_with(name: str, target: str) -> bool:
    """As PEFT matches a name of `target_modules`."""
    return name == target or name.endswith(f".{target}")


def layers_named(named: str) -> tuple[int, ...] | None:
    """`0,20-23` -> (0, 20, 21, 22, 23); None for `all`.

    Raises:
        UserError: it is neither.
    """
    if named == "all":
        return None
    layers: set[int] = set()
    for part in named.replace(" ", "").split(","):
        found = range_named(part)
        if found is None and part.isdecimal():
            found = range(int(part), int(part) + 1)
        if not found:
            raise UserError(f"got --lora_layers {named}, expected all, or layers and ranges by commas, such as 0,20-23")
        layers |= set(found)
    return tuple(sorted(layers))
