"""Runs of responses, the page of `fastft ab` on them, and ratings as the page exports them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastft.scores.ab import AbOptions, make_page
from fastft.scores.score import responses_sha256

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def entries(said_by: str, n: int = 10) -> list[dict[str, str]]:
    """Answers that name who gave them; to question 1 both runs say the same."""
    return [
        {"instruction": f"Write {row} in words.", "input": "", "output": WORDS[row % 10],
         "model_response": "the same" if row == 0 else f"{said_by} says {WORDS[row % 10]}"}
        for row in range(n)
    ]  # fmt: skip


def write_run(folder: Path, answers: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "responses.json").write_text(json.dumps(answers), encoding="utf-8")
    return folder


def two_runs(tmp: Path, n: int = 10) -> tuple[Path, Path]:
    return write_run(tmp / "ada", entries("ada", n)), write_run(tmp / "bob", entries("bob", n))


def judge(run: Path, scores: list[int | None]) -> None:
    """As if `fastft score` had scored the run."""
    held = {
        "summary": {"responses_sha256": responses_sha256(run)},
        "judgements": [{"score": score} for score in scores],
    }
    (run / "scores.json").write_text(json.dumps(held), encoding="utf-8")


def page_data(page: Path) -> dict[str, Any]:
    """What stands in a page for its script."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found
    return dict(json.loads(found[1]))


def says(text: str) -> Callable[[str], bool]:
    return lambda answer: answer.startswith(text)


def rated(page: Path, rater: str, likes: Callable[[str], bool], choice: str | None = None) -> dict[str, Any]:
    """A rater who likes one of the two answers to every question: 5 for it, 2 for the other."""
    data = page_data(page)
    rows = [
        {
            "item": item["item"],
            "choice": choice or ("a" if likes(item["a"]) else "b"),
            "scale_a": 5 if likes(item["a"]) else 2,
            "scale_b": 5 if likes(item["b"]) else 2,
            "seconds": 3.5,
            "time": "2026-01-01T00:00:00.000Z",
        }
        for item in data.pop("items")
    ]
    return {**data, "rater": rater, "exported": "2026-01-01T00:00:00.000Z", "n_items": len(rows), "ratings": rows}


def exported(tmp: Path, value: Any, name: str = "ratings.json") -> Path:
    path = tmp / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def made_page(tmp: Path, **options: Any) -> Path:
    first, second = two_runs(tmp)
    return make_page(AbOptions(first, second, **options))
