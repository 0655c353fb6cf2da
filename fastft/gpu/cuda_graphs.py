"""CUDA graphs: work that a GPU is asked for by one call, once it has been captured.

A step of a small batch is hundreds of kernels, and asking for each of them takes the host longer than the GPU needs to
run it. A graph asks for all of them at once. What is captured reads and writes the same addresses each time: its inputs
are put into tensors that stay, and so is what others read of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from fastft.common.console import warn

MOST_GRAPHS = 16
"""Graphs of one `Graphs`: beyond them work runs without. Each keeps its own list of kernels, a few MB."""


class Graphs:
    """Captured pieces of work of one device, in one pool of memory.

    They share the memory of what lies between their inputs and outputs, so they are replayed one at a time, on one
    stream, in any order. Whatever is to outlive a replay lies in tensors that were made outside of the captured work.
    """

    def __init__(self, device: torch.device, of: str, *, enabled: bool = True, most: int = MOST_GRAPHS) -> None:
        """No graph yet.

        Args:
            device: of the work.
            of: what the work belongs to, for warnings.
            enabled: off, all work runs as it is; as it does on a device without graphs.
            most: how many pieces of work are captured at the most.
        """
        self._device = device
        self._of = of
        self._enabled = enabled and device.type == "cuda"
        self._most = most
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}  # None: ran once, not captured yet
        self._pool: Any = None
        self._is_full = False

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return sum(graph is not None for graph in self._graphs.values())

    def captures(self, key: Hashable) -> bool:
        """Whether work of this key is captured, or will be when it is run next: its inputs are then to stay."""
        if self._graphs.get(key) is not None:
            return True
        return self._enabled and key in self._graphs and self.captured < self._most

    def run(self, key: Hashable, work: Callable[[], object]) -> None:
        """Does the work, which is known by `key`: the same kernels on the same tensors, whenever the key is the same.

        The first time it runs as it is, which compiles kernels and makes what libraries keep; the second time it is
        captured; from then on it is replayed. Work that cannot be captured, and work beyond `most`, always runs as it
        is; a warning says so once.
        """
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
        elif self.captures(key):
            self._capture(key, work)
        else:
            if self._enabled and key in self._graphs:
                self._say_full()
            elif self._enabled:
                self._graphs[key] = None
            work()

    def _capture(self, key: Hashable, work: Callable[[], object]) -> None:
        try:
            graph = self._captured(work)
        except RuntimeError as error:
            self._enabled = False
            reason = str(error).partition("\n")[0]
            warn(f"CUDA graphs of {self._of} are off from here on, as a step could not be captured ({reason})")
            work()
            return
        self._graphs[key] = graph
        graph.replay()

    def _captured(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self._device)
        try:
            # Another thread may pin memory for the next batch meanwhile: only this one must keep to what is allowed.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        except BaseException:
            torch.cuda.set_stream(before)  # where a capture fails, torch leaves its own stream the current one
            raise
        return graph

    def _say_full(self) -> None:
        if not self._is_full:
            warn(f"{self._most} CUDA graphs of {self._of} are captured; batches of further sizes run without")
        self._is_full = True
