"""Interval attention: softmax(q k^T * scale + mask) v, where the mask is one integer for each key.

    o = (q @ k.T * scale).masked_fill(~visible, -inf).softmax(-1) @ v,   visible[q, k] = k <= q < visible_until[k]

That one rule says plain causal attention (`visible_until = T`), packed documents (each key's document end), shared
prefixes (the end of the group behind the prefix) and any deeper trie.

With s the scores, lse the logarithm of a row's sum of exponentials, p = exp(s - lse) and delta = sum(o * do), the
gradients are `dv = p.T @ do`, `ds = p * (do @ v.T - delta)`, `dq = scale * ds @ k` and `dk = scale * ds.T @ q`
(Dao 2023, "FlashAttention-2", arXiv:2307.08691). The kernels compute the tiles of the score matrix that an
`AttentionPlan` lists, keep none of it, and add in a fixed order.

Letters: T tokens, R queries (T, or the length of `q_rows`), H heads, D head dim; BM queries and BN keys of a tile in
forward and dQ, BQ and BK in dK and dV; E entries, I items and G sums of the plan.
"""

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from fastft_kernels import attention_torch, support, tables
from fastft_kernels.attention_plan import AttentionPlan, plan_attention
from fastft_kernels.support import Impl, tl, triton
from fastft_kernels.tiles import TileGroup, plan_tiles

KEPT_PAIRS = 1 << 17
"""Pairs, of all tiles of a call, up to which the torch path keeps their probabilities for the backward pass."""
HEAD_DIMS = (32, 64, 128)
"""Head dims that the kernels are built for."""

# The size is (D, bytes of an element).
tables.TABLE["attention_forward"] = {"default": {None: {"num_warps": 4, "num_stages": 3}}}
tables.TABLE["attention_dq"] = {"default": {None: {"num_warps": 4, "num_stages": 2}}}
tables.TABLE["attention_dkv"] = {"default": {None: {"num_warps": 4, "num_stages": 2}}}
tables.TABLE["attention_sum"] = {"default": {None: {"num_warps": 4, "num_stages": 1}}}

_LOG2_E = 1.4426950408889634
LOG2_E = tl.constexpr(_LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)


