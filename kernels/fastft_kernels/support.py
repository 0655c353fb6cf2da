"""What every operation shares: Triton where it is installed, the choice of an implementation, the GPU's name."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # macOS and Windows have none; the torch path runs there

    class _NoTriton:
        """Stands for Triton where kernels are defined, but cannot run."""

        def __getattr__(self, name: str) -> Any:
            return lambda first=None, *_, **__: first if first is not None else (lambda fn: fn)

    triton = tl = _NoTriton()
    HAS_TRITON = False

Impl = Literal["auto", "triton", "torch", "reference"]
Chosen = Literal["triton", "torch", "reference"]

IMPLS = ("auto", "triton", "torch", "reference")
LEAST_CAPABILITY = (8, 0)
"""Ampere: the first with bf16 tensor cores and asynchronous copies, which the kernels are built on."""
DEFAULT_ARCH = "sm_80"


def choose(impl: str, tensor: Tensor) -> Chosen:
    """The implementation that runs for a tensor: `auto` takes Triton where it can, else torch.

    Raises:
        ValueError: no such implementation.
        RuntimeError: `triton` was asked for and cannot run here; the message says why.
    """
    if impl not in IMPLS:
        raise ValueError(f"got impl {impl!r}, expected one of {', '.join(IMPLS)}")
    if impl == "auto":
        return "torch" if tensor.device.type == "cpu" or why_not_triton(tensor.device) else "triton"
    if impl == "triton" and (reason := why_not_triton(tensor.device)):
        raise RuntimeError(f"got impl 'triton', which cannot run here: {reason}; use impl 'auto'")
    return impl  # type: ignore[return-value]


@cache
def why_not_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device; None where they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if interpreting() or offline():
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, expected cuda (or TRITON_INTERPRET=1, for tests)"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        return f"the GPU is sm_{capability[0]}{capability[1]}, expected sm_80 or newer"
    return None


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1, read when kernels are defined)."""
    return HAS_TRITON and bool(triton.knobs.runtime.interpret)


_offline_arch: str | None = None


def offline() -> bool:
    """Whether kernels are only compiled, for a GPU that is not there (`fastft_kernels.static`)."""
    return _offline_arch is not None


def set_offline(arch: str | None) -> None:
    """Compile for `arch`, such as sm_90, from now on; None ends it."""
    global _offline_arch
    _offline_arch = arch
    why_not_triton.cache_clear()


def arch_of(device: torch.device) -> str:
    """The key of the tile tables: sm_80, sm_90, ..., or gfx942."""
    if _offline_arch is not None:
        return _offline_arch
    if device.type != "cuda":
        return DEFAULT_ARCH
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
