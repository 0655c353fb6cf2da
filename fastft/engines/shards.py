"""DeepSpeed's sharded checkpoints, written in the background: every rank writes its part while training goes on.

DeepSpeed asks a "checkpoint engine" to write each of its files. This one copies the tensors to host memory and leaves
the writing to a thread. The files are DeepSpeed's own (its `zero_to_fp32.py`, which lies beside them, reads them); they
are read with `weights_only`, so that nothing in them is executed.

Imports DeepSpeed: to be imported where an engine of it has been made.
"""

from __future__ import annotations

import copy
import queue
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from fastft.common.errors import UserError
from fastft.common.files import identity

_KNOWN_CLASSES = [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum]


@dataclass(slots=True)
class _Job:
    """A file to be written."""

    path: Path
    state: Any


class BackgroundWriter(CheckpointEngine):  # type: ignore[misc] # DeepSpeed has no types
    """Writes DeepSpeed's files in a thread; a file's error is kept for `finish`."""

    tag = "zero"
    """DeepSpeed's name for the one set of files in a checkpoint's folder."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "fastft"
        self._jobs: queue.Queue[_Job] = queue.Queue()
        self._written: dict[str, dict[str, str | int]] = {}
        self._error: Exception | None = None
        threading.Thread(target=self._write_all, name="checkpoint writer", daemon=True).start()

    def finished(self) -> bool:
        """Whether all files that were asked for are on the disk, or an error has ended them."""
        return self._jobs.unfinished_tasks == 0

    def finish(self) -> dict[str, dict[str, str | int]]:
        """Waits for the files; returns the size and the SHA-256 of each by its name, for the last time.

        Raises:
            UserError: one could not be written.
        """
        self._jobs.join()
        written, self._written = self._written, {}
        error, self._error = self._error, None
        if error is not None:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise UserError(f"cannot write a shard of the checkpoint: {reason}; free space and go on with --resume")
        return written

    def create(self, info: CheckpointCommitInfo) -> None:
        """DeepSpeed begins a checkpoint."""

    def save(self, state_dict: Any, path: str) -> None:
        """Takes a copy of a file's content; from now on the model may change."""
        self._jobs.put(_Job(Path(path), _in_host_memory(state_dict)))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads a file, executing nothing.

        Raises:
            UserError: it holds something else than tensors and DeepSpeed's own records.
        """
        try:
            with torch.serialization.safe_globals(_KNOWN_CLASSES):
                return torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:
            raise UserError(f"cannot read the shard {path}: {' '.join(str(error).split())[:300]}") from error

    def commit(self, info: CheckpointCommitInfo) -> bool:  # noqa: ARG002 (DeepSpeed's signature)
        """DeepSpeed has asked for all files. They are whole when `finish` says so."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """Every tensor is copied by itself."""
        return False

    def _write_all(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if self._error is None:
                    torch.save(job.state, job.path)
                    self._written[f"{self.tag}/{job.path.name}"] = identity(job.path)
            except Exception as error:  # told by `finish`, in the thread that can act on it
                self._error = error
            finally:
                job.state = None
                self._jobs.task_done()


def _in_host_memory(value: Any) -> Any:
    """The value with its own copy of every tensor, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, _in_host_memory(one)) for key, one in value.items())
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_in_host_memory(one) for one in value)
    return copy.deepcopy(value)
