"""The command: compiles the cases, holds them against the golden figures, and says what it found."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fastft_kernels import static, support
from fastft_kernels.static import offline
from fastft_kernels.static.cases import CASES
from fastft_kernels.static.gate import Golden, Row, compiled, judged, updated, written
from fastft_kernels.static.offline import CARDS
from fastft_kernels.static.peers import of_liger
from fastft_kernels.static.shown import markdown, table

GATED = ("sm_80", "sm_86", "sm_90", "sm_100")
REPORTED = ("gfx942",)
"""Architectures that kernels must compile for, and whose figures decide nothing."""
GOLDEN = Path(__file__).with_name("golden.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints the table and the findings; 0 where there is none, 1 else, 2 where it cannot run."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.update and options.case:
        parser.error("--update writes an architecture's figures as a whole: leave --case out")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("TRITON_INTERPRET is set: kernels then go to the interpreter and are not compiled; unset it")
        return 2
    if not support.HAS_TRITON:
        print("Triton is not installed: there is nothing to compile")
        return 2
    began = time.perf_counter()
    cases = {name: run for name, run in CASES.items() if fnmatch.fnmatch(name, f"*{options.case}*")}
    if not cases:
        parser.error(f"--case {options.case}: no case has such a name, expected one of {', '.join(CASES)}")
    golden: Golden = json.loads(options.golden.read_text(encoding="utf-8")) if options.golden.exists() else {}
    rows: list[Row] = []
    failures: list[str] = []
    for arch in options.arch:
        of_arch, broken = compiled(arch, cases)
        rows += of_arch
        failures += broken
    worse, notes = judged(rows, {} if options.update else golden)
    failures += worse
    if options.update and not failures:
        options.golden.write_text(written(updated(golden, rows)), encoding="utf-8")
        notes = [f"wrote {options.golden}"]
    print((markdown if options.markdown else table)([*rows, *(_liger(options.arch) if options.liger else [])]))
    print("\n".join(["", *notes, *failures]).rstrip())
    outcome = f"{len(failures)} findings" if failures else "nothing spills, and nothing is worse than it was"
    print(f"{len(rows)} kernels for {', '.join(options.arch)} in {time.perf_counter() - began:.0f} s: {outcome}")
    return 1 if failures else 0


def _liger(archs: Sequence[str]) -> list[Row]:
    try:
        return [row for arch in archs if arch in CARDS for row in of_liger(arch)]
    except ImportError as error:
        print(f"Liger-Kernel is left out: {error}")
        return []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastft_kernels.static", description=(static.__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--arch", nargs="+", choices=offline.ARCHS, default=[*GATED, *REPORTED], metavar="ARCH")
    parser.add_argument("--case", default="", help="only cases whose name has this text, or fits this pattern")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="file of golden figures")
    parser.add_argument("--update", action="store_true", help="write the golden figures of these architectures")
    parser.add_argument("--markdown", action="store_true", help="print the table of kernels/README.md")
    parser.add_argument("--liger", action="store_true", help="add Liger-Kernel's kernels to the table, where installed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
