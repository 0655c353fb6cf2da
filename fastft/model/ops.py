"""The one file that runs a model's kernels, and chooses which implementation of them.

`reference` has none of the savings: it is what everything else is held against. `cpu` has them, in C on a CPU with a
compiler and else by torch (it runs on every device). `triton` runs the Triton kernels, on a GPU. `auto` is the fastest
that runs here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import fastft_kernels
import torch
from fastft_kernels import AttentionPlan, RowPlan, plan_rows, registry
from fastft_kernels.cpu import attention as cpu_attention
from fastft_kernels.cpu import best as cpu_best
from fastft_kernels.cpu import decode as cpu_decode
from fastft_kernels.cpu import library
from fastft_kernels.support import Impl as KernelImpl
from fastft_kernels.support import why_not_compiled, why_not_triton
from torch import Tensor, nn
from torch.nn import functional as F

from fastft.batches.batch import Batch, Batcher, Planner, Rounding, few_sizes, near_sizes
from fastft.common.errors import UserError
from fastft.common.files import cache_folder
from fastft.model.fixed_norm import FixedNorm
from fastft.model.lora import LoRALinear
from fastft.model.packed_linear import PackedLinear

AnyLinear = nn.Linear | LoRALinear | PackedLinear
"""A linear layer that is trained, one with an adapter, or one that only answers."""
IMPLS = ("auto", "triton", "cpu", "reference")
FEW = 1 << 15
"""Elements up to which torch's operators are faster on a CPU than one compiled pass: those of a few tokens' answers."""
library.keep_in(cache_folder() / "compiled")


def resolve(impl: str, device: torch.device) -> str:
    """What `--impl` means on a device: `auto` is `triton` on a GPU that runs the kernels, and `cpu` elsewhere.

    Raises:
        UserError: no such implementation, or `triton` where it cannot run.
    """
    if impl not in IMPLS:
        raise UserError(f"got --impl {impl}, expected one of {', '.join(IMPLS)}")
    if impl not in ("auto", "triton"):
        return impl
    if impl == "auto" and device.type != "cuda":
        return "cpu"
    why_not = why_no_triton(device)
    if impl == "triton" and why_not is not None:
        raise UserError(f"got --impl triton, which cannot run here: {why_not}; expected auto or cpu")
    return "triton" if why_not is None else "cpu"


def why_no_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device; None where they can."""
    return why_not_triton(torch.empty(0, device=device))


def why_no_compiled() -> str | None:
    """Why there is no compiled code for CPUs here; None where there is."""
    return library.why_not()


def kernel_impl(impl: str, device: torch.device) -> KernelImpl:
    """What `--impl` is called in `fastft_kernels`: there `auto` takes C on a CPU, and torch where there is none."""
    if impl == "cpu":
        return "auto" if device.type == "cpu" else "torch"
    return cast(KernelImpl, impl)


def _is_compiled(impl: str, x: Tensor) -> bool:
    """Whether passes over `x` run in compiled code for CPUs, the calls of which cost more than torch's own."""
    return impl == "cpu" and x.numel() > FEW and why_not_compiled(x) is None


def planner(impl: str, *, round_sizes: bool = False) -> Planner:
    """What finds, for a batch on the host, the parts of the score matrix that attention computes under `impl`."""
    if impl == "triton":
        return functools.partial(fastft_kernels.plan_attention, round_sizes=round_sizes)
    return fastft_kernels.plan_tiles


def compile_model(model: nn.Module) -> None:
    """Has torch.compile compile a model when it is called."""
    registry.prepare_compile()
    model.compile(fullgraph=True)


def rounding(device: torch.device, *, is_narrow: bool) -> Rounding | None:
    """Up to which sizes packs for a device are padded, so that what was captured or compiled for one fits others.

    Args:
        device: where they are computed.
        is_narrow: whether in 16 bits.
    """
    if device.type == "cuda":
        return few_sizes
    return near_sizes if is_narrow and device.type == "cpu" else None


def batcher(
    impl: str, device: torch.device, *, is_narrow: bool, packed: bool = True, share_prefix: bool = True
) -> Batcher:
    """What makes the batches that a model is given on a device under `impl`, with the plans of its kernels and the
    sizes of `rounding`."""
    on_cuda = device.type == "cuda"
    return Batcher(
        packed=packed,
        share_prefix=share_prefix,
        rounding=rounding(device, is_narrow=is_narrow),
        planner=planner(impl, round_sizes=on_cuda),
        row_planner=functools.partial(plan_rows, round_sizes=on_cuda) if impl == "triton" else None,
    )


def attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, impl: str) -> Tensor:
    """Attention of the batch's tokens, `[T, H, D]` each, over what `batch.visible_until` lets them see."""
    return _attention(q, k, v, batch, batch.tiles, impl, row_length=batch.row_length)


def attention_of_rows(q: Tensor, k: Tensor, v: Tensor, batch: Batch, impl: str) -> Tensor:
    """The same for the queries of the loss rows alone: q is `[R, H, D]`, of the tokens `batch.rows`."""
    return _attention(q, k, v, batch, batch.row_tiles, impl, q_rows=batch.rows)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: Batch,
    tiles: object,
    impl: str,
    *,
    q_rows: Tensor | None = None,
    row_length: int | None = None,
) -> Tensor:
    out: Any = fastft_kernels.attention(  # a tensor alone, as no log-sum-exp is asked for
        q,
        k,
        v,
        batch.visible_until,
        q_rows=q_rows,
        row_length=row_length,
        tiles=tiles if isinstance(tiles, tuple) else None,
        plan=tiles if isinstance(tiles, AttentionPlan) else None,
        impl=kernel_impl(impl, q.device),
    )
    return cast(Tensor, out)


def attention_decode(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, prefix: tuple[Tensor, Tensor] | None, impl: str
) -> Tensor:
    """Attention of one new token of each of N sequences, `[N, H, D]`, over its cache and a shared prefix.

    `keys` and `values` are `[N, S, H, D]`, finite throughout, of which the first `lengths` `[N]` places count; `prefix`
    holds keys and values `[P, H, D]` that all sequences see.
    """
    prefix_k, prefix_v = (None, None) if prefix is None else prefix
    return fastft_kernels.attention_decode(
        q,
        keys,
        values,
        lengths,
        prefix_k=prefix_k,
        prefix_v=prefix_v,
        unused_is_finite=True,
        impl=kernel_impl(impl, q.device),
    )


BLOCK_PLACES = cpu_decode.PLACES
"""Places of a block of keys and values."""


def has_blocks(impl: str, like: Tensor, head_dim: int) -> bool:
    """Whether there is code under `impl` for keys and values in blocks, in the dtype and on the device of `like`."""
    return kernel_impl(impl, like.device) == "auto" and cpu_decode.why_not(like.dtype, like.device, head_dim) is None


def new_block(layers: int, heads: int, head_dim: int, like: Tensor) -> Tensor:
    """Memory for the keys and values of `BLOCK_PLACES` places of a sequence, in all layers."""
    return cpu_decode.new_block(layers, heads, head_dim, like)


BlockTable = cpu_decode.BlockTable
"""What reads and writes the keys and values of sequences in blocks, by compiled code."""


def attention_of_prompts(q: Tensor, k: Tensor, v: Tensor, until: Tensor) -> Tensor:
    """Attention of the last T of P + T tokens, q `[T, H, D]`, k and v `[P + T, H, D]`, by compiled code; `until` is
    `Batch.visible_until`."""
    rows = torch.arange(len(k) - len(q), len(k)) if len(k) > len(q) else None
    return cast(Tensor, fastft_kernels.attention(q, k, v, until, q_rows=rows, impl="compiled"))


