"""For dry runs on a GPU that is only pretended (PRETENDED=1): CUDA libraries whose calls return and compute nothing.

All host code runs; no figure means anything. `collect` takes none of them.
"""

from __future__ import annotations

import torch

from fastft.gpu import clock as gpu_clock


def begin() -> None:
    """Leaves out what cannot be pretended: cuDNN, and that a GPU is behind its host."""
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    gpu_clock._still_before = _says_so


def _says_so(event: torch.cuda.Event) -> bool:
    del event
    return True
