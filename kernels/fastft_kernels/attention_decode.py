"""Attention of one new token a sequence over its cache of keys and values.

    o[n] = softmax(scale * q[n] @ keys.T) @ values,
    keys = cat(prefix_k, k_cache[n, :lengths[n]]),   values = cat(prefix_v, v_cache[n, :lengths[n]])

Where the keys have fewer heads than the queries, head h of the queries reads head `h // (H / G)` of the keys.

The sequences have different lengths, and may have a beginning in common that is cached once. It is bound by reading the
cache, so the kernel multiplies vectors, without tensor cores, and reads each key and value that is visible once.

Letters: N sequences, H heads of queries, G heads of keys and values, S places of the cache, P tokens of the shared
prefix, D head dim, DP the power of two that holds it; BN keys at a time.
"""

import math

import torch
from torch import Tensor

from fastft_kernels import registry, support, tables
from fastft_kernels.cpu import decode as compiled
from fastft_kernels.cpu import given
from fastft_kernels.heads import padded, why_not_head_dim
from fastft_kernels.support import Impl, tl, triton

tables.TABLE["attention_decode"] = {
    "default": {
        None: {"BN": 64, "num_warps": 4, "num_stages": 2},
        **{DP: {"BN": 4096 // DP, "num_warps": 4, "num_stages": 2} for DP in (128, 256)},
    }
}


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The equation, step by step: the prefix is copied in front of each cache."""
    (N, H, D), (_, S, G, _) = q.shape, k_cache.shape
    P = 0 if prefix_k is None else prefix_k.shape[0]
    if prefix_k is not None and prefix_v is not None:
        k_cache = torch.cat([prefix_k.expand(N, *prefix_k.shape), k_cache], dim=1)  # [N, P + S, H, D]
        v_cache = torch.cat([prefix_v.expand(N, *prefix_v.shape), v_cache], dim=1)
    k_cache, v_cache = (x.repeat_interleave(H // G, dim=2) for x in (k_cache, v_cache))
    place = torch.arange(P + S, device=q.device)
    visible = (place[None, :] < P + lengths[:, None])[:, None, :]  # [N, 1, P + S]
    scores = torch.einsum("nhd,nshd->nhs", q, k_cache) * (1 / math.sqrt(D) if scale is None else scale)
    # With nothing visible the output is 0, where the softmax would be NaN; nor may unused places' values count.
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1).masked_fill(~visible, 0)
    values = v_cache.masked_fill(~visible[:, 0, :, None, None], 0)
    return torch.einsum("nhs,nshd->nhd", weights, values)


@triton.jit
def _decode_step(
    out, largest, total, q, K, V, s, end, stride_k, stride_v, scale_log2, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Some keys and values, up to `end`, put into the running softmax."""
    d = tl.arange(0, DP)[None, :]
    inside = s < end
    there = inside[:, None]
    if DP != D:
        there = there & (d < D)
    at = s.to(tl.int64)[:, None]
    k = tl.load(K + at * stride_k + d, mask=there, other=0.0).to(tl.float32)  # [BN, DP]
    v = tl.load(V + at * stride_v + d, mask=there, other=0.0).to(tl.float32)
    score = tl.where(inside, tl.sum(k * q[None, :], 1) * scale_log2, float("-inf"))  # [BN]
    both = tl.maximum(largest, tl.max(score, 0))
    p = tl.math.exp2(score - both)
    shrink = tl.math.exp2(largest - both)
    return out * shrink + tl.sum(p[:, None] * v, 0), both, total * shrink + tl.sum(p, 0)


@triton.jit
def attention_decode_forward(
    Q, K, V, LENGTHS, PREFIX_K, PREFIX_V, OUT, P, S, scale_log2,
    stride_q, head_q, sequence_k, stride_k, head_k, sequence_v, stride_v, head_v,
    prefix_k, prefix_head_k, prefix_v, prefix_head_v,
    D: tl.constexpr, DP: tl.constexpr, HEADS_PER_KEY: tl.constexpr, BN: tl.constexpr, HAS_PREFIX: tl.constexpr,
):  # fmt: skip
    """One program for a sequence and a head."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    g = h // HEADS_PER_KEY
    d = tl.arange(0, DP)
    q = tl.load(Q + n * stride_q + h * head_q + d, mask=d < D, other=0.0).to(tl.float32)  # [DP]
    length = tl.minimum(tl.load(LENGTHS + n).to(tl.int32), S)
    out = tl.zeros([DP], tl.float32)
    largest = tl.full([], -1.0e30, tl.float32)  # finite, so that nothing computes inf - inf
    total = tl.full([], 0.0, tl.float32)
    if HAS_PREFIX:
        for begin in range(0, P, BN):
            out, largest, total = _decode_step(
                out, largest, total, q, PREFIX_K + g * prefix_head_k, PREFIX_V + g * prefix_head_v,
                begin + tl.arange(0, BN), P, prefix_k, prefix_v, scale_log2, D, DP,
            )  # fmt: skip
    for begin in range(0, length, BN):
        out, largest, total = _decode_step(
            out, largest, total, q, K + n * sequence_k + g * head_k, V + n * sequence_v + g * head_v,
            begin + tl.arange(0, BN), length, stride_k, stride_v, scale_log2, D, DP,
        )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)  # nothing was visible: the output is 0
    tl.store(OUT + (n * tl.num_programs(1) + h) * D + d, (out / total).to(OUT.dtype.element_ty), mask=d < D)


@registry.operation("attention_decode")
def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """`[N, H, D]`, forward only."""
    N, H, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not N:
        return out
    P = 0 if prefix_k is None else prefix_k.shape[0]
    pk, pv = (q, q) if prefix_k is None or prefix_v is None else (prefix_k, prefix_v)
    DP = padded(D)
    config = tables.tiles("attention_decode", support.arch_of(q), DP)
    attention_decode_forward[(N, H)](
        q, k_cache, v_cache, lengths, pk, pv, out, P, k_cache.shape[1],
        scale * math.log2(math.e), *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        *pk.stride()[:2], *pv.stride()[:2], D=D, DP=DP, HEADS_PER_KEY=H // k_cache.shape[2], HAS_PREFIX=P > 0, **config,
    )  # fmt: skip
    return out


@registry.fake(_decode)
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _by_torch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None,
    scale: float, unused_is_finite: bool,
) -> Tensor:  # fmt: skip
    """The same with the prefix read in place, for all sequences at once, and not copied in front of each cache."""
    N, S, G, _ = k_cache.shape
    P = 0 if prefix_k is None else prefix_k.shape[0]
    hidden = (torch.arange(S, device=q.device) >= lengths[:, None])[:, None, None]  # [N, 1, 1, S]
    scaled = q.unflatten(1, (G, -1)) * scale  # [N, G, H / G, D]: the heads that read one head of keys, as rows
    # A row times a matrix: on a CPU two to three times as fast as the same matrix times a column.
    scores = torch.matmul(scaled, k_cache.permute(0, 2, 3, 1))  # [N, G, H / G, S]
    scores.masked_fill_(hidden, -math.inf)
    if prefix_k is not None and P:
        of_prefix = torch.bmm(scaled.transpose(0, 1).flatten(1, 2), prefix_k.permute(1, 2, 0))  # [G, N H / G, P]
        scores = torch.cat([scores, of_prefix.unflatten(1, (N, -1)).transpose(0, 1)], dim=-1)
    weights = scores.softmax(dim=-1)
    own = weights[..., :S]
    if not P:
        own.masked_fill_(hidden, 0)  # nothing visible: 0 for NaN
    values = v_cache.transpose(1, 2)  # [N, G, S, D]
    if not unused_is_finite:
        values = values.masked_fill(hidden.squeeze(2)[..., None], 0)
    out = torch.matmul(own, values)  # [N, G, H / G, D]
    if prefix_v is not None and P:
        of_prefix = torch.bmm(weights[..., S:].transpose(0, 1).flatten(1, 2), prefix_v.transpose(0, 1))
        out += of_prefix.unflatten(1, (N, -1)).transpose(0, 1)
    return out.flatten(1, 2)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    scale: float | None = None,
    unused_is_finite: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of one query a sequence over the keys and values of its cache, and of a shared prefix.

    Args:
        q: `[N, H, D]`, floating; a view is read in place where its last axis lies in one piece, as are all below.
        k_cache, v_cache: `[N, S, G, D]`, in the dtype and on the device of q. G is H, or divides it: head h of the
            queries reads head `h // (H / G)`. The caller has put the new token's key and value in.
        lengths: `[N]` integers from 0 to S: the places of each sequence's cache that count. What lies behind them is
            never used, NaN neither.
        prefix_k, prefix_v: `[P, G, D]`: keys and values in front of all sequences' own.
        scale: factor of the scores; `1 / sqrt(D)` where it is not given.
        unused_is_finite: the places behind `lengths` hold finite values, as in a cache that began as zeros: `torch`
            then need not copy the values to be safe from NaN, which costs as much as all else it does.
        impl: `reference` copies the prefix in front of each cache and computes the equation above, `torch` uses it
            where it lies, `triton` runs the kernel, for D a multiple of 16 up to 256 in float32, float16 or bfloat16;
            `compiled` C on a CPU, for D up to 256 in float32 or bfloat16, with sums in float32; `auto` is `triton`
            where that runs on a GPU, `compiled` where that runs on a CPU, else `torch`.

    Returns:
        `[N, H, D]` in the dtype of q; 0 for a sequence that sees nothing.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an input that wants a gradient, or `triton` or `compiled`
            where it cannot run.
    """
    _check(q, k_cache, v_cache, lengths, prefix_k, prefix_v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    chosen = _choose(impl, q, k_cache, v_cache)
    if chosen == "reference":
        return reference(q, k_cache, v_cache, lengths, prefix_k=prefix_k, prefix_v=prefix_v, scale=scale)
    if chosen == "compiled":
        prefix = None if prefix_k is None or prefix_v is None else (prefix_k, prefix_v)
        return compiled.attention(q, k_cache, v_cache, lengths, prefix, scale)
    if chosen == "torch":
        return _by_torch(q, k_cache, v_cache, lengths, prefix_k, prefix_v, scale, unused_is_finite)
    q, k_cache, v_cache = given.in_rows(q), given.in_rows(k_cache), given.in_rows(v_cache)
    prefix_k, prefix_v = (None if x is None else given.in_rows(x) for x in (prefix_k, prefix_v))
    out: Tensor = _decode(q, k_cache, v_cache, lengths.contiguous(), prefix_k, prefix_v, scale)
    return out


def _choose(impl: Impl, q: Tensor, *caches: Tensor) -> Impl:
    """The implementation that runs: `auto` takes `torch` where the other has no such head dim or dtype."""
    chosen = support.choose(impl, q, *caches, has_compiled=True)
    if chosen == "compiled" and (why := compiled.why_not(q.dtype, q.device, q.shape[-1])):
        if impl == "compiled":
            raise ValueError(f'{why} with impl="compiled"; impl="torch" takes any')
        return "torch"
    if chosen == "triton" and (why_not_head_dim(q.shape[-1]) or q.dtype not in support.TRITON_DTYPES):
        if impl == "triton":
            support.check_dtype(q)
            raise ValueError(f'{why_not_head_dim(q.shape[-1])} with impl="triton"; impl="torch" takes any')
        return "torch"
    return chosen


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None
) -> None:
    if q.ndim != 3 or k_cache.ndim != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"got q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}, expected "
            "[N, H, D] and both caches [N, S, G, D]"
        )
    (N, H, D), G = q.shape, k_cache.shape[2]
    if (k_cache.shape[0], k_cache.shape[3]) != (N, D) or not G or H % G:
        raise ValueError(
            f"got k_cache {tuple(k_cache.shape)}, expected [{N}, S, G, {D}] with G dividing {H}, for q {tuple(q.shape)}"
        )
    if lengths.shape != (N,) or lengths.is_floating_point():
        raise ValueError(f"got lengths {tuple(lengths.shape)} {lengths.dtype}, expected [{N}] integers")
    _check_prefix(prefix_k, prefix_v, G, D)
    floating = [x for x in (q, k_cache, v_cache, prefix_k, prefix_v) if x is not None]
    if not q.is_floating_point() or any(x.dtype != q.dtype for x in floating):
        raise ValueError(f"got {', '.join(str(x.dtype) for x in floating)}, expected one floating dtype")
    if any(x.device != q.device for x in (*floating, lengths)):
        raise ValueError(f"got tensors on different devices, expected all on q's, {q.device}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in floating):
        raise ValueError("got an input that wants a gradient, expected none: call it within torch.no_grad()")


def _check_prefix(prefix_k: Tensor | None, prefix_v: Tensor | None, G: int, D: int) -> None:
    if prefix_k is None and prefix_v is None:
        return
    if prefix_k is None or prefix_v is None:
        raise ValueError("got one of prefix_k and prefix_v, expected both or none")
    if prefix_k.ndim != 3 or prefix_k.shape[1:] != (G, D) or prefix_v.shape != prefix_k.shape:
        raise ValueError(
            f"got prefix_k {tuple(prefix_k.shape)}, prefix_v {tuple(prefix_v.shape)}, expected both [P, {G}, {D}]"
        )
