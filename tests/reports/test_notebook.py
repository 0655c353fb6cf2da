"""The notebook of plots runs as it stands, cell by cell, with fewer steps."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "plots.ipynb"
FEWER = {"STEPS": 4, "ANSWERS": 4}
PNG = b"\x89PNG"


def value_of(source: str, scope: dict[str, Any]) -> Any:
    """What a cell shows: the value of its last expression."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), str(NOTEBOOK), "exec"), scope)
    return None if last is None else eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), scope)


@pytest.mark.long
def test_the_notebook_runs_and_shows_every_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    shown = []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            shown.append(value_of("".join(cell["source"]), scope))
            kept = [output["data"].get("image/png", "") for output in cell["outputs"]]
            assert [one != "" for one in kept] == [hasattr(shown[-1], "_repr_png_")] * len(kept)
            assert all(one.startswith("iVBORw0KGgo") for one in kept if one)  # as whoever reads it sees it
        if "parameters" in cell["metadata"].get("tags", []):
            assert scope.keys() >= FEWER.keys()
            scope |= FEWER
    plots = [value for value in shown if hasattr(value, "_repr_png_")]
    assert [plot.name for plot in plots] == ["loss", "loss", "learning-rate", "tokens", "scores"]
    assert all(plot._repr_png_().startswith(PNG) for plot in plots)
    assert "loss.pdf" in shown[-1]
    assert (tmp_path / "out" / "plots" / "report.html").is_file()
