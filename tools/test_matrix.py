"""Runs the kernels' tests under several versions of Python, torch, Triton and numpy: `make test-matrix`.

    python tools/test_matrix.py [--cell NAME ...] [--use NAME=PYTHON ...] [--folder .venv-matrix] [--quick]

Each cell has a venv of its own, made where it is missing, with torch, Triton, numpy and pytest and nothing else: 1 to 6
GB, as torch is a CPU or a CUDA build. In it all modules of `fastft_kernels` are imported, the kernels run in Triton's
interpreter (`tests/interpreted` without the test that trains), and the static gate compiles them. A cell that cannot be
installed is named with the reason, and fails nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Cell:
    """Versions that are tested together; `triton` is the one that this torch asks for, or one that users have."""

    python: str
    torch: str
    triton: str
    numpy: str

    @property
    def name(self) -> str:
        """As `--cell` and `--use` know it."""
        return f"py{self.python}-torch{self.torch}-triton{self.triton}-numpy{self.numpy}"


CELLS = (
    Cell("3.11", "2.13.0", "3.7.1", "2.4.6"),
    Cell("3.11", "2.13.0", "3.6.0", "2.4.6"),
    Cell("3.13", "2.13.0", "3.7.1", "2.4.6"),
    Cell("3.12", "2.12.0", "3.7.0", "2.4.6"),
    Cell("3.12", "2.11.0", "3.6.0", "2.5.2"),
    Cell("3.12", "2.10.0", "3.6.0", "1.26.4"),
)

IMPORTS = """
import importlib, pkgutil, fastft_kernels
for module in pkgutil.iter_modules(fastft_kernels.__path__):
    importlib.import_module(f"fastft_kernels.{module.name}")
"""
INTERPRETED = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not long")
WITHOUT = ("--ignore=tests/interpreted/test_training.py",)  # it needs all of fastft
STATIC = ("-m", "fastft_kernels.static", "--arch", "sm_80", "sm_90")


def installed(cell: Cell, folder: Path) -> Path:
    """The cell's interpreter, its venv made where it is missing.

    Raises:
        RuntimeError: this Python, or one of the versions, cannot be had.
    """
    python = folder / cell.name / "bin" / "python"
    done = folder / cell.name / ".installed"
    if done.exists():
        return python
    base = shutil.which(f"python{cell.python}")
    if base is None:
        raise RuntimeError(f"no python{cell.python} on the PATH")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    for command in (
        [base, "-m", "venv", str(folder / cell.name)],
        [*pip, f"torch=={cell.torch}", f"numpy=={cell.numpy}", "pytest", "setuptools"],
        [*pip, "--no-deps", f"triton=={cell.triton}"],  # also where torch asks for another one
    ):
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise RuntimeError((finished.stderr.strip().splitlines() or ["no message"])[-1])
    done.touch()
    return python


def outcome(python: Path, *arguments: str, **environment: str) -> str:
    """`passed` or `FAILED`, and the last line that the command said."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    done = subprocess.run(
        [str(python), *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    said = (done.stdout if done.stdout.strip() else done.stderr).strip().splitlines()
    return "; ".join(["FAILED" if done.returncode else "passed", *said[-1:]])


def main() -> int:
    """Runs the cells, prints a table, and returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = [cell.name for cell in CELLS]
    parser.add_argument("--cell", nargs="+", choices=names, default=names, metavar="NAME", help="; ".join(names))
    parser.add_argument(
        "--use", nargs="+", default=[], metavar="NAME=PYTHON", help="an interpreter that is there already"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-matrix", help="where the venvs are")
    parser.add_argument("--quick", action="store_true", help="the tests and cases of GELU alone")
    options = parser.parse_args()
    given = dict(pair.split("=", 1) for pair in options.use)
    tests = ["tests/interpreted/test_gelu.py"] if options.quick else ["tests/interpreted", *WITHOUT]
    cases = ["--case", "gelu"] if options.quick else []
    failed = False
    for cell in (cell for cell in CELLS if cell.name in options.cell):
        print(cell.name, flush=True)
        try:
            python = Path(given[cell.name]) if cell.name in given else installed(cell, options.folder)
        except RuntimeError as error:
            print(f"  not to be had: {error}", flush=True)
            continue
        for what, arguments, environment in (
            ("imports", ("-c", IMPORTS), {}),
            ("interpreter", (*INTERPRETED, *tests), {"TRITON_INTERPRET": "1"}),
            ("static gate", (*STATIC, *cases), {}),
        ):
            found = outcome(python, *arguments, **environment)
            failed |= found.startswith("FAILED")
            print(f"  {what}: {found}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
