"""What a report's figures say beyond its page (tests/reports/test_report.py): of responses of a name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastft.common.errors import UserError
from fastft.reports.figures import differing_decoding, read_run
from fastft.reports.report import ReportOptions, report
from fastft.scores.score import ScoreOptions, score

ENTRY = {"instruction": "Say one.", "input": "", "output": "one"}


def answered(run: Path, name: str | None, response: str, **decoding: float) -> None:
    """Responses of a name, or without one, with their scores."""
    run.mkdir(exist_ok=True)
    stem = "responses" if name is None else f"responses.{name}"
    (run / f"{stem}.json").write_text(json.dumps([{**ENTRY, "model_response": response}] * 2))
    (run / f"{stem}.made-from.json").write_text(json.dumps({"seconds": 7 if name else 5, "dtype": "fp32", **decoding}))
    score(ScoreOptions(run=run, name=name, judge="none"))


def test_a_report_of_a_name_is_of_those_responses(tmp_path: Path) -> None:
    run = tmp_path / "run"
    answered(run, None, "one", temperature=0.0)
    answered(run, "t1.0", "two", temperature=1.0)
    plain, drawn = read_run(run), read_run(run, "t1.0")
    assert [figures.summary["exact_match"] for figures in (plain, drawn) if figures.summary] == [100, 0]
    assert [figures.answers[0].exact for figures in (plain, drawn)] == [True, False]
    assert [figures.time["generate"] for figures in (plain, drawn)] == [5, 7]
    assert [figures.scores_problem for figures in (plain, drawn)] == [None, None]
    assert differing_decoding([plain, drawn]) == {"temperature": ["0.0", "1.0"]}
    answered(run, "nucleus", "one", temperature=1.0, top_k=0, top_p=0.9)
    assert differing_decoding([drawn, read_run(run, "nucleus")]) == {"top_p": ["1.0", "0.9"]}  # which 1.0 goes without
    page = report(ReportOptions(run=run, name="t1.0")).read_text(encoding="utf-8")
    assert "responses t1.0" in page
    (held,) = json.loads((run / "report.json").read_text())["runs"]
    assert (held["responses_name"], held["decoding"]) == ("t1.0", {"dtype": "fp32", "temperature": 1.0})
    assert "responses t1.0" not in report(ReportOptions(run=run)).read_text(encoding="utf-8")
    (run / "responses.t1.0.json").write_text(json.dumps([{**ENTRY, "model_response": "x"}]))
    assert read_run(run, "t1.0").scores_problem == (
        f"responses.t1.0.json has changed since it was scored: run fastft score --run {run} --name t1.0 again"
    )
    with pytest.raises(UserError, match="got --name train, which is reserved"):
        ReportOptions(run=run, name="train")


def test_a_folder_of_named_responses_alone_has_a_report_of_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    answered(run, "t1.0", "one", temperature=1.0)
    assert len(read_run(run, "t1.0").answers) == 2
    with pytest.raises(UserError, match="nothing to report"):
        read_run(run)
    with pytest.raises(UserError, match=r"neither responses nor conversations of the name t0\.5"):
        read_run(run, "t0.5")
