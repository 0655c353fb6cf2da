"""`fastft verify-resume` finds the same bits, and says what differs where something was forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from fastft.cli import main
from fastft.common.errors import TrainingError, UserError
from fastft.engines.engine import Engine
from fastft.training.verify import VerifyOptions, verify_resume


@pytest.fixture
def options(records_file: Path, tmp_path: Path) -> VerifyOptions:
    return VerifyOptions(
        data=str(records_file), model="pico", out=tmp_path / "proof", device="cpu", dtype="fp32", steps=5, lr=1e-3
    )


def test_the_two_runs_are_the_same(options: VerifyOptions) -> None:
    for _ in range(2):  # an earlier proof is in the way of none
        proof = verify_resume(options)
        assert (proof.steps, proof.stopped_at, proof.differences) == (5, 2, [])


@pytest.mark.parametrize("forgotten", ["moments", "weights"])
def test_what_was_forgotten_is_named(options: VerifyOptions, monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    real_load = Engine.load

    def load(self: Engine, weights: Path, moments: dict[str, Tensor]) -> None:
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        real_load(self, weights, {} if forgotten == "moments" else moments)
        if forgotten == "weights":
            for name, parameter in self.model.named_parameters():
                parameter.data.copy_(before[name])

    monkeypatch.setattr(Engine, "load", load)
    at = 3 if forgotten == "weights" else 4  # moments show in the step after the first one without them
    with pytest.raises(TrainingError, match=rf"stopped at step 2 of 5 .*, the run is another: step {at}: loss"):
        verify_resume(options)


def test_the_command(records_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(records_file), "--model", "pico", "--device", "cpu", "--out", str(tmp_path / "proof")]
    assert main(["verify-resume", *arguments, "--steps", "4"]) == 0
    assert "4 steps, and 2 with a stop and 2 after a resume: the same bits" in capsys.readouterr().err
    assert main(["verify-resume", *arguments, "--steps", "1"]) == 2
    assert "got --steps 1, expected at least 2" in capsys.readouterr().err


def test_a_resume_of_the_proof_itself_is_refused(options: VerifyOptions) -> None:
    with pytest.raises(UserError, match="got --resume with verify-resume"):
        VerifyOptions(out=options.out, resume=True)
