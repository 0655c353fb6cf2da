"""The C files of this folder as a library, and its functions run in torch's threads.

They are compiled where they are first asked for, in a few seconds, once for a machine's processor: the library is kept.
Where there is no compiler, or on Windows, every caller has a way through torch; `why_not` says it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SWITCH = "FASTFT_COMPILED"
"""At 0 there is no compiled code."""
_SOURCES = sorted(Path(__file__).parent.glob("*.c"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
_OF_PROCESSOR = {
    # gcc takes half of an AVX-512 register by itself, and then needs twice the time.
    "x86_64": ("-march=native", "-mprefer-vector-width=512"),
    "aarch64": ("-mcpu=native",),
    "arm64": ("-mcpu=native",),
}
_CONTRACTS = ("-ffp-contract=fast",)
_OF_FILE = {"update.c": ("-ffp-contract=off",)}
_SECONDS = 120
_DIGEST = hashlib.sha256().digest_size


def _own_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastft_kernels"


_folder: Path | None = None


def keep_in(folder: Path) -> None:
    """Has libraries kept in a folder, in place of `$XDG_CACHE_HOME/fastft_kernels`. To be said before anything is asked
    for."""
    global _folder
    _folder = folder


def why_not() -> str | None:
    """Why there is no compiled code here; None where there is. The first call compiles it."""
    return _built()[1]


def run(name: str, arguments: ctypes.Structure, *, threads: int | None = None) -> None:
    """Runs a function of the library in several threads, each of which does its part of the work.

    Args:
        name: of a `Task`, see `common.h`.
        arguments: what it is given the address of.
        threads: how many at most; all of torch's where it is not said. One where the work is less than the few
            microseconds that it takes to wake the others.
    """
    library, task = _built()[0], _task(name)
    where, parts = ctypes.byref(arguments), torch.get_num_threads() if threads is None else threads
    if parts == 1:
        task(where, 0, 1)
    elif library.openmp is not None:
        library.of.fastft_in_threads(task, where, parts, *library.openmp)
    else:
        _in_threads_of_our_own(task, where, parts)


@functools.cache
def _task(name: str) -> Any:
    task = getattr(_built()[0].of, name)
    task.argtypes, task.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64], None
    return task


@dataclass(frozen=True, slots=True)
class _Library:
    """The functions, and where torch's OpenMP has its own: `GOMP_parallel` and the two that tell a thread's number."""

    of: Any
    openmp: tuple[ctypes.c_void_p, ...] | None


def _in_threads_of_our_own(task: Any, where: Any, parts: int) -> None:
    others = [_threads(os.getpid(), parts).submit(task, where, part, parts) for part in range(1, parts)]
    try:
        task(where, 0, parts)
    finally:  # also where Ctrl-C breaks in: nobody may see what threads still write to
        for other in others:
            other.result()


@functools.lru_cache(maxsize=1)
def _threads(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="fastft")


@functools.cache
def _built() -> tuple[Any, str | None]:
    """The library, or why there is none."""
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH} is 0"
    if os.name != "posix":
        return None, f"it is not made for {platform.system()}"
    compiler = _compiler()
    if compiler is None:
        return None, "there is no C compiler (cc, gcc or clang), or what CC names is not there"
    try:
        functions = _functions(compiler)
        functions.fastft_in_threads.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, *3 * [ctypes.c_void_p]]
        functions.fastft_in_threads.restype = None
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return None, f"{shlex.join(compiler)} did not compile it ({' '.join(said.split())[:200]})"
    return _Library(functions, _openmp()), None


def _openmp() -> tuple[ctypes.c_void_p, ...] | None:
    """Where torch's OpenMP library has what `threads.c` needs; None where it is not to be seen in this process."""
    everything = ctypes.CDLL(None)
    try:
        found = [getattr(everything, name) for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")]
    except AttributeError:
        return None
    return tuple(ctypes.cast(function, ctypes.c_void_p) for function in found)


def _compiler() -> list[str] | None:
    """What CC names, a path or a command with arguments; or the first one that there is."""
    named = os.environ.get("CC", "").strip()
    if shutil.which(named):
        return [named]
    commands = [_words(named)] if named else [["cc"], ["gcc"], ["clang"]]
    return next(([path, *rest] for name, *rest in commands if (path := shutil.which(name))), None)


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # a quotation mark without another: then it is no command
        return [command]


def _functions(compiler: list[str]) -> ctypes.CDLL:
    """The library, compiled unless it was kept.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be.
    """
    sources = [path.read_text(encoding="utf-8") for path in (*_HEADERS, *_SOURCES)]
    made_of = "\n".join([*sources, _said_by([*compiler, "--version"]), repr(_commands(compiler, Path())), _processor()])
    name = f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    folder = _own_folder() if _folder is None else _folder
    if _is_whole(folder / name):
        return ctypes.CDLL(str(folder / name))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        beside = Path(tempfile.mkdtemp(dir=folder, prefix="."))
    except OSError:  # nobody's cache to write: for this process alone
        beside = Path(tempfile.mkdtemp(prefix="fastft-"))
    try:
        made = _compiled(compiler, beside, name)
        if beside.parent == folder:
            made = made.replace(folder / name)  # at once, whoever else makes it at the same time
        return ctypes.CDLL(str(made))  # it stays in memory where its file goes
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Removes what was left by processes that were killed while they compiled."""
    for left in folder.glob(".*"):
        with contextlib.suppress(OSError):  # another process may do the same
            if left.is_dir() and time.time() - left.stat().st_mtime > 10 * _SECONDS:
                shutil.rmtree(left)


def _compiled(compiler: list[str], folder: Path, name: str) -> Path:
    made = folder / name
    with ThreadPoolExecutor(len(_SOURCES)) as pool:
        [*pool.map(_said_by, _commands(compiler, folder))]
    objects = [str(folder / f"{source.stem}.o") for source in _SOURCES]
    _said_by([*compiler, "-shared", *objects, "-o", str(made), "-lm"])
    digest = hashlib.sha256(made.read_bytes()).digest()
    with made.open("ab") as file:  # behind its end, where no loader looks
        file.write(digest)
    return made


def _is_whole(kept: Path) -> bool:
    """Whether a file is as it was made: loading what is cut off, by a full disk or a crash, ends the process."""
    try:
        content = kept.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def _commands(compiler: list[str], folder: Path) -> list[list[str]]:
    """What makes each file's object in a folder."""
    flags = (*_FLAGS, *_OF_PROCESSOR.get(platform.machine(), ()))
    return [
        [
            *compiler,
            *flags,
            *_OF_FILE.get(source.name, _CONTRACTS),
            "-c",
            str(source),
            "-o",
            str(folder / f"{source.stem}.o"),
        ]
        for source in _SOURCES
    ]


def _said_by(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=True
    ).stdout


def _processor() -> str:
    """What tells processors apart for which code is made: a folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    telling = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))
