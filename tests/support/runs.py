"""Runs for tests of several ranks: their data, their command line, and how two of them are compared."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastft
from fastft.batches.batch import from_padded

LAUNCH = Path(__file__).parents[2] / "launch"
RATE = 5e-5
PATIENCE_S = 300.0
"""With launchers four processes import torch and DeepSpeed before the first step, on as few cores as there are."""
OF_THE_CLOCK = {"seconds", "eval_seconds", "memory_bytes"}

LOSS_LIMIT = 1e-5
"""Relative, over 20 steps at a rate of 5e-5 in float32."""
NORM_LIMIT = 1e-4
"""Relative. AdamW takes no notice of a factor common to all gradients; the norm does. DeepSpeed takes it in float32."""
LOGITS_LIMIT = 1e-4


def write_records(path: Path) -> Path:
    """60 records whose answers have from 1 to 12 words: 51 training examples, supervised unequally."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    records = [
        {"instruction": f"Count to {words[i % 12]}, try {i}.", "input": "", "output": " ".join(words[: i % 12 + 1])}
        for i in range(60)
    ]
    path.write_text(json.dumps(records))
    return path


def settings(data: Path, run: Path, zero: str = "plain", **options: Any) -> dict[str, Any]:
    """The options of a small run in float32 on the CPU, with a file of `launch` unless it is `plain`."""
    return {
        "data": data, "model": "pico", "steps": 20, "batch_size": 8, "lr": RATE, "samples": 1, "eval_every": 10,
        "save_every": 100, "keep_best": False, "dtype": "fp32", "device": "cpu", "threads": 1, "out": run,
        **({} if zero == "plain" else {"deepspeed_config": LAUNCH / f"{zero}.json"}), **options,
    }  # fmt: skip


def arguments(values: dict[str, Any]) -> list[str]:
    """Options as a command line gives them."""
    named = [
        (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)) for name, value in values.items()
    ]
    return [text for pair in named for text in pair]


@dataclass(frozen=True)
class Trained:
    """What a run has left."""

    run: Path

    def lines(self, key: str) -> list[dict[str, Any]]:
        """The lines of the metrics that hold a key, but for what the clock and the memory say."""
        return [line for line in metrics(self.run) if key in line]

    def figures(self, key: str) -> list[float]:
        return [line[key] for line in self.lines(key)]

    def logits(self) -> torch.Tensor:
        """Of the exported model, for two rows of ids."""
        model = fastft.load(self.run / "model")
        ids = torch.arange(100, 164).view(2, 32)
        with torch.no_grad():
            return model.logits(from_padded(ids, torch.full_like(ids, -100)))


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in OF_THE_CLOCK} for line in lines]


def farthest(got: list[float], expected: list[float]) -> float:
    assert len(got) == len(expected)
    return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def assert_one_curve(got: Trained, expected: Trained) -> None:
    """Losses, norms of the gradients, validation losses, token counts, samples and the final model's logits."""
    assert farthest(got.figures("loss"), expected.figures("loss")) < LOSS_LIMIT
    assert farthest(got.figures("grad_norm"), expected.figures("grad_norm")) < NORM_LIMIT
    assert farthest(got.figures("val_loss"), expected.figures("val_loss")) < LOSS_LIMIT
    for key in ("tokens_real", "tokens_supervised", "sample"):
        assert [line[key] for line in got.lines(key)] == [line[key] for line in expected.lines(key)]
    assert relative(got.logits(), expected.logits()) < LOGITS_LIMIT


def assert_same_run(run: Path, expected: Path) -> None:
    """Every step once with the same figures, and the same bits in the final weights and moments."""
    assert metrics(run) == metrics(expected)
    last = max(line["step"] for line in metrics(expected))
    for name in ("model/model.safetensors", f"checkpoints/step-{last}/optimizer.safetensors"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    assert not list((run / "checkpoints").glob(".*"))


def wait_until(reached: Callable[[], bool], *, every_s: float = 0.001) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(every_s)


def wait_for_lines(run: Path, count: int) -> None:
    path = run / "metrics.jsonl"
    wait_until(lambda: path.is_file() and path.read_bytes().count(b"\n") >= count)
