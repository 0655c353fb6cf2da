"""The counters of the pretended GPU, read from within a process that runs on it."""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def library() -> ctypes.CDLL:
    """The library that this process runs on.

    Raises:
        RuntimeError: the process was not started on a pretended GPU.
    """
    loaded = ctypes.CDLL(None)
    if not hasattr(loaded, "pretended_gpu_counts"):
        raise RuntimeError("this process has no pretended GPU: start it by `python -m tools.pretended_gpu run`")
    loaded.pretended_gpu_name.restype = ctypes.c_char_p
    loaded.pretended_gpu_last_refusal.restype = ctypes.c_char_p
    loaded.pretended_gpu_fill.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
    return loaded


@functools.cache
def names() -> tuple[str, ...]:
    """The counters' names, as csrc/pretended.h has them."""
    return tuple(library().pretended_gpu_name(i).decode() for i in range(library().pretended_gpu_counters()))


def counts(*, reset: bool = True) -> dict[str, int]:
    """What was asked of the GPU since the last reset, zeros included.

    `device_bytes`, `device_bytes_peak` and `host_bytes` are levels: a reset leaves them, and puts the peak to the
    present level.
    """
    values = (ctypes.c_uint64 * len(names()))()
    library().pretended_gpu_counts(values, int(reset))
    return dict(zip(names(), values, strict=True))


def last_refusal() -> str:
    """The call that was refused last, as CUDA would have refused it; empty where none was."""
    refusal: bytes = library().pretended_gpu_last_refusal()
    return refusal.decode()


def fill(address: int, values: bytes) -> None:
    """Writes to device memory, as kernels compute nothing: `fill(tensor.data_ptr(), ids.numpy().tobytes())`.

    Raises:
        ValueError: the bytes do not lie within one allocation of the device.
    """
    if library().pretended_gpu_fill(address, values, len(values)):
        raise ValueError(f"got {len(values)} bytes at {address:#x}, expected room within one allocation of the device")
