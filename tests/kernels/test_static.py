# Without `from __future__ import annotations`: a kernel's tl.constexpr annotations must be objects.
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastft_kernels import cross_entropy
from fastft_kernels.static import cases, gate, offline
from fastft_kernels.static.__main__ import main
from fastft_kernels.static.gate import Row
from fastft_kernels.static.offline import Compiled
from fastft_kernels.support import INTERPRETED, tl, triton

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

SOUND = Compiled(
    kernel="k", arch="sm_90", dtypes=("bfloat16",), warps=8, stages=3, registers=128, stack=0, spills=0, smem=98304,
    blocks=2, products=1, tensor=4, atomics=0, narrow=0, instructions=1000,
)  # fmt: skip


@triton.jit
def crowded(X, Y, N: tl.constexpr):
    """Holds more at a time than there are registers."""
    i = tl.arange(0, N)
    total = tl.load(X + i)
    for _ in range(8):
        total += tl.sqrt(total + tl.load(Y + i))
    tl.store(Y + i, total)
    tl.store(X + i, tl.sum(total, 0) + total)


@triton.jit
def added_atomically(X, Y, N: tl.constexpr):
    tl.atomic_add(Y, tl.sum(tl.load(X + tl.arange(0, N)), 0))


@triton.jit
def one_by_one(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + 3 * i, tl.load(X + 3 * i))


@triton.jit
def multiplied(X, Y, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    x = tl.load(X + at)
    tl.store(Y + at, tl.dot(x, x, input_precision=PRECISION))


@triton.jit
def ill_typed(X, Y, N: tl.constexpr):
    value = tl.load(X)
    if value > 0:
        value = tl.load(X + tl.arange(0, N))
    tl.store(Y + tl.arange(0, N), value)


def compiled(arch: str, launch: Callable[[], None]) -> Compiled:
    rows, failures = gate.compiled(arch, {"toy": launch})
    assert not failures
    return rows[0].figures


def floats(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(n, dtype=dtype)


def test_a_sound_kernel_has_no_fault() -> None:
    assert gate.faults(SOUND) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 2}, "2 spill instructions"),
        ({"smem": 232449, "blocks": 0}, "232449 bytes of shared memory, expected at most 232448"),
        ({"blocks": 0}, "not one block"),
        ({"tensor": 0}, "no tensor-core instruction"),
        ({"atomics": 1}, "1 atomic additions"),
        ({"narrow": 65}, "65 loads and stores of single 16-bit"),
    ],
)
def test_each_fault_is_found(change: dict[str, int], said: str) -> None:
    found = gate.faults(dataclasses.replace(SOUND, **change))
    assert len(found) == 1
    assert said in found[0]


def test_float32_needs_no_tensor_cores_and_listed_kernels_may_read_narrowly() -> None:
    assert gate.faults(dataclasses.replace(SOUND, products=0, tensor=0)) == []
    assert gate.faults(dataclasses.replace(SOUND, kernel=next(iter(gate.NARROW)), narrow=9)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": 137}, "137 registers, expected at most 128 + 8"),
        ({"blocks": 1}, "1 blocks of a multiprocessor at a time, expected 2"),
        ({"tensor": 0}, "no tensor-core instruction, expected 4"),
    ],
)
def test_a_change_for_the_worse_is_found(change: dict[str, int], said: str) -> None:
    golden = gate.golden_of(Row("case", "k", SOUND))
    assert gate.regressions(dataclasses.replace(SOUND, registers=136, blocks=3), golden) == []
    found = gate.regressions(dataclasses.replace(SOUND, **change), golden)
    assert len(found) == 1
    assert said in found[0]


def test_golden_figures_are_kept_by_version_architecture_case_and_kernel() -> None:
    row = Row("case", "k", SOUND)
    worse = Row("case", "k", dataclasses.replace(SOUND, registers=200))
    golden = gate.updated({"0.1": {"sm_90": {}}, triton.__version__: {"sm_80": {"case": {}}}}, [row])
    assert json.loads(gate.written(golden)) == golden
    assert set(golden) == {"0.1", triton.__version__}
    assert set(golden[triton.__version__]) == {"sm_80", "sm_90"}
    assert gate.judged([row], golden) == ([], [])
    failures, notes = gate.judged([worse], golden)
    assert failures == ["sm_90, case, k: 200 registers, expected at most 128 + 8"]
    assert not notes


