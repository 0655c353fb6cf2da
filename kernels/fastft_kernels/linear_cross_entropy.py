"""Linear cross-entropy: F.cross_entropy(hidden @ weight.T, targets), for the rows that a loss asks for.

    z[r] = weight @ hidden[rows[r]],   losses[r] = logsumexp(z[r]) - z[r, targets[r]]

and with p = softmax(z), e the target's unit vector, the gradient of a row's logits is (p - e) times what flows in.

The Triton kernels never have the logits in memory. Forward, each tile of the logits leaves its largest value and its
sum of exponentials; these are put together in a fixed order. Backward, the logits are computed again, some columns of
the vocabulary at a time, as the gradient of the logits, which the two remaining products read. That is 8 R V C
multiplications and additions where keeping the logits (in chunks of rows, each turned into its gradient in place) takes
6: for 4,915 rows of gpt2-medium a predicted 10.9 against 9.3 ms on an A100, 3.7 against 3.4 ms on an H100. In exchange
evaluation needs no memory for logits, they are never rounded to 16 bits, any gradient may flow into the losses, and the
number of rows may stay on the device.

Letters: T tokens, R loss rows, C width, V vocab; a tile has BM rows and BN columns, its product goes through C by BK.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft_kernels import linear_cross_entropy_torch as in_torch
from fastft_kernels import registry, support, tables
from fastft_kernels.rows import RowPlan, take_rows
from fastft_kernels.support import Impl, tl, triton

Reduction = Literal["mean", "sum", "none"]

LOGIT_CHUNK_BYTES = 64 << 20
"""Bytes of logits, or of their gradient, that exist at a time."""
LOG2E = tl.constexpr(1.4426950408889634)

_NARROW = {"BM": 128, "BN": 128, "BK": 64, "G": 8, "num_warps": 8, "num_stages": 3}
_WIDE = {"BM": 64, "BN": 64, "BK": 32, "G": 8, "num_warps": 4, "num_stages": 2}
_SMALL = {**_NARROW, "BK": 32}  # about 100 KB of shared memory
for _kernel in ("lse_tiles", "logit_gradient", "product"):
    tables.TABLE[_kernel] = {"default": {4: _WIDE, 2: _NARROW}, "sm_86": {2: _SMALL}}  # by bytes of an element
tables.TABLE["lse_combine"] = {"default": {None: {"BM": 64, "num_warps": 2, "num_stages": 1}}}


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The equation, step by step, over the logits of all tokens: losses `[R]`, or `[T]` without rows; 0 if ignored."""
    logits = F.linear(hidden, weight)  # [T, V]
    logits = logits if rows is None else logits.index_select(0, rows)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="none")


@triton.jit
def _tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr):
    """Row and column of a tile: G rows of tiles go through the columns together, so that the caches serve them."""
    n_rows = tl.cdiv(M, BM)
    of_a_group = G * tl.cdiv(N, BN)
    first = pid // of_a_group * G
    rows = tl.minimum(n_rows - first, G)
    return first + (pid % of_a_group) % rows, (pid % of_a_group) // rows