def visible_mask(visible_until: Tensor, q_rows: Tensor | None = None) -> Tensor:
    """`[R, T]` boolean mask of a `[T]` interval: entry (r, k) is True where query `q_rows[r]` sees key k."""
    token = torch.arange(visible_until.numel(), device=visible_until.device)
    query = token if q_rows is None else q_rows
    return (token[None, :] <= query[:, None]) & (query[:, None] < visible_until[None, :])


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    *,
    q_rows: Tensor | None = None,
    scale: float | None = None,
    row_length: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The equation, step by step, over all R x T scores (over each row's own with `row_length`)."""
    T, H, D = k.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    if row_length is not None and q_rows is None:
        q, k, v = (x.reshape(T // row_length, row_length, H, D).transpose(1, 2) for x in (q, k, v))  # [B, H, W, D]
        mask = torch.ones(row_length, row_length, dtype=torch.bool, device=q.device).tril()
    else:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [H, R or T, D]
        mask = visible_mask(visible_until, q_rows)
    scores = ((q @ k.transpose(-1, -2)) * scale).masked_fill(~mask, -math.inf)
    out = _packed(scores.softmax(dim=-1) @ v)
    if not return_lse:
        return out
    wide = torch.promote_types(q.dtype, torch.float32)
    return out, _packed(scores.detach().to(wide).logsumexp(dim=-1, keepdim=True)).squeeze(-1).t().contiguous()


def _packed(x: Tensor) -> Tensor:
    """`[H, R, D]` or `[B, H, W, D]` as `[R, H, D]`."""
    return x.transpose(-3, -2).reshape(-1, x.shape[-3], x.shape[-1])


@triton.jit
def _rows_of(X, rows, inside, stride, D: tl.constexpr):
    """Rows of one head: [B, D], 0 where they are not inside."""
    at = rows.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(X + at, mask=inside[:, None], other=0.0)


@triton.jit
def _tokens_of(ROWS, queries, R, HAS_ROWS: tl.constexpr):
    """The tokens that queries stand for: [B]. Beyond the last query it is that one again, which sees something."""
    tokens = tl.minimum(queries, R - 1)
    if HAS_ROWS:
        tokens = tl.load(ROWS + tokens).to(tl.int32)
    return tokens


@triton.jit
def _scores(q, k, tokens, keys, UNTIL, T, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """[BM, BN] scores, in units of ln 2; -inf where a query does not see a key."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if MASKED:
        until = tl.load(UNTIL + keys, mask=keys < T, other=0).to(tl.int32)
        visible = (keys[None, :] <= tokens[:, None]) & (tokens[:, None] < until[None, :])
        s = tl.where(visible, s, float("-inf"))
    return s


@triton.jit
def _forward_tiles(
    total, largest, weight, q, tokens, K, V, UNTIL, KEY_TILES, begin, end, T, scale_log2, stride_k, stride_v,
    BN: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes some key tiles into the running sums of a query tile."""
    for entry in range(begin, end):
        keys = tl.load(KEY_TILES + entry) * BN + tl.arange(0, BN)
        k = _rows_of(K, keys, keys < T, stride_k, D)  # [BN, D]
        v = _rows_of(V, keys, keys < T, stride_v, D)  # [BN, D]
        s = _scores(q, k, tokens, keys, UNTIL, T, scale_log2, MASKED, PRECISION)
        higher = tl.maximum(largest, tl.max(s, 1))
        p = tl.math.exp2(s - higher[:, None])
        shrink = tl.math.exp2(largest - higher)
        weight = weight * shrink + tl.sum(p, 1)
        total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision=PRECISION)
        largest = higher
    return total, largest, weight


@triton.jit
def attention_forward(
    Q, K, V, UNTIL, ROWS, QUERY_TILES, KEY_TILES, OUT, LSE, R, T, scale_log2,
    stride_q, head_q, stride_k, head_k, stride_v, head_v,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for a query tile and a head; the last tiles, which see the most, begin first."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, H = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    queries = tile * BM + tl.arange(0, BM)
    inside = queries < R
    tokens = _tokens_of(ROWS, queries, R, HAS_ROWS)
    q = _rows_of(Q + h * head_q, queries, inside, stride_q, D)  # [BM, D]
    K += h * head_k
    V += h * head_v
    total = tl.zeros([BM, D], tl.float32)
    largest = tl.full([BM], -1.0e30, tl.float32)  # finite: a row with all its keys masked so far gives no NaN
    weight = tl.zeros([BM], tl.float32)
    begin = tl.load(QUERY_TILES + 3 * tile)
    masked = tl.load(QUERY_TILES + 3 * tile + 1)
    end = tl.load(QUERY_TILES + 3 * tile + 2)
    total, largest, weight = _forward_tiles(
        total, largest, weight, q, tokens, K, V, UNTIL, KEY_TILES, begin, masked, T, scale_log2, stride_k, stride_v,
        BN, D, False, PRECISION,
    )  # fmt: skip
    total, largest, weight = _forward_tiles(
        total, largest, weight, q, tokens, K, V, UNTIL, KEY_TILES, masked, end, T, scale_log2, stride_k, stride_v,
        BN, D, True, PRECISION,
    )  # fmt: skip
    at = (queries.to(tl.int64) * H + h)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(OUT + at, (total / weight[:, None]).to(OUT.dtype.element_ty), mask=inside[:, None])
    tl.store(LSE + h * R + queries, (largest + tl.math.log2(weight)) * LN_2, mask=inside)


@triton.jit
def _dq_tiles(
    dq, q, do, lse, delta, tokens, K, V, UNTIL, KEY_TILES, begin, end, T, scale_log2, stride_k, stride_v,
    BN: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what some key tiles give to the gradient of a query tile."""
    for entry in range(begin, end):
        keys = tl.load(KEY_TILES + entry) * BN + tl.arange(0, BN)
        k = _rows_of(K, keys, keys < T, stride_k, D)  # [BN, D]
        v = _rows_of(V, keys, keys < T, stride_v, D)  # [BN, D]
        s = _scores(q, k, tokens, keys, UNTIL, T, scale_log2, MASKED, PRECISION)
        p = tl.math.exp2(s - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def attention_dq(
    Q, K, V, UNTIL, ROWS, QUERY_TILES, KEY_TILES, OUT, DO, LSE, DQ, DELTA, R, T, scale, scale_log2,
    stride_q, head_q, stride_k, head_k, stride_v, head_v,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for a query tile and a head: dQ, and delta, which dK and dV need too."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, H = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    queries = tile * BM + tl.arange(0, BM)
    inside = queries < R
    tokens = _tokens_of(ROWS, queries, R, HAS_ROWS)
    q = _rows_of(Q + h * head_q, queries, inside, stride_q, D)  # [BM, D]
    at = (queries.to(tl.int64) * H + h)[:, None] * D + tl.arange(0, D)[None, :]
    o = tl.load(OUT + at, mask=inside[:, None], other=0.0)  # [BM, D]
    do = tl.load(DO + at, mask=inside[:, None], other=0.0)  # [BM, D]
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + h * R + queries, delta, mask=inside)
    lse = tl.load(LSE + h * R + queries, mask=inside, other=0.0) * LOG2_E
    K += h * head_k
    V += h * head_v
    dq = tl.zeros([BM, D], tl.float32)
    begin = tl.load(QUERY_TILES + 3 * tile)
    masked = tl.load(QUERY_TILES + 3 * tile + 1)
    end = tl.load(QUERY_TILES + 3 * tile + 2)
    dq = _dq_tiles(
        dq, q, do, lse, delta, tokens, K, V, UNTIL, KEY_TILES, begin, masked, T, scale_log2, stride_k, stride_v,
        BN, D, False, PRECISION,
    )  # fmt: skip
    dq = _dq_tiles(
        dq, q, do, lse, delta, tokens, K, V, UNTIL, KEY_TILES, masked, end, T, scale_log2, stride_k, stride_v,
        BN, D, True, PRECISION,
    )  # fmt: skip
    tl.store(DQ + at, (dq * scale).to(DQ.dtype.element_ty), mask=inside[:, None])


@triton.jit
def attention_dkv(
    Q, K, V, UNTIL, ROWS, ITEMS, DO, LSE, DELTA, DK, DV, PARTIAL, R, T, scale, scale_log2,
    stride_q, head_q, stride_k, head_k, stride_v, head_v,
    D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, HAS_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for an item of the plan and a head: what a range of queries gives to the gradients of a key tile."""
    item = tl.program_id(0)
    h, H = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    tile = tl.load(ITEMS + 4 * item)
    first = tl.load(ITEMS + 4 * item + 1)
    end = tl.load(ITEMS + 4 * item + 2)
    slot = tl.load(ITEMS + 4 * item + 3)
    keys = tile * BK + tl.arange(0, BK)
    inside = (keys >= 0) & (keys < T)  # key tile -1 is no work
    until = tl.load(UNTIL + keys, mask=inside, other=0).to(tl.int32)
    k = _rows_of(K + h * head_k, keys, inside, stride_k, D)  # [BK, D]
    v = _rows_of(V + h * head_v, keys, inside, stride_v, D)  # [BK, D]
    Q += h * head_q
    DO += h * D
    dk = tl.zeros([BK, D], tl.float32)
    dv = tl.zeros([BK, D], tl.float32)
    for begin in range(first, end, BQ):
        queries = begin + tl.arange(0, BQ)
        asks = queries < end
        tokens = _tokens_of(ROWS, queries, R, HAS_ROWS)
        q = _rows_of(Q, queries, asks, stride_q, D)  # [BQ, D]
        do = _rows_of(DO, queries, asks, H * D, D)  # [BQ, D]
        lse = tl.load(LSE + h * R + queries, mask=asks, other=0.0) * LOG2_E
        delta = tl.load(DELTA + h * R + queries, mask=asks, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # [BK, BQ]
        visible = (keys[:, None] <= tokens[None, :]) & (tokens[None, :] < until[:, None]) & asks[None, :]
        p = tl.math.exp2(tl.where(visible, s - lse[None, :], float("-inf")))
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk *= scale
    d = tl.arange(0, D)[None, :]
    if slot >= 0:
        at = (slot * H + h) * 2 * BK * D + tl.arange(0, BK)[:, None] * D + d
        tl.store(PARTIAL + at, dk)
        tl.store(PARTIAL + at + BK * D, dv)
    else:
        at = (keys.to(tl.int64) * H + h)[:, None] * D + d
        tl.store(DK + at, dk.to(DK.dtype.element_ty), mask=inside[:, None])
        tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=inside[:, None])


@triton.jit
def attention_sum(PARTIAL, SUMS, DK, DV, T, D: tl.constexpr, BK: tl.constexpr):
    """One program for a key tile that was cut, a head, and one of dK and dV: adds its slots, from the first on."""
    at = SUMS + 3 * tl.program_id(0)
    h, H, which = tl.program_id(1).to(tl.int64), tl.num_programs(1), tl.program_id(2)
    keys = tl.load(at) * BK + tl.arange(0, BK)
    d = tl.arange(0, D)[None, :]
    total = tl.zeros([BK, D], tl.float32)
    for slot in range(tl.load(at + 1), tl.load(at + 2)):
        part = (slot * H + h) * 2 + which
        total += tl.load(PARTIAL + part * BK * D + tl.arange(0, BK)[:, None] * D + d)
    to = (keys.to(tl.int64) * H + h)[:, None] * D + d
    inside = ((keys >= 0) & (keys < T))[:, None]
    if which == 0:
        tl.store(DK + to, total.to(DK.dtype.element_ty), mask=inside)
    else:
        tl.store(DV + to, total.to(DV.dtype.element_ty), mask=inside)


def _constants(kernel: str, q: Tensor, q_rows: Tensor | None) -> dict[str, object]:
    """Launch parameters of a kernel but its tile sizes, which are the plan's."""
    D = q.shape[2]
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    config = tables.tiles(kernel, support.arch_of(q), (D, q.element_size()))
    return {"D": D, "HAS_ROWS": q_rows is not None, "PRECISION": precision, **config}


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


# A plan goes into the operations as its four tensors, and as [BM, BN, BQ, BK, slots].


@torch.library.custom_op("fastft_kernels::attention_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, q_rows: Tensor | None,
    plan: Sequence[Tensor], sizes: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output `[R, H, D]`, and lse `[H, R]` float32."""
    R, H, _ = q.shape
    (BM, BN, *_), (query_tiles, key_tiles, *_) = sizes, plan
    out, lse = _forward_outputs(q)
    if R:
        attention_forward[(triton.cdiv(R, BM), H)](
            q, k, v, visible_until, q if q_rows is None else q_rows, query_tiles, key_tiles, out, lse,
            R, k.shape[0], scale * _LOG2_E, *_strides(q, k, v), BM=BM, BN=BN,
            **_constants("attention_forward", q, q_rows),
        )  # fmt: skip
    return out, lse


def _forward_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    R, H, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty((H, R), dtype=torch.float32, device=q.device)


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, q_rows: Tensor | None,
    plan: Sequence[Tensor], sizes: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward_outputs(q)


@torch.library.custom_op("fastft_kernels::attention_dq", mutates_args=())
def _dq(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible_until: Tensor,
    q_rows: Tensor | None, plan: Sequence[Tensor], sizes: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of q `[R, H, D]`, and delta `[H, R]` float32."""
    R, H, _ = q.shape
    (BM, BN, *_), (query_tiles, key_tiles, *_) = sizes, plan
    dq, delta = _forward_outputs(q)
    if R:
        attention_dq[(triton.cdiv(R, BM), H)](
            q, k, v, visible_until, q if q_rows is None else q_rows, query_tiles, key_tiles, out, grad.contiguous(),
            lse, dq, delta, R, k.shape[0], scale, scale * _LOG2_E, *_strides(q, k, v), BM=BM, BN=BN,
            **_constants("attention_dq", q, q_rows),
        )  # fmt: skip
    return dq, delta


@_dq.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible_until: Tensor,
    q_rows: Tensor | None, plan: Sequence[Tensor], sizes: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward_outputs(q)


@torch.library.custom_op("fastft_kernels::attention_dkv", mutates_args=())
def _dkv(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, visible_until: Tensor,
    q_rows: Tensor | None, plan: Sequence[Tensor], sizes: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of k and v, `[T, H, D]`."""
    (R, H, D), T = q.shape, k.shape[0]
    (_, _, BQ, BK, slots), (_, _, items, sums) = sizes, plan
    dk, dv = _key_outputs(k)
    partial = torch.empty((slots, H, 2, BK, D), dtype=torch.float32, device=q.device)
    if T:
        attention_dkv[(items.shape[0], H)](
            q, k, v, visible_until, q if q_rows is None else q_rows, items, grad.contiguous(), lse, delta,
            dk, dv, partial, R, T, scale, scale * _LOG2_E, *_strides(q, k, v), BQ=BQ, BK=BK,
            **_constants("attention_dkv", q, q_rows),
        )  # fmt: skip
    if slots:
        config = tables.tiles("attention_sum", support.arch_of(q), (D, q.element_size()))
        attention_sum[(sums.shape[0], H, 2)](partial, sums, dk, dv, T, D=D, BK=BK, **config)
    return dk, dv


def _key_outputs(k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


@_dkv.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, visible_until: Tensor,
    q_rows: Tensor | None, plan: Sequence[Tensor], sizes: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _key_outputs(k)


def _save(ctx, inputs, output):
    q, k, v, visible_until, q_rows, plan, sizes, scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, visible_until, q_rows, *plan)
    ctx.sizes, ctx.scale = sizes, scale
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _grad_lse):
    if grad is None:
        return (None,) * 8
    q, k, v, out, lse, visible_until, q_rows, *plan = ctx.saved_tensors
    how = (visible_until, q_rows, plan, ctx.sizes, ctx.scale)
    dq, delta = _dq(grad, q, k, v, out, lse, *how)
    dk = dv = None
    if any(ctx.needs_input_grad[1:3]):
        dk, dv = _dkv(grad, q, k, v, lse, delta, *how)
    return dq, dk, dv, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, *, q_rows: Tensor | None = ..., scale: float | None = ...,
    row_length: int | None = ..., tiles: Sequence[TileGroup] | None = ..., plan: AttentionPlan | None = ...,
    return_lse: Literal[False] = ..., impl: Impl = ...,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, *, q_rows: Tensor | None = ..., scale: float | None = ...,
    row_length: int | None = ..., tiles: Sequence[TileGroup] | None = ..., plan: AttentionPlan | None = ...,
    return_lse: Literal[True], impl: Impl = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


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
        q: `[T, H, D]`, or `[R, H, D]` with `q_rows`; a view, as of `[T, 3, H, D]`, is read in place where its last axis
            lies in one piece, and copied otherwise. So are k and v.
        k, v: `[T, H, D]`, in the dtype and on the device of `q`.
        visible_until: `[T]` integers; key k is visible to query q exactly when `k <= q < visible_until[k]`. Each token
            sees itself: `visible_until[k] > k`.
        q_rows: `[R]` sorted int64: the tokens that ask, where not all of them do. They may repeat.
        scale: factor of the scores; `1 / sqrt(D)` where it is not given.
        row_length: W where the tokens are `T / W` rows of W tokens each that see only their own row causally
            (`visible_until` says the same): `torch` and `reference` then run on `[T / W, W]`.
        tiles: for `torch`, what `plan_tiles(visible_until, q_rows)` gives.
        plan: for `triton`, what `plan_attention(visible_until, q_rows)` gives, on the device of `q`. Tiles or a plan
            that are needed and not given are computed here, which waits for the device, and which `torch.compile`
            cannot trace.
        return_lse: whether to return the logarithms of the sums too.
        impl: `reference` computes the equation above step by step, over all T x T scores; `torch` computes the tiles
            that are needed, or calls torch's fused attention on rows of equal length; `triton` runs the kernels, for D
            of 32, 64 or 128, in float32, float16 or bfloat16; `auto` takes `triton` where it can on a GPU, or `torch`.

    Returns:
        `[T, H, D]` (`[R, H, D]` with `q_rows`) in the dtype of `q`. With `return_lse` also the natural logarithm of
        each query's sum of exponentiated scores, `[H, T]` (`[H, R]`) in float32 (float64 where q is); no gradient flows
        through it.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a plan for other sizes, or `triton` where it cannot run.
    """
    _check(q, k, v, visible_until, q_rows, row_length)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    impl = _chosen(impl, q)
    if impl == "triton":
        plan = _plan_for(q, k, visible_until, q_rows, plan)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        tensors = [plan.query_tiles, plan.key_tiles, plan.items, plan.sums]
        sizes = [plan.BM, plan.BN, plan.BQ, plan.BK, plan.slots]
        out, lse = _forward(q, k, v, visible_until, q_rows, tensors, sizes, scale)
        return (out, lse) if return_lse else out
    if impl == "reference":
        return reference(
            q, k, v, visible_until, q_rows=q_rows, scale=scale, row_length=row_length, return_lse=return_lse
        )
    if row_length is not None and q_rows is None and not return_lse:
        return attention_torch.equal_rows(q, k, v, row_length, scale)
    tiles = plan_tiles(visible_until, q_rows) if tiles is None else tiles
    out = attention_torch.tiled(q, k, v, tiles, scale, KEPT_PAIRS)
    return (out, attention_torch.log_sum_exp(q, k, tiles, scale)) if return_lse else out


def _chosen(impl: Impl, q: Tensor) -> Impl:
    chosen = support.choose(impl, q)
    if chosen != "triton" or (q.shape[2] in HEAD_DIMS and q.dtype in support.TRITON_DTYPES):
        return chosen
    if impl == "auto":
        return "torch"
    support.check_dtype(q)
    raise ValueError(f'got D = {q.shape[2]}, expected one of {HEAD_DIMS} with impl="triton"; "torch" takes any')


def _plan_for(
    q: Tensor, k: Tensor, visible_until: Tensor, q_rows: Tensor | None, plan: AttentionPlan | None
) -> AttentionPlan:
    if plan is None:
        return plan_attention(visible_until, q_rows).to(q.device)
    if k.shape[0] != plan.T or q.shape[0] != plan.R:
        raise ValueError(
            f"got a plan of {plan.R} queries and {plan.T} keys, expected {q.shape[0]} and {k.shape[0]}: "
            "plan_attention takes the visible_until and the q_rows that attention is given"
        )
    if plan.items.device != q.device:
        raise ValueError(f"got a plan on {plan.items.device}, expected it on {q.device}: plan.to(device)")
    return plan


def _check(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, q_rows: Tensor | None, row_length: int | None
) -> None:
    queries = k.shape[0] if q_rows is None else q_rows.numel()
    if k.ndim != 3 or k.shape != v.shape or q.shape != (queries, *k.shape[1:]):
        raise ValueError(
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, expected k and v [T, H, D] and q "
            "the same (or [R, H, D] with q_rows [R])"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"got q {q.dtype}, k {k.dtype}, v {v.dtype}, expected one floating dtype")
    if visible_until.shape != k.shape[:1] or visible_until.is_floating_point():
        raise ValueError(
            f"got visible_until {tuple(visible_until.shape)} {visible_until.dtype}, expected [{k.shape[0]}] integers"
        )
    if q_rows is not None and (q_rows.ndim != 1 or q_rows.is_floating_point()):
        raise ValueError(f"got q_rows {tuple(q_rows.shape)} {q_rows.dtype}, expected [R] integers")
    if any(x is not None and x.device != q.device for x in (k, v, visible_until, q_rows)):
        raise ValueError(f"got tensors on different devices, expected all on q's, {q.device}")
    if row_length is not None and (row_length < 1 or k.shape[0] % row_length):
        raise ValueError(f"got row_length {row_length}, expected a divisor of T = {k.shape[0]}")
