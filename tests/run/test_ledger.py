"""The ledger's summary, and its place in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastft.reports.report import ReportOptions, report
from fastft.run.ledger import Entry, read_ledger
from fastft.run.metrics_file import MetricsFile

LINES = [
    {"step": 1, "epoch": 1, "rows": [1, 2, 3], "losses": [2.0, 1.0, 5.0]},
    {"step": 2, "epoch": 2, "rows": [3, 1], "losses": [5.5, 1.5]},
]


def test_worst_and_never_improved() -> None:
    ledger = read_ledger(LINES)
    assert ledger is not None
    assert ledger.examples == 3
    assert [entry.row for entry in ledger.worst] == [3, 1, 2]
    assert ledger.never_improved == [Entry(row=3, first=5.0, last=5.5, visits=2)]  # row 2 was visited once
    assert ledger.n_never_improved == 1
    assert read_ledger([]) is None


def test_losses_that_are_no_numbers_are_passed_over() -> None:
    nan = float("nan")
    odd: list[dict[str, Any]] = [
        {"rows": [1, 2], "losses": [nan, float("inf")]}, {"rows": [3]}, {"losses": [1.0]},
        {"rows": [2], "losses": [None]},
    ]  # fmt: skip
    assert read_ledger([*odd, *LINES, *odd]) == read_ledger(LINES)
    assert read_ledger(odd) is None


def test_every_line_is_json_that_others_read_too(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    log = MetricsFile(path, resume_at=0)
    log.append({"step": 1, "rows": [1, 2], "losses": [float("nan"), 2.0], "loss": float("inf")})
    assert path.read_text() == '{"step": 1, "rows": [1, 2], "losses": [null, 2.0], "loss": null}\n'


def test_the_report_lists_them(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "seconds": 1.0}) + "\n")
    assert "Never improved" not in report(ReportOptions(run=tmp_path)).read_text()
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    page = report(ReportOptions(run=tmp_path)).read_text()
    assert "Never improved" in page
    assert '<td class="n">3</td><td class="n">5.00</td><td class="n">5.50</td>' in page
