"""Attention of one new token a sequence over cached keys and values, in C: `decode.c`.

The cache is either `[N, S, G, D]`, a row of places for each sequence, or blocks of a few places, which a sequence gets
one by one as it grows (Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with
PagedAttention", arXiv:2309.06180): then nothing is ever copied, and no place lies empty but in a sequence's last block.

Letters: N sequences, H heads of queries, G heads of keys and values, D head dim, P tokens of the shared prefix, T new
tokens, W blocks of the longest sequence.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from fastft_kernels import support
from fastft_kernels.cpu import given
from fastft_kernels.cpu.library import run

MOST_HEAD_DIM = 256
PLACES = 16
"""Of a block: with 64 numbers a head, its keys fill a page of memory in float32; of a sequence's last block, half lie
empty on average."""


class _Decode(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "k", "v", "new_k", "new_v", "prefix_k", "prefix_v", "lengths", "blocks", "out")
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "N", "H", "G", "D", "P", "places", "width", "offset_k", "offset_v", "row_q", "head_q", "row_new",
                "head_new", "row_k", "head_k", "place_k", "row_v", "head_v", "place_v", "prefix_place_k",
                "prefix_head_k", "prefix_place_v", "prefix_head_v",
            )
        ),
        ("scale", ctypes.c_float),
        ("is_narrow", ctypes.c_int32),
    ]  # fmt: skip


class _Fill(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cache", "rows", "at")),
        ("T", ctypes.c_int64),
    ]


def why_not(dtype: torch.dtype, device: torch.device, head_dim: int) -> str | None:
    """Why there is no such code for these keys and values; None where there is."""
    if head_dim > MOST_HEAD_DIM:
        return f"the head dim is {head_dim}, and compiled code takes up to {MOST_HEAD_DIM}"
    return support.why_not_compiled(torch.empty(0, dtype=dtype, device=device))


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, prefix: tuple[Tensor, Tensor] | None, scale: float
) -> Tensor:
    """See `fastft_kernels.attention_decode`, which has looked at shapes, dtypes and devices.

    Raises:
        ValueError: a length that is negative or more than the cache's places, or what `why_not` says.
    """
    _refuse(q.dtype, q.device, q.shape[-1])
    k_cache, v_cache = given.in_rows(k_cache), given.in_rows(v_cache)
    (N, S, G, D), lengths = k_cache.shape, lengths.to(torch.int64).contiguous()
    of = _Decode(lengths=given.at_integers("lengths", lengths, len(q)), G=G, D=D, is_narrow=given.is_narrow(q))
    asked = _asked(of, q, N, given.extremes("lengths", lengths, S)[1], prefix, scale)
    of.k, of.v = (given.at(x, N, S, G, D, dtype=q.dtype, name="a cache") for x in (k_cache, v_cache))
    of.places = max(S, 1)
    of.row_k, of.place_k, of.head_k, _ = k_cache.stride()
    of.row_v, of.place_v, of.head_v, _ = v_cache.stride()
    return asked.answered()


def new_block(layers: int, heads: int, head_dim: int, like: Tensor) -> Tensor:
    """A block's memory, `[L, G, 2, PLACES, D]`: the keys and the values of a head lie beside each other."""
    return like.new_empty(layers, heads, 2, PLACES, head_dim)


