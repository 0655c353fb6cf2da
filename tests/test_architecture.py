"""What import-linter cannot say of the rooms (`make lint` runs it): what their doors promise, and what kernels need."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FASTFT = ROOT / "fastft"
ROOMS = sorted(path.parent.name for path in FASTFT.glob("*/__init__.py"))
DOORS = sorted(
    str(path.parent.relative_to(ROOT))
    for package in (FASTFT, ROOT / "kernels" / "fastft_kernels")
    for path in package.glob("*/**/__init__.py")
)


def imported(file: Path) -> set[str]:
    """The packages that a file imports, and from fastft the modules."""
    return {name for name, _ in imports(file)}


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """Each module that a file imports, with the name that it takes of it ("" for the module itself)."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def door(room: Path) -> str:
    return ast.get_docstring(ast.parse((room / "__init__.py").read_text()), clean=False) or ""


def entries(room: Path) -> dict[str, str]:
    """The files and rooms that a door lists, in its order, each with what is said of it."""
    listed = re.split(r"^    (?=\S)", door(room), flags=re.MULTILINE)[1:]
    return {entry.split()[0]: entry for entry in listed}


@pytest.mark.parametrize("room", DOORS)
def test_a_door_says_what_comes_in_and_goes_out_and_lists_its_files(room: str) -> None:
    first = door(ROOT / room).partition("\n\n")[0]
    assert ":" in first
    assert "->" in first or room == "fastft/run"
    files = {path.name for path in (ROOT / room).glob("*.py")} - {"__init__.py", "__main__.py"}
    assert files == {name for name in entries(ROOT / room) if name.endswith(".py")} - {"__main__.py"}
    rooms = {f"{path.parent.name}/" for path in (ROOT / room).glob("*/__init__.py")}
    folders = {name for name in entries(ROOT / room) if name.endswith("/")}
    assert rooms <= folders
    assert all((ROOT / room / name).is_dir() for name in folders)


def test_rooms_use_of_each_other_what_the_doors_name() -> None:
    unnamed = set()
    for file in FASTFT.rglob("*.py"):
        own = file.relative_to(FASTFT).parts[0]
        for module, name in imports(file):
            _, room, *rest = [*module.split("."), ""]
            if not module.startswith("fastft.") or room == own or room not in ROOMS or not name or not rest[0]:
                continue
            if f"`{name}`" not in entries(FASTFT / room)[f"{rest[0]}.py"]:
                unnamed.add(f"{file.relative_to(ROOT)}: {module}.{name}")
    assert unnamed == set()


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("fastft/model/tied.py", "import fastft.run.config", "The rooms of fastft"),
        ("fastft/data/audit.py", "import fastft.training", "The rooms of fastft"),
        ("kernels/fastft_kernels/gelu.py", "import fastft", "never back"),
        ("kernels/fastft_kernels/gelu.py", "import numpy", "torch and Triton alone"),
    ],
)
def test_an_import_the_wrong_way_fails(file: str, line: str, contract: str, tmp_path: Path) -> None:
    if shutil.which("lint-imports", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("import-linter is not installed here")
    for name in ("fastft", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    planted = tmp_path / file
    planted.write_text(f"{planted.read_text()}\n{line}\n")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{tmp_path / 'kernels'}", "PATH": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"{contract}.*BROKEN", done.stdout), done.stdout


def test_kernels_need_torch_and_triton_alone() -> None:
    """No numpy, nothing of fastft: the package is of use to other projects."""
    code = (
        "import sys; sys.modules['numpy'] = None; import fastft_kernels; "
        "assert not [m for m in sys.modules if m.split('.')[0] == 'fastft']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    for file in (ROOT / "kernels" / "fastft_kernels").rglob("*.py"):
        outside = {name.split(".")[0] for name in imported(file)} - set(sys.stdlib_module_names)
        allowed = {"triton"} if file.name in ("support.py", "offline.py") else set()
        assert outside <= {"torch", "fastft_kernels"} | allowed, file


def test_kernels_import_without_triton() -> None:
    """As on macOS and Windows, where it does not exist: the torch implementations run."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch, fastft_kernels as k; "
        "x = torch.randn(3, 8); assert k.gelu(x).shape == (3, 8)\n"
        "try: k.gelu(x, impl='triton')\n"
        "except ValueError as error: assert 'not installed' in str(error)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_few_files_of_fastft_know_kernels() -> None:
    """ops.py chooses and runs a model's, fixed_norm.py holds one ready, loss.py gives one to users, batch.py holds
    their plans, optim.py updates with one; the doctor and the prediction look at each of them."""
    users = {
        file.name
        for file in FASTFT.rglob("*.py")
        if any(name.split(".")[0] == "fastft_kernels" for name in imported(file))
    }
    of_models = {"ops.py", "fixed_norm.py", "loss.py", "batch.py", "optim.py"}
    assert users == of_models | {"kernel_checks.py", "kernel_speeds.py", "predict.py"}


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by these names: of two alike, the second one is not collected. Triton's interpreter has a
    process of its own."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name != "interpreted"]
    assert sorted(names) == sorted(set(names))
