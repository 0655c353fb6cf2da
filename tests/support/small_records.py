"""Records that tests write to files."""

from __future__ import annotations

from typing import Any


def made_records(n: int = 30) -> list[dict[str, Any]]:
    """`n` short records, all different, every other one with an input."""
    return [
        {"instruction": f"Say the number {i} in words.", "input": f"n{i}" if i % 2 else "", "output": f"number {i}"}
        for i in range(n)
    ]
