"""`fastft doctor`: what this machine is, which implementation the trainer will pick, and the proof that it computes
what it should here: errors against float64, isolation, determinism, and speeds on a GPU.

Each finding is printed and written when it is there. On a GPU they are found in a child process
(`python -m fastft.doctor.doctor`), so that a kernel that breaks it costs itself alone.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastft.common import files
from fastft.common.console import say
from fastft.common.effects import check_effects
from fastft.common.errors import EXIT_DONE, EXIT_FAILED
from fastft.common.options import Condition, Facts, check_values, names_checked, option
from fastft.common.version import __version__
from fastft.doctor import child_tasks, kernel_checks, kernel_speeds
from fastft.doctor.child_tasks import Found
from fastft.doctor.kernel_checks import CASES, CPU_SIZES, GPU_SIZES
from fastft.model import ops
from fastft.model.names import Device
from fastft.model.precision import choose_device, choose_dtype

_PACKAGES = ("torch", "triton", "numpy", "transformers", "deepspeed", "liger_kernel", "flash_attn")
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
)
_VECTORS = {"avx2": "AVX2", "avx512_f": "AVX-512", "neon": "NEON", "sve": "SVE"}
_BF16 = {"avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX", "bf16": "BF16"}
"""By torch's names."""
_SILENCE_S = 300.0
"""Seconds without a finding after which a kernel, or the compiler of a peer, counts as hung."""


_CUDA = Condition(
    lambda _, facts: facts.device in (None, "cuda"), "a CUDA GPU: speeds are measured there", refused=False
)


@names_checked
@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """What is examined."""

    device: Device = "auto"
    """Where to check."""
    json: Path | None = None
    """A file for everything that was found, to attach to a report."""
    speed: bool = option(True, needs=_CUDA)
    """Measure speeds too, on a GPU."""

    def __post_init__(self) -> None:
        check_values(self)


def doctor(options: DoctorOptions) -> int:
    """Examines the machine, prints what it finds, and writes it as JSON where that is asked for.

    Returns:
        The exit status: 1 where a kernel is wrong here, or fails.
    """
    device = choose_device(options.device)
    check_effects(options, Facts(device=device.type))
    report = Report(options.json)
    report.add({"environment": environment(device), "choice": choice(device)})
    for title in ("environment", "choice"):
        _print_values(title, report.found[title])
    examination = Examination(device, ops.kernel_impl(report.found["choice"]["impl"], device))
    report.add({"sizes": asdict(examination.sizes)})
    for task, found in _results(examination, speeds=device.type == "cuda" and options.speed):
        report.take(task, found)
    report.add({"ran": _ran(report.found), "did_not_run": _did_not_run(report.found, options, device)})
    for title, key in (("ran", "ran"), ("did not run", "did_not_run")):
        print(f"\n{title}")
        for line in report.found[key]:
            print(_wrapped(f"  {line}", 4))
    if options.json is not None:
        say(f"written: {options.json}")
    print()
    what = _WHAT[report.found["choice"]["impl"]]
    print(f"{what} compute what they should here." if report.is_sound else f"{what} are WRONG here: see above.")
    return EXIT_DONE if report.is_sound else EXIT_FAILED


_WHAT = {
    "triton": "The Triton kernels",
    "cpu": "The implementations without Triton",
    "reference": "The reference's operations",
}


def _ran(found: Found) -> list[str]:
    """What was examined, in words."""
    on = f"{_WHAT[found['choice']['impl']].lower().replace('triton', 'Triton')} on {found['environment']['device']}"
    dtypes = list(dict.fromkeys(check["dtype"] for check in found["checks"]))
    lines = [f"{on}: {len(found['checks'])} comparisons with float64 in {' and '.join(dtypes)}"]
    lines += [f"{on}: {len(found['proofs'])} proofs of isolation and determinism"]
    timed = [speed for speed in found["speeds"] if speed["why_not"] is None]
    return [*lines, *([f"{len(timed)} speeds"] if timed else [])]


def _did_not_run(found: Found, options: DoctorOptions, device: torch.device) -> list[str]:
    """What was not examined, each with why."""
    lines = []
    if found["choice"]["impl"] != "triton":
        lines.append(f"the Triton kernels: {ops.why_no_triton(device)}")
    if "bfloat16" not in {check["dtype"] for check in found["checks"]}:
        lines.append(f"bf16: --dtype auto takes {found['choice']['dtype']} here, the fastest that {device.type} has")
    if not options.speed:
        lines.append("speeds: --speed false")
    elif device.type != "cuda":
        lines.append("speeds: they are measured on a GPU alone, and none is used here")
    lines += [f"speed of {one['name']} by {one['by']}: {one['why_not']}" for one in found["speeds"] if one["why_not"]]
    return [*lines, *(f"{task}: it failed" for task in found["failed"])]


