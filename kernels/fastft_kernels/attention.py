"""Interval attention: softmax(q k^T * scale + mask) v, where the mask is one integer for each key.

Key k is visible to query q exactly when `k <= q < visible_until[k]`. That one rule says plain causal attention
(`visible_until = T`), packed documents (each key's document end) and shared prefixes (the end of the group behind the
prefix).

The Triton kernels follow Dao 2023, "FlashAttention-2" (arXiv:2307.08691): an online softmax over tiles of keys, and a
backward pass that computes the probabilities again from the log-sum-exp. Which tiles of keys a tile of queries visits,
and which of them need no mask, is listed beforehand (`plan_attention`). The queries that see a tile of keys lie behind
it without a gap, so dK and dV go through a range; nothing is added atomically, and the same bits come out each time.
Where J heads of queries share a head of keys (grouped queries), dK and dV go through the rows (query, head) of that
range, the heads of a query side by side: the sum over the heads is part of the product.

Letters: T tokens, R queries (T, or the length of `q_rows`), H heads of queries, G heads of keys and values, J = H / G,
D head dim, DP the power of two that holds it; tiles of BM queries and BN keys in forward and dQ, of BQ queries and BK
keys in dK and dV.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft_kernels import attention_torch as in_torch
from fastft_kernels import registry, support, tables
from fastft_kernels.attention_plan import CHUNK, AttentionPlan, plan_attention
from fastft_kernels.cpu import attention as compiled
from fastft_kernels.heads import padded, why_not_head_dim
from fastft_kernels.support import Impl, tl, triton
from fastft_kernels.tiles import TileGroup, plan_tiles

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)
"""Below every score, and finite: a tile without a visible pair then leaves no NaN."""

SMALL_TILES: dict[str, Any] = {"BM": 16, "BN": 32, "BQ": 16, "BK": 32}
"""A plan's tiles for float32 heads of 128, for which the usual ones leave too few registers."""

WIDEST_FLOAT32 = 128
"""The widest heads that the kernels take in float32: registers spill beyond it."""
SHORTEST_CHUNK = 128
"""The fewest queries of a chunk of dK and dV, which is shorter with grouped queries: each has J rows there."""

_FOUR, _EIGHT = ({"num_warps": warps, "num_stages": 1} for warps in (4, 8))
_WIDE = {"num_warps": 8, "num_stages": 2}
_BY_HEAD = {(4, 16): _FOUR, (4, 32): _FOUR, (4, 64): _EIGHT, (4, 128): _EIGHT}
"""By (bytes of an element, DP): float32 products without tensor cores want many registers. Where other entries
stand below, these would spill under Triton 3.6; a BQ there is in place of the plan's."""
tables.TABLE["attention_forward"] = {
    "default": {None: {"num_warps": 4, "num_stages": 3}, **_BY_HEAD, (4, 32): _EIGHT, (2, 256): _WIDE},
    "sm_100": {(2, 64): {"num_warps": 4, "num_stages": 2}, (2, 256): _FOUR},
}
tables.TABLE["attention_dq"] = {
    "default": {
        None: {"num_warps": 4, "num_stages": 2, "PART": 32, "TURNED": False},
        **{size: {**config, "PART": 16, "TURNED": False} for size, config in _BY_HEAD.items()},
        (4, 128): {**_EIGHT, "PART": 32, "TURNED": True},
        (2, 256): {**_WIDE, "PART": 32, "TURNED": False},
    },
    "sm_86": {
        (4, 128): {"num_warps": 16, "num_stages": 1, "PART": 32, "TURNED": True},  # 8 spill at heads of 80 and 96
        (2, 256): {**_WIDE, "PART": 16, "TURNED": False},
    },
}
tables.TABLE["attention_dkv"] = {
    "default": {
        None: {"num_warps": 4, "num_stages": 2},
        **_BY_HEAD,
        (4, 32): _EIGHT,
        (4, 64): {**_EIGHT, "BQ": 16},
        (2, 256): {**_WIDE, "BQ": 16},
    },
    "sm_86": {(2, 128): _WIDE},  # 4 warps spill at heads of 80 and 96 under Triton 3.6
}
tables.TABLE["attention_sum"] = {"default": {None: _FOUR, (2, 256): _EIGHT}}


