"""Linear cross-entropy: F.cross_entropy(hidden @ weight.T, targets), for the rows that a loss asks for.

loss[r] = logsumexp(z[r]) - z[r, targets[r]],   z[r] = weight @ hidden[rows[r]]

Shapes: T tokens, C width, V vocab, R loss rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Impl = Literal["auto", "torch", "reference"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """The cross-entropy of each loss row.

    Args:
        hidden: `[T, C]`, floating.
        weight: `[V, C]`, the head; it has no bias.
        targets: `[R]` int64, the right id of each row.
        rows: `[R]` int64, the token that each row reads its hidden state from; a token may be read by several rows.
        impl: `reference` computes the logits of all T tokens and then picks; `torch` picks the rows first, so that a
            token without a target costs nothing; `auto` is `torch`.

    Returns:
        `[R]` float32 losses (float64 where the logits are float64). With no row, an empty tensor that is still
        connected to `hidden` and `weight`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"got hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, expected [T, C] and [V, C]")
    if targets.ndim != 1 or targets.shape != rows.shape:
        raise ValueError(f"got targets {tuple(targets.shape)}, rows {tuple(rows.shape)}, expected both [R]")
    if impl == "reference":
        logits = F.linear(hidden, weight).index_select(0, rows)  # [T, V] -> [R, V]
    else:
        logits = F.linear(hidden.index_select(0, rows), weight)  # [R, V]
    at_least_float32 = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(at_least_float32), targets, reduction="none")
