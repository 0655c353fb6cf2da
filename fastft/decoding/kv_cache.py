"""The keys and values of sequences that are being answered, which come and go.

Letters: N sequences, n of them new, L layers, H heads, S places of a row, D head dim.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

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

    def drop(self, over: Collection[int]) -> list[int]:
        """Ends the sequences of the numbers `over`.

        Returns:
            The old numbers of those that go on, in the order of their new ones.
        """
        N = len(self.lengths)
        order = list(range(N - len(over)))
        holes = [number for number in order if number in over]
        moved = [number for number in range(len(order), N) if number not in over]
        for hole, number in zip(holes, moved, strict=True):
            order[hole] = number
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