@triton.jit
def _logits(
    X, W, m, v, M, V, stride_x, stride_w,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile of logits of rows m `[BM]` and columns v `[BN]`: `[BM, BN]` float32; 0 beyond M and V."""
    k = tl.arange(0, BK)
    x_at = X + m[:, None].to(tl.int64) * stride_x + k[None, :]
    w_at = W + v[:, None].to(tl.int64) * stride_w + k[None, :]
    z = tl.zeros([BM, BN], tl.float32)
    for begin in range(0, C, BK):
        inside = (begin + k < C)[None, :]
        x = tl.load(x_at + begin, mask=(m < M)[:, None] & inside, other=0.0)  # [BM, BK]
        w = tl.load(w_at + begin, mask=(v < V)[:, None] & inside, other=0.0)  # [BN, BK]
        z = tl.dot(x, tl.trans(w), z, input_precision=PRECISION)
    return z


@triton.jit
def lse_tiles(
    X, W, TARGETS, COUNT, LARGEST, SUM, OWN, M, V, stride_x, stride_w,
    C: tl.constexpr, HAS_COUNT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """One program a tile of the logits: LARGEST and SUM `[tiles, M]`, and the targets' logits OWN `[M]`."""
    i, j = _tile_of(tl.program_id(0), M, V, BM, BN, G)
    count = M
    if HAS_COUNT:
        count = tl.load(COUNT)
    if i * BM < count:
        m = i * BM + tl.arange(0, BM)
        v = j * BN + tl.arange(0, BN)
        z = _logits(X, W, m, v, count, V, stride_x, stride_w, C, BM, BN, BK, PRECISION)
        target = tl.load(TARGETS + m, mask=m < count, other=-1)
        own = tl.sum(tl.where(target[:, None] == v[None, :], z, 0.0), 1)
        here = (target >= j * BN) & (target < tl.minimum((j + 1) * BN, V))
        tl.store(OWN + m, own, mask=(m < count) & here)  # one tile has the target's column
        z = tl.where((v < V)[None, :], z * LOG2E, -float("inf"))
        largest = tl.max(z, 1)
        at = j.to(tl.int64) * M + m
        tl.store(LARGEST + at, largest, mask=m < count)
        tl.store(SUM + at, tl.sum(tl.exp2(z - largest[:, None]), 1), mask=m < count)


@triton.jit
def lse_combine(
    TARGETS, COUNT, LARGEST, SUM, OWN, LSE, LOSSES, M, tiles,
    HAS_COUNT: tl.constexpr, IGNORE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One program for BM rows: LSE (to base 2) and LOSSES `[M]`, from the tiles in their order."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    count = M
    if HAS_COUNT:
        count = tl.load(COUNT)
    inside = m < count
    largest = tl.load(LARGEST + m, mask=inside, other=0.0)
    total = tl.load(SUM + m, mask=inside, other=1.0)
    for tile in range(1, tiles):
        at = tl.cast(tile, tl.int64) * M + m
        other = tl.load(LARGEST + at, mask=inside, other=0.0)
        both = tl.maximum(largest, other)
        total = total * tl.exp2(largest - both) + tl.load(SUM + at, mask=inside, other=1.0) * tl.exp2(other - both)
        largest = both
    lse = largest + tl.log2(total)
    asked = inside & (tl.load(TARGETS + m, mask=inside, other=IGNORE) != IGNORE)
    loss = lse / LOG2E - tl.load(OWN + m, mask=asked, other=0.0)
    tl.store(LSE + m, tl.where(inside, lse, 0.0), mask=m < M)
    tl.store(LOSSES + m, tl.where(asked, loss, 0.0), mask=m < M)


@triton.jit
def logit_gradient(
    X, W, TARGETS, COUNT, LSE, FLOWING, OUT, M, V, first, stride_x, stride_w, stride_out,
    C: tl.constexpr, HAS_COUNT: tl.constexpr, IGNORE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """One program a tile: OUT[m, j] = (p - e) FLOWING[m] for the columns `first + j`; 0 for ignored rows and beyond V.

    OUT's rows are whole tiles wide, so that no store is cut off in the middle of 16 bytes.
    """
    i, j = _tile_of(tl.program_id(0), M, stride_out, BM, BN, G)
    count = M
    if HAS_COUNT:
        count = tl.load(COUNT)
    if i * BM < count:
        m = i * BM + tl.arange(0, BM)
        column = j * BN + tl.arange(0, BN)
        v = first + column
        z = _logits(X, W, m, v, count, V, stride_x, stride_w, C, BM, BN, BK, PRECISION)
        target = tl.load(TARGETS + m, mask=m < count, other=IGNORE)
        lse = tl.load(LSE + m, mask=m < count, other=0.0)
        flowing = tl.load(FLOWING + m, mask=m < count, other=0.0)
        flowing = tl.where(target == IGNORE, 0.0, flowing)
        p = tl.exp2(tl.where((v < V)[None, :], z * LOG2E - lse[:, None], -float("inf")))
        gradient = tl.where(target[:, None] == v[None, :], p - 1.0, p) * flowing[:, None]
        at = OUT + m[:, None].to(tl.int64) * stride_out + column[None, :]
        tl.store(at, gradient.to(OUT.dtype.element_ty), mask=(m < M)[:, None])


@triton.jit
def product(
    A, B, OUT, COUNT, M, N, K, columns, stride_am, stride_ak, stride_bk, stride_bn, stride_out,
    LIMITS_ROWS: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """OUT `[M, N]` (+)= A `[M, K]` B `[K, N]`, where only COUNT of the M rows, or of the K summands, are there.

    What torch's product cannot do without asking the device for the count. Rows that are not there become 0.
    A is whole tiles of columns wide and 0 from `columns` on, so that none of its loads is cut off in the middle of 16
    bytes; B's rows (OUT's, where the summands are limited) end at `columns`.
    """
    i, j = _tile_of(tl.program_id(0), M, N, BM, BN, G)
    count = tl.load(COUNT)
    rows, summands, of_b, of_out = M, count, count, columns
    if LIMITS_ROWS:
        rows, summands, of_b, of_out = count, K, columns, M
    m = i * BM + tl.arange(0, BM)
    n = j * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    total = tl.zeros([BM, BN], tl.float32)
    if i * BM < rows:
        for begin in range(0, summands, BK):
            at = begin + k
            a = tl.load(
                A + m[:, None].to(tl.int64) * stride_am + at[None, :].to(tl.int64) * stride_ak,
                mask=(m < rows)[:, None] & (at < summands)[None, :], other=0.0,
            )  # fmt: skip
            b = tl.load(
                B + at[:, None].to(tl.int64) * stride_bk + n[None, :] * stride_bn,
                mask=(at < of_b)[:, None] & (n < N)[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(a, b, total, input_precision=PRECISION)
    where = OUT + m[:, None].to(tl.int64) * stride_out + n[None, :]
    inside = (m < of_out)[:, None] & (n < N)[None, :]
    if ADD:
        total += tl.load(where, mask=inside, other=0.0).to(tl.float32)
    tl.store(where, total.to(OUT.dtype.element_ty), mask=inside)


def _config(kernel: str, x: Tensor) -> dict[str, int]:
    config = dict(tables.tiles(kernel, support.arch_of(x), x.element_size()))
    return {
        **config,
        "PRECISION": support.precision(),
        "BK": min(config["BK"], max(16, triton.next_power_of_2(x.shape[1]))),
    }


@registry.operation("linear_cross_entropy_forward")
def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, count: Tensor | None, ignore_index: int, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """hidden `[R, C]`, weight `[V, C]`, targets `[R]`, count `[1]` int32 of the rows that are there -> losses and
    log-sum-exps (to base 2), `[R]` float32; losses are 0 where ignored, both are 0 beyond the count."""
    R, V = hidden.shape[0], weight.shape[0]
    losses, lse, own = (torch.empty(R, dtype=torch.float32, device=hidden.device) for _ in range(3))
    if not R:
        return losses, lse
    config = _config("lse_tiles", hidden)
    tiles = triton.cdiv(V, config["BN"])
    largest, total = (torch.empty(tiles, R, dtype=torch.float32, device=hidden.device) for _ in range(2))
    limit = targets if count is None else count
    lse_tiles[(triton.cdiv(R, config["BM"]) * tiles,)](
        hidden, weight, targets, limit, largest, total, own, R, V, hidden.stride(0), weight.stride(0),
        C=hidden.shape[1], HAS_COUNT=count is not None, **config,
    )  # fmt: skip
    config = tables.tiles("lse_combine", support.arch_of(hidden))
    lse_combine[(triton.cdiv(R, config["BM"]),)](
        targets, limit, largest, total, own, lse, losses, R, tiles,
        HAS_COUNT=count is not None, IGNORE=ignore_index, **config,
    )  # fmt: skip
    return losses, lse


@registry.fake(_forward)
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, count: Tensor | None, ignore_index: int, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    losses, lse = (torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device) for _ in range(2))
    return losses, lse


@registry.operation("linear_cross_entropy_backward")
def _backward(
    flowing: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, count: Tensor | None, lse: Tensor,
    ignore_index: int, chunk_bytes: int, needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What flows into the losses, `[R]` -> gradients of hidden `[R, C]` and weight `[V, C]`, each empty if not needed.

    Some columns of the vocabulary at a time, as many as `chunk_bytes` hold for all rows.
    """
    (R, C), V = hidden.shape, weight.shape[0]
    d_hidden, d_weight = _backward_outputs(hidden, weight, needs_hidden, needs_weight)
    if not R:
        return d_hidden, d_weight.zero_()
    config = _config("logit_gradient", hidden)
    width = _columns(V, R, hidden.element_size(), chunk_bytes, config["BN"])
    gradient = torch.empty(R, width, dtype=hidden.dtype, device=hidden.device)
    summed = d_hidden
    if needs_hidden and width < V and hidden.dtype != torch.float32:
        summed = torch.empty(R, C, dtype=torch.float32, device=hidden.device)  # over the chunks
    for first in range(0, V, width):
        logit_gradient[(triton.cdiv(R, config["BM"]) * (width // config["BN"]),)](
            hidden, weight, targets, targets if count is None else count, lse, flowing, gradient, R, V, first,
            hidden.stride(0), weight.stride(0), width,
            C=C, HAS_COUNT=count is not None, IGNORE=ignore_index, **config,
        )  # fmt: skip
        columns = slice(first, min(first + width, V))
        if needs_hidden:
            _multiply(gradient, weight[columns], summed, count, limits_rows=True, add=first > 0)
        if needs_weight:
            _multiply(gradient.t(), hidden, d_weight[columns], count, limits_rows=False, add=False)
    return summed.to(hidden.dtype) if needs_hidden else d_hidden, d_weight


def _columns(V: int, R: int, element_size: int, chunk_bytes: int, BN: int) -> int:
    """Columns of a chunk: whole tiles, as many as the bytes hold, and the same for all chunks."""
    tiles = -(-V // BN)
    most = max(1, chunk_bytes // (R * element_size * BN))
    return BN * -(-tiles // -(-tiles // most))


def _multiply(a: Tensor, b: Tensor, out: Tensor, count: Tensor | None, *, limits_rows: bool, add: bool) -> None:
    """`out (+)= a @ b`, without a's columns (rows, where the summands are limited) that b (out) does not have: by torch
    where all rows are there, else by `product`."""
    columns = b.shape[0] if limits_rows else out.shape[0]
    if count is None:
        a = a[:, :columns] if limits_rows else a[:columns]
        if not add and out.dtype == a.dtype:
            torch.mm(a, b, out=out)
        elif out.dtype == a.dtype:
            out.addmm_(a, b)
        else:
            out.copy_(torch.mm(a, b)) if not add else out.add_(torch.mm(a, b))
        return
    config = tables.tiles("product", support.arch_of(b), b.element_size())
    (M, K), N = a.shape, b.shape[1]
    product[(triton.cdiv(M, config["BM"]) * triton.cdiv(N, config["BN"]),)](
        a, b, out, count, M, N, K, columns, *a.stride(), *b.stride(), out.stride(0),
        LIMITS_ROWS=limits_rows, ADD=add, PRECISION=support.precision(), **config,
    )  # fmt: skip


def _backward_outputs(hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    made = ((hidden, needs_hidden), (weight, needs_weight))
    d_hidden, d_weight = (
        torch.empty(x.shape if needed else (0,), dtype=x.dtype, device=x.device) for x, needed in made
    )
    return d_hidden, d_weight


@registry.fake(_backward)
def _(
    flowing: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, count: Tensor | None, lse: Tensor,
    ignore_index: int, chunk_bytes: int, needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _backward_outputs(hidden, weight, needs_hidden, needs_weight)


def _save(ctx, inputs, output):
    hidden, weight, targets, count, ctx.ignore_index, ctx.chunk_bytes = inputs
    ctx.save_for_backward(hidden, weight, targets, count, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, flowing, _):
    hidden, weight, targets, count, lse = ctx.saved_tensors
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    d_hidden, d_weight = _backward(
        flowing.contiguous(), hidden, weight, targets, count, lse,
        ctx.ignore_index, ctx.chunk_bytes, needs_hidden, needs_weight,
    )  # fmt: skip
    return d_hidden if needs_hidden else None, d_weight if needs_weight else None, None, None, None, None


registry.differentiable(_forward, save=_save, gradient=_differentiate)


def linear_cross_entropy_with_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    rows_plan: RowPlan | None = None,
    row_weights: Tensor | None = None,
    ignore_index: int = -100,
    logit_chunk_bytes: int = LOGIT_CHUNK_BYTES,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the rows' cross-entropies, and each row's own: what a trainer needs.

    Arguments and errors are those of `linear_cross_entropy`; without `rows`, row r reads token r and all are computed,
    ignored or not.

    Returns:
        The sum, a scalar, and the losses `[R]`, both float32 (float64 where hidden is). Gradients flow through the sum
        alone, to `hidden` and `weight`. With no row the sum is 0 and still connected to them.
    """
    _check(hidden, weight, targets, rows, row_weights, "sum")
    hidden, weight = _as_autocast(hidden, weight)
    impl = support.choose(impl, hidden, weight, has_compiled=True)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weights = (torch.ones(len(targets), device=hidden.device) if row_weights is None else row_weights).to(wide)
    if impl == "reference":
        losses = reference(hidden, weight, targets, rows=rows, ignore_index=ignore_index)
        return (losses * weights).sum(), losses.detach()
    if impl == "triton":
        picked = hidden if rows is None else take_rows(hidden, rows, plan=rows_plan, impl="triton")
        losses = _losses_by_triton(picked, weight, targets, None, ignore_index, logit_chunk_bytes)
        return (losses * weights).sum(), losses.detach()
    picked = hidden if rows is None else hidden.index_select(0, rows)
    ignored = targets == ignore_index
    total, losses = in_torch.weighted_sum(
        picked, weight, targets.masked_fill(ignored, 0), weights.masked_fill(ignored, 0), logit_chunk_bytes,
        compiled=impl == "compiled",
    )  # fmt: skip
    return total, losses.masked_fill(ignored, 0)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    rows_plan: RowPlan | None = None,
    row_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    logit_chunk_bytes: int = LOGIT_CHUNK_BYTES,
    impl: Impl = "auto",
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T`, whose logits never exist as a whole; ignored tokens cost no product.

    Args:
        hidden: `[T, C]`, floating.
        weight: `[V, C]`, the head, in the dtype of hidden; it has no bias.
        targets: the right ids, int64: `[R]` with `rows`, `[T]` without.
        rows: `[R]` int64, the token that each row reads; a token may be read by several rows. With it nothing waits for
            the device. Without it every token is a row, and the ignored ones are left out: the Triton kernels keep
            their number on the device, the torch implementation waits for it once on a GPU.
        rows_plan: for `triton`, `plan_rows(rows)` on the device of hidden, as of `take_rows`.
        row_weights: floating, in the shape of `targets`; all 1 where they are not given. They get no gradient.
        ignore_index: target of a row that has none.
        reduction: `sum` of the losses by their weights; `mean`: the sum divided by the weights of the rows that are not
            ignored, 0 where there is none; `none`: the losses by their weights, in the shape of `targets`, 0 where
            ignored.
        logit_chunk_bytes: the most bytes of logits, or of their gradient, at a time (at least one row's or one tile's).
        impl: `reference` computes all T x V logits; `torch` and `compiled` chunks of rows, the second with its own
            passes between the products; `triton` the kernels; `auto` is `triton` on a supported GPU, `compiled` on a
            CPU, else `torch`.

    Returns:
        A scalar, or with `none` a tensor in the shape of `targets`; float32 (float64 where hidden is).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or `triton` or `compiled` where it cannot run.
        IndexError, RuntimeError: on a CPU, a target that there is no row of the head for, of `compiled` and of `torch`.
    """
    _check(hidden, weight, targets, rows, row_weights, reduction)
    hidden, weight = _as_autocast(hidden, weight)
    impl = support.choose(impl, hidden, weight, has_compiled=True)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weights = None if row_weights is None else row_weights.detach().to(wide)
    if reduction == "mean":
        weights = _shares(weights, targets != ignore_index, wide)
    arguments = (hidden, weight, targets, rows, ignore_index, logit_chunk_bytes)
    compiled = impl == "compiled"
    if impl in ("torch", "compiled") and reduction != "none":
        return _sum_by_torch(*arguments, weights, compiled=compiled)
    if impl == "reference":
        losses = reference(hidden, weight, targets, rows=rows, ignore_index=ignore_index)
    elif impl in ("torch", "compiled"):
        losses = _all_by_torch(*arguments, compiled=compiled)
    else:
        losses = _all_by_triton(*arguments, rows_plan)
    losses = losses if weights is None else losses * weights
    return losses if reduction == "none" else losses.sum()


def _shares(weights: Tensor | None, asked: Tensor, wide: torch.dtype) -> Tensor:
    """The weights (of 1 where there are none) divided by the sum of those that are asked for."""
    weights = asked.to(wide) if weights is None else weights
    total = (weights * asked).sum()
    return weights / torch.where(total > 0, total, 1.0)


def _losses_by_triton(
    picked: Tensor, weight: Tensor, targets: Tensor, count: Tensor | None, ignore_index: int, chunk_bytes: int
) -> Tensor:
    support.check_dtype(picked, weight)
    picked, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (picked, weight))
    losses: Tensor = _forward(picked, weight, targets.contiguous(), count, ignore_index, chunk_bytes)[0]
    return losses


def _all_by_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, ignore_index: int, chunk_bytes: int,
    rows_plan: RowPlan | None,
) -> Tensor:  # fmt: skip
    if rows is not None:
        picked = take_rows(hidden, rows, plan=rows_plan, impl="triton")
        return _losses_by_triton(picked, weight, targets, None, ignore_index, chunk_bytes)
    # The rows that are asked for to the front, in their order; how many they are the device keeps to itself.
    ignored = targets == ignore_index
    order = ignored.to(torch.uint8).argsort(stable=True)
    count = (~ignored).sum(dtype=torch.int32).view(1)
    picked, wanted = hidden.index_select(0, order), targets.index_select(0, order)
    losses = _losses_by_triton(picked, weight, wanted, count, ignore_index, chunk_bytes)
    return losses.index_select(0, order.argsort())


def _all_by_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, ignore_index: int, chunk_bytes: int,
    *, compiled: bool,
) -> Tensor:  # fmt: skip
    if rows is None:
        rows = (targets != ignore_index).nonzero().squeeze(1)
        picked = hidden.index_select(0, rows)
        losses = in_torch.every_loss(picked, weight, targets[rows], chunk_bytes, compiled=compiled)
        return losses.new_zeros(targets.shape).index_copy(0, rows, losses)
    ignored = targets == ignore_index
    picked = hidden.index_select(0, rows)
    losses = in_torch.every_loss(picked, weight, targets.masked_fill(ignored, 0), chunk_bytes, compiled=compiled)
    return losses.masked_fill(ignored, 0)


def _sum_by_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, ignore_index: int, chunk_bytes: int,
    weights: Tensor | None, *, compiled: bool,
) -> Tensor:  # fmt: skip
    if rows is None:
        rows = (targets != ignore_index).nonzero().squeeze(1)
        targets, weights = targets[rows], None if weights is None else weights[rows]
    if weights is None:
        weights = torch.ones(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    ignored = targets == ignore_index
    picked = hidden.index_select(0, rows)
    return in_torch.weighted_sum(
        picked, weight, targets.masked_fill(ignored, 0), weights.masked_fill(ignored, 0), chunk_bytes, compiled=compiled
    )[0]


def _as_autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, row_weights: Tensor | None, reduction: str
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"got hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, expected [T, C] and [V, C]")
    n_rows = hidden.shape[0] if rows is None else rows.numel()
    if targets.shape != (n_rows,) or (row_weights is not None and row_weights.shape != (n_rows,)):
        weights_shape = None if row_weights is None else tuple(row_weights.shape)
        raise ValueError(f"got targets {tuple(targets.shape)}, row_weights {weights_shape}, expected both [{n_rows}]")
    autocast = torch.is_autocast_enabled(hidden.device.type)
    if not hidden.is_floating_point() or (hidden.dtype != weight.dtype and not autocast):
        raise ValueError(f"got hidden {hidden.dtype}, weight {weight.dtype}, expected one floating dtype")
    if any(x is not None and x.device != hidden.device for x in (weight, targets, rows, row_weights)):
        raise ValueError(f"got tensors on different devices, expected all on hidden's, {hidden.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"got reduction={reduction!r}, expected mean, sum or none")
