"""A scores.json that fastft score did not write is refused by what reads it, and names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rating_pages import entries, two_runs, write_run

from fastft.cli import main
from fastft.common.errors import UserError
from fastft.scores.score import ScoreOptions, score
from fastft.scores.scores_file import read_scores


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"summary": []}, "summary is an empty array, expected an object"),
        ({"judgements": None}, "judgements is null, expected a list"),
        ({"judgements": [{"score": "80"}]}, "judgement 1 has no score from 0 to 100, nor null"),
        ({"judgements": [{"score": None}, {"score": 101}]}, "judgement 2 has no score"),
        ({"judgements": [{"score": float("nan")}]}, "judgement 1 has no score"),
        ({"judgements": [{"score": True}]}, "judgement 1 has no score"),
        ({"judgements": [{"score": 10**400}]}, "judgement 1 has no score"),
        ({"judgements": ["80"]}, "judgement 1 has no score"),
        ({"exact_match": "86%"}, "summary.exact_match is text"),
        ({"n": True}, "summary.n is"),
        ({"intervals": [1, 2]}, "summary.intervals is an array"),
        ({"judge": "llama"}, "summary.judge is text"),
        ({"by_category": {"a": 1}}, "summary.by_category.a is a number, expected an object"),
    ],
)
def test_other_forms_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    run = write_run(tmp_path / "run", entries("ada"))
    scores = score(ScoreOptions(run=run, judge="none"))
    path = run / "scores.json"
    assert read_scores(path) == json.loads(json.dumps(scores))
    parts = {name: change.pop(name) for name in ("summary", "judgements") if name in change}
    path.write_text(json.dumps({**scores, "summary": {**scores["summary"], **change}, **parts}))
    with pytest.raises(UserError, match="is not a file that fastft score wrote") as refused:
        read_scores(path)
    assert said in str(refused.value)


@pytest.mark.parametrize("command", ["report --run {a}", "compare {a} {b}", "score --run {a} --judge none"])
def test_all_that_reads_scores_refuses_them(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two_runs(tmp_path)
    (a / "scores.json").write_text('{"summary": {"exact_match": "86%"}, "judgements": []}')
    assert main(command.format(a=a, b=b).split()) == 2
    assert "(summary.exact_match is text); move it away" in " ".join(capsys.readouterr().err.split())
    assert not (a / "report.html").exists()
