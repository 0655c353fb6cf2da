"""A small C file, compiled where a run begins: what torch's own operators take several passes over memory for.

It takes a C compiler a second, once for a machine's processor: the library is kept in the cache's folder. Where there
is no compiler, or on Windows, the caller has a way of its own through torch; `why_not` says it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastft.common.files import cache_folder

_SOURCE = Path(__file__).with_name("one_pass.c")
_BLOCK = 1 << 16
"""Elements of a block of squares, as in the source."""
_COMMON_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_OF_PROCESSOR = {
    # gcc takes half of an AVX-512 register by itself, and then needs twice the time.
    "x86_64": ("-march=native", "-mprefer-vector-width=512"),
    "aarch64": ("-mcpu=native",),
    "arm64": ("-mcpu=native",),
}
_SWITCH = "FASTFT_COMPILED"
_SECONDS = 60


class _Piece(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "mean", "square", "gradient", "copy")),
        ("size", ctypes.c_int64), ("is_narrow", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("keep", "rate", "root")),
    ]  # fmt: skip


class _Common(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("beta2", "rest1", "rest2", "epsilon", "scale")]


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


def why_not() -> str | None:
    """Why there is no compiled code here; None where there is."""
    return _built()[1]


def adamw(
    pieces: Iterable[Piece], *, lr: float, betas: tuple[float, float], epsilon: float, scale: float = 1.0
) -> None:
    """AdamW's update of all pieces, in place, in one pass over memory. With torch's threads.

    Args:
        pieces: see above; `why_not` is None.
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
    _in_parts(lambda lib, part, parts: lib.fastft_adamw(array, len(given), ctypes.byref(common), part, parts))


def norm(gradients: Iterable[Tensor]) -> float:
    """The 2-norm over all gradients, float32 or bf16, contiguous, on the CPU: the same for any number of threads."""
    given = [*gradients]
    array = (_Piece * len(given))(
        *(_Piece(gradient=g.data_ptr(), size=g.numel(), is_narrow=g.dtype == torch.bfloat16) for g in given)
    )
    sums = (ctypes.c_double * sum(-(-g.numel() // _BLOCK) for g in given))()
    _in_parts(lambda lib, part, parts: lib.fastft_squares(array, len(given), sums, part, parts))
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


def _in_parts(call: Callable[[Any, int, int], None]) -> None:
    """Runs a function of the library, given it and which part of how many to do, in as many threads as torch has: it
    lets go of Python's lock."""
    library, parts = _built()[0], torch.get_num_threads()
    others = [_threads(os.getpid(), parts).submit(call, library, part, parts) for part in range(1, parts)]
    try:
        call(library, 0, parts)
    finally:  # also where Ctrl-C breaks in: nobody may see weights that threads still write to
        for other in others:
            other.result()


@functools.lru_cache(maxsize=1)
def _threads(process: int, threads: int) -> ThreadPoolExecutor:  # noqa: ARG001 (a fork has none of its parent's threads)
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="update")


@functools.cache
def _built() -> tuple[Any, str | None]:
    """The library, or why there is none."""
    if os.environ.get(_SWITCH) == "0":
        return None, f"{_SWITCH} is 0"
    if os.name != "posix":
        return None, f"it is not made for {platform.system()}"
    compiler = _compiler()
    if compiler is None:
        return None, "there is no C compiler (cc, gcc or clang), or what CC names is not there"
    flags = (*_COMMON_FLAGS, *_OF_PROCESSOR.get(platform.machine(), ()))
    try:
        library = ctypes.CDLL(str(_library(compiler, flags)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return None, f"{compiler} did not compile it ({' '.join(said.split())[:200]})"
    of_parts = [ctypes.c_int64, ctypes.c_int64]
    library.fastft_adamw.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, *of_parts]
    library.fastft_squares.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, *of_parts]
    library.fastft_adamw.restype = library.fastft_squares.restype = None
    return library, None


def _compiler() -> str | None:
    """What CC names, or the first one that there is."""
    named = os.environ.get("CC")
    found = [shutil.which(name) for name in ([named] if named else ("cc", "gcc", "clang"))]
    return next((path for path in found if path), None)


def _library(compiler: str, flags: tuple[str, ...]) -> Path:
    """The library's file, compiled unless the cache has it.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be.
    """
    made_of = "\n".join([_SOURCE.read_text(encoding="utf-8"), _said_by([compiler, "--version"]), *flags, _processor()])
    name = f"one-pass-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    folder = cache_folder() / "compiled"
    if (folder / name).is_file():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = tempfile.mkdtemp(dir=folder, prefix=".")
    except OSError:  # nobody's cache to write: for this process alone
        folder = Path(beside := tempfile.mkdtemp(prefix="fastft-"))
    made = Path(beside) / name
    try:
        _said_by([compiler, *flags, str(_SOURCE), "-o", str(made), "-lm"])
        if made.parent == folder:
            return made
        return made.replace(folder / name)  # whole, whoever else makes it at the same time
    finally:
        if Path(beside) != folder:
            shutil.rmtree(beside, ignore_errors=True)


def _said_by(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout


def _processor() -> str:
    """What tells processors apart for which code is made: a folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    telling = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))