def visible_mask(visible_until: Tensor, q_rows: Tensor | None = None) -> Tensor:
    """`[R, T]` boolean mask of a `[T]` interval: entry (r, k) is True where query `q_rows[r]` sees key k."""
    token = torch.arange(visible_until.numel(), device=visible_until.device)
    query = token if q_rows is None else q_rows
    return (token[None, :] <= query[:, None]) & (query[:, None] < visible_until[None, :])


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The equation, step by step: q `[..., H, R, D]`, k and v `[..., G, T, D]`, mask `[R, T]` -> `[..., H, R, D]`, and
    the log-sum-exp of each query's scores `[..., H, R]`."""
    if (each := q.shape[-3] // k.shape[-3]) > 1:
        k, v = (x.repeat_interleave(each, dim=-3) for x in (k, v))
    scores = ((q @ k.transpose(-1, -2)) * scale).masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)


@triton.jit
def _rows_of(X, r, N, h, stride_t, stride_h, D: tl.constexpr, DP: tl.constexpr):
    """Rows r of head h, or of a head for each row: `[len(r), DP]`, zeros beyond N and D."""
    at = r[:, None].to(tl.int64) * stride_t + h * stride_h + tl.arange(0, DP)[None, :]
    return tl.load(X + at, mask=_inside(r, N, D, DP), other=0.0)


@triton.jit
def _inside(r, N, D: tl.constexpr, DP: tl.constexpr):
    """Where rows r of a tile that is DP wide are below N, and its columns below D."""
    inside = (r < N)[:, None]
    if DP != D:
        inside = inside & (tl.arange(0, DP) < D)[None, :]
    return inside


@triton.jit
def _positions(ROWS, r, R, T, HAS_ROWS: tl.constexpr):
    """The tokens that queries r are; T, which sees nothing, beyond R."""
    position = tl.where(r < R, r, T)
    if HAS_ROWS:
        position = tl.where(r < R, tl.load(ROWS + r, mask=r < R, other=0).to(tl.int32), T)
    return position


@triton.jit
def _forward_step(
    out, largest, total, q, position, K, V, UNTIL, tile, T, g, scale, stride_kt, stride_kh, stride_vt, stride_vh,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys put into the running softmax of a tile of queries."""
    n = tile * BN + tl.arange(0, BN)
    k = _rows_of(K, n, T, g, stride_kt, stride_kh, D, DP)  # [BN, DP]
    v = _rows_of(V, n, T, g, stride_vt, stride_vh, D, DP)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)  # [BM, BN]
    if MASKED:
        until = tl.load(UNTIL + n, mask=n < T, other=0)
        s = tl.where((n[None, :] <= position[:, None]) & (position[:, None] < until[None, :]), s, -float("inf"))
    both = tl.maximum(largest, tl.max(s, 1))
    p = tl.exp2(s - both[:, None])
    shrink = tl.exp2(largest - both)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return out, both, total * shrink + tl.sum(p, 1)


@triton.jit
def attention_forward(
    Q, K, V, UNTIL, ROWS, QUERY_TILES, KEY_TILES, OUT, LSE, T, R, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for a tile of queries of a head: OUT `[R, H, D]`, and LSE `[H, R]` to base 2."""
    i = tl.program_id(0)
    h = tl.program_id(1)
    g = h // J
    r = i * BM + tl.arange(0, BM)
    position = _positions(ROWS, r, R, T, HAS_ROWS)
    q = _rows_of(Q, r, R, h, stride_qt, stride_qh, D, DP)  # [BM, DP]
    largest = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, DP], tl.float32)
    begin = tl.load(QUERY_TILES + 3 * i)
    masked = tl.load(QUERY_TILES + 3 * i + 1)
    end = tl.load(QUERY_TILES + 3 * i + 2)
    for j in range(begin, masked):
        out, largest, total = _forward_step(
            out, largest, total, q, position, K, V, UNTIL, tl.load(KEY_TILES + j), T, g, scale,
            stride_kt, stride_kh, stride_vt, stride_vh, D, DP, BN, False, PRECISION,
        )  # fmt: skip
    for j in range(masked, end):
        out, largest, total = _forward_step(
            out, largest, total, q, position, K, V, UNTIL, tl.load(KEY_TILES + j), T, g, scale,
            stride_kt, stride_kh, stride_vt, stride_vh, D, DP, BN, True, PRECISION,
        )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)  # beyond R nothing was seen
    at = r[:, None].to(tl.int64) * (H * D) + h * D + tl.arange(0, DP)[None, :]
    tl.store(OUT + at, (out / total[:, None]).to(OUT.dtype.element_ty), mask=_inside(r, R, D, DP))
    tl.store(LSE + h * R + r, largest + tl.log2(total), mask=r < R)