class Examination:
    """What is looked at on a device: the tasks `check CASE DTYPE`, `isolation`, `bits CASE`, `speed CASE BY`."""

    def __init__(self, device: torch.device, impl: str) -> None:
        self.device = device
        self.impl = impl
        self.sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
        self._dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in _dtypes(device)}
        self._cases = {case.name: case for case in CASES}

    def tasks(self, *, speeds: bool) -> list[str]:
        """All of them: whether it is right comes before how fast it is."""
        checks = [f"check {case} {dtype}" for case in self._cases for dtype in self._dtypes]
        proofs = ["isolation", *(f"bits {case}" for case in self._cases)]
        timed = [f"speed {case} {by}" for case in self._cases for by in kernel_speeds.implementations(case)]
        return [*checks, *proofs, *(timed if speeds else [])]

    def do(self, task: str) -> Found:
        """What a task finds: a part of the report."""
        match task.split(" ", maxsplit=2):
            case ["check", name, dtype]:
                return self._check(name, dtype)
            case ["bits", name]:
                return self._bits(name)
            case ["speed", name, by]:
                return self._speed(name, by)
            case _:
                return self._isolation()

    def _check(self, name: str, dtype: str) -> Found:
        checks = kernel_checks.against_float64(
            self._cases[name], self.sizes, self._dtypes[dtype], self.device, self.impl
        )
        return {"checks": [{**asdict(check), "ok": check.ok} for check in checks]}

    def _isolation(self) -> Found:
        holds = kernel_checks.is_isolated(self.sizes, self._first_dtype, self.device, self.impl)
        return {"proofs": {"attention: other documents change no bit": holds}}

    def _bits(self, name: str) -> Found:
        case = self._cases[name]
        same = kernel_checks.is_deterministic(case, self.sizes, self._first_dtype, self.device, self.impl)
        return {"proofs": {f"{name}: twice the same bits": same}}

    def _speed(self, name: str, by: str) -> Found:
        return {"speeds": [asdict(kernel_speeds.measure(name, by, self.sizes, self._first_dtype, self.impl))]}

    @property
    def _first_dtype(self) -> torch.dtype:
        return next(iter(self._dtypes.values()))


def _results(examination: Examination, *, speeds: bool) -> Iterator[tuple[str, Found]]:
    """Each task and what it found: on a GPU in a process of its own."""
    tasks = examination.tasks(speeds=speeds)
    if examination.device.type != "cuda":
        return child_tasks.run_here(tasks, examination.do)
    command = [sys.executable, "-m", "fastft.doctor.doctor", str(examination.device), examination.impl]
    return child_tasks.run_apart(command, tasks, silence=_SILENCE_S)


class Report:
    """What was found so far: printed when it comes, and written to a file, if there is one."""

    def __init__(self, path: Path | None) -> None:
        self.found: dict[str, Any] = {"checks": [], "proofs": {}, "speeds": [], "failed": {}}
        self._path = path
        self._printed = ""

    @property
    def is_sound(self) -> bool:
        """Whether everything ran, and computed what it should."""
        right = all(check["ok"] for check in self.found["checks"]) and all(self.found["proofs"].values())
        return right and not self.found["failed"]

    def take(self, task: str, found: Found) -> None:
        """Adds and prints what a task found."""
        if "error" in found:
            found = {"failed": {task: found["error"]}}
        self.add(found)
        for lines in (_check_lines, _proof_lines, _speed_lines, _failure_lines):
            for title, line in lines(found):
                if title != self._printed:
                    print(f"\n{title}")
                    self._printed = title
                print(line, flush=True)

    def add(self, found: Found) -> None:
        """Adds to what was found, and writes all of it."""
        for key, value in found.items():
            before = self.found.get(key)
            if isinstance(before, list):
                before.extend(value)
            elif isinstance(before, dict):
                before.update(value)
            else:
                self.found[key] = value
        if self._path is not None:
            files.write_json(self._path, self.found)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor, GPUs, and the variables that change what runs."""
    found: dict[str, Any] = {
        "fastft": __version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
        **_processor(),
        "threads": torch.get_num_threads(),
    }
    for package in _PACKAGES:
        there = importlib.util.find_spec(package) is not None
        found[package] = _version(package) if there else "not installed"
    found["CUDA of torch"] = torch.version.cuda or "none"
    found["ROCm of torch"] = torch.version.hip or "none"
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found[f"GPU {index}"] = (
            f"{about.name}, capability {about.major}.{about.minor}, {about.total_memory / 2**30:.0f} GiB, "
            f"{about.multi_processor_count} multiprocessors"
        )
    if not torch.cuda.is_available():
        found["GPU"] = "none that torch finds"
    if (driver := _driver_version()) is not None:
        found["NVIDIA driver"] = driver
    for name in _VARIABLES:
        if name in os.environ:
            found[name] = os.environ[name]
    found["device"] = str(device)
    return found


def _processor() -> dict[str, Any]:
    """What the CPU is called, and which of the instructions it has that decide how fast it trains."""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    name = platform.processor() or str(has.get("cpu_name", "unknown"))
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    found: dict[str, Any] = {"CPU": f"{name} ({platform.machine()}), {os.cpu_count()} logical cores"}
    if not has:
        return {**found, "CPU's bf16": "unknown: torch does not say"}
    vectors = [label for flag, label in _VECTORS.items() if has.get(flag)]
    bf16 = [label for flag, label in _BF16.items() if has.get(flag)]
    return {
        **found,
        "CPU's vectors": ", ".join(vectors) or "none that torch names",
        "CPU's bf16": f"fast: {', '.join(bf16)}" if bf16 else "slow: no instructions for it",
        "CPU's AMX": "yes" if has.get("amx_tile") else "no",
    }


def _driver_version() -> str | None:
    """What `nvidia-smi` says; None where it is not there."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.split()
    return said[0] if said else "nvidia-smi does not say"


