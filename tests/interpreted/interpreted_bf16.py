"""Makes Triton's interpreter right for bfloat16.

The interpreter keeps bfloat16 as uint16 and computes on those integers: sums and products are garbage, and a cast from
float32 truncates. `install` gives it what a GPU does: casts round to nearest even, a dot product multiplies in float32,
additions and the like are done in float32 and rounded. What is not made right raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

Handle = interpreter.TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _data(handle: Any) -> np.ndarray:
    return widen(handle.data) if _is_bf16(handle) else handle.data


def _refused(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation, which would compute on bfloat16's bits, for other dtypes alone."""

    def checked(self: Any, *operands: Any) -> Any:
        if any(getattr(getattr(x, "dtype", None), "scalar", None) == tl.bfloat16 for x in operands):
            raise TypeError("got bfloat16, expected float32: convert before this operation")
        return operation(self, *operands)

    return checked


def install() -> None:
    """Patches the interpreter's builder, for the rest of the process."""
    builder = interpreter.InterpreterBuilder
    cast_of_integers, dot, binary = builder.cast_impl, builder.create_dot, builder.binary_op

    def cast(self: Any, source: Any, to: Any) -> Any:
        before, after = source.dtype.scalar, to.scalar
        if before == tl.float32 and after == tl.bfloat16:
            return Handle(narrow(source.data), tl.bfloat16)
        if before == tl.bfloat16 and after == tl.float32:
            return Handle(widen(source.data), tl.float32)
        if tl.bfloat16 in (before, after) and before != after:
            return cast(self, cast(self, source, tl.float32), to)
        return cast_of_integers(self, source, to)

    def wide_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, n: Any) -> Any:
        if not (_is_bf16(a) or _is_bf16(b)):
            return dot(self, a, b, d, precision, n)
        return Handle(np.matmul(_data(a), _data(b), dtype=np.float32) + d.data, d.dtype.scalar)

    def wide_binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
        bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
        if not (_is_bf16(left) or _is_bf16(right)) or operation in bitwise:
            return binary(self, left, right, operation)
        result = operation(_data(left), _data(right))
        if result.dtype == bool:
            return Handle(result, tl.int1)
        return Handle(narrow(result), tl.bfloat16)

    def cast_between_floats(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        if rounding not in (None, ir.ROUNDING_MODE.RTNE):
            raise TypeError("got a cast that does not round to nearest, which the interpreter has not")
        return cast(self, source, to)

    builder.cast_impl, builder.create_dot, builder.binary_op = cast, wide_dot, wide_binary
    builder.create_fp_to_fp = cast_between_floats
    builder.get_bf16 = lambda _self, value: Handle(narrow(np.array([value], np.float32)), tl.bfloat16)
    builder.unary_op, builder.create_fma = _refused(builder.unary_op), _refused(builder.create_fma)
    interpreter.ReduceOps.sum = _refused(interpreter.ReduceOps.sum)
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", lambda self, source, to: self.cast_impl(source, to))