@triton.jit
def _dq_step(
    dq, q, do, lse, delta, position, K, V, UNTIL, tile, T, g, scale, stride_kt, stride_kh, stride_vt, stride_vh,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr, TURNED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to dQ, without the scale; PART keys at a time, and TURNED, the scores keys by queries,
    as registers allow."""
    for begin in range(0, BN, PART):
        n = tile * BN + begin + tl.arange(0, PART)
        k = _rows_of(K, n, T, g, stride_kt, stride_kh, D, DP)  # [PART, DP]
        v = _rows_of(V, n, T, g, stride_vt, stride_vh, D, DP)
        until = tl.load(UNTIL + n, mask=n < T, other=0)
        if TURNED:
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) - lse[None, :]  # [PART, BM]
            if MASKED:
                seen = (n[:, None] <= position[None, :]) & (position[None, :] < until[:, None])
                s = tl.where(seen, s, -float("inf"))
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = tl.trans(tl.exp2(s) * (dp - delta[None, :]))
        else:
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) - lse[:, None]  # [BM, PART]
            if MASKED:
                seen = (n[None, :] <= position[:, None]) & (position[:, None] < until[None, :])
                s = tl.where(seen, s, -float("inf"))
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = tl.exp2(s) * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def attention_dq(
    Q, K, V, OUT, DO, UNTIL, ROWS, QUERY_TILES, KEY_TILES, LSE, DQ, DELTA, T, R, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PART: tl.constexpr, TURNED: tl.constexpr, HAS_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for a tile of queries of a head: DQ `[R, H, D]`, and DELTA = sum(out * do) `[H, R]`."""
    i = tl.program_id(0)
    h = tl.program_id(1)
    g = h // J
    r = i * BM + tl.arange(0, BM)
    position = _positions(ROWS, r, R, T, HAS_ROWS)
    q = _rows_of(Q, r, R, h, stride_qt, stride_qh, D, DP)  # [BM, DP]
    do = _rows_of(DO, r, R, h, stride_dt, stride_dh, D, DP)
    o = _rows_of(OUT, r, R, h, H * D, D, D, DP)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + h * R + r, delta, mask=r < R)
    lse = tl.load(LSE + h * R + r, mask=r < R, other=0.0)
    dq = tl.zeros([BM, DP], tl.float32)
    begin = tl.load(QUERY_TILES + 3 * i)
    masked = tl.load(QUERY_TILES + 3 * i + 1)
    end = tl.load(QUERY_TILES + 3 * i + 2)
    for j in range(begin, masked):
        dq = _dq_step(
            dq, q, do, lse, delta, position, K, V, UNTIL, tl.load(KEY_TILES + j), T, g, scale,
            stride_kt, stride_kh, stride_vt, stride_vh, D, DP, BN, PART, TURNED, False, PRECISION,
        )  # fmt: skip
    for j in range(masked, end):
        dq = _dq_step(
            dq, q, do, lse, delta, position, K, V, UNTIL, tl.load(KEY_TILES + j), T, g, scale,
            stride_kt, stride_kh, stride_vt, stride_vh, D, DP, BN, PART, TURNED, True, PRECISION,
        )  # fmt: skip
    at = r[:, None].to(tl.int64) * (H * D) + h * D + tl.arange(0, DP)[None, :]
    tl.store(DQ + at, (dq * scale).to(DQ.dtype.element_ty), mask=_inside(r, R, D, DP))


