"""The child of tests/doctor/test_child_tasks.py. It loads the module alone, and not the whole package with torch: it
starts in a fraction of a second, so that the times of the tests can be short."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any


def do(task: str) -> dict[str, Any]:
    match task:
        case "abort":
            os.write(2, b"what broke\n")
            os.abort()
        case "raise":
            raise ValueError("a mistake")
        case "hang":
            time.sleep(600)
        case "print":
            print("not a line of the protocol")
            os.write(1, b"nor this\n")
    return {"did": task}


if __name__ == "__main__":
    path = Path(__file__).parents[2] / "fastft" / "doctor" / "child_tasks.py"
    spec = importlib.util.spec_from_file_location("child_tasks", path)
    assert spec is not None
    assert spec.loader is not None
    child_tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(child_tasks)
    child_tasks.serve(sys.argv[1:], do)
