"""Every kernel at small sizes under compute-sanitizer, where there is one: it sees each access out of bounds."""

from __future__ import annotations

import shutil
import subprocess
import sys

import torch

from fastft.doctor import kernel_checks
from fastft.doctor.child_tasks import Found
from fastft.doctor.kernel_checks import CASES, Sizes

_SIZES = Sizes(prefix=20, documents=5, length=19, H=2, D=64, R=33, V=1105)


def tasks() -> list[str]:
    """The run under the tool."""
    return ["memcheck"]


def do(task: str) -> Found:
    """Runs this module under it."""
    del task
    if (tool := shutil.which("compute-sanitizer")) is None:
        return {"skipped": "there is no compute-sanitizer"}
    command = [
        tool,
        "--tool",
        "memcheck",
        "--print-limit",
        "5",
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        __name__,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    return {"ok": done.returncode == 0, "said": " ".join(said)[-600:]}


def run_all() -> None:
    """Each kernel once."""
    for case in CASES:
        inputs = kernel_checks.inputs_of(case, _SIZES, torch.bfloat16, torch.device("cuda"))
        kernel_checks.results(case, inputs, "triton")
    torch.cuda.synchronize()


if __name__ == "__main__":
    run_all()
