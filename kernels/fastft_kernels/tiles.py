"""Which parts of the score matrix an interval mask needs: the plan of attention's torch path.

Queries are cut into tiles of equal size, and each tile takes the keys that any of its queries sees: its ancestors in
the prefix tree and its own neighbourhood. Tiles are computed together, as one batched product, with those of about as
many keys. So the computed area follows the number of pairs that see each other, where a dense mask computes all T^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_QUERIES = (32, 64, 128, 256)
"""The tile sizes to choose from: large ones gather fewer keys, small ones compute fewer pairs that are masked."""
GATHER_COST = 64
"""What gathering a key and adding up its gradient costs, in pairs of the score matrix; tuned on a CPU."""
LARGEST_GROUP = 1 << 19
"""Pairs of a group, padding included: what bounds the memory of its scores."""
WORTH_PADDING = 1 << 16
"""Pairs that a group may compute for nothing: fewer than a group of its own would cost."""


@dataclass(frozen=True, slots=True)
class TileGroup:
    """Tiles that are computed together: G tiles of `t` queries with `m` keys each.

    Attributes:
        queries: `[G, t]` int64, indices of the queries; beyond the last one they count on, and are padding.
        keys: `[G, m]` int64, the tokens that are keys; unused places repeat token 0 and are masked.
        mask: `[G, t, m]` boolean, True where visible. Padding queries see everything, so that their softmax is defined.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> TileGroup:
        """The group on `device`."""
        return TileGroup(self.queries.to(device), self.keys.to(device), self.mask.to(device))


def plan_tiles(visible_until: Tensor, q_rows: Tensor | None = None) -> tuple[TileGroup, ...]:
    """The tiles of an interval mask: together they cover each visible pair exactly once.

    Args:
        visible_until: `[T]` integers; key k is visible to query q exactly when `k <= q < visible_until[k]`.
        q_rows: `[R]` sorted tokens that ask; all T where it is not given.

    Returns:
        Groups of equal tile size, on the device of `visible_until`; none where nothing asks.
    """
    until = visible_until.to(torch.int64)
    asked = torch.arange(len(until), device=until.device) if q_rows is None else q_rows
    if not len(asked):
        return ()
    needed = min((_needed_keys(until, asked, size) for size in TILE_QUERIES), key=_cost)
    counts = needed.keys.sum(dim=1)
    order = counts.argsort(stable=True)
    return tuple(_group(until, needed, counts, order[a:b]) for a, b in _cut(counts[order].tolist(), needed.size))


@dataclass(frozen=True, slots=True)
class _Needed:
    """Tiles of `size` queries: which tokens ask, `[G, size]`, and which keys they need, `[G, T]`."""

    size: int
    asked: Tensor
    keys: Tensor
    n_queries: int


def _needed_keys(until: Tensor, asked: Tensor, size: int) -> _Needed:
    tiles = -(-len(asked) // size)
    padding = asked[-1:].expand(tiles * size - len(asked))
    by_tile = torch.cat([asked, padding]).view(tiles, size)
    key = torch.arange(len(until), device=until.device)
    # Some query of the tile sees the key unless the key is behind them all or its interval ends before them all.
    # A query subset may have a gap where the interval lies: such a key is needless, and masked.
    needed = (key <= by_tile[:, -1:]) & (until > by_tile[:, :1])
    return _Needed(size, by_tile, needed, len(asked))


def _cost(needed: _Needed) -> int:
    return int(needed.keys.sum()) * (needed.size + GATHER_COST)


def _cut(counts: list[int], size: int) -> list[tuple[int, int]]:
    """Cuts tiles, sorted by their number of keys, into groups."""
    cuts, begin, used = [], 0, 0
    for at, count in enumerate(counts):
        area = (at - begin + 1) * count
        if at > begin and (area * size > LARGEST_GROUP or (area - used - count) * size > WORTH_PADDING):
            cuts.append((begin, at))
            begin, used = at, 0
        used += count
    return [*cuts, (begin, len(counts))]


def _group(until: Tensor, needed: _Needed, counts: Tensor, tiles: Tensor) -> TileGroup:
    tiles = tiles.sort().values
    size, most = needed.size, int(counts[tiles].max())
    # A stable sort brings each tile's keys to the front, in their order.
    keys = needed.keys[tiles].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    is_key = torch.arange(most, device=until.device) < counts[tiles, None]
    keys = keys.masked_fill(~is_key, 0)
    queries = tiles[:, None] * size + torch.arange(size, device=until.device)
    asked = needed.asked[tiles][:, :, None]
    mask = (keys[:, None] <= asked) & (asked < until[keys][:, None]) & is_key[:, None]
    return TileGroup(queries, keys, mask | (queries >= needed.n_queries)[:, :, None])