class BlockTable:
    """The blocks of N sequences, and how many of their places count: looked at once, for all layers of a step."""

    def __init__(self, block: Tensor, addresses: Tensor, lengths: Tensor) -> None:
        """Keeps what it is given, none of which may change as long as it is used.

        Args:
            block: any of them, of `new_block`.
            addresses: `[N, W]` int64, of the blocks of each sequence, as far as its length needs them.
            lengths: `[N]` int64, from 0 to `W * PLACES`: the places that count.

        Raises:
            ValueError: what would be read or written outside the blocks, or what `why_not` says.
        """
        _refuse(block.dtype, block.device, block.shape[-1])
        _check_blocks(block, addresses, len(lengths))
        self._N, self._block, self._addresses = len(lengths), block, addresses
        self._lengths = lengths.to(torch.int64).contiguous()
        self._least, self._longest = given.extremes("lengths", self._lengths, addresses.shape[1] * PLACES)
        _, G, _, _, D = block.shape
        of_layer, of_head, of_kind, of_place, _ = block.stride()
        self._of_layer, self._of_kind = of_layer, of_kind
        self._of = _Decode(
            lengths=given.at_integers("lengths", self._lengths, len(lengths)), blocks=addresses.data_ptr(),
            width=addresses.stride(0), places=PLACES, G=G, D=D, head_k=of_head, head_v=of_head, place_k=of_place,
            place_v=of_place, is_narrow=given.is_narrow(block),
        )  # fmt: skip

    def attention(
        self,
        layer: int,
        q: Tensor,
        *,
        prefix: tuple[Tensor, Tensor] | None = None,
        new: tuple[Tensor, Tensor] | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of one query a sequence over the keys and values of its blocks, and of a shared prefix.

        Args:
            layer: whose keys and values.
            q: `[M, H, D]` on the CPU, in the blocks' dtype; rows behind the N sequences see nothing.
            prefix: keys and values `[P, G, D]` in front of all sequences' own.
            new: keys and values `[M, G, D]`, the first N of which are to be written into each sequence's last place
                before: no length is 0.
            scale: factor of the scores; `1 / sqrt(D)` where it is not given.

        Returns:
            `[M, H, D]`; 0 for what sees nothing.

        Raises:
            ValueError: tensors of other shapes or dtypes, or no such layer.
        """
        block, N, of = self._block, self._N, self._of_layer_alone(layer)
        if q.ndim != 3 or q.shape[0] < N or q.shape[2] != of.D or q.dtype != block.dtype:
            expected = f"[{N} or more, H, {of.D}] {block.dtype}, as blocks"
            raise ValueError(f"got q {tuple(q.shape)} {q.dtype}, expected {expected}")
        asked = _asked(of, q, N, self._longest, prefix, 1 / math.sqrt(of.D) if scale is None else scale)
        if new is not None:
            if N and self._least < 1:
                raise ValueError("got a length of 0 with new keys and values, expected lengths that count them")
            asked.keep += _place_new(of, *new, block, len(q))
        return asked.answered()

    def fill(self, layer: int, rows: Tensor, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Writes keys and values of T tokens, `[T, G, D]`: each into the place `places[t]` of the sequence `rows[t]`.

        Args:
            layer: whose.
            rows, places: `[T]` int64, no two the same; also places that do not count yet.
            k, v: in the blocks' dtype.

        Raises:
            ValueError: what would be written outside the blocks, or no such layer.
        """
        T, (N, W) = len(rows), self._addresses.shape
        for name, at, most in (("rows", rows, N), ("places", places, W * PLACES)):
            given.at_integers(name, at, T)
            given.extremes(name, at, most - 1)
        of = self._of_layer_alone(layer)
        of.N, of.H = T, of.G
        kept = _place_new(of, k, v, self._block, T)
        run("fastft_fill_places", _Fill(ctypes.addressof(of), rows.data_ptr(), places.data_ptr(), T))
        del kept  # until here what `of` has the addresses of is there

    def _of_layer_alone(self, layer: int) -> _Decode:
        """A copy, of a layer's keys and values."""
        if not 0 <= layer < len(self._block):
            raise ValueError(f"got layer {layer}, expected 0 to {len(self._block) - 1}")
        of = _Decode.from_buffer_copy(self._of)
        of.offset_k = layer * self._of_layer
        of.offset_v = of.offset_k + self._of_kind
        return of


class _Asked:
    """What the function is given, all but where keys and values lie; and the tensors whose addresses are in it."""

    def __init__(self, of: _Decode, out: Tensor, keep: list[Tensor], elements: int) -> None:
        self.of, self.keep = of, keep
        self._out, self._elements = out, elements

    def answered(self) -> Tensor:
        run("fastft_attention_decode", self.of, threads=given.threads(self._elements))
        return self._out


def _asked(of: _Decode, q: Tensor, N: int, longest: int, prefix: tuple[Tensor, Tensor] | None, scale: float) -> _Asked:
    """`of` with the first N queries, the prefix and the result; its sizes G and D and its lengths are there."""
    (M, H, D), G = q.shape, of.G
    if H % G:
        raise ValueError(f"got {H} heads of queries, expected a multiple of the {G} of keys")
    q, out = given.in_rows(q), torch.empty(M, H, D, dtype=q.dtype)
    if N < M:
        out[N:] = 0
    of.q, of.out, of.N, of.H, of.scale = given.at(q, M, H, D), out.data_ptr(), N, H, scale
    of.row_q, of.head_q, _ = q.stride()
    keep = [q]
    if prefix is not None and len(prefix[0]):
        k, v = map(given.in_rows, prefix)
        of.P = len(k)
        of.prefix_k, of.prefix_v = (given.at(x, of.P, G, D, dtype=q.dtype, name="a prefix") for x in (k, v))
        (of.prefix_place_k, of.prefix_head_k, _), (of.prefix_place_v, of.prefix_head_v, _) = k.stride(), v.stride()
        keep += [k, v]
    return _Asked(of, out, keep, N * (longest + of.P) * H * D)


def _refuse(dtype: torch.dtype, device: torch.device, head_dim: int) -> None:
    if (why := why_not(dtype, device, head_dim)) is not None:
        raise ValueError(f"got {dtype} with a head dim of {head_dim}: {why}")


def _check_blocks(block: Tensor, addresses: Tensor, N: int) -> None:
    if block.ndim != 5 or block.shape[2:4] != (2, PLACES) or not block.is_contiguous():
        raise ValueError(f"got a block {tuple(block.shape)}, expected [L, G, 2, {PLACES}, D] in one piece")
    if (
        (addresses.ndim, len(addresses), addresses.dtype) != (2, N, torch.int64)
        or not addresses.is_cpu
        or addresses.stride(1) != 1
    ):
        raise ValueError(
            f"got addresses {tuple(addresses.shape)} {addresses.dtype} on {addresses.device}, expected [{N}, W] int64 "
            "on the CPU, rows in one piece"
        )


def _place_new(of: _Decode, k: Tensor, v: Tensor, block: Tensor, count: int) -> list[Tensor]:
    """Returns the tensors that have to live on."""
    shape = (count, block.shape[1], block.shape[-1])
    k, v = given.in_rows(k), given.in_rows(v)
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    of.new_k, of.new_v = (given.at(x, *shape, dtype=block.dtype, name="new") for x in (k, v))
    of.row_new, of.head_new, _ = k.stride()
    return [k, v]
