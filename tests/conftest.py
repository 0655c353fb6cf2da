from __future__ import annotations

import json
import os
from pathlib import Path

import hypothesis
import pytest
from small_records import made_records

pytest.register_assert_rewrite("runs", "started")

# Tests assert results, not seconds: on a busy machine the first example alone may take longer than the usual limit.
hypothesis.settings.register_profile("fastft", deadline=None)
hypothesis.settings.load_profile("fastft")


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
