"""Commands that an error names can be pasted into a shell."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from fastft.common.errors import UserError
from fastft.common.shell import command
from fastft.reports.report import ReportOptions, report
from fastft.scores.compare import CompareOptions, compare
from fastft.scores.score import read_responses


def test_a_command_is_what_a_shell_reads() -> None:
    out = Path("out/my 'best' run; rm x")
    said = command("generate", run=out, name=None, data=["a b.json", "c.json"], overwrite=True)
    expected = ["fastft", "generate", "--run", str(out), "--data", "a b.json", "c.json", "--overwrite"]
    assert shlex.split(said) == expected
    assert command("score", run=Path("out/medium"), name="t1.0") == "fastft score --run out/medium --name t1.0"


def test_the_remedies_of_a_folder_with_spaces(tmp_path: Path) -> None:
    """Of responses that are not there, scores that are not there, and on a report's page."""
    run = tmp_path / "my run"
    run.mkdir()
    with pytest.raises(UserError) as raised:
        read_responses(run, "t1.0")
    said = str(raised.value).split("`")[1]
    assert shlex.split(said) == ["fastft", "generate", "--run", str(run), "--name", "t1.0"]
    entries = [{"instruction": "Say one.", "input": "", "output": "one", "model_response": "one"}]
    (run / "responses.t1.0.json").write_text(json.dumps(entries))
    why = compare(CompareOptions(run, run, name="t1.0"))["no_judge"]
    assert shlex.split(why.split("`")[1]) == ["fastft", "score", "--run", str(run), "--name", "t1.0"]
    (run / "responses.json").write_text(json.dumps(entries))  # by which a folder is known for a run
    page = report(ReportOptions(run=run, name="t1.0")).read_text(encoding="utf-8")
    assert f"fastft score --run &#39;{run}&#39; --name t1.0</code>" in page
