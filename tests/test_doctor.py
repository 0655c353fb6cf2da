from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastft import kernel_checks
from fastft.cli import main
from fastft.kernel_checks import CASES, CPU_SIZES, Case, Inputs, Sizes

SMALL = Sizes(prefix=8, documents=3, length=5, H=2, D=16, R=12, V=101)
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_torch_implementations_pass(case: Case) -> None:
    checks = list(kernel_checks.against_float64(case, SMALL, torch.float32, CPU, "torch"))
    assert {check.name for check in checks} >= {f"{case.name}: output"}
    assert all(check.ok for check in checks), [check for check in checks if not check.ok]
    assert kernel_checks.is_deterministic(case, SMALL, torch.float32, CPU, "torch")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_kernel_fails(case: Case, dtype: torch.dtype) -> None:
    def off(inputs: Inputs, impl: str) -> Tensor:
        right = case.run(inputs, impl)
        return right if impl == "reference" else right * (1.01 if dtype == torch.bfloat16 else 1 + 1e-5)

    checks = list(kernel_checks.against_float64(replace(case, run=off), SMALL, dtype, CPU, "torch"))
    assert not all(check.ok for check in checks)


def test_nan_is_wrong() -> None:
    assert not kernel_checks.Check("x", "float32", float("nan"), 1e-7, 1e-6).ok


def test_isolation_is_seen_and_its_loss_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_checks.is_isolated(SMALL, torch.float32, CPU, "torch")
    everybody = torch.full((SMALL.T,), SMALL.T, dtype=torch.int32)  # no document ends: later ones see the changed one
    monkeypatch.setattr(Sizes, "visible_until", lambda _sizes: everybody)
    assert not kernel_checks.is_isolated(SMALL, torch.float32, CPU, "torch")


def test_a_kernel_that_differs_from_run_to_run_is_seen() -> None:
    case = CASES[-1]
    noisy = replace(case, run=lambda x, impl: case.run(x, impl) + torch.rand(()))
    assert not kernel_checks.is_deterministic(noisy, SMALL, torch.float32, CPU, "torch")


def test_the_sizes_are_those_of_a_pack() -> None:
    until = SMALL.visible_until()
    assert len(until) == SMALL.T == 8 + 3 * 5
    assert until.tolist() == [SMALL.T] * 8 + [13] * 5 + [18] * 5 + [23] * 5
    assert CPU_SIZES.C == 256


def test_the_command_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    monkeypatch.setattr("fastft.doctor.CPU_SIZES", SMALL)
    out = tmp_path / "found.json"
    assert main(["doctor", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "All kernels compute what they should here." in printed
    assert "there is none here" in printed
    found = json.loads(out.read_text())
    assert found["choice"]["impl"] == "cpu"
    assert "not triton" in found["choice"]["why"]
    assert found["environment"]["torch"] == torch.__version__.split("+")[0] or found["environment"]["torch"]
    assert all(check["ok"] for check in found["checks"])
    assert all(found["proofs"].values())


def test_a_wrong_kernel_is_told_by_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[-1]
    wrong = replace(case, run=lambda x, impl: case.run(x, impl) * (1.0 if impl == "reference" else 1.1))
    monkeypatch.setattr("fastft.doctor.CPU_SIZES", SMALL)
    monkeypatch.setattr("fastft.doctor.CASES", (wrong,))
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_gpu_suites_skip_with_a_reason_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    if subprocess.run([sys.executable, "-c", "import pytest_benchmark"], capture_output=True).returncode:
        pytest.skip("pytest-benchmark is not installed: `make bench` installs it")
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_attention.py", "-rs", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert done.returncode == 0
    assert "torch finds no GPU here" in done.stdout
