"""Which tiles of the score matrix the attention kernels compute: found on the host, once for all layers of a step.

Queries are cut into tiles of BM and keys into tiles of BN, aligned at its multiples. Forward and dQ go through a list
of key tiles for each query tile. dK and dV go through the queries that see a key tile (here of BK keys): by the rule
`k <= q < visible_until[k]` they are a range. A range of very many queries, as of a prefix that all examples share, is
cut into chunks, so that no program works long after all others are done. A chunk's sums go to a slot of its own, and
the slots are added in their order: no atomics, and the same bits each time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK = 1024
"""Queries that a single program of dK and dV goes through; more where there would be more than `MOST_SLOTS` slots."""
MOST_SLOTS = 64
"""Slots of a plan: what bounds their memory, `64 H * 2 * BK * D` float32."""

USUAL_KEY_TILES = 8
"""Key tiles of a query tile that a plan of rounded size has room for: packs of the book's examples need up to 7."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The work of the attention kernels for one `visible_until`; valid for all heads, head dims and dtypes.

    Attributes:
        T, R: tokens and queries.
        BM, BN: queries and keys of a tile, in forward and dQ.
        BQ, BK: the same in dK and dV.
        slots: partial sums of dK and dV that are added up afterwards.
        query_tiles: `[ceil(R / BM), 3]` int32. Row i is `(begin, masked, end)`: query tile i needs
            `key_tiles[begin:end]`, and from `masked` on these hold pairs that do not see each other.
        key_tiles: `[E]` int32; entry j stands for keys `j BN` to `(j + 1) BN`.
        items: `[I, 4]` int32, `(key tile, first query, end of queries, slot)`. Slot -1 writes dK and dV themselves; key
            tile -1 is no work.
        sums: `[G, 3]` int32, `(key tile, first slot, end of slots)`: what the slots are added up to; key tile -1 is no
            work.
        scores: score matrix entries that forward computes for one head, tiles and all; dQ computes as many.
        scores_dkv: the same for dK and dV.
    """

    T: int
    R: int
    BM: int
    BN: int
    BQ: int
    BK: int
    slots: int
    query_tiles: Tensor
    key_tiles: Tensor
    items: Tensor
    sums: Tensor
    scores: int
    scores_dkv: int

    def to(self, device: torch.device | str) -> AttentionPlan:
        """The plan on `device`."""
        names = ("query_tiles", "key_tiles", "items", "sums")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def plan_attention(
    visible_until: Tensor,
    q_rows: Tensor | None = None,
    *,
    BM: int = 64,
    BN: int = 32,
    BQ: int = 32,
    BK: int = 64,
    chunk: int = CHUNK,
    most_slots: int = MOST_SLOTS,
    round_sizes: bool = False,
) -> AttentionPlan:
    """The tiles that `attention` computes, for `plan=`.

    Its work grows with the number of tiles that are needed, not with `T * T`.

    Args:
        visible_until: `[T]` integers; key k is visible to query q exactly when `k <= q < visible_until[k]`. On another
            device than the CPU it is copied, which waits for that device.
        q_rows: `[R]` sorted tokens that ask, which may repeat; all T where it is not given.
        BM, BN, BQ, BK: tile sizes, powers of two from 16 on; the default is what the kernels are tuned for.
        chunk: queries that one program of dK and dV goes through, doubled until `most_slots` suffice. Where J heads of
            queries share a head of keys, it goes through J rows of each: `CHUNK // J` is then as much work.
        most_slots: the most partial sums.
        round_sizes: make all sizes depend on T and R alone, with entries that are no work: what was compiled or
            captured for one plan then fits others. (`key_tiles` is longer, by powers of two, where queries see
            unusually many.)

    Returns:
        The plan, on the CPU.

    Raises:
        ValueError: a token that does not see itself, or queries that are not sorted tokens.
    """
    until = visible_until.detach().to("cpu", torch.int64)
    T = until.numel()
    asked = torch.arange(T) if q_rows is None else q_rows.detach().to("cpu", torch.int64)
    _check(until, asked)
    query_tiles, key_tiles = _forward_lists(until, asked, BM, BN)
    items, sums, slots = _backward_items(until, asked, BK, chunk, most_slots)
    scores = len(key_tiles) * BM * BN
    lengths = items[:, 2] - items[:, 1]
    scores_dkv = int((-(-lengths // BQ)).sum()) * BQ * BK
    if round_sizes:
        most = max(len(key_tiles), USUAL_KEY_TILES * len(query_tiles))
        key_tiles = _padded(key_tiles, 1 << max(0, most - 1).bit_length(), 0)
    if round_sizes and len(asked) > chunk:
        items = _padded(items, -(-T // BK) + most_slots, -1, 0, 0, -1)
        sums, slots = _padded(sums, most_slots // 2, -1, 0, 0), most_slots
    query_tiles, key_tiles, items, sums = (x.to(torch.int32) for x in (query_tiles, key_tiles, items, sums))
    return AttentionPlan(
        T, len(asked), BM, BN, BQ, BK, slots, query_tiles, key_tiles, items, sums, scores, scores_dkv
    )  # fmt: skip


def _forward_lists(until: Tensor, asked: Tensor, BM: int, BN: int) -> tuple[Tensor, Tensor]:
    first = asked[::BM].contiguous()
    last = torch.cat([asked[BM - 1 :: BM], asked[-1:]])[: len(first)]
    begins, smallest, largest = _key_tiles(until, BN)
    # Both ends of the query tiles rise, so those that a key tile is needed by are a range.
    low = torch.searchsorted(last, begins)
    counts = (torch.searchsorted(first, largest) - low).clamp_min(0)
    key_tile, place = _expand(counts)
    query_tile = low[key_tile] + place
    whole = (smallest[key_tile] > last[query_tile]) & (begins[key_tile] + BN - 1 <= first[query_tile])
    order = (2 * query_tile + (~whole).long()).argsort(stable=True)
    ends = torch.bincount(query_tile, minlength=len(first)).cumsum(0)
    begin = ends - torch.bincount(query_tile, minlength=len(first))
    masked = begin + torch.bincount(query_tile[whole], minlength=len(first))
    return torch.stack([begin, masked, ends], dim=1), key_tile[order]


def _backward_items(until: Tensor, asked: Tensor, BK: int, chunk: int, most_slots: int) -> tuple[Tensor, Tensor, int]:
    begins, _, largest = _key_tiles(until, BK)
    low = torch.searchsorted(asked, begins)
    lengths = (torch.searchsorted(asked, largest) - low).clamp_min(0)
    while True:
        chunks = (-(-lengths // chunk)).clamp_min(1)
        split = chunks > 1
        slots = int(chunks[split].sum())
        if slots <= most_slots:
            break
        chunk *= 2
    key_tile, place = _expand(chunks)
    q_low = low[key_tile] + place * chunk
    q_high = torch.minimum(q_low + chunk, (low + lengths)[key_tile])
    slot_ends = (chunks * split).cumsum(0)
    slot_begins = slot_ends - chunks * split
    slot = torch.where(split[key_tile], slot_begins[key_tile] + place, -1)
    items = torch.stack([key_tile, q_low, q_high, slot], dim=1)
    sums = torch.stack([split.nonzero().flatten(), slot_begins[split], slot_ends[split]], dim=1)
    return items, sums, slots


def _key_tiles(until: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each tile of `size` keys: its first key, and its smallest and largest `visible_until`."""
    tiles = -(-len(until) // size)
    by_tile = torch.cat([until, until[-1:].expand(tiles * size - len(until))]).view(tiles, size)
    return torch.arange(tiles) * size, by_tile.amin(dim=1), by_tile.amax(dim=1)


def _expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For counts (2, 0, 3): the owners (0, 0, 2, 2, 2) and the places (0, 1, 0, 1, 2)."""
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return owner, torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]


def _padded(rows: Tensor, size: int, *fill: int) -> Tensor:
    """The rows, and behind them as many of `fill` as `size` asks for."""
    padding = torch.tensor(fill if rows.ndim > 1 else fill[0]).expand(size - len(rows), *rows.shape[1:])
    return torch.cat([rows, padding])


def _check(until: Tensor, asked: Tensor) -> None:
    if until.ndim != 1 or asked.ndim != 1:
        raise ValueError(f"got visible_until {tuple(until.shape)}, q_rows {tuple(asked.shape)}, expected [T] and [R]")
    sees_itself = until > torch.arange(len(until))
    if not sees_itself.all():
        k = int(sees_itself.int().argmin())
        raise ValueError(f"got visible_until[{k}] = {int(until[k])}, expected more than {k}: each token sees itself")
    if len(asked) and not (asked[0] >= 0 and asked[-1] < len(until) and (asked.diff() >= 0).all()):
        raise ValueError(f"got q_rows that are no sorted tokens of [0, {len(until)}), expected them sorted")
