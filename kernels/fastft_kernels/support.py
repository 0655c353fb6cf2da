"""What the kernels share: Triton where it is installed, and the choice of an implementation.

Kernel files take `triton` and `tl` from here, so that the package also imports where Triton does not exist (macOS,
Windows): the torch implementations run there.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fastft_kernels.cpu import library

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:

    class _Missing:
        """Stands in for Triton's modules while kernel files are imported; nothing of it ever runs."""

        def __getattr__(self, name: str) -> Any:
            return _Missing()

        def __call__(self, *args: Any, **_: Any) -> Any:
            return args[0] if args else self

    triton = tl = _Missing()
    HAS_TRITON = False

Impl = Literal["auto", "triton", "compiled", "torch", "reference"]
IMPLS = ("auto", "triton", "compiled", "torch", "reference")

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run in Triton's interpreter, on CPU tensors: fixed when they are decorated."""

OLDEST_CUDA = (8, 0)
"""The compute capability from which on the kernels are built: below, bf16 and asynchronous copies are missing."""

INTERPRETED_ARCH = "sm_80"
"""The architecture whose tiles the interpreter uses."""

_PLAIN = (Tensor, torch.nn.Parameter)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COMPILED_DTYPES = (torch.float32, torch.bfloat16)

_offline_arch: str | None = None


@contextlib.contextmanager
def offline(arch: str) -> Iterator[None]:
    """Within it, launches on CPU tensors are for the architecture `arch`: `fastft_kernels.static` compiles them and
    launches nothing."""
    global _offline_arch
    before, _offline_arch = _offline_arch, arch
    try:
        yield
    finally:
        _offline_arch = before


@cache
def _arch_of_gpu(index: int) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def arch_of(x: Tensor) -> str:
    """The architecture that a launch on `x` is for, as the tile tables name it: `sm_80`, ..., `gfx942`."""
    if _offline_arch is not None:
        return _offline_arch
    return INTERPRETED_ARCH if x.device.type != "cuda" else _arch_of_gpu(x.device.index or 0)


def why_not_triton(x: Tensor) -> str | None:
    """Why Triton kernels cannot run on `x`; None where they can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if _offline_arch is not None or (INTERPRETED and x.device.type == "cpu"):
        return None
    if x.device.type != "cuda":
        return f"the tensors are on {x.device}, and Triton needs a GPU (or TRITON_INTERPRET=1 set before the import)"
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set, and the interpreter takes CPU tensors"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(x.device)) < OLDEST_CUDA:
        return f"the GPU has compute capability {'{}.{}'.format(*capability)}, and the kernels need 8.0"
    return None


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def why_not_compiled(x: Tensor, *others: Tensor | torch.dtype | None) -> str | None:
    """Why compiled code cannot run on `x` and what else it is given; None where it can."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}, and compiled code is for CPUs"
    for other in (x, *others):
        dtype = other.dtype if isinstance(other, Tensor) else other
        if dtype is not None and dtype not in COMPILED_DTYPES:
            return f"the tensors are {dtype}, and compiled code takes float32 and bfloat16"
    if torch.compiler.is_compiling():
        return "torch.compile is at work, which cannot look into it"
    for other in (x, *others):
        if not (other is None or type(other) is torch.dtype) and (why := _why_not_at_address(cast(Tensor, other))):
            return why
    return library.why_not()


def _why_not_at_address(x: Tensor) -> str | None:
    """Why a tensor's numbers are not what lies at its address; None where they are."""
    if type(x) not in _PLAIN or torch._C._len_torch_dispatch_stack():
        return (
            "a tensor is of a class of its own, or a dispatch mode is on, which may have no memory, or trace operators"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "torch.func is at work, which differentiates operators"
    if x.layout is not torch.strided or x.is_neg():
        return "a tensor is not laid out by strides, or is the negative of what is in memory"
    return None


def choose(impl: str, x: Tensor, *others: Tensor | torch.dtype | None, has_compiled: bool = False) -> Impl:
    """The implementation that runs on `x`: `auto` is `triton` on a supported GPU, `compiled` on a CPU where there is
    compiled code, and `torch` elsewhere.

    Args:
        impl: what was asked for.
        x: a tensor of the operation.
        others: its other tensors, and dtypes of results, which compiled code takes or not.
        has_compiled: whether the operation is there in C.

    Raises:
        ValueError: no such implementation, or one where it cannot run.
    """
    if impl == "auto":
        if x.device.type != "cuda" or x.dtype not in TRITON_DTYPES:
            return "compiled" if has_compiled and why_not_compiled(x, *others) is None else "torch"
        if (why := why_not_triton(x)) is not None:
            _say_once(f"fastft_kernels runs its torch implementations: {why}")
            return "torch"
        return "triton"
    if impl == "triton" and (why := why_not_triton(x)) is not None:
        raise ValueError(f'got impl="triton", which cannot run here: {why}; expected impl="auto" or "torch"')
    if impl == "compiled":
        why = why_not_compiled(x, *others) if has_compiled else "this operation is not there in C"
        if why is not None:
            raise ValueError(f'got impl="compiled", which cannot run here: {why}; expected impl="auto" or "torch"')
    if impl in IMPLS:
        return cast(Impl, impl)
    raise ValueError(f"got impl={impl!r}, expected one of {', '.join(IMPLS)}")


def check_dtype(*given: Tensor | torch.dtype | None) -> None:
    """Sees to it that Triton kernels take these dtypes, or tensors' dtypes.

    Raises:
        ValueError: one that they do not take, float64 for example.
    """
    for x in given:
        dtype = x.dtype if isinstance(x, Tensor) else x
        if dtype is not None and dtype not in TRITON_DTYPES:
            raise ValueError(
                f'got {dtype}, expected float32, float16 or bfloat16 with impl="triton"; '
                'impl="torch" and "reference" take float64 too'
            )


def in_rows(x: Tensor) -> Tensor:
    """`[..., C]` as `[N, C]` whose rows lie in one piece each, as kernels read them."""
    if x.ndim == 2 and x.stride(1) == 1:
        return x
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def precision() -> str:
    """How float32 matrix products are computed: IEEE, or in TF32 where torch's own are allowed to be.

    `fp32_precision` follows `allow_tf32` and `set_float32_matmul_precision` too; reading those raises once it was set.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
