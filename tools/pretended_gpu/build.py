"""Builds the pretended CUDA library for the torch of a Python: one shared object, to be preloaded as libcuda.so.1.

What torch wants and `csrc` has not is read from torch's own libraries and made here: functions that return success and
say once, by name, that nobody has written them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
LIBRARY, MANIFEST = "libcuda.so.1", "manifest.json"
COMPILER_OPTIONS = ("-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
WANTED = re.compile(r"(__)?cuda[A-Z]|cublas[A-Z]|nccl[A-Z]|cu(?!File)[A-Z]")
"""The names of functions that are pretended: not those of cuDNN, cuSPARSE, cuSOLVER and other libraries."""

UNWRITTEN = """\
/* Made by build.py. */
void unwritten_call(const char *name, char *told, const char *what_it_did);
#define RETURNS_SUCCESS(name) __attribute__((visibility("default"))) int name(void) {\\
    static char told; unwritten_call(#name, &told, "returned success and did nothing"); return 0; }
#define NOT_SUPPORTED(name) static int name##_(void) {\\
    static char told; unwritten_call(#name, &told, "said that it is not supported"); return 801; }
"""


class BuildError(Exception):
    """What is missing, in one line."""


@dataclass(frozen=True)
class Torch:
    """A CUDA build of torch, found without importing it.

    Attributes:
        version, cuda: `2.11.0+cu130` and `13.0`.
        libraries: the folder of its shared objects.
        packages: the folder that it is installed in.
    """

    version: str
    cuda: str
    libraries: Path
    packages: Path


@dataclass(frozen=True)
class Manifest:
    """What a library was built from.

    Attributes:
        sources: a hash of the C files and of this one.
        torch: the version of torch that it was built for.
        unwritten: the functions that torch may call and nobody has written.
    """

    sources: str
    torch: str
    unwritten: list[str]


def find_torch(python: str) -> Torch:
    """The torch of an interpreter.

    Raises:
        BuildError: there is no such interpreter, it has no torch, or none that is built for CUDA.
    """
    ask = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    try:
        answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"got {python}, expected a Python that runs: {error}") from None
    folder = Path(answer.stdout.strip())
    if not answer.stdout.strip():
        raise BuildError(f"{python} has no torch: install a CUDA build of it there")
    values = dict(re.findall(r"^(\w+)(?::[^=]+)? = '([^']+)'", (folder / "version.py").read_text(), re.MULTILINE))
    if "cuda" not in values:
        raise BuildError(f"the torch of {python}, {values['__version__']}, is not built for CUDA: install one that is")
    return Torch(values["__version__"], values["cuda"], folder / "lib", folder.parent)


def include_folders(torch: Torch) -> list[Path]:
    """Where CUDA's headers of torch's major version are: in NVIDIA's wheels, or in a toolkit. Triton's wheel has those
    that NVIDIA's leaves to its compiler, and serves alone where the version is the same.

    Raises:
        BuildError: they are nowhere.
    """
    major = torch.cuda.partition(".")[0]
    triton = torch.packages / "triton/backends/nvidia/include"
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    candidates = [torch.packages / f"nvidia/cu{major}/include", torch.packages / "nvidia/cuda_runtime/include"]
    for folder in (*candidates, toolkit, triton):
        header = folder / "cuda_runtime_api.h"
        if header.exists() and re.search(rf"#define CUDART_VERSION +{major}0\d\d\b", header.read_text()):
            return [folder, triton]
    raise BuildError(f"found no CUDA {major} headers: install nvidia-cuda-runtime beside torch, or set CUDA_HOME")


def build(folder: Path, python: str) -> Manifest:
    """Builds `folder/libcuda.so.1` for the torch of `python`, unless it is there and up to date.

    Raises:
        BuildError: torch, the headers or a C compiler is missing, or the compiler fails.
    """
    torch = find_torch(python)
    known = read_manifest(folder)
    if known is not None and (known.sources, known.torch) == (sources_hash(), torch.version):
        return known
    for tool in ("cc", "nm"):
        if shutil.which(tool) is None:
            raise BuildError(f"there is no {tool} on the path: install a C compiler and binutils")
    folder.mkdir(parents=True, exist_ok=True)
    # Made beside and renamed into place: other processes may run on the library that is there, or build it too.
    with tempfile.TemporaryDirectory(dir=folder) as made:
        unwritten = _make(Path(made), torch)
        manifest = Manifest(sources_hash(), torch.version, unwritten)
        (Path(made) / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1))
        for name in (LIBRARY, MANIFEST):
            (Path(made) / name).replace(folder / name)
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """What the library in `folder` was built from; None where there is none."""
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text()))
    except FileNotFoundError:
        return None


def sources_hash() -> str:
    """A hash of all that a library is built from, but torch and the headers."""
    files = (Path(__file__), *sorted(SOURCES.iterdir()))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _make(folder: Path, torch: Torch) -> list[str]:
    """Compiles and links the library; returns the functions that torch wants and nobody has written."""
    headers = include_folders(torch)
    options = [*COMPILER_OPTIONS, *(f"-I{each}" for each in headers)]
    objects = [_compile(source, folder, options) for source in sorted(SOURCES.glob("*.c"))]
    wanted = _wanted(torch)
    unwritten = sorted(wanted - _names(objects, "--defined-only"))
    made = folder / "unwritten.c"
    made.write_text(_unwritten(unwritten, _driver_functions(headers[0])))
    objects.append(_compile(made, folder, options))
    _run(["cc", "-shared", f"-Wl,-soname,{LIBRARY}", *objects, "-ldl", "-lpthread", "-o", folder / LIBRARY])
    if hidden := wanted - _names([folder / LIBRARY], "--dynamic", "--defined-only"):
        raise BuildError(f"written in csrc, but no header declares them: mark {', '.join(sorted(hidden))} as EXPORTED")
    return unwritten


def _wanted(torch: Torch) -> set[str]:
    """The pretended functions that torch's libraries want."""
    libraries = [*torch.libraries.glob("libtorch*.so"), *torch.libraries.glob("lib*c10*.so")]
    libraries += torch.libraries.glob("libcaffe2_nvrtc.so")
    return {name for name in _names(libraries, "--dynamic", "--undefined-only") if WANTED.match(name)}


def _names(files: Iterable[Path], *options: str) -> set[str]:
    """The symbols of object files, without the versions of libraries."""
    listing = subprocess.run(["nm", *options, *files], capture_output=True, text=True, check=True).stdout
    lines = (line.split() for line in listing.splitlines())
    return {words[-1].partition("@")[0] for words in lines if len(words) >= 2}


def _driver_functions(headers: Path) -> list[str]:
    """All that the driver API has, by the names without versions by which it is asked for them."""
    return sorted(set(re.findall(r"CUresult CUDAAPI\s+(cu[A-Z]\w+)\(", (headers / "cuda.h").read_text())))


def _unwritten(wanted: list[str], driver: list[str]) -> str:
    """The C of the functions that nobody has written."""
    table = ["struct unwritten { const char *name; void *function; };", "const struct unwritten"]
    table += [
        "unwritten_driver_functions[] = {",
        *(f'    {{"{name}", {name}_}},' for name in driver),
        "    {0, 0},",
        "};",
    ]
    functions = [f"RETURNS_SUCCESS({name})" for name in wanted] + [f"NOT_SUPPORTED({name})" for name in driver]
    return UNWRITTEN + "\n".join([*functions, *table]) + "\n"


def _compile(source: Path, folder: Path, options: list[str]) -> Path:
    made = folder / f"{source.stem}.o"
    _run(["cc", *options, "-c", source, "-o", made])
    return made


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise BuildError(f"the C compiler could not make {command[-1]}")
