"""What tests of a pretended GPU have in common."""

from __future__ import annotations

from pathlib import Path

_WITHOUT_CUDNN = "import torch\ntorch.backends.cudnn.enabled = False\ntorch.backends.cuda.enable_cudnn_sdp(False)\n"


def without_cudnn(folder: Path) -> Path:
    """A folder for PYTHONPATH: each process that has it leaves cuDNN out, which is not pretended and finds no GPU."""
    (folder / "sitecustomize.py").write_text(_WITHOUT_CUDNN)
    return folder
