"""Runs the phases within a time, each finding written as it comes; a summary last. `python -m tools.gpu_day --help`.

Exit status: 0, or 1 where a kernel is wrong or a task failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KIT = ROOT / ".kit"


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase and how many seconds it may take."""

    name: str
    limit: float


PHASES = (
    Phase("env", 60),
    Phase("checks", 150),
    Phase("kernels", 110),
    Phase("steps", 130),
    Phase("compile", 80),
    Phase("train", 60),
    Phase("decoding", 40),
    Phase("memcheck", 60),
)
"""In the order in which they are worth knowing. `compile` begins with the first one, in the background; its limit is
for what is timed in its turn."""

_LEAST_S = 8.0
"""A phase that would have less is left out."""
_COMPILER_MAY_TAKE_S = 60.0
"""Before kernels are timed the compiler gets so long to be done, so that it does not take their host's time."""


class Day:
    """The phases of one run: their time, and the file that all findings go to."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.began = time.monotonic()
        self.end = self.began + options.budget
        self.out: Path = options.out
        self.results = self.out / "results.jsonl"
        self.go, self.compiled = work / "go", threading.Event()
        self._writing = threading.Lock()

    def run(self, phase: Phase, *, until: float | None = None) -> None:
        """Does a phase's tasks in child processes, until its time or the day's is over."""
        from fastft.doctor import child_tasks
        from tools.gpu_day.child import phase as module_of

        now = time.monotonic()
        until = min(self.end, now + phase.limit) if until is None else until
        if until - now < _LEAST_S:
            self._say(f"{phase.name}: no time left")
            return
        tasks = module_of(phase.name).tasks()
        command = [sys.executable, "-m", "tools.gpu_day.child", phase.name]
        log = self.out / f"{phase.name}.log"
        done, failed = 0, 0
        for task, found in child_tasks.run_apart(command, tasks, silence=until - now, until=until, log=log):
            done, failed = done + 1, failed + ("error" in found)
            self._note(phase.name, task, found)
        self._say(f"{phase.name}: {done} of {len(tasks)} tasks, {failed} failed, {time.monotonic() - now:.0f} s")

    def run_in_background(self, phase: Phase) -> threading.Thread:
        """Begins a phase that compiles until it is told to go on."""
        thread = threading.Thread(target=self.run, args=[phase], kwargs={"until": self.end}, daemon=True)
        thread.start()
        return thread

    def _note(self, phase: str, task: str, found: dict[str, Any]) -> None:
        line = {"phase": phase, "task": task, "at": round(time.monotonic() - self.began, 1), **found}
        with self._writing, self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if (phase, task) == ("compile", "compile"):
            self.compiled.set()

    def _say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:5.0f} s  {line}", flush=True)


def run_day(day: Day, wanted: Sequence[str]) -> None:
    """All wanted phases; what compiles does so beside the first ones, and is timed in its turn."""
    phases = [phase for phase in PHASES if phase.name in wanted]
    compiling = next((day.run_in_background(phase) for phase in phases if phase.name == "compile"), None)
    for phase in phases:
        if phase.name == "compile" and compiling is not None:
            day.go.touch()
            compiling.join(max(0.0, min(phase.limit, day.end - time.monotonic())))
            continue
        if phase.name == "kernels" and compiling is not None:
            _wait(day, compiling)
        day.run(phase)


def _wait(day: Day, compiling: threading.Thread) -> None:
    until = time.monotonic() + _COMPILER_MAY_TAKE_S
    while time.monotonic() < until and compiling.is_alive() and not day.compiled.wait(0.2):
        pass


def environment(work: Path, out: Path) -> dict[str, str]:
    """What the children get: this checkout, the kit's packages and data, new caches if there are none, no network."""
    site = work / "site"
    for wheel in sorted(KIT.glob("whl/*.whl")):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(site)
    paths = [site, ROOT, ROOT / "kernels", *filter(None, [os.environ.get("PYTHONPATH")])]
    data = KIT / "instruction-data.json"
    return {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **{name: os.environ.get(name, str(work / name)) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")},
        "GPU_DAY_OUT": str(out),
        "GPU_DAY_GO": str(work / "go"),
        **({"FASTFT_BOOK_DATA": str(data)} if data.is_file() else {}),
    }


def pack_logs(out: Path) -> None:
    """The children's logs as one archive: few files travel better."""
    logs = sorted(out.glob("*.log"))
    with tarfile.open(out / "logs.tgz", "w:gz") as archive:
        for log in logs:
            archive.add(log, log.name)
    for log in logs:
        log.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_day", description=(__doc__ or "").partition("\n")[0])
    names = [phase.name for phase in PHASES]
    parser.add_argument("--phases", nargs="+", choices=names, default=names, metavar="PHASE", help=" ".join(names))
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "out/gpu-day"), help="or $OUT")
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-day-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        os.environ |= environment(work, options.out)
        sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
        day = Day(options, work)
        run_day(day, options.phases)
    pack_logs(options.out)
    from tools.gpu_day import summary

    results = summary.read(day.results)
    text = summary.text(results)
    (options.out / "summary.txt").write_text(text)
    print(text, end="")
    return int(summary.is_wrong(results))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # a stream of text
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a phase in the background that hangs is not waited for
