"""The compiled library's file, and tensors that C must not be given the address of."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import fastft_kernels
import pytest
import torch
from compiled import needs_compiled
from fastft_kernels.cpu import library
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

pytestmark = needs_compiled

_ASK = """
from pathlib import Path
from fastft_kernels.cpu import library
library._SOURCES = [path for path in library._SOURCES if path.stem in ("threads", "best")]  # the fastest to compile
print(library.why_not())
"""
_CUT_OFF = """
(kept,) = library._own_folder().iterdir()
whole = kept.read_bytes()
kept.unlink()  # the process has it in its memory
kept.write_bytes(whole[: len(whole) // 2])
assert not library._is_whole(kept)
library._built.cache_clear()
print(library.why_not())
assert library._is_whole(kept)
assert [*library._own_folder().iterdir()] == [kept]
"""


def _why_not(cache: Path, then: str = "", **environment: str) -> str:
    """What a process of its own says, with its libraries in a folder."""
    given = {name: value for name, value in os.environ.items() if name != "CC"}
    done = subprocess.run(
        [sys.executable, "-c", _ASK + then],
        env={**given, "XDG_CACHE_HOME": str(cache), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_file_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    assert _why_not(tmp_path, _CUT_OFF) == "None\nNone"


def test_what_killed_compilers_left_is_removed(tmp_path: Path) -> None:
    left, of_another = (tmp_path / "fastft_kernels" / name for name in (".left", ".of_another"))
    for folder in (left, of_another):
        folder.mkdir(parents=True)
        (folder / "best.o").write_bytes(b"half")
    os.utime(left, (0, 0))
    assert _why_not(tmp_path) == "None"
    assert not left.exists()
    assert of_another.exists()


def test_a_compiler_with_arguments_and_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "its name" / "cc"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && printf "\\377\\n" && exit\nexec cc "$@"\n')
    compiler.chmod(stat.S_IRWXU)
    monkeypatch.setenv("CC", str(compiler))
    assert library._compiler() == [str(compiler)]
    monkeypatch.setenv("CC", "nowhere -x")
    assert library._compiler() is None
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    of_all = {"CC": f"'{compiler}' -DANYTHING", "TMPDIR": str(temporary)}
    assert _why_not(Path("/dev/null"), **of_all) == "None"
    assert not [*temporary.iterdir()]


class _Elsewhere(Tensor):
    """A tensor whose numbers are another one's."""

    @staticmethod
    def __new__(cls, of: Tensor) -> _Elsewhere:
        made: _Elsewhere = Tensor._make_wrapper_subclass(cls, of.shape, strides=of.stride(), dtype=of.dtype)
        made.of = of
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        inner = [x.of if isinstance(x, _Elsewhere) else x for x in args]
        return function(*inner, **(kwargs or {}))


def test_what_has_no_address_goes_through_torch() -> None:
    x, bias = torch.randn(3, 20), torch.randn(20)
    right = F.gelu(x + bias, approximate="tanh")
    for given, added in ((_Elsewhere(x), bias), (x, _Elsewhere(bias))):
        torch.testing.assert_close(fastft_kernels.gelu(given, added), right)
    negative = torch.complex(x, -x).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(fastft_kernels.gelu(negative, bias), right)
    q = negative.view(3, 2, 10)
    until = torch.full((3,), 3)
    expected = fastft_kernels.attention(*3 * [q.clone()], until)
    torch.testing.assert_close(fastft_kernels.attention(q.clone(), q, q.clone(), until), expected)
    with pytest.raises(ValueError, match="negative"):
        fastft_kernels.gelu(negative, bias, impl="compiled")
    wanted = []
    for flow in (negative, negative.clone()):  # which flows back as it is
        y = x.clone().requires_grad_()
        fastft_kernels.gelu(y, bias).backward(flow)
        wanted.append(y.grad)
    assert torch.equal(*wanted)


def test_what_traces_operators_sees_them() -> None:
    x, bias = torch.randn(3, 20), torch.randn(20)
    traced = make_fx(lambda given: fastft_kernels.gelu(given, bias))(torch.randn(3, 20))
    torch.testing.assert_close(traced(x), fastft_kernels.gelu(x, bias))
    with FakeTensorMode():
        fake = torch.empty(3, 20)
        assert fastft_kernels.layer_norm(fake, torch.empty(20), torch.empty(20)).shape == (3, 20)
    slope = torch.func.grad(lambda given: fastft_kernels.gelu(given, bias).sum())(x)
    given = x.clone().requires_grad_()
    fastft_kernels.gelu(given, bias).sum().backward()
    torch.testing.assert_close(slope, given.grad)


def test_weights_that_lie_apart() -> None:
    x, apart = torch.randn(3, 20), torch.randn(40)[::2]
    torch.testing.assert_close(fastft_kernels.gelu(x, apart), fastft_kernels.gelu(x, apart.clone()))
    norm = fastft_kernels.layer_norm(x, apart, apart)
    torch.testing.assert_close(norm, fastft_kernels.layer_norm(x, apart.clone(), apart.clone()))
    torch.testing.assert_close(fastft_kernels.rms_norm(x, apart), fastft_kernels.rms_norm(x, apart.clone()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_another_ignored_target_leaves_the_usual_one_wrong(reduction: str) -> None:
    hidden, head, targets = torch.randn(3, 8), torch.randn(9, 8), torch.tensor([1, -100, -1])
    with pytest.raises(IndexError, match="-100"):
        fastft_kernels.linear_cross_entropy(
            hidden, head, targets, rows=torch.arange(3), ignore_index=-1, reduction=reduction, impl="compiled"
        )


def test_intervals_that_int32_cannot_hold() -> None:
    q = torch.randn(4, 1, 8)
    until = torch.tensor([4, 4 - 2**32, 4, 4 + 2**32])
    expected = fastft_kernels.attention(q, q, q, until, impl="reference")
    torch.testing.assert_close(fastft_kernels.attention(q, q, q, until, impl="compiled"), expected)
