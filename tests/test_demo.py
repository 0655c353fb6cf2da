"""The demo: the whole way in small here, and the real one with its figures in `make test-long`."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from fastft import demo as demo_module
from fastft.cli import EXIT_INTERRUPTED, main
from fastft.common.errors import UserError
from fastft.common.lock import writing
from fastft.demo import DemoOptions, demo_run
from fastft.run.config import TrainOptions, to_yaml
from fastft.run.folder import Run
from fastft.training.checkpoint import Progress
from fastft.training.train import Outcome


def test_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def shorter(options: DemoOptions, full=demo_module.demo_run) -> TrainOptions:
        return replace(full(options), model="pico", steps=3, epochs=2, warmup=1, eval_every=2)

    monkeypatch.setattr(demo_module, "demo_run", shorter)
    for _ in range(2):  # a second demo replaces the first
        assert main(["demo", "--out", str(tmp_path / "demo"), "--judge", "false"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"report: {tmp_path / 'demo' / 'report.html'}"
    assert lines[1].startswith("exact match on 144 test questions: 0.0% before training, ")
    assert len(lines) == 2 * (3 + demo_module.ANSWERS_SHOWN)
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "checkpoints", "model", "responses.json", "scores.json"}
    assert "<html" in (tmp_path / "demo" / "report.html").read_text()


def test_ctrl_c_ends_it_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(options: TrainOptions, **_: object) -> Outcome:
        return Outcome(Run(options.out), Progress(), signal.SIGINT)

    monkeypatch.setattr(demo_module, "train", interrupted)
    monkeypatch.setattr(demo_module, "_exact_match_of", lambda *_: 0.0)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == EXIT_INTERRUPTED


@pytest.mark.long
def test_the_real_demo_learns_to_answer(tmp_path: Path) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--judge", "false"]) == 0
    summary = json.loads((tmp_path / "demo" / "scores.json").read_text())["summary"]
    before = json.loads((tmp_path / "demo" / "demo.json").read_text())["exact_match_before"]
    assert before < 2
    assert summary["exact_match"] >= 80
    assert len(json.loads((tmp_path / "demo" / "responses.json").read_text())) >= 100


def test_a_demo_beside_another_writer_of_its_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its beginning, and where one came while it trained."""
    monkeypatch.setattr(demo_module, "_exact_match_of", lambda *_: 0.0)
    with writing(tmp_path):
        assert main(["demo", "--out", str(tmp_path)]) == 2
        monkeypatch.setattr(demo_module, "train", lambda options, **_: Outcome(Run(options.out), Progress()))
        assert main(["demo", "--out", str(tmp_path)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 2
    assert all("another process writes to" in line for line in said)
    assert not (tmp_path / "demo.json").exists()


def held(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_but_a_demo_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is loaded, behind a link too; what is there stays as it is."""
    monkeypatch.setattr(demo_module, "initial_model", lambda *_: pytest.fail("too late"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(TrainOptions(data="sample", model="nano", out=run, epochs=8)))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    checkpoint = tmp_path / "kept" / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "DONE").touch()
    answers = tmp_path / "answers"
    answers.mkdir()
    (answers / "responses.json").write_text("[]")
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "file").touch()
    before = held(tmp_path)
    said = {
        "run": "holds a run that is no demo (it has no demo.json)",
        "link": "holds a run that is no demo",
        "kept": "holds a run that is no demo",
        "answers": "no run of fastft's has written it",
        "dangling": "is there and is no folder",
        "file": "is there and is no folder",
    }
    for name, expected in said.items():
        assert main(["demo", "--out", str(tmp_path / name)]) == 2, name
        assert expected in " ".join(capsys.readouterr().err.split()), name
    assert held(tmp_path) == before


def test_a_demo_is_known_killed_or_whole(tmp_path: Path) -> None:
    """Before its mark is there too, and with another seed; one that was begun otherwise is a run."""
    old = demo_run(DemoOptions(out=tmp_path, seed=4, dtype="fp32", steps=30))
    (tmp_path / "config.yaml").write_text(to_yaml(old))
    now = demo_run(DemoOptions(out=tmp_path))
    demo_module.refuse_what_is_no_demo(now)
    (tmp_path / "config.yaml").write_text(to_yaml(replace(old, lr=2e-3)))
    with pytest.raises(UserError, match="no demo"):
        demo_module.refuse_what_is_no_demo(now)
    (tmp_path / "demo.json").write_text('{"exact_match_before": 0.0}')
    demo_module.refuse_what_is_no_demo(now)
