from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from fastft_kernels.cpu import library
from torch import Tensor

from fastft.cli import main
from fastft.doctor import child_tasks, doctor, kernel_checks, kernel_speeds
from fastft.doctor.kernel_checks import CASES, CPU_SIZES, Case, Inputs, Outputs, Sizes

SMALL = Sizes(prefix=8, documents=3, length=5, H=2, D=16, R=12, V=101)
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_torch_implementations_pass(case: Case) -> None:
    checks = list(kernel_checks.against_float64(case, SMALL, torch.float32, CPU, "torch"))
    assert checks[0].name.startswith(f"{case.name}: output")
    assert all(check.ok for check in checks), [check for check in checks if not check.ok]
    assert kernel_checks.is_deterministic(case, SMALL, torch.float32, CPU, "torch")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_kernel_fails(case: Case, dtype: torch.dtype) -> None:
    def off(inputs: Inputs, impl: str) -> Outputs:
        right, factor = case.run(inputs, impl), 1.01 if dtype == torch.bfloat16 else 1 + 1e-5
        if impl == "reference":
            return right
        return tuple(x * factor for x in right) if isinstance(right, tuple) else right * factor

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
    noisy = replace(case, run=lambda x, impl: cast(Tensor, case.run(x, impl)) + torch.rand(()))
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
    monkeypatch.setattr("fastft.doctor.doctor.CPU_SIZES", SMALL)
    out = tmp_path / "found.json"
    assert main(["doctor", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "The implementations without Triton compute what they should here." in printed
    did_not = printed.partition("\ndid not run\n")[2]
    assert "the Triton kernels: " in did_not
    assert "speeds: they are measured on a GPU alone" in did_not
    ran = printed.partition("\nran\n")[2].partition("\ndid not run\n")[0]
    found = json.loads(out.read_text())
    assert found["choice"]["impl"] == "cpu"
    assert "not triton" in found["choice"]["why"]
    assert found["choice"]["C for CPUs"] == (library.why_not() or "compiled, and runs")
    assert found["environment"]["torch"] == torch.__version__.split("+")[0] or found["environment"]["torch"]
    assert all(check["ok"] for check in found["checks"])
    assert all(found["proofs"].values())
    assert f"{len(found['checks'])} comparisons with float64" in ran
    assert f"{len(found['proofs'])} proofs" in ran


@pytest.mark.parametrize(
    ("has", "bf16", "amx"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": True, "amx_tile": True},
         "fast: AVX-512 BF16, AMX", "yes"),
        ({"avx2": True, "avx512_bf16": False, "amx_tile": False}, "slow: no instructions for it", "no"),
    ],
)  # fmt: skip
def test_the_processor_is_named_with_what_it_is_fast_at(
    has: dict[str, bool], bf16: str, amx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Some CPU", **has}, raising=False)
    found = doctor.environment(CPU)
    assert (found["CPU's bf16"], found["CPU's AMX"]) == (bf16, amx)
    assert found["CPU"].endswith(f"({platform.machine()}), {os.cpu_count()} logical cores")
    monkeypatch.setattr(Path, "read_text", no_such_file)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert doctor.environment(CPU)["CPU"].startswith("Some CPU (")


def no_such_file(*_: Any, **__: Any) -> str:
    raise FileNotFoundError


def run_with_last_case(
    monkeypatch: pytest.MonkeyPatch, out: Path, run: Callable[[Case, Inputs, str], Outputs]
) -> tuple[int, dict[str, Any]]:
    """The doctor on two cases, of which the last one runs otherwise: its exit status and what it wrote."""
    good, last = CASES[-2:]
    cases = (good, replace(last, run=lambda x, impl: run(last, x, impl)))
    monkeypatch.setattr("fastft.doctor.doctor.CPU_SIZES", SMALL)
    monkeypatch.setattr("fastft.doctor.doctor.CASES", cases)
    return main(["doctor", "--device", "cpu", "--json", str(out)]), json.loads(out.read_text())


def test_a_wrong_kernel_is_told_by_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(case: Case, inputs: Inputs, impl: str) -> Outputs:
        return cast(Tensor, case.run(inputs, impl)) * (1.0 if impl == "reference" else 1.1)

    status, found = run_with_last_case(monkeypatch, tmp_path / "found.json", wrong)
    assert status == 1
    assert "WRONG" in capsys.readouterr().out
    assert {check["name"].partition(":")[0] for check in found["checks"] if not check["ok"]} == {CASES[-1].name}


def test_a_kernel_that_raises_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(case: Case, inputs: Inputs, impl: str) -> Outputs:
        raise RuntimeError("no kernel image is available")

    status, found = run_with_last_case(monkeypatch, tmp_path / "found.json", raises)
    good, last = (case.name for case in CASES[-2:])
    assert status == 1
    assert f"check {last} float32: RuntimeError: no kernel image is available" in capsys.readouterr().out
    assert {check["name"].partition(":")[0] for check in found["checks"]} == {good}
    assert f"bits {last}" in found["failed"]


def test_the_child_that_a_gpu_is_examined_in() -> None:
    command = [sys.executable, "-m", "fastft.doctor.doctor", "cpu", "torch"]
    found = dict(child_tasks.run_apart(command, ["bits gelu", "check gelu float32"], silence=120))
    assert found["bits gelu"] == {"proofs": {"gelu: twice the same bits": True}}
    assert [check["name"] for check in found["check gelu float32"]["checks"]] == [
        "gelu: output",
        "gelu: d x",
        "gelu: d bias",
    ]


def test_what_is_found_is_written_as_it_comes(tmp_path: Path) -> None:
    """So that a process that is killed leaves what it found."""
    report = doctor.Report(tmp_path / "found.json")
    check = asdict(kernel_checks.Check("gelu: output", "float32", 1e-7, 1e-7, 2e-6))
    report.take("check gelu float32", {"checks": [{**check, "ok": True}]})
    assert json.loads((tmp_path / "found.json").read_text())["checks"][0]["name"] == "gelu: output"
    report.take("isolation", {"proofs": {"attention: other documents change no bit": True}})
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["checks"]) == 1
    assert found["proofs"] == {"attention: other documents change no bit": True}
    assert report.is_sound


def test_what_is_printed_fits_into_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    names = [(name, by) for name in kernel_speeds.PEERS for by in kernel_speeds.implementations(name)]
    report = doctor.Report(None)
    for name, by in names:
        speed = kernel_speeds.Speed(name, by, 123.456, (123.456, 234.567), 12.34, 12345, 1234, 4321)
        report.take(f"speed {name} {by}", {"speeds": [asdict(speed)]})
        report.take(f"speed {name} {by}", {"speeds": [asdict(kernel_speeds.Speed(name, by, why_not="no " * 60))]})
    for case in CASES:
        longest = max(case.make(SMALL, torch.Generator()), key=len)
        check = asdict(kernel_checks.Check(f"{case.name}: d {longest}", "bfloat16", 1e-300, 1e-300, 1e-300))
        report.take("check", {"checks": [{**check, "ok": False}]})
        report.take("bits", {"error": "RuntimeError: " + "word " * 60})
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_varlen_is_given_each_document_with_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's kernel is asked for is what the shared prefix stands for, in the order of the documents."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    seen: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.extend((k[:, 0, 0], cu_q))
        return v

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    monkeypatch.setattr(torch, "arange", functools.partial(on_cpu, torch.arange))
    inputs = {name: torch.arange(float(SMALL.T)).view(-1, 1, 1).requires_grad_() for name in "qkv"}
    kernel_speeds.PEERS["attention"]["torch varlen, prefix copied"](SMALL, inputs).run()
    prefix = list(range(SMALL.prefix))
    assert seen[0].tolist() == [*prefix, *range(8, 13), *prefix, *range(13, 18), *prefix, *range(18, 23)]
    assert seen[1].tolist() == [0, 13, 26, 39]


def on_cpu(make: Callable[..., Tensor], *args: Any, device: object = None, **kwargs: Any) -> Tensor:
    del device
    return make(*args, **kwargs)


def test_gpu_suites_skip_with_a_reason_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    if subprocess.run([sys.executable, "-c", "import pytest_benchmark"], capture_output=True).returncode:
        pytest.skip("pytest-benchmark is not installed: `make bench` installs it")
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_attention.py", "-rs", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0
    assert "torch finds no GPU here" in done.stdout
