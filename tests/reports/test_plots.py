from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastft.common.errors import UserError
from fastft.reports.figures import read_run
from fastft.reports.plots import FORMATS, plots
from fastft.reports.report import ReportOptions, report
from fastft.run.folder import Run
from fastft.scores.score import ScoreOptions, score

NAMES = ("loss", "learning-rate", "tokens", "scores")


def trained(run: Path, *, steps: int = 6, a_pass: int = 3, **more: Any) -> Path:
    run.mkdir()
    lines: list[dict[str, Any]] = [{"step": 0, "val_loss": 5.0}]
    for step in range(1, steps + 1):
        lines.append(
            {"step": step, "epoch": 1 + (step - 1) // a_pass, "loss": 4.0 / step, "lr": 1e-3, "tokens_padded": 20,
             "tokens_real": 10 * step, "tokens_computed": 9, "tokens_supervised": 4}
        )  # fmt: skip
    lines.append({"step": steps, "val_loss": 1.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps({**line, **more}) + "\n" for line in lines))
    return run


def answered(run: Path) -> Path:
    entries = [
        {"instruction": f"{n}", "input": "", "output": "an owl in a tree", "model_response": "an owl", "category": c}
        for n, c in enumerate("aabb")
    ]
    (run / "responses.json").write_text(json.dumps(entries))
    score(ScoreOptions(run=run, judge="none"))
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return answered(trained(tmp_path / "run"))


def test_plots_are_written_as_files_of_three_kinds_and_are_the_same_each_time(run: Path) -> None:
    report(ReportOptions(run=run, plots=True))
    folder = run / "plots"
    held = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(held) == sorted(f"{name}.{kind}" for name in NAMES for kind in FORMATS)
    for kind, begins in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert all(held[f"{name}.{kind}"].startswith(begins) for name in NAMES)
    assert all(plot.as_bytes("pdf") == held[f"{plot.name}.pdf"] for plot in plots(run))
    assert {path.name for path in Run(run).written()} >= {*held}  # what replaces the run removes them
    assert not [name for name in held if b"CreationDate" in held[name] or b"dc:date" in held[name]]


def test_losses_stand_against_epochs_with_the_tokens_above(run: Path) -> None:
    loss = next(plot for plot in plots(run) if plot.name == "loss")
    (axes,) = loss.figure.axes
    training, validation = axes.get_lines()
    assert (training.get_label(), validation.get_label()) == ("training", "validation")
    assert list(training.get_xdata()) == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert list(validation.get_xdata()) == [0, 2]
    (above,) = axes.child_axes
    assert (axes.get_xlabel(), above.get_xlabel()) == ("epochs", "tokens seen")
    assert above._functions[0]([0, 1, 2]).tolist() == [0, 60, 210]  # 10 + 20 + 30, and all
    loss.as_bytes("png")
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


@pytest.mark.parametrize(
    ("settings", "data", "epochs"),
    [
        ("batch_size: 5\n", {"files": [{"train": 22}], "train": {"dropped": [1, 2]}}, 0.5),
        ("batch_size: 5\ndrop_last: true\n", {"files": [{"train": 29}], "train": {"dropped": []}}, 0.4),
        ("batch_size: 5\n", {"files": [{"train": 3}], "train": {"dropped": []}}, None),  # another data set's
        ("batch_size: 5\n", {}, None),
    ],
)
def test_a_first_pass_that_has_not_ended_is_no_epoch(
    tmp_path: Path, settings: str, data: Any, epochs: float | None
) -> None:
    run = trained(tmp_path / "run", steps=2)
    (run / "config.yaml").write_text(settings)
    (run / "data.json").write_text(json.dumps(data))
    seen = read_run(run).seen
    assert seen.epochs == ([] if epochs is None else [epochs / 2, epochs])
    axes = plots(run)[0].figure.axes[0]
    assert axes.get_xlabel() == ("steps" if epochs is None else "epochs")


def test_several_runs_are_drawn_beside_each_other(tmp_path: Path) -> None:
    runs = [answered(trained(tmp_path / name)) for name in ("one", "two")]
    drawn = {plot.name: plot.figure.axes[0] for plot in plots(*runs)}
    labels = [line.get_label() for line in drawn["loss"].get_lines()]
    assert labels == ["training of one", "validation of one", "training of two", "validation of two"]
    assert [line.get_label() for line in drawn["learning-rate"].get_lines()] == ["one", "two"]
    assert len(drawn["tokens"].containers) == 2
    figures = [label.get_text() for label in drawn["scores"].get_yticklabels()]
    assert figures == ["Exact match, %", "ROUGE-L F1, %", "BLEU, %", "chrF, %", "a (exact)", "b (exact)"]


def test_what_a_run_lacks_is_not_drawn(tmp_path: Path) -> None:
    assert [plot.name for plot in plots(trained(tmp_path / "trained"))] == ["loss", "learning-rate", "tokens"]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="nothing to plot"):
        report(ReportOptions(run=tmp_path / "bare", plots=True))
    assert not (tmp_path / "bare" / "report.html").exists()


def test_scores_of_other_responses_are_not_drawn_and_their_plot_goes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(ReportOptions(run=run, plots=True))
    assert "not drawn" not in capsys.readouterr().err
    (run / "responses.json").write_text((run / "responses.json").read_text().replace("an owl", "a cat"))
    report(ReportOptions(run=run, plots=True))
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: the scores of run are not drawn: responses.json has changed since it was scored" in said
    assert {path.stem for path in (run / "plots").iterdir()} == {*NAMES} - {"scores"}


def test_without_matplotlib_the_report_is_made_and_plots_are_refused_in_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib is not installed.*pip install 'fastft\[plots\]'"):
        report(ReportOptions(run=run, plots=True))
    assert not (run / "report.html").exists()
    report(ReportOptions(run=run))
    assert (run / "report.html").read_text().count("<svg") == 2
    assert not (run / "plots").exists()
