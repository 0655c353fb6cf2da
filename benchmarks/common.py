"""What every benchmark shares: the examples, the machine in words, turns of processes, results as table and JSON.

A benchmark that needs a process of its own has a worker that prints one line of JSON, and a parent that starts the
workers in turn. The parent imports no torch: nothing runs beside the worker.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft.batches.batch import Batcher
    from fastft.data.encode import EncodedSet
    from fastft.data.records import Record
    from fastft.engines.engine import AnyEngine

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

WARMUP = 2
"""Steps that no figure includes: they allocate memory and fill caches of primitives, and take two to four times as
long."""

BATCH_SIZE = 8

_TELLING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "sve", "bf16")


def data_name() -> str:
    """`book` where FASTFT_BOOK_DATA names the book's file, else `sample` (the set that fastft embeds)."""
    return "book" if os.environ.get("FASTFT_BOOK_DATA") else "sample"


def training_records() -> list[Record]:
    """The training split's records of the data that `data_name` names."""
    from fastft.data.reading import load_records
    from fastft.data.records import split

    records = load_records(os.environ.get("FASTFT_BOOK_DATA") or "sample").good
    return [records[index] for index in split(len(records)).train]


def encoded_records(records: Sequence[Record], max_length: int = 1024) -> EncodedSet:
    """The records as the chapter encodes them, the prompt masked."""
    from fastft.data.encode import encode
    from fastft.data.prompts import ALPACA
    from fastft.data.tokenizer import gpt2_tokenizer

    return encode(records, ALPACA, gpt2_tokenizer(), max_length=max_length, too_long="drop")


def records_in_order(n: int) -> list[Record]:
    """The first `n` training records of one fixed shuffled order, from its beginning again where it ends."""
    import numpy as np

    records = training_records()
    order = np.random.default_rng(0).permutation(len(records))
    return [records[order[index % len(records)]] for index in range(n)]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n", 1)[0])
    parser.add_argument("--size", default="gpt2", help="gpt2, gpt2-medium, ..., nano or pico")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each process")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON and PNG files")
    return parser


def begin(threads: int) -> None:
    """What a worker does first, as `fastft train` does it: threads, and memory that is kept once freed."""
    import torch

    from fastft.common.memory import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()


def chosen_device(device: str) -> str:
    """`cuda` or `cpu`; `auto` takes CUDA where it is."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def wait_for(device: str) -> None:
    """Waits until the device has done what it was given: a CPU always has."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def batcher_of(engine: AnyEngine, *, packed: bool = True, share_prefix: bool = True) -> Batcher:
    """What makes an engine's batches, as the trainer does."""
    from fastft.model import ops
    from fastft.model.precision import NARROW

    return ops.batcher(
        engine.impl, engine.device, is_narrow=engine.dtype in NARROW, packed=packed, share_prefix=share_prefix
    )


def seconds_of(work: Callable[[], object], device: str) -> float:
    """How long a device works on something: a GPU by its own clock, without what the host needs to ask for it."""
    if device == "cuda":
        from fastft.gpu import clock as gpu_clock

        return gpu_clock.gpu_times(work, rounds=1).median / 1e3
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def peak_bytes(device: str) -> int | None:
    """The most memory that this process has held: on CUDA what torch's allocator handed out, else resident memory.

    Resident memory is the process's own high-water mark. `ru_maxrss` would not do: a child inherits its parent's.
    """
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, Any]:
    """The processor, its telling flags, cores, GPU and versions; neither a host's name nor a path."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = said.get("flags", said.get("Features", "")).split()
    return {
        "cpu": said.get("model name") or platform.machine(),
        "flags": [flag for flag in _TELLING_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def in_words(described: dict[str, Any]) -> str:
    """The machine in one line."""
    flags = " ".join(described["flags"])
    what = f"{described['cpu']} ({flags})" if flags else described["cpu"]
    gpu = f", {described['gpu']}" if described["gpu"] else ""
    return f"{what}, {described['cores']} cores{gpu}, torch {described['torch']}"


def versions(*packages: str) -> dict[str, str]:
    """The version of each package; of one that runs from its checkout, what it says itself."""

    def of(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return str(getattr(importlib.import_module(package.replace("-", "_")), "__version__", "unknown"))

    return {package: of(package) for package in packages}


def say(result: dict[str, Any]) -> None:
    """A worker's result: the last line of its output."""
    print(json.dumps(result), flush=True)


def run_worker(module: str, *options: object, threads: int) -> dict[str, Any]:
    """Runs `python -m module options` in a process of its own and returns what it says.

    Raises:
        RuntimeError: it failed; its own last lines are in the message.
    """
    # numactl, taskset and the like stay the caller's affair; threads are what the libraries must agree on.
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", module, *map(str, options), "--threads", str(threads)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def in_turn(
    workers: dict[str, tuple[str, Sequence[object]]], *, rounds: int, threads: int
) -> dict[str, list[dict[str, Any]]]:
    """Runs each worker once a round, one after the other; the results of each, round by round.

    Args:
        workers: name to module and options.
        rounds: how often.
        threads: CPU threads of each.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for turn in range(rounds):
        for name, (module, options) in workers.items():
            print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            results[name].append(run_worker(module, *options, threads=threads))
    return results


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most."""
    values = list(values)
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratios(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """The ratios of values that were measured in the same rounds: median, least and most."""
    return spread(a / b for a, b in zip(of, to, strict=True))


def shown(ratio: dict[str, float] | None, digits: int = 2) -> str:
    """`3.51 (3.42 to 3.60)`."""
    if ratio is None:
        return "-"
    median, least, most = (f"{ratio[key]:.{digits}f}" for key in ("median", "least", "most"))
    return f"{median} ({least} to {most})"


def mebibytes(n: int | float | None) -> str:
    """Bytes as MiB."""
    return "-" if n is None else f"{n / 2**20:,.0f}"


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """A table on the terminal: the first column's text to the left, figures to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    # A table that goes to a file must not be cut to the 80 columns of a terminal that is not there.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


def write_result(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Writes `result` to `folder/name.json`."""
    from fastft.common.files import write_json

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", result)


def new_figure(columns: int = 1, *, width: float = 6.4, height: float = 4.2) -> tuple[Any, Any]:
    """A figure for a file, without a display, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width * columns, height), layout="constrained")


def save_figure(figure: Any, folder: Path, name: str) -> None:
    """Writes the figure to `folder/name.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    # Neither version nor date: the same figures give the same file.
    figure.savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})
