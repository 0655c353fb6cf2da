"""Rows of a matrix, `x[rows]`, whose gradient is summed in a fixed order: token and position embeddings, loss rows.

    y[r] = x[rows[r]],   dx[i] = sum of dy[r] over the places r with rows[r] = i

A row that is taken several times gets several gradients. Added atomically, as torch's `index_select` and what inductor
makes of an embedding do on a GPU, they come in any order, hence with other bits each time. Here the places are sorted
by their row beforehand (`plan_rows`), one program adds up those of one row in float32, and writes the sum once. Of a
row that is taken very often, as padding's is, chunks of places are summed by programs of their own, and then added in
their order.

Letters: N rows of x, C width, R places, S segments: places of one row, next to each other once they are sorted.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastft_kernels import registry, support, tables
from fastft_kernels.support import Impl, tl, triton

CHUNK = 128
"""Places that a single program adds up where a segment has more."""

_TILES = {"BR": 8, "BC": 256, "num_warps": 1, "num_stages": 1}  # a warp loads a row of bf16 at a time, 16 bytes a lane
tables.TABLE["rows_chunks"] = {"default": {None: _TILES}}
tables.TABLE["rows_sum"] = {"default": {None: _TILES}}


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The places that take each row; all tensors int32.

    Attributes:
        order: `[R]`, the places sorted by their row, those of one row as they come.
        starts: `[S + 1]`; segment s is `order[starts[s]:starts[s + 1]]`. An empty one is no work.
        ids: `[S]`, each segment's row; -1 where it is empty.
        whole: `[R // CHUNK]`, 1 where all of `order[i CHUNK:(i + 1) CHUNK]` take one row; `[0]` where none do.
    """

    order: Tensor
    starts: Tensor
    ids: Tensor
    whole: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "RowPlan":
        """The plan on `device`."""
        names = ("order", "starts", "ids", "whole")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names})


