"""The one file of the integrations that runs kernels; each call is counted, so that a saving that never ran is seen.

Letters: N tokens of all rows end to end, H query heads, G heads of keys and values, D head dim, C width, V vocab.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import fastft_kernels
import torch
from fastft_kernels import AttentionPlan, TileGroup
from fastft_kernels.attention import SMALL_TILES, why_not_heads
from fastft_kernels.support import INTERPRETED, TRITON_DTYPES, Impl, choose
from torch import Tensor

OPS = ("attention", "attention_sdpa", "gelu", "layer_norm", "loss", "loss_of_logits", "rms_norm", "swiglu")
"""What is counted: what ran here, `attention_sdpa` what was handed on to torch's attention (decoding, a mask that is no
interval), and `loss_of_logits` a loss of an accelerated model that was computed from logits after all."""

_everywhere: ContextVar[bool] = ContextVar("_everywhere", default=False)
_counters: list[Counter[str]] = []
_lock = threading.Lock()  # DataParallel calls from several threads


def note(op: str) -> None:
    """Notes that an operation ran."""
    with _lock:
        for counter in _counters:
            counter[op] += 1


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts, of this process and while it is open, how often each of `OPS` ran forward."""
    counter: Counter[str] = Counter()
    with _lock:
        _counters.append(counter)
    try:
        yield counter
    finally:
        with _lock:
            _counters[:] = [other for other in _counters if other is not counter]


@contextmanager
def everywhere() -> Iterator[None]:
    """While it is open, all runs here, where torch's own is as fast too: what is tried out on a CPU may go to a GPU."""
    token = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(token)


def is_recorded() -> bool:
    """Whether what runs now is recorded to run again (torch.compile, torch.export, torch.jit.trace), or transformed by
    torch.func: what is planned here from values would be a constant there, and the fused operations have no rules for
    transforms. The model's own operations run then."""
    if torch.compiler.is_compiling():  # alone, as the compiler reads this too
        return True
    transformed: bool = torch._C._are_functorch_transforms_active()  # as autograd functions ask themselves
    return transformed or torch._C._get_tracing_state() is not None


def runs(x: Tensor, on_a_cpu: bool) -> bool:
    """Whether an operation on x is computed here: on a CPU where it pays there."""
    return on_a_cpu or _everywhere.get() or x.device.type != "cpu" or _impl(x) == "triton"


def _impl(*given: Tensor) -> Impl:
    """The implementation for these tensors: the kernels wherever they can run, in Triton's interpreter too, which
    `auto` does not: so what is proven there is what a GPU gets."""
    if any(x.dtype not in TRITON_DTYPES for x in given):
        return "torch"
    return "triton" if INTERPRETED and given[0].device.type == "cpu" else choose("auto", given[0])


@dataclass(frozen=True, slots=True)
class Plan:
    """What attention needs to know of its N tokens, found once for all layers.

    Attributes:
        visible_until: `[N]` int32; key k is visible to query q exactly when `k <= q < visible_until[k]`.
        row_length: where each row of that many tokens is causal by itself, and nothing else is asked for.
        parts: the tiles of the torch path or of the kernels; None with a `row_length`, and for compiled code, which
            need none.
        blind: `[N, 1, 1]` boolean, True for queries that see nothing, whose output is 0; None where there is none.
        unseen: `[U]` int64, queries that see others and not themselves, as padding behind a row does: the kernels take
            none, and torch computes them; None where there is none, or all are torch's.
        unseen_parts: the tiles of those.
    """

    visible_until: Tensor
    row_length: int | None = None
    parts: tuple[TileGroup, ...] | AttentionPlan | None = None
    blind: Tensor | None = None
    unseen: Tensor | None = None
    unseen_parts: tuple[TileGroup, ...] = ()


def plan_rows_of(q: Tensor, B: int, T: int) -> Plan:
    """The plan of B rows that are causal and whole."""
    until = torch.arange(1, B + 1, dtype=torch.int32, device=q.device).mul_(T).repeat_interleave(T)
    return Plan(until, T)


