"""What the measuring scripts share: their options, the clock, and how they report.

The times are the host's, on the machine at hand: they say what a GPU would wait for, and ratios of them hold better
than milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.pretended_gpu.counters import counts

LEVELS = ("device_bytes", "device_bytes_peak", "host_bytes")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every script takes."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n", 1)[0])
    data = os.environ.get("FASTFT_BOOK_DATA") or "sample"
    parser.add_argument("--data", default=data, help="a data file or `sample`; FASTFT_BOOK_DATA's where it is set")
    parser.add_argument("--json", type=Path, help="a file to write the results to")
    return parser


def say_and_write(results: Any, lines: Sequence[str], path: Path | None) -> None:
    """Prints the lines, and writes the results where a file is named."""
    print("\n".join(lines), flush=True)
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")


class Parts:
    """The parts of a step, one after the other: milliseconds of the host, and what the GPU was asked for."""

    def __init__(self) -> None:
        self._milliseconds: dict[str, list[float]] = {}
        self._counts: dict[str, list[dict[str, int]]] = {}

    def run(self, name: str, part: Callable[[], Any]) -> Any:
        """Runs a part, and returns what it returns."""
        counts()
        began = time.perf_counter()
        result = part()
        self._milliseconds.setdefault(name, []).append(1e3 * (time.perf_counter() - began))
        self._counts.setdefault(name, []).append(counts())
        return result

    def summary(self) -> dict[str, Any]:
        """Of each part the median and the least milliseconds, and the median of each counter where it is not 0."""
        return {
            name: {
                "ms": round(statistics.median(times), 3),
                "least_ms": round(min(times), 3),
                "counts": _medians(self._counts[name]),
            }
            for name, times in self._milliseconds.items()
        }


def _medians(all_counts: list[dict[str, int]]) -> dict[str, int]:
    names = [name for name in all_counts[0] if name not in LEVELS]
    medians = {name: int(statistics.median_low(each[name] for each in all_counts)) for name in names}
    return {name: median for name, median in medians.items() if median}


def in_lines(title: str, summary: dict[str, Any]) -> list[str]:
    """The summary as text."""
    lines = [title]
    for name, part in summary.items():
        asked = ", ".join(f"{counter} {value}" for counter, value in part["counts"].items())
        lines.append(f"  {name}: {part['ms']:.2f} ms (least {part['least_ms']:.2f}); {asked or 'nothing asked for'}")
    return lines


def microseconds(run: Callable[[], object], *, calls: int, rounds: int = 7) -> tuple[float, float]:
    """The least and the median time of a call, over rounds of `calls` calls each, after a round that does not count."""
    times = []
    for _ in range(1 + rounds):
        began = time.perf_counter()
        for _ in range(calls):
            run()
        times.append(1e6 * (time.perf_counter() - began) / calls)
    return min(times[1:]), statistics.median(times[1:])