def plan_rows(rows: Tensor, *, round_sizes: bool = False) -> RowPlan:
    """The plan of `take_rows` and `add_rows_` for these rows, on their device.

    Args:
        rows: `[R]` integers, not negative.
        round_sizes: make all sizes depend on R alone, by segments that are no work: what was compiled or captured for
            one plan then fits others, and nothing waits for the device. Without it a plan on a GPU does wait.

    Raises:
        ValueError: rows that are no vector of integers, or, on a CPU, a negative one.
    """
    _check_rows(rows)
    R = rows.numel()
    taken, order = rows.detach().to(torch.int64).sort(stable=True)
    first = torch.ones_like(taken, dtype=torch.bool)
    first[1:] = taken[1:] != taken[:-1]
    if round_sizes:
        segment = first.cumsum(0)  # from 1 on
        starts = torch.searchsorted(segment, torch.arange(1, R + 2, device=rows.device))
        ids = torch.where(starts[:-1] < R, taken[starts[:-1].clamp_max(R - 1)], -1) if R else taken
    else:
        at = first.nonzero().flatten()
        starts, ids = torch.cat([at, at.new_full((1,), R)]), taken[at]
    whole = taken[CHUNK - 1 :: CHUNK] == taken[: R // CHUNK * CHUNK : CHUNK]
    if not round_sizes and not whole.any():
        whole = whole[:0]
    return RowPlan(*(x.to(torch.int32) for x in (order, starts, ids, whole)))


def reference(x: Tensor, rows: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """The equation; in at least float32, as its gradient is a sum."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).index_select(0, rows).to(out_dtype or x.dtype)


@triton.jit
def _sum_of_places(total, DY, ORDER, begin, end, c, C, stride, BR: tl.constexpr):
    """Adds columns c of DY's rows ORDER[begin:end] to `total`, BR rows at a time."""
    for first in range(begin, end, BR):
        place = first + tl.arange(0, BR)
        r = tl.load(ORDER + place, mask=place < end, other=0).to(tl.int64)
        inside = (place < end)[:, None] & (c < C)[None, :]
        dy = tl.load(DY + r[:, None] * stride + c[None, :], mask=inside, other=0.0)  # [BR, BC]
        total += tl.sum(dy.to(tl.float32), 0)
    return total


@triton.jit
def rows_chunks(DY, ORDER, WHOLE, PARTIAL, C, stride, CHUNK: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """One program for a chunk of places and BC columns: PARTIAL `[R // CHUNK, C]`, where all of it take one row."""
    chunk = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    if tl.load(WHOLE + chunk) != 0:
        total = tl.zeros([BC], tl.float32)
        total = _sum_of_places(total, DY, ORDER, chunk * CHUNK, (chunk + 1) * CHUNK, c, C, stride, BR)
        tl.store(PARTIAL + chunk.to(tl.int64) * C + c, total, mask=c < C)


@triton.jit
def rows_sum(
    DY, ORDER, STARTS, IDS, PARTIAL, OUT, N, C, stride, stride_out,
    ADD: tl.constexpr, HAS_PARTIAL: tl.constexpr, CHUNK: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One program for a segment and BC columns: OUT[id] (+)= the sum of its places.

    Its whole chunks are in PARTIAL already; what lies before and behind them is added up here.
    """
    s = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    row = tl.load(IDS + s)
    begin = tl.load(STARTS + s)
    end = tl.load(STARTS + s + 1)
    if (row >= 0) & (row < N):
        total = tl.zeros([BC], tl.float32)
        if HAS_PARTIAL:
            from_chunk = tl.cdiv(begin, CHUNK)
            to_chunk = end // CHUNK
            if from_chunk < to_chunk:
                total = _sum_of_places(total, DY, ORDER, begin, from_chunk * CHUNK, c, C, stride, BR)
                for first in range(from_chunk, to_chunk, BR):
                    chunk = first + tl.arange(0, BR)
                    inside = (chunk < to_chunk)[:, None] & (c < C)[None, :]
                    part = tl.load(PARTIAL + chunk[:, None].to(tl.int64) * C + c[None, :], mask=inside, other=0.0)
                    total += tl.sum(part, 0)
                begin = to_chunk * CHUNK
        total = _sum_of_places(total, DY, ORDER, begin, end, c, C, stride, BR)
        at = OUT + row.to(tl.int64) * stride_out + c
        if ADD:
            total += tl.load(at, mask=c < C, other=0.0).to(tl.float32)
        tl.store(at, total.to(OUT.dtype.element_ty), mask=c < C)


def _launch(out: Tensor, dy: Tensor, order: Tensor, starts: Tensor, ids: Tensor, whole: Tensor, *, add: bool) -> None:
    """Writes the sums of dy `[R, C]` to the rows `ids` of out `[N, C]`, or adds them."""
    (N, C), S, chunks = out.shape, ids.shape[0], whole.shape[0]
    if not S or not C:
        return
    arch = support.arch_of(dy)
    partial = torch.empty(chunks, C, dtype=torch.float32, device=dy.device)
    if chunks:
        config = tables.tiles("rows_chunks", arch)
        rows_chunks[(chunks, triton.cdiv(C, config["BC"]))](
            dy, order, whole, partial, C, dy.stride(0), CHUNK=CHUNK, **config
        )
    config = tables.tiles("rows_sum", arch)
    rows_sum[(S, triton.cdiv(C, config["BC"]))](
        dy, order, starts, ids, partial, out, N, C, dy.stride(0), out.stride(0),
        ADD=add, HAS_PARTIAL=chunks > 0, CHUNK=CHUNK, **config,
    )  # fmt: skip


def _sums_by_torch(dy: Tensor, order: Tensor, starts: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that are taken, `[S]` without empty segments, and the sums of their gradients `[S, C]`."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    sums = torch.zeros(len(ids), dy.shape[1], dtype=wide, device=dy.device)
    segment = torch.arange(len(ids), device=dy.device).repeat_interleave(starts.diff(), output_size=len(order))
    in_order = dy.index_select(0, order).to(wide)
    if dy.device.type == "cpu":
        sums.index_add_(0, segment, in_order)
    else:  # on a GPU index_add_ adds atomically; this sorts
        sums.index_put_((segment,), in_order, accumulate=True)
    there = ids >= 0
    return ids[there].to(torch.int64), sums[there]


@registry.operation("rows_gradient")
def _gradient(
    dy: Tensor, order: Tensor, starts: Tensor, ids: Tensor, whole: Tensor, N: int, dtype: torch.dtype, by_triton: bool
) -> Tensor:
    """dy `[R, C]` and a plan's tensors -> the gradient of x, `[N, C]` in `dtype`; 0 for rows that nothing takes."""
    dx = torch.zeros(N, dy.shape[1], dtype=dtype, device=dy.device)
    if by_triton:
        _launch(dx, _dense(dy), order, starts, ids, whole, add=False)
        return dx
    taken, sums = _sums_by_torch(dy, order, starts, ids)
    return dx.index_copy_(0, taken, sums.to(dtype))


@registry.fake(_gradient)
def _(
    dy: Tensor, order: Tensor, starts: Tensor, ids: Tensor, whole: Tensor, N: int, dtype: torch.dtype, by_triton: bool
) -> Tensor:
    return torch.empty(N, dy.shape[1], dtype=dtype, device=dy.device)


@registry.operation("rows_add", mutates=("total",))
def _add(total: Tensor, dy: Tensor, order: Tensor, starts: Tensor, ids: Tensor, whole: Tensor, by_triton: bool) -> None:
    """Adds the sums of dy `[R, C]` to total `[N, C]`, in float32, and rounds once."""
    if by_triton:
        _launch(total, _dense(dy), order, starts, ids, whole, add=True)
        return
    taken, sums = _sums_by_torch(dy, order, starts, ids)
    total.index_copy_(0, taken, (sums + total.index_select(0, taken)).to(total.dtype))


@registry.fake(_add)
def _(total: Tensor, dy: Tensor, order: Tensor, starts: Tensor, ids: Tensor, whole: Tensor, by_triton: bool) -> None:
    return None


def _dense(dy: Tensor) -> Tensor:
    """dy with its rows in one piece."""
    return dy if dy.stride(1) == 1 else dy.contiguous()


@registry.operation("take_rows")
def _take(
    x: Tensor, rows: Tensor, order: Tensor, starts: Tensor, ids: Tensor, whole: Tensor, dtype: torch.dtype,
    by_triton: bool,
) -> Tensor:  # fmt: skip
    """x `[N, C]`, rows `[R]` and their plan's tensors, which are for the gradient -> `[R, C]` in `dtype`.

    By torch, which sees to it that every row is there.
    """
    return x.index_select(0, rows).to(dtype)


@registry.fake(_take)
def _(
    x: Tensor, rows: Tensor, order: Tensor, starts: Tensor, ids: Tensor, whole: Tensor, dtype: torch.dtype,
    by_triton: bool,
) -> Tensor:  # fmt: skip
    return torch.empty(rows.shape[0], x.shape[1], dtype=dtype, device=x.device)


def _save(ctx, inputs, output):
    x, _, order, starts, ids, whole, _, ctx.by_triton = inputs
    ctx.save_for_backward(order, starts, ids, whole)
    ctx.N, ctx.dtype = x.shape[0], x.dtype


def _differentiate(ctx, dy):
    return _gradient(dy, *ctx.saved_tensors, ctx.N, ctx.dtype, ctx.by_triton), *[None] * 7


registry.differentiable(_take, save=_save, gradient=_differentiate)


def take_rows(
    x: Tensor,
    rows: Tensor,
    *,
    plan: RowPlan | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """`x[rows]`, whose gradient has the same bits each time.

    Args:
        x: `[N, C]`, floating.
        rows: `[R]` integers from 0 to N - 1; a row may be taken several times.
        plan: `plan_rows(rows)` on x's device, which nothing holds against `rows`. Where it is not given and a gradient
            is wanted, it is made here, in some twenty small launches that do not wait.
        out_dtype: of the result, and so of the gradient that flows in; the dtype of x where it is not given.
        impl: `reference` leaves the gradient to autograd; `torch` and `triton` sum it by the plan, `triton` in its
            kernels (`torch` waits for a GPU); `auto` is `triton` on a supported GPU, else `torch`.

    Returns:
        `[R, C]` in `out_dtype`. The gradient of x, `[N, C]` in its dtype, is summed in float32 and rounded once; it is
        dense, and 0 for rows that nothing takes.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a plan for another number of rows, or `triton` where it
            cannot run.
        IndexError: on a CPU, a row that x does not have (on a GPU torch's own assertion ends the process).
    """
    _check(x, rows, plan, out_dtype)
    impl = support.choose(impl, x)
    if impl == "reference":
        return reference(x, rows, out_dtype=out_dtype)
    out_dtype = out_dtype or x.dtype
    if impl == "triton":
        support.check_dtype(x, out_dtype)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.index_select(0, rows).to(out_dtype)
    plan = plan_rows(rows, round_sizes=True) if plan is None else plan
    y: Tensor = _take(x, rows, plan.order, plan.starts, plan.ids, plan.whole, out_dtype, impl == "triton")
    return y


def add_rows_(total: Tensor, grad: Tensor, plan: RowPlan, impl: Impl = "auto") -> Tensor:
    """Adds to each row of `total` the gradients of the places that take it: the lookup's part of a tied embedding's
    gradient, where the head's lies in `total` already.

    Args:
        total: `[N, C]`, floating, its rows in one piece; it is written.
        grad: `[R, C]`, floating, what flows into `take_rows`' result.
        plan: `plan_rows(rows)` on their device, of rows below N.
        impl: as of `take_rows`; `reference` is not there, as it has no rows.

    Returns:
        `total`: read, added to in float32, and written once for each row that is taken.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or `triton` where it cannot run.
    """
    _check_added(total, grad, plan)
    impl = support.choose(impl, total)
    if impl == "reference":
        raise ValueError('got impl="reference", expected auto, torch or triton: total.index_add(0, rows, grad) is it')
    if impl == "triton":
        support.check_dtype(total, grad)
    _add(total, grad, plan.order, plan.starts, plan.ids, plan.whole, impl == "triton")
    return total


def _check_rows(rows: Tensor) -> None:
    if rows.ndim != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"got rows {tuple(rows.shape)} {rows.dtype}, expected [R] int64 or int32")
    looks = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and rows.numel() and int(rows.min()) < 0:
        raise ValueError(f"got row {int(rows.min())}, expected none below 0")


def _check(x: Tensor, rows: Tensor, plan: RowPlan | None, out_dtype: torch.dtype | None) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"got x {tuple(x.shape)} {x.dtype}, expected floating [N, C]")
    if rows.ndim != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"got rows {tuple(rows.shape)} {rows.dtype}, expected [R] int64 or int32")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f"got out_dtype={out_dtype}, expected a floating one")
    if rows.device != x.device:
        raise ValueError(f"got rows on {rows.device}, expected x's device, {x.device}")
    if plan is not None:
        _check_plan(plan, rows.shape[0], x.device)


def _check_added(total: Tensor, grad: Tensor, plan: RowPlan) -> None:
    if total.ndim != 2 or grad.ndim != 2 or total.shape[1] != grad.shape[1]:
        raise ValueError(f"got total {tuple(total.shape)}, grad {tuple(grad.shape)}, expected [N, C] and [R, C]")
    if not (total.is_floating_point() and grad.is_floating_point()):
        raise ValueError(f"got total {total.dtype}, grad {grad.dtype}, expected floating ones")
    if total.numel() and total.stride(1) != 1:
        raise ValueError(f"got total with strides {total.stride()}, expected rows in one piece: it is written in place")
    if grad.device != total.device:
        raise ValueError(f"got grad on {grad.device}, expected total's device, {total.device}")
    _check_plan(plan, grad.shape[0], total.device)


def _check_plan(plan: RowPlan, R: int, device: torch.device) -> None:
    if plan.order.shape[0] != R:
        raise ValueError(f"got a plan of {plan.order.shape[0]} rows, expected {R}")
    if plan.order.device != device:
        raise ValueError(f"got a plan on {plan.order.device}, expected it on {device}: plan.to(device)")
