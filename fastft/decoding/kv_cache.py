"""The keys and values of sequences that are being answered, which come and go.

Letters: N sequences, n of them new, L layers, H heads, S places of a row, D head dim, T tokens, P tokens of the shared
prefix.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.model import ops

_GROW_BY = 16
"""Places. A row is read as a whole, since torch's products in bfloat16 copy a part of one; so few stay empty."""


_LEAST_PLACES = 128
"""Of a `FixedCache`, whose places double from there on: as kernels read only those that are filled, empty ones cost
memory alone."""


class _Rows:
    """Rows of places, a row for a sequence.

    Attributes:
        keys, values: of each layer `[rows, H, S, D]`, finite throughout.
    """

    def __init__(self, n_layer: int, n_head: int, like: Tensor, head_dim: int, *, rows: int, places: int) -> None:
        shape = (rows, n_head, places, head_dim)
        self.keys = [like.new_zeros(shape) for _ in range(n_layer)]
        self.values = [like.new_zeros(shape) for _ in range(n_layer)]

    def write(self, layer: int, rows: Tensor, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Fills a place with each of `k` and `v` `[T, H, D]`: row `rows[t]`, place `places[t]`."""
        self.keys[layer][rows, :, places] = k
        self.values[layer][rows, :, places] = v

    def _resize(self, rows: int, places: int) -> None:
        """More rows and places, which hold zeros."""
        n, H, S, D = self.keys[0].shape
        for caches in (self.keys, self.values):
            for layer, cache in enumerate(caches):  # one at a time, so that not all are there twice
                grown = cache.new_empty((rows, H, places, D))
                grown[:n, :, :S] = cache
                grown[:n, :, S:] = 0
                grown[n:] = 0
                caches[layer] = grown


class KVCache(_Rows):
    """A row for each sequence, number n in row n; a row that becomes free is filled from the end, and used again.

    Attributes:
        keys, values: of each layer `[rows, H, S, D]`, finite throughout; rows behind the sequences' are spare ones.
        lengths: `[N]` int64: how many places of its row each sequence has filled.
    """

    def __init__(self, n_layer: int, n_head: int, like: Tensor, head_dim: int) -> None:
        """An empty cache, with the dtype and on the device of `like`."""
        super().__init__(n_layer, n_head, like, head_dim, rows=0, places=_GROW_BY)
        self.lengths = torch.zeros(0, dtype=torch.int64, device=like.device)

    def add(self, lengths: Tensor) -> None:
        """Rows behind the others for new sequences, whose first `lengths` `[n]` places are going to be filled."""
        self.lengths = torch.cat([self.lengths, lengths])
        self._make_room()

    def extend(self) -> Tensor:
        """One more place of each sequence, which is going to be filled: its number, `[N]`."""
        places = self.lengths
        self.lengths = places + 1
        self._make_room()
        return places

    def read(self, layer: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of the sequences from number `first` on: `[n, H, S, D]`, with the places not yet filled."""
        N = len(self.lengths)
        return self.keys[layer][first:N], self.values[layer][first:N]

    def attention(
        self, layer: int, q: Tensor, prefix: tuple[Tensor, Tensor] | None, impl: str, *, first: int = 0
    ) -> Tensor:
        """Attention of one query `[n, H, D]` of each sequence from number `first` on, over all that it sees."""
        keys, values = (x.transpose(1, 2) for x in self.read(layer, first))
        return ops.attention_decode(q, keys, values, self.lengths[first:], prefix, impl)

    def step_attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, impl: str
    ) -> Tensor:
        """The same of all sequences, whose last places are filled with `k` and `v` before. Of these and of q,
        `[M, H, D]` each, rows behind the N sequences are padding: 0 in the result."""
        N, M = len(self.lengths), len(q)
        self.write(layer, torch.arange(N, device=q.device), self.lengths - 1, k[:N], v[:N])
        out = self.attention(layer, q[:N], prefix, impl)
        return F.pad(out, (0, 0, 0, 0, 0, M - N)) if M > N else out

    def drop(self, over: Collection[int]) -> list[int]:
        """Ends the sequences of the numbers `over`.

        Returns:
            The old numbers of those that go on, in the order of their new ones.
        """
        order, holes, moved = _after(len(self.lengths), over)
        to, of = (torch.tensor(rows, dtype=torch.int64, device=self.lengths.device) for rows in (holes, moved))
        for cache in (*self.keys, *self.values) if moved else ():
            cache[to] = cache[of]
        self.lengths = self.lengths[torch.tensor(order, dtype=torch.int64, device=self.lengths.device)]
        return order

    def _make_room(self) -> None:
        """Rows for all sequences, and places for the longest."""
        rows, _, S, _ = self.keys[0].shape
        N, longest = len(self.lengths), int(self.lengths.max())
        if rows < N or longest > S:
            self._resize(max(rows, N), max(S, -(-longest // _GROW_BY) * _GROW_BY))


class BlockCache:
    """As `KVCache`, in blocks of a few places, for compiled code on a CPU: nothing is ever copied to make room.

    Attributes:
        lengths: `[N]` int64: how many places each sequence has filled.
        blocks: all that there are, in use or free.
    """

    def __init__(self, n_layer: int, n_head: int, like: Tensor, head_dim: int) -> None:
        """An empty cache, in the dtype of `like`; where `ops.has_blocks` says that there is code for it."""
        self.lengths = torch.zeros(0, dtype=torch.int64)
        self._like = ops.new_block(n_layer, n_head, head_dim, like)
        self.blocks = [self._like]
        self._free = [self._like.data_ptr()]
        self._addresses = np.zeros((0, 0), np.int64)  # [rows, W]
        self._counts: list[int] = []  # [N] blocks of each sequence
        self._of_all: ops.BlockTable | None = None

    def add(self, lengths: Tensor) -> None:
        """Room for new sequences behind the others, whose first `lengths` `[n]` places are going to be filled."""
        self.lengths = torch.cat([self.lengths, lengths])
        self._counts += [0] * len(lengths)
        self._make_room()

    def extend(self) -> Tensor:
        """One more place of each sequence, which is going to be filled: its number, `[N]`."""
        places = self.lengths
        self.lengths = places + 1
        self._make_room()
        return places

    def write(self, layer: int, rows: Tensor, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Fills a place with each of `k` and `v` `[T, H, D]`: of sequence `rows[t]`, place `places[t]`."""
        self._table().fill(layer, rows, places, k, v)

    def attention(
        self, layer: int, q: Tensor, prefix: tuple[Tensor, Tensor] | None, _impl: str, *, first: int = 0
    ) -> Tensor:
        """See `KVCache`."""
        return self._table(first).attention(layer, q, prefix=prefix)

    def step_attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, _impl: str
    ) -> Tensor:
        """See `KVCache`; in one pass."""
        return self._table().attention(layer, q, prefix=prefix, new=(k, v))

    def drop(self, over: Collection[int]) -> list[int]:
        """See `KVCache`: only addresses move."""
        self._of_all = None
        order, holes, moved = _after(len(self.lengths), over)
        for number in over:
            self._free += self._addresses[number, : self._counts[number]].tolist()
        self._addresses[holes] = self._addresses[moved]
        self._counts = [self._counts[number] for number in order]
        self.lengths = self.lengths[order]
        return order

    def _table(self, first: int = 0) -> ops.BlockTable:
        """Of the sequences from number `first` on; that of all is kept until there are others, or further places."""
        if first == 0 and self._of_all is not None:
            return self._of_all
        addresses = torch.from_numpy(self._addresses[first : len(self.lengths)])
        table = ops.BlockTable(self._like, addresses, self.lengths[first:])
        if first == 0:
            self._of_all = table
        return table

    def _make_room(self) -> None:
        """Blocks for all places that are filled, or going to be."""
        self._of_all = None
        needed = [-(-length // ops.BLOCK_PLACES) for length in self.lengths.tolist()]
        (rows, W), N, widest = self._addresses.shape, len(needed), max(needed, default=0)
        if rows < N or widest > W:
            grown = np.zeros((max(N, rows), max(widest + widest // 2, W)), np.int64)
            grown[:rows, :W] = self._addresses
            self._addresses = grown
        for number, count in enumerate(needed):
            for block in range(self._counts[number], count):
                self._addresses[number, block] = self._taken()
            self._counts[number] = count

    def _taken(self) -> int:
        """The address of a block that nobody uses."""
        if not self._free:
            self.blocks.append(torch.empty_like(self._like))
            self._free.append(self.blocks[-1].data_ptr())
        return self._free.pop()


def _after(N: int, over: Collection[int]) -> tuple[list[int], list[int], list[int]]:
    """What becomes of N numbers when those of `over` are given up: the old numbers in the order of their new ones; and
    which of them are filled again, with which."""
    order = list(range(N - len(over)))
    holes = [number for number in order if number in over]
    moved = [number for number in range(len(order), N) if number not in over]
    for hole, number in zip(holes, moved, strict=True):
        order[hole] = number
    return order, holes, moved


class FixedCache(_Rows):
    """A fixed number of rows, whose places lie at the same addresses until there must be more of them.

    Attributes:
        keys, values: of each layer `[rows, H, S, D]`, finite throughout.
    """

    def __init__(self, n_layer: int, n_head: int, like: Tensor, head_dim: int, *, rows: int, most: int) -> None:
        """No place yet; with the dtype and on the device of `like`.

        Args:
            n_layer, n_head, head_dim: the model's.
            like: gives dtype and device.
            rows: how many.
            most: places that no row will ever need more of.
        """
        super().__init__(n_layer, n_head, like, head_dim, rows=rows, places=0)
        self._most = most

    @property
    def places(self) -> int:
        """S."""
        return self.keys[0].shape[2]

    def make_room(self, places: int) -> None:
        """At least so many places of each row, got in few large steps: a step that was captured is of no use after."""
        if places > self._most:
            raise ValueError(f"got {places} places, expected at most {self._most}")
        if places > self.places:
            size = max(_LEAST_PLACES, 1 << (places - 1).bit_length())
            self._resize(len(self.keys[0]), min(size, self._most))
