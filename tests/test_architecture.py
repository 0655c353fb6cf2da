"""What the CONTRIBUTING guide says of the imports, held against them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imported(file: Path) -> set[str]:
    """The packages that a file imports, and from fastft the modules."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_kernels_need_torch_and_triton_alone() -> None:
    """No numpy, nothing of fastft: the package is of use to other projects."""
    code = (
        "import sys; sys.modules['numpy'] = None; import fastft_kernels; "
        "assert not [m for m in sys.modules if m.split('.')[0] == 'fastft']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    for file in (ROOT / "kernels" / "fastft_kernels").glob("*.py"):
        outside = {name.split(".")[0] for name in imported(file)} - set(sys.stdlib_module_names)
        allowed = {"triton"} if file.name in ("support.py", "offline.py") else set()
        allowed |= {"liger_kernel"} if file.name == "static.py" else set()  # measured where it is installed
        assert outside <= {"torch", "fastft_kernels"} | allowed, file


def test_kernels_import_without_triton() -> None:
    """As on macOS and Windows, where it does not exist: the torch implementations run."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch, fastft_kernels as k; "
        "x = torch.randn(3, 8); assert k.gelu(x).shape == (3, 8)\n"
        "try: k.gelu(x, impl='triton')\n"
        "except ValueError as error: assert 'not installed' in str(error)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_few_files_of_fastft_know_kernels() -> None:
    """ops.py chooses and runs them, batch.py holds their plans; the doctor and the prediction look at each of them."""
    users = {
        file.name
        for file in (ROOT / "fastft").glob("*.py")
        if any(name.split(".")[0] == "fastft_kernels" for name in imported(file))
    }
    assert users == {"ops.py", "batch.py", "kernel_checks.py", "kernel_speeds.py", "predict.py"}
