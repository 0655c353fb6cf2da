"""What is compiled: the public functions, forward and backward, on CPU tensors of real widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

WIDTHS = (768, 1024, 1280, 1600)
LLAMA_WIDTHS = (576, 2048, 4096, 8192)
"""Widths of models with RMS norm, from SmolLM2-135M on."""
HEADS = {32: 12, 64: 16, 128: 8}
"""Head dimensions, with a number of heads that they occur with."""
FURTHER_HEADS = {80: 32, 96: 32, 256: 8}
"""Those of other models than GPT-2: two are no power of two, and the last is taken in 16 bits alone."""
GROUPED = ((64, 9, 3), (128, 16, 4))
"""Head dimensions, heads of queries and heads of keys of models with grouped queries."""
VOCAB = 50257
V = 1105
"""Stands for GPT-2's vocabulary. Compiled code depends on a size by whether it is a multiple of 16; 50257 is one more
than such a multiple, as this is, and torch's products between the launches take no time."""
ODD_ROWS = 17
"""Rows of a loss: their number is a multiple of nothing in most batches, and it is a stride."""
TOKENS, PREFIX = 201, 40
"""Of a pack whose examples share a prefix, cut into parts in dK and dV; as odd a number as most are."""


def _attention(H: int, G: int, D: int, dtype: torch.dtype, *, rows: bool = False) -> None:
    from fastft_kernels import attention, plan_attention
    from fastft_kernels.attention import SMALL_TILES

    T = TOKENS
    until = torch.full((T,), T, dtype=torch.int32)
    until[PREFIX : T // 2] = T // 2
    asked = torch.arange(T // 3, T - 1) if rows else None
    q, k, v = learnt(T, (H + 2 * G) * D, dtype=dtype).unflatten(1, (-1, D)).split([H, G, G], dim=1)
    q = q if asked is None else q.index_select(0, asked)
    tiles: dict[str, Any] = SMALL_TILES if dtype == torch.float32 and D > 64 else {}
    plan = plan_attention(until, asked, chunk=64, **tiles)
    _backward(attention(q, k, v, until, q_rows=asked, plan=plan, impl="triton"))


def _attention_decode(H: int, G: int, D: int, dtype: torch.dtype) -> None:
    from fastft_kernels import attention_decode

    cache, prefix = torch.empty(2, 4, 256, G, D, dtype=dtype), torch.empty(2, PREFIX, G, D, dtype=dtype)
    q, lengths = torch.empty(4, H, D, dtype=dtype), torch.full((4,), 100, dtype=torch.int32)
    attention_decode(q, cache[0], cache[1], lengths, prefix_k=prefix[0], prefix_v=prefix[1], impl="triton")


def _layer_norm(width: int, branch: torch.dtype | None, stream: torch.dtype, out: torch.dtype) -> None:
    from fastft_kernels import layer_norm

    x = learnt(64, width, dtype=stream)
    weight, bias = (learnt(width, dtype=torch.float32) for _ in range(2))
    if branch is None:
        _backward(layer_norm(x, weight, bias, out_dtype=out, impl="triton"))
    else:
        added = learnt(64, width, dtype=branch)
        _backward(layer_norm(added, weight, bias, residual=x, out_dtype=out, impl="triton"))


def _rms_norm(width: int, branch: torch.dtype | None, stream: torch.dtype, out: torch.dtype) -> None:
    from fastft_kernels import rms_norm

    x, weight = learnt(64, width, dtype=stream), learnt(width, dtype=torch.float32)
    added = None if branch is None else learnt(64, width, dtype=branch)
    given, residual = (x, None) if added is None else (added, x)
    _backward(rms_norm(given, weight, residual=residual, out_dtype=out, impl="triton"))


def _swiglu(F: int, dtype: torch.dtype) -> None:
    from fastft_kernels import swiglu

    gate, up = learnt(64, 2 * F, dtype=dtype).chunk(2, dim=1)
    _backward(swiglu(gate, up, impl="triton"))


def _gelu(width: int, dtype: torch.dtype) -> None:
    from fastft_kernels import gelu

    _backward(gelu(learnt(64, 4 * width, dtype=dtype), learnt(4 * width, dtype=torch.float32), impl="triton"))


def _cross_entropy(dtype: torch.dtype) -> None:
    from fastft_kernels import cross_entropy

    _backward(cross_entropy(learnt(ODD_ROWS, V, dtype=dtype), _targets(), impl="triton"))


def _linear_cross_entropy(width: int, dtype: torch.dtype, *, rows: bool) -> None:
    from fastft_kernels import linear_cross_entropy

    hidden, weight = learnt(ODD_ROWS, width, dtype=dtype), learnt(V, width, dtype=dtype)
    picked = torch.arange(ODD_ROWS) if rows else None
    _backward(linear_cross_entropy(hidden, weight, _targets(), rows=picked, impl="triton"))


def _rows(width: int, dtype: torch.dtype, of_gradient: torch.dtype) -> None:
    from fastft_kernels import add_rows_, plan_rows, take_rows

    each_once = torch.arange(TOKENS)
    for rows in (each_once, each_once.clamp_min(TOKENS - PREFIX)):  # the second ones with a whole chunk of one row
        plan = plan_rows(rows)
        _backward(take_rows(learnt(V, width, dtype=dtype), rows, plan=plan, out_dtype=of_gradient, impl="triton"))
        add_rows_(torch.empty(V, width, dtype=dtype), torch.empty(TOKENS, width, dtype=of_gradient), plan, "triton")


def _targets() -> Tensor:
    return torch.arange(ODD_ROWS)


def learnt(*shape: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor that asks for a gradient."""
    return torch.empty(*shape, dtype=dtype, requires_grad=True)


def _backward(outputs: Tensor | tuple[Tensor, ...]) -> None:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def _cases() -> Iterator[tuple[str, Callable[[], None]]]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for D, H in HEADS.items():
        yield f"attention D={D} bf16", partial(_attention, H, H, D, bf16)
        yield f"attention D={D} fp32", partial(_attention, H, H, D, fp32)
        yield f"attention_decode D={D} bf16", partial(_attention_decode, H, H, D, bf16)
    yield "attention D=64 fp16", partial(_attention, 16, 16, 64, fp16)
    yield "attention D=64 bf16, of some rows", partial(_attention, 16, 16, 64, bf16, rows=True)
    for D, H in FURTHER_HEADS.items():
        name, dtype = ("fp16", fp16) if D == 256 else ("fp32", fp32)
        yield f"attention D={D} bf16", partial(_attention, H, H, D, bf16)
        yield f"attention D={D} {name}", partial(_attention, H, H, D, dtype)
        yield f"attention_decode D={D} bf16", partial(_attention_decode, H, H, D, bf16)
    for D, H, G in GROUPED:
        yield f"attention D={D} H={H} G={G} bf16", partial(_attention, H, G, D, bf16)
    yield "attention D=64 H=9 G=3 bf16, of some rows", partial(_attention, 9, 3, 64, bf16, rows=True)
    yield "attention_decode D=64 H=9 G=3 bf16", partial(_attention_decode, 9, 3, 64, bf16)
    for C in WIDTHS:
        yield f"layer_norm C={C} bf16", partial(_layer_norm, C, None, fp32, bf16)
        yield f"layer_norm C={C} bf16, added", partial(_layer_norm, C, bf16, fp32, bf16)
    yield "layer_norm C=4096 bf16, added", partial(_layer_norm, 4096, bf16, fp32, bf16)
    yield "layer_norm C=1024 fp16, added", partial(_layer_norm, 1024, fp16, fp32, fp16)
    yield "layer_norm C=1024 fp32, added", partial(_layer_norm, 1024, fp32, fp32, fp32)
    for C in LLAMA_WIDTHS:
        yield f"rms_norm C={C} bf16", partial(_rms_norm, C, None, bf16, bf16)
        yield f"rms_norm C={C} bf16, added", partial(_rms_norm, C, bf16, fp32, bf16)
    yield "rms_norm C=2048 fp16, added", partial(_rms_norm, 2048, fp16, fp32, fp16)
    yield "rms_norm C=2048 fp32, added", partial(_rms_norm, 2048, fp32, fp32, fp32)
    for name, dtype in (("bf16", bf16), ("fp16", fp16), ("fp32", fp32)):
        yield f"swiglu F=1536 {name}", partial(_swiglu, 1536, dtype)
        yield f"gelu F=4096 {name}", partial(_gelu, 1024, dtype)
        yield f"cross_entropy {name}", partial(_cross_entropy, dtype)
        yield f"linear_cross_entropy C=1024 {name}", partial(_linear_cross_entropy, 1024, dtype, rows=True)
    for C in WIDTHS:
        yield f"rows C={C} bf16", partial(_rows, C, bf16, bf16)
    yield "rows C=1024 fp32", partial(_rows, 1024, fp32, fp32)
    yield "rows C=1024 bf16, gradient fp32", partial(_rows, 1024, bf16, fp32)
    yield "rows C=1024 fp16", partial(_rows, 1024, fp16, fp16)
    for C in (768, 1280, 1600):
        yield f"linear_cross_entropy C={C} bf16", partial(_linear_cross_entropy, C, bf16, rows=True)
    yield "linear_cross_entropy C=1024 bf16, no rows", partial(_linear_cross_entropy, 1024, bf16, rows=False)


CASES: dict[str, Callable[[], None]] = dict(_cases())
"""What is compiled: name -> function that calls a public function, forward and backward."""
