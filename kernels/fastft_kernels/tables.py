"""The tiles that the kernels are launched with, by kernel, architecture and size.

Each kernel's file adds its own entries. They are fixed, with no search at run time: a search costs seconds and its
outcome changes the order of sums, hence bits. Every entry passes the static gate (`python -m fastft_kernels.static`):
no spilled register, shared memory that fits.
"""

from typing import Any

Config = dict[str, Any]
"""Tile sizes by their names in the kernel, with `num_warps` and `num_stages`."""

FAMILY = {"sm_87": "sm_86", "sm_89": "sm_86", "sm_103": "sm_100", "sm_120": "sm_86", "sm_121": "sm_86"}
"""Architectures that use another one's tiles: those with about 100 KB of shared memory a block use sm_86's."""

TABLE: dict[str, dict[str, dict[Any, Config]]] = {}
"""Kernel -> architecture, or `default` -> size (the head's, or the width; None for any) -> configuration."""


def tiles(kernel: str, arch: str, size: Any = None) -> Config:
    """The configuration of a kernel on an architecture, for a size.

    Raises:
        KeyError: a kernel or size that has no entry.
    """
    by_arch = TABLE[kernel]
    by_size = {**by_arch["default"], **by_arch.get(FAMILY.get(arch, arch), {})}
    return by_size[size] if size in by_size else by_size[None]
