"""A phase's child process: `python -m tools.gpu_day.child PHASE TASK...` (see `fastft.doctor.child_tasks.serve`)."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

from fastft.doctor import child_tasks
from tools.gpu_day import pretended
from tools.gpu_day.models import PRETENDED


def phase(name: str) -> ModuleType:
    """The module of a phase."""
    return importlib.import_module(f"tools.gpu_day.phases.{name}")


def main(arguments: list[str]) -> None:
    """Does the tasks."""
    if PRETENDED:
        pretended.begin()
    name, *tasks = arguments
    child_tasks.serve(tasks, phase(name).do)
    sys.stdout.flush()
    os._exit(0)  # an orderly end has been seen to hang behind inductor's pool of compilers


if __name__ == "__main__":
    main(sys.argv[1:])
