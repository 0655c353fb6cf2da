"""Starts processes on the pretended GPU."""

from __future__ import annotations

import os
from pathlib import Path

from tools.pretended_gpu.build import LIBRARY, BuildError

PROJECT = Path(__file__).resolve().parents[2]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a process that runs on the library in `folder`, with this checkout to import from,
    behind what PYTHONPATH names.

    Raises:
        BuildError: nothing has been built there.
    """
    library = folder.resolve() / LIBRARY
    if not library.exists():
        raise BuildError(f"there is no {library}: python -m tools.pretended_gpu build {folder}")
    paths = [os.environ.get("PYTHONPATH", ""), str(PROJECT), str(PROJECT / "kernels")]
    return {
        "OMP_NUM_THREADS": "1",  # the host of a GPU is timed, and that is one thread
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # workers would each load the library for nothing
        **os.environ,
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(library.parent), os.environ.get("LD_LIBRARY_PATH", "")])),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **more,
    }
