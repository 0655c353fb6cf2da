"""`fastft doctor`: what this machine is, which implementation the trainer will pick, and the proof that it computes
what it should here: errors against float64, isolation, determinism, and speeds on a GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastft import __version__, files, kernel_checks, kernel_speeds, ops
from fastft.config import Device
from fastft.console import say
from fastft.errors import EXIT_DONE, EXIT_FAILED
from fastft.kernel_checks import CASES, CPU_SIZES, GPU_SIZES, Check, Sizes
from fastft.kernel_speeds import Speed
from fastft.options import check_choices
from fastft.precision import choose_device, choose_dtype

_PACKAGES = ("torch", "triton", "numpy", "transformers", "deepspeed", "liger_kernel", "flash_attn")
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
)


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """The options of `fastft doctor`."""

    device: Device = "auto"
    """Where to check."""
    json: Path | None = None
    """A file for everything that was found, to attach to a report."""
    speed: bool = True
    """Measure speeds too, on a GPU."""

    def __post_init__(self) -> None:
        check_choices(self)


def doctor(options: DoctorOptions) -> int:
    """Examines the machine, prints what it finds, and writes it as JSON where that is asked for.

    Returns:
        The exit status: 1 where a kernel is wrong here.
    """
    device = choose_device(options.device)
    found: dict[str, Any] = {"environment": environment(device), "choice": choice(device)}
    out = Console(highlight=False, soft_wrap=True)
    for title in ("environment", "choice"):
        _print_values(out, title, found[title])
    impl, sizes = found["choice"]["impl"], GPU_SIZES if device.type == "cuda" else CPU_SIZES
    found["sizes"] = asdict(sizes)
    checks = list(_checks(sizes, device, impl))
    proofs = dict(_proofs(sizes, device, impl))
    found |= {"checks": [{**asdict(check), "ok": check.ok} for check in checks], "proofs": proofs}
    _print_checks(out, checks, impl)
    _print_values(out, "proofs", {name: "yes" if holds else "NO" for name, holds in proofs.items()})
    if device.type == "cuda" and options.speed:
        speeds = [speed for case in CASES for speed in kernel_speeds.measure(case, sizes, _dtypes(device)[0], impl)]
        found["speeds"] = [asdict(speed) for speed in speeds]
        _print_speeds(out, speeds, kernel_speeds.card_of(torch.cuda.get_device_name(device)))
    else:
        out.print(
            "Speeds are measured on a GPU alone: there is none here." if options.speed else "No speeds: --speed false."
        )
    if options.json is not None:
        files.write_json(options.json, found)
        say(f"written: {options.json}")
    sound = all(check.ok for check in checks) and all(proofs.values())
    out.print("All kernels compute what they should here." if sound else "A kernel is WRONG here: see above.")
    return EXIT_DONE if sound else EXIT_FAILED


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor, GPUs, and the variables that change what runs."""
    found: dict[str, Any] = {
        "fastft": __version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "CPU": torch.cpu.get_capabilities().get("architecture", platform.machine())
        if hasattr(torch.cpu, "get_capabilities")
        else platform.machine(),
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


def _checks(sizes: Sizes, device: torch.device, impl: str) -> Iterator[Check]:
    for case in CASES:
        for dtype in _dtypes(device):
            yield from kernel_checks.against_float64(case, sizes, dtype, device, ops.kernel_impl(impl))


def _proofs(sizes: Sizes, device: torch.device, impl: str) -> Iterator[tuple[str, bool]]:
    kernel_impl, dtype = ops.kernel_impl(impl), _dtypes(device)[0]
    yield "attention: other documents change no bit", kernel_checks.is_isolated(sizes, dtype, device, kernel_impl)
    for case in CASES:
        same = kernel_checks.is_deterministic(case, sizes, dtype, device, kernel_impl)
        yield f"{case.name}: twice the same bits", same


def _print_values(out: Console, title: str, values: dict[str, Any]) -> None:
    table = Table(box=SIMPLE_HEAD, show_header=False, title=title, title_justify="left")
    for name, value in values.items():
        table.add_row(name, str(value))
    out.print(table)


def _print_checks(out: Console, checks: list[Check], impl: str) -> None:
    table = Table(
        "operation", "dtype", "error", "plain PyTorch", "limit", "", box=SIMPLE_HEAD, title_justify="left",
        title=f"relative errors of impl={ops.kernel_impl(impl)} against float64",
    )  # fmt: skip
    for check in checks:
        figures = (f"{x:.1e}" for x in (check.error, check.plain, check.limit))
        table.add_row(check.name, check.dtype, *figures, "ok" if check.ok else "WRONG")
    out.print(table)


def _print_speeds(out: Console, speeds: list[Speed], card: Any) -> None:
    peak = (
        ""
        if card is None
        else f"; {card.name} peaks at {card.matrix_flops / 1e12:.0f} TFLOP/s, {card.bandwidth / 1e9:.0f} GB/s"
    )
    table = Table(
        "operation", "by", "ms", "10% .. 90%", "peak MiB", "TFLOP/s", "GB/s", box=SIMPLE_HEAD, title_justify="left",
        title=f"forward and backward{peak}",
    )  # fmt: skip
    for speed in speeds:
        if speed.milliseconds is None or speed.spread is None or speed.peak_mib is None:
            table.add_row(speed.name, speed.impl, speed.why_not, "", "", "", "")
            continue
        work = ("" if x is None else f"{x:.0f}" for x in (speed.tflops, speed.gbytes))
        table.add_row(
            speed.name, speed.impl, f"{speed.milliseconds:.3f}", f"{speed.spread[0]:.3f} .. {speed.spread[1]:.3f}",
            f"{speed.peak_mib:.0f}", *work,
        )  # fmt: skip
    out.print(table)