def choice(device: torch.device) -> dict[str, str]:
    """What `--impl auto` and `--dtype auto` mean on a device, and why."""
    impl = ops.resolve("auto", device)
    why_not = ops.why_no_triton(device)
    return {
        "impl": impl,
        "why": "the Triton kernels run on this GPU"
        if why_not is None and impl == "triton"
        else f"not triton: {why_not}",
        "dtype": choose_dtype("auto", device),
        **({"C for CPUs": ops.why_no_compiled() or "compiled, and runs"} if device.type == "cpu" else {}),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def _dtypes(device: torch.device) -> list[torch.dtype]:
    """What to check in: what the trainer picks first, float32 always."""
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choose_dtype("auto", device))
    return [torch.float32] if wanted is None else [wanted, torch.float32]


def _print_values(title: str, values: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, value in values.items():
        print(_wrapped(f"  {name:<15} {value}", 18))


Line = tuple[str, str]
"""A table's title and columns, and a line of it, within 80 columns: a pipe cuts nothing."""


def _check_lines(found: Found) -> Iterator[Line]:
    title = f"relative errors against float64, and those of plain PyTorch\n  {'':31}{'dtype':>9}"
    title += f"{'error':>9}{'plain':>9}{'limit':>9}"
    for check in found.get("checks", ()):
        figures = "".join(f"{check[key]:9.1e}" for key in ("error", "plain", "limit"))
        yield title, f"  {check['name']:<31}{check['dtype']:>9}{figures} {'ok' if check['ok'] else 'WRONG'}"


def _proof_lines(found: Found) -> Iterator[Line]:
    for name, holds in found.get("proofs", {}).items():
        yield "proofs", f"  {name:<45} {'yes' if holds else 'NO'}"


def _speed_lines(found: Found) -> Iterator[Line]:
    for speed in found.get("speeds", ()):
        ways = "forward and backward" if kernel_speeds.CASE[speed["name"]].learns else "forward"
        title = f"{speed['name']}, {ways}: the GPU's own time, caches empty\n  {'':27}{'ms':>7}"
        title += f"{'10%..90%':>14}{'host':>7}{'MiB':>6}{'TFLOP/s':>8}{'GB/s':>6}"
        if speed["why_not"] is not None:
            yield title, _wrapped(f"  {speed['by']:<27} {speed['why_not']}", 30)
            continue
        spread = "..".join(f"{x:.3f}" for x in speed["spread"])
        figures = f"{speed['milliseconds']:7.3f}{spread:>14}{speed['host_milliseconds']:7.2f}{speed['peak_mib']:6.0f}"
        work = "" if speed["tflops"] is None else f"{speed['tflops']:8.0f}{speed['gbytes']:6.0f}"
        yield title, f"  {speed['by']:<27}{figures}{work}"


def _failure_lines(found: Found) -> Iterator[Line]:
    for task, error in found.get("failed", {}).items():
        yield "failed", _wrapped(f"  {task}: {error}", 4)


def _wrapped(line: str, indent: int) -> str:
    return textwrap.fill(line, 80, subsequent_indent=" " * indent)


def main(arguments: Sequence[str]) -> None:
    """The child: a device, the kernels' implementation, and the tasks."""
    device, impl, *tasks = arguments
    child_tasks.serve(tasks, Examination(torch.device(device), impl).do)


if __name__ == "__main__":
    main(sys.argv[1:])
