"""Memory: how much has been taken, and keeping what was freed.

A training step on a CPU frees and takes the same hundreds of megabytes again and again. glibc gives large blocks back
to the system when they are freed, so that every step faults them in anew, page by page.
"""

from __future__ import annotations

import ctypes
import sys

import psutil
import torch

# mallopt's parameters, as in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Tells glibc to take all memory from its heap and never to shrink it; returns whether that was possible.

    Elsewhere (macOS, Windows, musl) nothing happens: their allocators differ.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: of the GPU's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
