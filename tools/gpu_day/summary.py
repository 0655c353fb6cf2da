"""The findings in few lines: what is wrong first, then steps, kernels, the machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Result = dict[str, Any]
MOST_CHARACTERS = 10_500
"""Of the text: with the driver's own lines it stays within 12,000, which some callers cut replies to."""
_WIDTH = 150


def read(path: Path) -> list[Result]:
    """The results of a file; of a task that was done again, the last one."""
    latest: dict[tuple[str, str], Result] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        result = json.loads(line)
        latest[result["phase"], result["task"]] = result
    return list(latest.values())


def is_wrong(results: list[Result]) -> bool:
    """Whether something failed, or is not right."""
    return not results or any("error" in result or result.get("ok") is False for result in results)


def text(results: list[Result]) -> str:
    """All sections, the least important lines left out where there are too many."""
    sections = [list(section(results)) for section in (_wrong, _steps, _kernels, _others)]
    while sum(len(line) + 1 for lines in sections for line in lines) > MOST_CHARACTERS:
        longest = max(sections, key=lambda lines: sum(map(len, lines)))
        del longest[-2:]
        longest.append("  ... more in results.jsonl")
    return "".join(line + "\n" for lines in sections for line in lines)


def _wrong(results: list[Result]) -> Iterator[str]:
    checks = [result for result in results if "ok" in result]
    bad = [result for result in checks if not result["ok"]]
    failed = [result for result in results if "error" in result]
    yield f"== {len(checks)} checks, {len(bad)} wrong; {len(results)} tasks, {len(failed)} failed"
    for result in bad:
        yield _line(
            "WRONG", result, ("worst", "worst_error", "limit", "same_bits", "errors", "gradients_apart", "differing")
        )
    for result in failed:
        yield _line("FAILED", result, ("error",))
    for result in results:
        if "skipped" in result and isinstance(result["skipped"], str):
            yield _line("skipped", result, ("skipped",))


def _steps(results: list[Result]) -> Iterator[str]:
    yield "== steps: milliseconds by the wall, and of them the GPU at work"
    keys = ("ms", "busy_ms", "gpu_ms", "predicted_ms", "host_ms", "launches", "peak_gib")
    for result in results:
        if result["phase"] in ("steps", "compile") and result["task"] != "compile" and _has(result, keys):
            yield _line("", result, keys)
    for result in results:
        if result["task"].startswith("parts"):
            yield _line("", result, tuple(key for key in result if key.endswith("_ms")))


def _kernels(results: list[Result]) -> Iterator[str]:
    yield "== kernels: milliseconds of the GPU, caches empty; what the host needs; the card's floor for ours"
    for result in results:
        if result["phase"] == "kernels" and "error" not in result:
            keys = ("milliseconds", "host_milliseconds", "floor_milliseconds", "why_not")
            yield _line("", result, keys)


def _others(results: list[Result]) -> Iterator[str]:
    yield "== the machine, compiling, training, answering"
    for result in results:
        compiling = (result["phase"], result["task"]) == ("compile", "compile")
        if (compiling or result["phase"] in ("env", "train", "decoding", "memcheck")) and "error" not in result:
            yield _line("", result, tuple(key for key in result if key not in ("phase", "task", "at", "skipped")))


def _has(result: Result, keys: tuple[str, ...]) -> bool:
    return any(result.get(key) is not None for key in keys)


def _line(mark: str, result: Result, keys: tuple[str, ...]) -> str:
    said = " ".join(f"{_short(key)}={_shown(result[key])}" for key in keys if result.get(key) is not None)
    name = f"{mark} {result['phase']} {result['task']}".strip()
    return f"  {name}: {said}"[:_WIDTH]


def _short(key: str) -> str:
    return key.replace("milliseconds", "ms")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + " ".join(map(_shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + " ".join(f"{key}={_shown(each)}" for key, each in value.items()) + "}"
    return str(value)