def plan(q: Tensor, visible_until: Tensor) -> Plan:
    """The plan for queries like `q` `[N, H, D]` under `visible_until` `[N]`. On a GPU it waits for the device, once."""
    until = visible_until.to(device="cpu", dtype=torch.int32)
    place = torch.arange(len(until), dtype=torch.int32)
    blind = _seen_keys(until) == 0
    until = torch.where(blind, place + 1, until)  # that their softmax is defined: before, nobody saw them
    masked = blind.to(q.device)[:, None, None] if blind.any() else None
    if (impl := _attention_impl(q)) != "triton":
        return Plan(until.to(q.device), None, None if impl == "compiled" else _tiles(until, None, q), masked)
    unseen = (until <= place).nonzero().flatten()
    sizes = SMALL_TILES if q.dtype == torch.float32 and q.shape[-1] > 64 else {}
    seen = torch.maximum(until, place + 1)  # they are seen by nobody else
    parts = fastft_kernels.plan_attention(seen, round_sizes=True, **sizes).to(q.device)
    if not len(unseen):
        return Plan(seen.to(q.device), None, parts, masked)
    return Plan(seen.to(q.device), None, parts, masked, unseen.to(q.device), _tiles(until, unseen, q))


def _tiles(until: Tensor, rows: Tensor | None, q: Tensor) -> tuple[TileGroup, ...]:
    return tuple(group.to(q.device) for group in fastft_kernels.plan_tiles(until, rows))


def _seen_keys(until: Tensor) -> Tensor:
    """`[N]`: how many keys each query sees."""
    until = until.to(torch.int64)
    ends = torch.zeros(len(until) + 1, dtype=torch.int64).scatter_add_(0, until, torch.ones_like(until))
    return torch.arange(1, len(until) + 1) - ends.cumsum(0)[: len(until)]


def _attention_impl(q: Tensor) -> Impl:
    """As `_impl`, for heads that the kernels may not take, and with the one that is there in C."""
    if q.device.type == "cpu" and not INTERPRETED:
        return choose("auto", q, has_compiled=True)
    return "triton" if _impl(q) == "triton" and why_not_heads(q) is None else "torch"


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """q `[N, H, D]`, k and v `[N, G, D]` -> `[N, H, D]`; each head of k and v serves `H / G` heads of q."""
    note("attention")
    parts = plan.parts
    out: Any = fastft_kernels.attention(  # a tensor alone, as no log-sum-exp is asked for
        q,
        k,
        v,
        plan.visible_until,
        scale=scale,
        row_length=plan.row_length,
        tiles=parts if isinstance(parts, tuple) else None,
        plan=parts if isinstance(parts, AttentionPlan) else None,
        impl=_attention_impl(q),
    )
    if plan.unseen is not None:
        own: Any = fastft_kernels.attention(
            q[plan.unseen], k, v, plan.visible_until, q_rows=plan.unseen, scale=scale, tiles=plan.unseen_parts,
            impl="torch",
        )  # fmt: skip
        out = out.index_copy(0, plan.unseen, own)
    return cast(Tensor, out if plan.blind is None else out.masked_fill(plan.blind, 0))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, of any shape."""
    note("gelu")
    flat = x.reshape(-1, x.shape[-1])
    return fastft_kernels.gelu(flat, impl=_impl(x)).view(x.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, of one shape and dtype."""
    note("swiglu")
    return fastft_kernels.swiglu(gate, up, impl=_impl(gate))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """x `[..., C]`, weight and bias `[C]` -> `[..., C]` in `out_dtype`; computed in float32 (float64 where x is)."""
    note("layer_norm")
    impl = _impl(x, weight, bias)
    return cast(Tensor, fastft_kernels.layer_norm(x, weight, bias, eps=eps, out_dtype=out_dtype, impl=impl))


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out_dtype: torch.dtype) -> Tensor:
    """x `[..., C]`, weight `[C]`, to which offset is added -> `[..., C]` in `out_dtype`; computed in float32 (float64
    where x is)."""
    note("rms_norm")
    impl = _impl(x, weight)
    return cast(Tensor, fastft_kernels.rms_norm(x, weight, eps=eps, offset=offset, out_dtype=out_dtype, impl=impl))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, count: Tensor | float
) -> Tensor:
    """The sum of the cross-entropies of `hidden` `[N, C]` under the head `[V, C]`, where targets `[N]` are asked for,
    divided by `count`.

    A scalar, float32 (float64 where hidden is); rows with the target `ignore_index` cost no product. The division is
    each row's weight: of the sum, it would go once more through the head's gradient.
    """
    note("loss")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    share = 1 / torch.as_tensor(count, dtype=wide, device=hidden.device)
    return fastft_kernels.linear_cross_entropy(
        hidden, weight, targets, row_weights=share.expand(len(targets)), ignore_index=ignore_index, reduction="sum",
        impl=_impl(hidden, weight),
    )  # fmt: skip


def losses_of_rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each row, `[R]`, hidden `[R, C]`, targets `[R]`."""
    note("loss")
    return fastft_kernels.linear_cross_entropy(hidden, weight, targets, reduction="none", impl=_impl(hidden, weight))