def test_without_golden_figures_faults_are_still_found_and_it_says_so() -> None:
    spilling = Row("case", "k", dataclasses.replace(SOUND, spills=1))
    failures, notes = gate.judged([spilling], {"0.1": {}})
    assert len(failures) == 1
    assert "1 kernels have no golden figures" in notes[0]


def test_amd_figures_decide_nothing() -> None:
    spilling = dataclasses.replace(SOUND, arch="gfx942", blocks=None, spills=9)
    assert gate.judged([Row("case", "k", spilling)], {}) == ([], [])


def test_spills_atomics_and_narrow_accesses_are_read_from_the_machine_code() -> None:
    crowd = compiled("sm_80", lambda: crowded[(1,)](floats(8192), floats(8192), 8192, num_warps=1))
    assert crowd.stack > 0
    assert crowd.spills > 0
    assert compiled("sm_90", lambda: added_atomically[(1,)](floats(64), floats(1), 64)).atomics > 0
    bf16 = (floats(384, torch.bfloat16), floats(384, torch.bfloat16))
    assert compiled("sm_90", lambda: one_by_one[(1,)](*bf16, 128)).narrow > 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_tensor_cores_are_read_from_the_machine_code(arch: str) -> None:
    bf16 = compiled(arch, lambda: multiplied[(1,)](floats(4096, torch.bfloat16), floats(4096), 64, "ieee"))
    assert bf16.products == 1
    assert bf16.tensor > 0
    fp32 = compiled(arch, lambda: multiplied[(1,)](floats(1024), floats(1024), 32, "ieee"))
    assert fp32.products == 0
    assert fp32.tensor == 0


def test_what_does_not_compile_is_a_finding() -> None:
    rows, failures = gate.compiled("sm_80", {"toy": lambda: ill_typed[(1,)](floats(16), floats(16), 16)})
    assert not rows
    assert len(failures) == 1
    assert "sm_80, toy: does not compile" in failures[0]


def test_the_small_vocabulary_compiles_to_what_gpt2s_does() -> None:
    with offline.capture("sm_80") as found:
        for V in (cases.V, cases.VOCAB):
            logits = torch.empty(3, V, dtype=torch.bfloat16, requires_grad=True)
            cross_entropy(logits, torch.arange(3), impl="triton").backward()
    assert found.launches == {"cross_entropy_forward": 2, "cross_entropy_backward": 2}
    assert len(found.compiled) == 2


def run_gate(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "fastft_kernels.static", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.long), "sm_90"])
def test_the_gate_is_green(arch: str) -> None:
    done = run_gate("--arch", arch)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "no golden figures" not in done.stdout, done.stdout[-2000:]
    assert "nothing spills" in done.stdout.splitlines()[-1]


def test_a_worse_kernel_fails_the_gate(tmp_path: Path) -> None:
    case = "gelu F=4096 fp32"
    figures = {"registers": 1, "blocks": 1, "tensor": 0}
    golden = {triton.__version__: {"sm_80": {case: {"gelu_forward": figures}}}}
    path = tmp_path / "golden.json"
    path.write_text(json.dumps(golden), encoding="utf-8")
    done = run_gate("--arch", "sm_80", "--case", case, "--golden", str(path))
    assert done.returncode == 1
    assert f"sm_80, {case}, gelu_forward: " in done.stdout
    assert done.stdout.splitlines()[-1].endswith("1 findings")


def test_it_says_why_it_cannot_run() -> None:
    done = run_gate(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stdout


def test_a_case_that_is_not_there_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--arch", "sm_80", "--case", "gleu"])
    assert ended.value.code == 2
    assert "--case gleu: no case has such a name, expected one of" in capsys.readouterr().err