def near_best(x: Tensor, *, below: float, relative: float) -> tuple[Tensor, Tensor] | None:
    """Rows and columns of what is at least `best - below - relative * |best|` in the rows of `x` `[N, V]`; None where
    there is no compiled code for it."""
    return cpu_best.near_best(x, below=below, relative=relative) if why_not_compiled(x) is None else None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, batch: Batch, row_weights: Tensor, impl: str, *, rows_only: bool
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the batch's row losses, and each row's, from the head `weight` `[V, C]`.

    `hidden` is `[T, C]`, or `[R, C]` of the loss rows with `rows_only`.
    """
    return fastft_kernels.linear_cross_entropy_with_losses(
        hidden,
        weight,
        batch.targets,
        rows=None if rows_only else batch.rows,
        rows_plan=batch.row_plan,
        row_weights=row_weights,
        impl=kernel_impl(impl, hidden.device),
    )


def add_layer_norm(
    stream: Tensor, branch: Tensor | None, norm: nn.LayerNorm, dtype: torch.dtype, impl: str
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream, `[T, C]` each, and normalises the sum.

    Args:
        stream: in the dtype of the sums.
        branch: what is added; None before the first block.
        norm: holds weight, bias and eps.
        dtype: of the product that reads the normalised rows, where autocast does not say another one.
        impl: see above.

    Returns:
        The normalised rows in that dtype, and the sum.
    """
    if isinstance(norm, FixedNorm) and impl == "cpu":
        return norm.added(stream, branch)
    if impl == "triton" or _is_compiled(impl, stream):
        if torch.is_autocast_enabled(stream.device.type):
            dtype = torch.get_autocast_dtype(stream.device.type)
        fused = functools.partial(
            fastft_kernels.layer_norm,
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
            out_dtype=dtype,
            impl=kernel_impl(impl, stream.device),
        )
        if branch is None:
            return cast(Tensor, fused(stream)), stream
        return cast(tuple[Tensor, Tensor], fused(branch, residual=stream))
    if branch is not None:
        stream = stream + branch
    # The weights may be narrower than the stream, where DeepSpeed keeps the float32 ones to itself.
    weight, bias = norm.weight.to(stream.dtype), norm.bias.to(stream.dtype)
    return F.layer_norm(stream, norm.normalized_shape, weight, bias, norm.eps).to(dtype), stream


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a tensor, `at` `[R]` int64, that may repeat; `plan`, where it is known, says which are the same."""

    at: Tensor
    plan: RowPlan | None = None


def lookup(weight: Tensor, rows: Rows, impl: str) -> Tensor:
    """The rows of an embedding `[V, C]`: `[T, C]`. Its gradient is dense."""
    if impl == "triton":
        return fastft_kernels.take_rows(weight, rows.at, plan=rows.plan, impl="triton")
    return F.embedding(rows.at, weight)


def take_rows(x: Tensor, rows: Rows, impl: str) -> Tensor:
    """The rows of activations `x` `[T, C]`: `[R, C]`. Triton kernels add the gradients of a row in a fixed order."""
    if impl == "triton":
        return fastft_kernels.take_rows(x, rows.at, plan=rows.plan, impl="triton")
    return x.index_select(0, rows.at)


def add_rows_(total: Tensor, grad: Tensor, rows: Rows, impl: str) -> Tensor:
    """Adds `grad` `[R, C]` to the rows of `total` `[T, C]`. Those of one row are summed in float32 first, in a fixed
    order: one by one, the small ones of a row that comes often would be lost in 16 bits."""
    if impl == "triton":
        plan = plan_rows(rows.at) if rows.plan is None else rows.plan
        return fastft_kernels.add_rows_(total, grad, plan, impl="triton")
    different, at = rows.at.unique(return_inverse=True)
    sums = grad.new_zeros(len(different), grad.shape[1]).index_add_(0, at, grad)
    return total.index_add_(0, different, sums.to(total.dtype))


def split_heads(product: Tensor, n: int, H: int, impl: str) -> tuple[Tensor, ...]:
    """A layer's product `[T, n H D]` as n views of its heads, `[T, H, D]` each."""
    learns = torch.is_grad_enabled()
    if learns and kernel_impl(impl, product.device) == "auto" and why_not_compiled(product) is None:
        return cpu_attention.split_heads(product, n, H)
    heads: Tensor = product.unflatten(1, (n, H, -1))
    return heads.unbind(1)


def split_linear(xs: Sequence[Tensor], layer: nn.Linear | LoRALinear, sizes: Sequence[int]) -> list[Tensor]:
    """Each of some inputs `[T, in]` through its part of a layer's outputs: `[T, size]`.

    This and `linear_gelu` read a layer's weight, instead of calling it: it is here that adapters are known.
    """
    if isinstance(layer, LoRALinear):
        ends = list(itertools.accumulate(sizes))
        return [layer.product(x, slice(end - size, end)) for x, size, end in zip(xs, sizes, ends, strict=True)]
    weights, biases = layer.weight.split(list(sizes)), layer.bias.split(list(sizes))
    return [F.linear(x, w, b) for x, w, b in zip(xs, weights, biases, strict=True)]


def linear_gelu(x: Tensor, layer: AnyLinear, impl: str) -> Tensor:
    """`gelu(layer(x))`, `[T, C]` -> `[T, 4C]`: GELU in its tanh form."""
    if isinstance(layer, PackedLinear):
        return layer.product(x, gelu=True)
    if impl == "triton" or _is_compiled(impl, x):
        product = layer.product(x, with_bias=False) if isinstance(layer, LoRALinear) else F.linear(x, layer.weight)
        return fastft_kernels.gelu(product, layer.bias, impl=kernel_impl(impl, x.device))
    return F.gelu(layer(x), approximate="tanh")
