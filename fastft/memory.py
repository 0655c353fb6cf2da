"""Keeping freed memory: a training step on a CPU frees and takes the same hundreds of megabytes again and again.

glibc gives large blocks back to the system when they are freed, so that every step faults them in anew, page by page.
"""

from __future__ import annotations

import ctypes
import sys

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
