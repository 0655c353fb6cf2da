from __future__ import annotations

import os
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastft_kernels import support, tables
from fastft_kernels.cpu import library

CUDA = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
"""What the choice looks at of a tensor on a GPU."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the compute capability of a GPU that is not there."""

    def of(major: int, minor: int) -> None:
        support._say_once.cache_clear()
        support._arch_of_gpu.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (major, minor))

    yield of
    support._arch_of_gpu.cache_clear()


def test_a_supported_gpu_takes_triton(gpu: Any) -> None:
    gpu(9, 0)
    assert support.choose("auto", CUDA) == "triton"
    assert support.choose("torch", CUDA) == "torch"
    assert support.arch_of(CUDA) == "sm_90"


def test_an_old_gpu_takes_torch_and_says_so_once(gpu: Any) -> None:
    gpu(7, 5)
    with pytest.warns(UserWarning, match=r"capability 7\.5, and the kernels need 8\.0"):
        assert support.choose("auto", CUDA) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert support.choose("auto", CUDA) == "torch"
    with pytest.raises(ValueError, match=r"impl=\"triton\", which cannot run here: .*7\.5"):
        support.choose("triton", CUDA)


def test_what_the_kernels_do_not_take_goes_to_torch(gpu: Any) -> None:
    gpu(9, 0)
    assert support.choose("auto", SimpleNamespace(device=CUDA.device, dtype=torch.float64)) == "torch"
    with pytest.raises(ValueError, match=r"got torch\.float64, expected float32"):
        support.check_dtype(torch.zeros(1, dtype=torch.float64))


def test_on_a_cpu() -> None:
    x = torch.zeros(1)
    assert support.choose("auto", x) == "torch"
    with pytest.raises(ValueError, match="Triton needs a GPU"):
        support.choose("triton", x)
    with pytest.raises(ValueError, match="expected one of auto, triton, compiled, torch, reference"):
        support.choose("cuda", x)
    with support.offline("sm_86"):  # launches are compiled there, not run
        assert support.choose("triton", x) == "triton"
        assert support.arch_of(x) == "sm_86"


def test_compiled_code_is_for_what_it_is_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "why_not", lambda: None)
    x = torch.zeros(1)
    assert support.choose("auto", x, has_compiled=True) == "compiled"
    assert support.choose("auto", x.double(), has_compiled=True) == "torch"
    with pytest.raises(ValueError, match=r"takes float32 and bfloat16"):
        support.choose("compiled", x.double(), has_compiled=True)
    with pytest.raises(ValueError, match="not there in C"):
        support.choose("compiled", x)
    monkeypatch.setattr(library, "why_not", lambda: "there is no C compiler")
    assert support.choose("auto", x, has_compiled=True) == "torch"
    with pytest.raises(ValueError, match="no C compiler"):
        support.choose("compiled", x, has_compiled=True)


# Switched off where nothing can be compiled, or nobody wants it: what `why_not` says there has tests of its own.
@pytest.mark.skipif(
    os.name != "posix" or os.environ.get(library.SWITCH) == "0" or library._compiler() is None,
    reason="there is no C compiler, or it is switched off",
)
def test_where_there_is_a_compiler_there_is_compiled_code() -> None:
    """Its tests are skipped where there is none: C that does not compile would look like that."""
    assert library.why_not() is None


def test_tiles_are_those_of_the_architecture_then_of_its_family_then_the_default() -> None:
    ours = tables.tiles("logit_gradient", "sm_86", 2)
    assert tables.tiles("logit_gradient", "sm_89", 2) == ours
    assert tables.tiles("logit_gradient", "sm_80", 2) != ours
    assert tables.tiles("logit_gradient", "sm_90", 4) == tables.tiles("logit_gradient", "sm_80", 4)
    with pytest.raises(KeyError):
        tables.tiles("no such kernel", "sm_80")


@pytest.fixture
def matmul() -> Any:
    """torch's settings of float32 products, put back afterwards."""
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.allow_tf32 = False


def test_precision_follows_either_of_torchs_settings(matmul: Any) -> None:
    assert support.precision() == "ieee"
    matmul.allow_tf32 = True
    assert support.precision() == "tf32"
    matmul.allow_tf32 = False
    assert support.precision() == "ieee"
    torch.set_float32_matmul_precision("high")
    assert support.precision() == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert support.precision() == "ieee"


def test_precision_follows_the_newer_setting_where_the_older_one_raises(matmul: Any) -> None:
    matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        assert matmul.allow_tf32
    assert support.precision() == "tf32"
    matmul.fp32_precision = "ieee"
    assert support.precision() == "ieee"
    matmul.allow_tf32 = True  # whoever sets the older one is heard too
    assert support.precision() == "tf32"
