"""What the documentation names is there: files, links, commands, options, dependencies, the version; and the wheel."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fastft import cli
from fastft.common.version import __version__

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
LONGER = (*PAGES, ROOT / "kernels/README.md", ROOT / "benchmarks/README.md")
LAUNCHES = re.compile(r"(?:launch/train\.py|(?:-m|--module) fastft\.launch|launch/fastft\.sbatch [\w/]+)(?= |$)(.*)")
CALLS = re.compile(r"(?:^|[\s/])(?:-m )?fastft +([a-z][a-z-]*)(?= |$)(.*)")
OPTION = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
OTHER_TOOLS = {"--signal=TERM@300", "--signal=B:TERM@300", "--time=5"}
"""Code in a sentence that is another tool's option."""


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code_blocks(text: str) -> str:
    return re.sub(r"(?ms)^```.*?^```", "", text)


def links(text: str) -> list[str]:
    """The relative links of a page, without their anchors."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code_blocks(text))
    return [link.partition("#")[0] for link in found if "://" not in link and not link.startswith("#")]


def code_lines(text: str) -> Iterator[str]:
    """The lines of a page's code blocks, continued ones in one piece, without their comments."""
    for block in re.findall(r"(?ms)^```\w*\n(.*?)^```", text):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"(?:^|\s)#.*", "", line)


def code_in_sentences(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_code_blocks(text))


@cache
def options_of(command: str) -> frozenset[str]:
    """The options that a command's help lists, with `_` between words."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    return frozenset(name.replace("-", "_") for name in OPTION.findall(said.getvalue()))


def unknown_options(command: str, rest: str) -> list[str]:
    return [f"{command} --{name}" for name in OPTION.findall(rest) if name.replace("-", "_") not in options_of(command)]


def problems_of_code(text: str) -> list[str]:
    """The commands and options of fastft in code blocks that do not exist."""
    problems = []
    for line in code_lines(text):
        if match := LAUNCHES.search(line):
            problems += unknown_options("train", match[1])
        elif match := CALLS.search(line):
            command, rest = match.groups()
            problems += unknown_options(command, rest) if command in cli.COMMANDS else [command]
    return problems


@pytest.mark.parametrize("page", LONGER, ids=by_name)
def test_links_lead_to_files(page: Path) -> None:
    assert [link for link in links(page.read_text()) if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_and_options_in_code_blocks_exist(page: Path) -> None:
    assert problems_of_code(page.read_text()) == []


def test_what_does_not_exist_is_found() -> None:
    """And what does is not."""
    assert links("[a](b.md) [c](d.md#e) [f](https://g.h) [i](#j)") == ["b.md", "d.md"]
    assert problems_of_code("```\n.venv/bin/fastft trane --data book\n```") == ["trane"]
    assert problems_of_code("```\nfastft train --datum book  # --lr\n```") == ["train --datum"]
    assert problems_of_code("```\ntorchrun --nproc-per-node 2 -m fastft train --lr 1 \\\n  --no_lr\n```") == [
        "train --no_lr"
    ]
    for started in ("deepspeed --num_gpus 2 launch/train.py", "torchrun --nnodes 2 -m fastft.launch"):
        assert problems_of_code(f"```\n{started} --batch_size 8 --batch-sizes 8\n```") == ["train --batch-sizes"]
    assert problems_of_code("```\nfastft chat --run out/medium\n```\nfastft trane") == []


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_options_in_sentences_exist(page: Path) -> None:
    known = frozenset[str]().union(*map(options_of, cli.COMMANDS))
    launchers = page.name == "clusters.md"  # it tells of the options of launchers and schedulers too
    for code in code_in_sentences(page.read_text()):
        if code.startswith("--") and code not in OTHER_TOOLS:
            unknown = [name for name in OPTION.findall(code) if name.replace("-", "_") not in known]
            assert unknown == [] or launchers, code


@pytest.mark.parametrize("page", LONGER, ids=by_name)
def test_files_and_modules_in_sentences_exist(page: Path) -> None:
    for code in code_in_sentences(page.read_text()):
        if re.fullmatch(r"(?:fastft|tests|kernels|docs|benchmarks|launch|tools)/[\w./-]+", code):
            assert (ROOT / code).exists(), code
        for module in re.findall(r"python -m ((?:fastft|tools|benchmarks)[\w.]*)", code):
            assert importlib.util.find_spec(module), module


def test_every_dependency_has_its_cost() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [canonicalize_name(Requirement(one).name) for one in project["dependencies"]]
    measured = runpy.run_path(str(ROOT / "tools/installation_cost.py"))["USES"]
    assert sorted(measured) == sorted(named)
    rows = re.findall(r"(?m)^\| `([\w-]+)` [\d.]+", (ROOT / "docs/installation.md").read_text())
    assert set(named) <= set(rows)


def test_the_newest_version_in_the_changelog_is_this_one() -> None:
    versions = re.findall(r"(?m)^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text())
    assert versions[0] == __version__
    assert versions == sorted(versions, key=lambda version: [*map(int, version.split("."))], reverse=True)


@pytest.mark.long
def test_the_wheel_holds_all_that_is_needed(tmp_path: Path) -> None:
    """Every file of both packages (templates, the compiler's golden figures, the types' mark), and nothing else's."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        scripts = archive.read(f"fastft-{__version__}.dist-info/entry_points.txt").decode()
    for package in (ROOT / "fastft", ROOT / "kernels/fastft_kernels"):
        files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {str(path.relative_to(package.parent)) for path in files} - held == set()
    assert {"fastft/py.typed", "fastft_kernels/py.typed", "fastft/launch.py"} <= held
    assert any(name.endswith("report.html.j2") for name in held)
    assert not any(name.startswith(("tests", "docs", "launch/", "kernels/")) for name in held)
    assert "fastft = fastft.cli:main" in scripts
