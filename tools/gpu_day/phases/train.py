"""`fastft train` from end to end: its first steps, evaluations, samples, checkpoints."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fastft.doctor.child_tasks import Found
from tools.gpu_day.models import PRETENDED

_STEPS, _WARMUP = 40, 5
SIZE = "nano" if PRETENDED else "gpt2"


def tasks() -> list[str]:
    """The run."""
    return ["train"]


def do(task: str) -> Found:
    """Trains, and reads what the run wrote; its metrics are kept beside the results."""
    del task
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        given = {
            "data": os.environ.get("FASTFT_BOOK_DATA") or "sample", "model": SIZE, "weights": "none", "out": out,
            "batch_size": 32, "steps": _STEPS, "eval_every": 20, "eval_examples": 32, "save_every": _STEPS,
            "device": "cuda",
        }  # fmt: skip
        if PRETENDED:
            # An answer needs logits that are some, and an update a gradient that is one.
            given |= {"samples": 0, "max_skipped": _STEPS}
        command = [sys.executable, "-m", "fastft", "train", *(f"--{key}={value}" for key, value in given.items())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"status {done.returncode}: {done.stderr[-600:]}")
        metrics = out / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        (Path(os.environ["GPU_DAY_OUT"]) / "metrics.jsonl").write_text(metrics.read_text())
        checkpoints = sum(path.is_dir() for path in (out / "checkpoints").iterdir())
    steps = [line for line in lines if "loss" in line]
    return {
        "ms": 1e3 * statistics.median(line["seconds"] for line in steps[_WARMUP:]),
        "losses": [steps[0]["loss"], steps[-1]["loss"]],
        "val_losses": [line["val_loss"] for line in lines if "val_loss" in line],
        "samples": sum("sample" in line for line in lines),
        "skipped": sum(bool(line.get("skipped")) for line in steps),
        "checkpoints": checkpoints,
    }