@triton.jit
def attention_dkv(
    Q, K, V, DO, UNTIL, ROWS, ITEMS, LSE, DELTA, DK, DV, PARTIAL, T, R, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    HAS_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for an item of the plan and a head of keys: a tile of keys, and the queries that see it or a chunk of
    them, of each of the head's J heads of queries.

    DK and DV `[T, G, D]`, or the item's slot of PARTIAL `[slots, G, 2, BK, DP]`.
    """
    item = tl.program_id(0)
    g = tl.program_id(1)
    tile = tl.load(ITEMS + 4 * item)
    first = tl.load(ITEMS + 4 * item + 1)
    end = tl.load(ITEMS + 4 * item + 2)
    slot = tl.load(ITEMS + 4 * item + 3)
    if tile >= 0:
        n = tile * BK + tl.arange(0, BK)
        d = tl.arange(0, DP)
        k = _rows_of(K, n, T, g, stride_kt, stride_kh, D, DP)  # [BK, DP]
        v = _rows_of(V, n, T, g, stride_vt, stride_vh, D, DP)
        until = tl.load(UNTIL + n, mask=n < T, other=0)
        dk = tl.zeros([BK, DP], tl.float32)
        dv = tl.zeros([BK, DP], tl.float32)
        for begin in range(first * J, end * J, BQ):
            row = begin + tl.arange(0, BQ)
            r = row // J
            h = g * J + row % J
            position = _positions(ROWS, r, end, T, HAS_ROWS)
            q = _rows_of(Q, r, end, h[:, None], stride_qt, stride_qh, D, DP)  # [BQ, DP]
            do = _rows_of(DO, r, end, h[:, None], stride_dt, stride_dh, D, DP)
            lse = tl.load(LSE + h * R + r, mask=r < end, other=0.0)
            delta = tl.load(DELTA + h * R + r, mask=r < end, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) - lse[None, :]  # [BK, BQ]
            visible = (n[:, None] <= position[None, :]) & (position[None, :] < until[:, None])
            p = tl.exp2(tl.where(visible, s, -float("inf")))
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        dk *= scale
        if slot >= 0:
            part = (slot * G + g).to(tl.int64) * (2 * BK * DP) + tl.arange(0, BK)[:, None] * DP + d[None, :]
            tl.store(PARTIAL + part, dk)
            tl.store(PARTIAL + part + BK * DP, dv)
        else:
            at = n[:, None].to(tl.int64) * (G * D) + g * D + d[None, :]
            tl.store(DK + at, dk.to(DK.dtype.element_ty), mask=_inside(n, T, D, DP))
            tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=_inside(n, T, D, DP))


@triton.jit
def attention_sum(
    PARTIAL, SUMS, DK, DV, T, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """One program for a tile of keys whose queries were cut into chunks, and a head: its slots, in their order."""
    i = tl.program_id(0)
    g = tl.program_id(1)
    tile = tl.load(SUMS + 3 * i)
    begin = tl.load(SUMS + 3 * i + 1)
    end = tl.load(SUMS + 3 * i + 2)
    if tile >= 0:
        n = tile * BK + tl.arange(0, BK)
        d = tl.arange(0, DP)
        dk = tl.zeros([BK, DP], tl.float32)
        dv = tl.zeros([BK, DP], tl.float32)
        for slot in range(begin, end):
            of_slot = (tl.cast(slot, tl.int64) * G + g) * (2 * BK * DP)
            part = PARTIAL + of_slot + tl.arange(0, BK)[:, None] * DP + d[None, :]
            dk += tl.load(part)
            dv += tl.load(part + BK * DP)
        at = n[:, None].to(tl.int64) * (G * D) + g * D + d[None, :]
        tl.store(DK + at, dk.to(DK.dtype.element_ty), mask=_inside(n, T, D, DP))
        tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=_inside(n, T, D, DP))


def _config(kernel: str, q: Tensor) -> dict[str, int]:
    return tables.tiles(kernel, support.arch_of(q), (q.element_size(), padded(q.shape[-1])))


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of tokens and heads."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def _dense(x: Tensor) -> Tensor:
    """x with its last axis in one piece."""
    return x if x.stride(2) == 1 else x.contiguous()


@registry.operation("attention_forward")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, until: Tensor, rows: Tensor | None,
    query_tiles: Tensor, key_tiles: Tensor, items: Tensor, sums: Tensor,
    sizes: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q `[R, H, D]`, k and v `[T, G, D]`, a plan's tensors and `[BM, BN, BQ, BK, slots]` -> `[R, H, D]`, and the
    log-sum-exps `[H, R]` to base 2. `items` and `sums` are for the backward pass."""
    (R, H, D), T = q.shape, k.shape[0]
    out, lse = _forward_outputs(q)
    if R:
        attention_forward[(query_tiles.shape[0], H)](
            q, k, v, until, until if rows is None else rows, query_tiles, key_tiles, out, lse, T, R, scale,
            *_strides(q, k, v), H=H, J=H // k.shape[1], D=D, DP=padded(D), BM=sizes[0], BN=sizes[1],
            HAS_ROWS=rows is not None, PRECISION=support.precision(), **_config("attention_forward", q),
        )  # fmt: skip
    return out, lse


def _forward_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    R, H, _ = q.shape
    lse = torch.empty(H, R, dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


@registry.fake(_forward)
def _(
    q: Tensor, k: Tensor, v: Tensor, until: Tensor, rows: Tensor | None,
    query_tiles: Tensor, key_tiles: Tensor, items: Tensor, sums: Tensor,
    sizes: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward_outputs(q)


@registry.operation("attention_backward")
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, until: Tensor, rows: Tensor | None,
    query_tiles: Tensor, key_tiles: Tensor, items: Tensor, sums: Tensor,
    sizes: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q `[R, H, D]`, k and v `[T, G, D]`."""
    (R, H, D), (T, G, _), DP = q.shape, k.shape, padded(q.shape[2])
    dq, dk, dv = _backward_outputs(q, k, v)
    if not R:
        return dq, dk.zero_(), dv.zero_()
    BM, BN, BQ, BK, slots = sizes
    do = _dense(do)
    delta = torch.empty_like(lse)
    partial = torch.empty(max(1, slots), G, 2, BK, DP, dtype=torch.float32, device=q.device)
    which = until if rows is None else rows
    shared = {"J": H // G, "D": D, "DP": DP, "HAS_ROWS": rows is not None, "PRECISION": support.precision()}
    attention_dq[(query_tiles.shape[0], H)](
        q, k, v, out, do, until, which, query_tiles, key_tiles, lse, dq, delta, T, R, scale,
        *_strides(q, k, v, do), H=H, BM=BM, BN=BN, **shared, **_config("attention_dq", q),
    )  # fmt: skip
    attention_dkv[(items.shape[0], G)](
        q, k, v, do, until, which, items, lse, delta, dk, dv, partial, T, R, scale,
        *_strides(q, k, v, do), G=G, BK=BK, **shared, **{"BQ": BQ, **_config("attention_dkv", q)},
    )  # fmt: skip
    if slots:
        config = _config("attention_sum", q)
        attention_sum[(sums.shape[0], G)](partial, sums, dk, dv, T, G=G, D=D, DP=DP, BK=BK, **config)
    return dq, dk, dv


def _backward_outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


@registry.fake(_backward)
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, until: Tensor, rows: Tensor | None,
    query_tiles: Tensor, key_tiles: Tensor, items: Tensor, sums: Tensor,
    sizes: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward_outputs(q, k, v)


def _save(ctx, inputs, output):
    q, k, v, until, rows, query_tiles, key_tiles, items, sums, ctx.sizes, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, until, rows, query_tiles, key_tiles, items, sums)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, do, _):
    return *_backward(do, *ctx.saved_tensors, ctx.sizes, ctx.scale), *[None] * 8


registry.differentiable(_forward, save=_save, gradient=_differentiate)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    *,
    q_rows: Tensor | None = None,
    scale: float | None = None,
    row_length: int | None = None,
    tiles: Sequence[TileGroup] | None = None,
    plan: AttentionPlan | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed tokens over the keys that each one sees.

    Args:
        q: `[T, H, D]`, or `[R, H, D]` with `q_rows`.
        k, v: `[T, G, D]`, in the dtype and on the device of `q`. G is H, or divides it (grouped queries): head h of the
            queries then reads head `h // (H / G)`, which no implementation but `reference` and torch's own fused
            attention copies. All three may be views into one tensor.
        visible_until: `[T]` integers; key k is visible to query q exactly when `k <= q < visible_until[k]`.
        q_rows: `[R]` sorted int64: the tokens that ask, where not all of them do; they may repeat.
        scale: factor of the scores; `1 / sqrt(D)` where it is not given.
        row_length: W where the tokens are `T / W` rows of W tokens each that see only their own row causally
            (`visible_until` says the same): torch's fused attention then runs on `[T / W, W]` wherever compiled code is
            not faster, on every device.
        tiles, plan: what `plan_tiles(visible_until, q_rows)` gives, for `torch`, and `plan_attention`, for `triton`;
            computed here where they are not given, which waits for the device. `compiled` needs none.
        return_lse: also return the log-sum-exp of each query's scores, without gradient.
        impl: `reference` computes the equation above step by step, over all T x T scores; `torch` the tiles that are
            needed, by torch's products; `compiled` C on a CPU, float32 and bf16; `triton` the kernels, for head
            dims that are multiples of 16 up to 256 (128 in float32); `auto` is `triton` where those run on a GPU,
            `compiled` on a CPU that has a compiler, else `torch`.

    Returns:
        `[T, H, D]` (`[R, H, D]` with `q_rows`) in the dtype of `q`; with `return_lse` also `[H, R]` float32 (float64
        where q is), natural logarithms.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or `triton` or `compiled` where it cannot run.
    """
    _check(q, k, v, visible_until, q_rows, row_length)
    impl = _chosen(impl, q, k, v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    W = row_length if q_rows is None and not return_lse else None
    if W is not None and impl != "reference" and not (impl == "compiled" and _pays_in_rows(q, k, v)):
        return in_torch.in_rows(q, k, v, W, scale)
    if impl == "triton":
        out, lse = _by_triton(q, k, v, visible_until, q_rows, scale, plan)
        return (out, lse * math.log(2)) if return_lse else out
    if impl == "compiled":
        out, lse = compiled.attention(q, k, v, visible_until, q_rows, scale)
        return (out, lse) if return_lse else out
    if impl == "torch" and not return_lse:
        return in_torch.in_tiles(q, k, v, plan_tiles(visible_until, q_rows) if tiles is None else tiles, scale)
    if W is not None:
        return _reference_in_rows(q, k, v, W, scale)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out, lse = reference(q, k, v, visible_mask(visible_until, q_rows), scale)
    wide = torch.promote_types(lse.dtype, torch.float32)
    return (out.transpose(0, 1), lse.detach().to(wide)) if return_lse else out.transpose(0, 1)


def _reference_in_rows(q: Tensor, k: Tensor, v: Tensor, row_length: int, scale: float) -> Tensor:
    """`reference` of rows of W tokens that each see their own row causally."""
    q, k, v = (x.unflatten(0, (-1, row_length)).transpose(1, 2) for x in (q, k, v))  # [B, H, W, D]
    causal = torch.ones(row_length, row_length, dtype=torch.bool, device=q.device).tril()
    return reference(q, k, v, causal, scale)[0].transpose(1, 2).flatten(0, 1)


def _by_triton(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, q_rows: Tensor | None, scale: float,
    plan: AttentionPlan | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    support.check_dtype(q)
    if (why_not := why_not_heads(q)) is not None:
        raise ValueError(f'{why_not} with impl="triton"; impl="torch" takes any')
    if plan is None:
        small = q.dtype == torch.float32 and q.shape[-1] > 64
        chunk = max(SHORTEST_CHUNK, CHUNK // (q.shape[1] // k.shape[1]))
        plan = plan_attention(visible_until, q_rows, chunk=chunk, **(SMALL_TILES if small else {})).to(q.device)
    if plan.query_tiles.device != q.device:
        raise ValueError(f"got a plan on {plan.query_tiles.device}, expected it on q's device: plan.to(q.device)")
    if (k.shape[0], q.shape[0]) != (plan.T, plan.R):
        raise ValueError(f"got a plan for T = {plan.T}, R = {plan.R}, expected {k.shape[0]} and {q.shape[0]}")
    out, lse = _forward(
        *map(_dense, (q, k, v)), visible_until.to(torch.int32), q_rows,
        plan.query_tiles, plan.key_tiles, plan.items, plan.sums,
        [plan.BM, plan.BN, plan.BQ, plan.BK, plan.slots], scale,
    )  # fmt: skip
    return out, lse


def _chosen(impl: Impl, q: Tensor, *others: Tensor) -> Impl:
    if impl == "auto" and q.device.type != "cpu" and why_not_heads(q):
        return "torch"
    return support.choose(impl, q, *others, has_compiled=True)


def _pays_in_rows(*given: Tensor) -> bool:
    """Whether compiled code is faster than torch's fused attention, whose products of bf16 a CPU may have instructions
    for: forward then, and not backward."""
    return given[0].dtype == torch.float32 or (torch.is_grad_enabled() and any(x.requires_grad for x in given))


def why_not_heads(q: Tensor) -> str | None:
    """Why the kernels do not take heads `[..., D]`; None where they do."""
    D = q.shape[-1]
    if (why_not := why_not_head_dim(D)) is None and q.dtype == torch.float32 and D > WIDEST_FLOAT32:
        return f"got head dim {D} in float32, expected at most {WIDEST_FLOAT32}, or 16 bits,"
    return why_not


def _check(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, q_rows: Tensor | None, row_length: int | None
) -> None:
    queries = k.shape[0] if q_rows is None else q_rows.numel()
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, expected "
    if k.ndim != 3 or k.shape != v.shape or q.ndim != 3 or (q.shape[0], q.shape[2]) != (queries, k.shape[2]):
        raise ValueError(f"{shapes}k and v [T, G, D] and q [T, H, D] (or [R, H, D] with q_rows [R])")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{shapes}heads of keys that divide the heads of queries: {q.shape[1]} % {k.shape[1]} is not 0"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"got q {q.dtype}, k {k.dtype}, v {v.dtype}, expected one floating dtype")
    if visible_until.shape != k.shape[:1] or visible_until.is_floating_point():
        raise ValueError(
            f"got visible_until {tuple(visible_until.shape)} {visible_until.dtype}, expected [{k.shape[0]}] integers"
        )
    if row_length is not None and (row_length < 1 or k.shape[0] % row_length):
        raise ValueError(f"got row_length {row_length}, expected a divisor of T = {k.shape[0]}")
    if any(x is not None and x.device != q.device for x in (k, v, visible_until, q_rows)):
        raise ValueError(f"got tensors on different devices, expected all on q's, {q.device}")
