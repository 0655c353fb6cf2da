"""AdamW's update on a CPU in one pass over memory, and the norm of gradients in another: `update.c`.

For what torch's own operators take several passes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastft_kernels.cpu.library import run

_BLOCK = 1 << 16
"""Elements of a block of squares, as in the source."""


class _Piece(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "mean", "square", "gradient", "copy")),
        ("size", ctypes.c_int64), ("is_narrow", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("keep", "rate", "root")),
    ]  # fmt: skip


class _Common(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("beta2", "rest1", "rest2", "epsilon", "scale")]


class _Update(ctypes.Structure):
    _fields_ = [
        ("pieces", ctypes.c_void_p), ("count", ctypes.c_int64), ("common", _Common), ("sums", ctypes.c_void_p),
    ]  # fmt: skip


@dataclass(slots=True)
class Piece:
    """A weight and all that belongs to its update, each of the same number of elements, contiguous, on the CPU.

    Attributes:
        weight, mean, square: float32.
        gradient: float32 or bf16.
        copy: bf16, or None.
        step: which update this is, from 1.
        weight_decay: of this weight.
    """

    weight: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    copy: Tensor | None
    step: int
    weight_decay: float


def adamw(
    pieces: Iterable[Piece], *, lr: float, betas: tuple[float, float], epsilon: float, scale: float = 1.0
) -> None:
    """AdamW's update of all pieces, in place, in one pass over memory. With torch's threads.

    Args:
        pieces: see above; `library.why_not` is None.
        lr: the rate.
        betas, epsilon: AdamW's.
        scale: of the gradients.
    """
    beta1, beta2 = betas
    given = [*pieces]
    array = (_Piece * len(given))(
        *(
            _Piece(
                *_places(piece), piece.weight.numel(), piece.gradient.dtype == torch.bfloat16,
                1 - lr * piece.weight_decay, lr / (1 - beta1**piece.step), math.sqrt(1 - beta2**piece.step),
            )
            for piece in given
        )
    )  # fmt: skip
    common = _Common(beta2, 1 - beta1, 1 - beta2, epsilon, scale)
    run("fastft_adamw", _Update(ctypes.addressof(array), len(given), common, None))


def norm(gradients: Iterable[Tensor]) -> float:
    """The 2-norm over all gradients, float32 or bf16, contiguous, on the CPU: the same for any number of threads."""
    given = [*gradients]
    array = (_Piece * len(given))(
        *(_Piece(gradient=g.data_ptr(), size=g.numel(), is_narrow=g.dtype == torch.bfloat16) for g in given)
    )
    sums = (ctypes.c_double * sum(-(-g.numel() // _BLOCK) for g in given))()
    run("fastft_squares", _Update(ctypes.addressof(array), len(given), _Common(), ctypes.addressof(sums)))
    return math.sqrt(math.fsum(sums))


def _places(piece: Piece) -> list[int]:
    tensors = (piece.weight, piece.mean, piece.square, piece.gradient, piece.copy)
    for tensor in tensors:
        # A wrong address is not found out by C.
        if tensor is not None and not (
            tensor.is_contiguous() and tensor.device.type == "cpu" and tensor.numel() == piece.weight.numel()
        ):
            raise ValueError(f"got {tuple(tensor.shape)} on {tensor.device}, expected contiguous ones of equal sizes")
    if any(tensor.dtype != torch.float32 for tensor in tensors[:3]) or (
        piece.gradient.dtype not in (torch.float32, torch.bfloat16)
        or (piece.copy is not None and piece.copy.dtype != torch.bfloat16)
    ):
        raise ValueError("got dtypes that there is no code for, expected float32, and bf16 gradients and copies")
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
