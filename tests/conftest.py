from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def made_records(n: int = 30) -> list[dict[str, Any]]:
    """`n` short records, all different, every other one with an input."""
    return [
        {"instruction": f"Say the number {i} in words.", "input": f"n{i}" if i % 2 else "", "output": f"number {i}"}
        for i in range(n)
    ]


@pytest.fixture
def records_file(tmp_path: Path) -> Path:
    """A JSON file of 30 good records."""
    path = tmp_path / "records.json"
    path.write_text(json.dumps(made_records()), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def book_data() -> Path:
    """The book's data file, which is not part of this repository."""
    given = os.environ.get("FASTFT_BOOK_DATA")
    if not given:
        pytest.skip("FASTFT_BOOK_DATA is not set: give the path of the book's instruction-data.json")
    path = Path(given)
    if not path.is_file():
        pytest.skip(f"FASTFT_BOOK_DATA names {path}, which is not there")
    return path
