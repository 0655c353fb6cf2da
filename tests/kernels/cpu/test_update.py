"""The compiled update and norm: against torch's own, bit for bit where it has the same order, and against float64."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compiled import needs_compiled
from fastft_kernels.cpu import library, update
from torch import Tensor

from fastft.engines.optim import BETAS, EPSILON, CpuAdamW

SIZES = (1, 15, 64, 4096 + 48, 3 * (1 << 16) + 16)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pieces_of(
    gradient_dtype: torch.dtype, *, has_copy: bool, seed: int = 0, sizes: tuple[int, ...] = SIZES
) -> list[update.Piece]:
    generator = torch.Generator().manual_seed(seed)
    random = functools.partial(torch.randn, generator=generator)
    return [
        update.Piece(
            weight=random(n),
            gradient=(0.01 * random(n)).to(gradient_dtype),
            mean=0.01 * random(n),
            square=1e-4 * random(n).square(),
            copy=torch.zeros(n, dtype=torch.bfloat16) if has_copy else None,
            step=3 + number,
            weight_decay=0.1 * (number % 2),
        )
        for number, n in enumerate(sizes)
    ]


def updated(pieces: list[update.Piece], scale: float = 1.0) -> list[update.Piece]:
    update.adamw(pieces, lr=1e-2, betas=BETAS, epsilon=EPSILON, scale=scale)
    return pieces


def by_torch(pieces: list[update.Piece], scale: float, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    results = []
    for piece in pieces:
        w, m, v = (t.to(dtype, copy=True) for t in (piece.weight, piece.mean, piece.square))
        torch._fused_adamw_(
            [w], [piece.gradient.to(dtype) * scale], [m], [v], [], [torch.tensor(float(piece.step))],
            lr=1e-2, beta1=BETAS[0], beta2=BETAS[1], weight_decay=piece.weight_decay, eps=EPSILON, amsgrad=False,
            maximize=False,
        )  # fmt: skip
        results.append((w, m, v))
    return results


@needs_compiled
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("has_copy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_is_torchs(dtype: torch.dtype, has_copy: bool, scale: float) -> None:
    """Bit for bit but for what torch's vectors leave over; all within two roundings of float64."""
    given = pieces_of(dtype, has_copy=has_copy)
    before = [(p.weight.clone(), p.mean.clone(), p.square.clone()) for p in given]
    expected, exact = (by_torch(given, scale, kind) for kind in (torch.float32, torch.float64))
    for piece, wanted, true, old in zip(updated(given, scale), expected, exact, before, strict=True):
        whole = piece.weight.numel() // 64 * 64
        for got, want, value, was in zip((piece.weight, piece.mean, piece.square), wanted, true, old, strict=True):
            assert torch.equal(got[:whole], want[:whole])
            assert ((got - value).abs() <= rounding(value, was)).all()
        if has_copy:
            assert piece.copy is not None
            assert torch.equal(piece.copy, piece.weight.bfloat16())


def rounding(value: Tensor, was: Tensor) -> Tensor:
    """Four float32 roundings of what is added up: the value before, and what was added to it."""
    return 4 * torch.finfo(torch.float32).eps * (was.abs() + (value - was).abs())


@needs_compiled
def test_the_limit_rejects_a_step_of_another_count() -> None:
    one, other = pieces_of(torch.float32, has_copy=False), pieces_of(torch.float32, has_copy=False)
    other[-1].step += 1
    was = one[-1].weight.clone()
    updated(one), updated(other)
    apart = (one[-1].weight - other[-1].weight).abs()
    assert (apart > 10 * rounding(one[-1].weight, was)).float().mean() > 0.9


@needs_compiled
def test_any_number_of_threads_gives_the_same_bits(threads: None) -> None:
    found, norms = [], set()
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        given = pieces_of(torch.bfloat16, has_copy=True)
        norms.add(update.norm([piece.gradient for piece in given]))
        found.append(updated(given))
    assert len(norms) == 1
    for others in found[1:]:
        for piece, first in zip(others, found[0], strict=True):
            assert torch.equal(piece.weight, first.weight)
            assert torch.equal(piece.mean, first.mean)
            assert torch.equal(piece.square, first.square)


@needs_compiled
def test_copies_are_rounded_as_torch_rounds() -> None:
    """Ties, subnormals, what overflows to infinity, and what is no number: through an update that changes nothing."""
    bits = torch.arange(-(1 << 31), 1 << 31, 65_537 * 7, dtype=torch.int64).to(torch.int32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x7FC00001, 1, -(1 << 31)], dtype=torch.int32)
    weight = torch.cat([bits, ties]).view(torch.float32)
    zeros = [torch.zeros_like(weight) for _ in range(3)]
    piece = update.Piece(weight.clone(), *zeros, torch.zeros_like(weight, dtype=torch.bfloat16), 1, 0.0)
    updated([piece])
    assert piece.copy is not None
    numbers = ~weight.isnan()
    assert torch.equal(piece.copy[numbers], weight.bfloat16()[numbers])
    assert piece.copy[~numbers].isnan().all()


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_float64(dtype: torch.dtype) -> None:
    """Where one sum in float32 is 0.3% off."""
    generator = torch.Generator().manual_seed(0)
    gradients = [(1e-3 * torch.randn(n, generator=generator)).to(dtype) for n in (5_000_001, 7, 65_536)]
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert update.norm(gradients) == pytest.approx(exact, rel=1e-7)
    assert update.norm([]) == 0
    assert math.isnan(update.norm([torch.tensor([1.0, math.nan])]))
    assert math.isinf(update.norm([torch.tensor([1.0, math.inf])]))


@needs_compiled
def test_what_there_is_no_code_for_is_refused() -> None:
    (piece,) = pieces_of(torch.float32, has_copy=True, sizes=(64,))
    for name, value in (
        ("weight", piece.weight.double()),
        ("gradient", piece.gradient.half()),
        ("copy", piece.weight.clone()),
        ("mean", piece.mean[:32]),
        ("gradient", torch.zeros(128)[::2]),
    ):
        right = getattr(piece, name)
        setattr(piece, name, value)
        with pytest.raises(ValueError, match="expected"):
            updated([piece])
        setattr(piece, name, right)


@pytest.mark.parametrize("by", ["torch", pytest.param("compiled", marks=needs_compiled)])
def test_weights_that_are_no_piece_of_memory_are_refused(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not updated in a copy that nobody sees."""
    if by == "torch":
        monkeypatch.setattr(library, "why_not", lambda: "it is switched off")
    weight = torch.nn.Parameter(torch.ones(4, 6).t())
    weight.grad = torch.ones(6, 4)
    optimizer = CpuAdamW([{"params": [weight], "weight_decay": 0.0}], None, lr=1e-2)
    with pytest.raises((RuntimeError, ValueError), match=r"view|contiguous"):
        optimizer.step()


REPORTS = "from fastft_kernels.cpu import library; print(library.why_not())"


def reported(script: str = REPORTS, **environment: str) -> str:
    given = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", script], env=given, capture_output=True, text=True, check=True).stdout


def test_without_a_compiler_it_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 1 && exit 0\necho 'no such flag' >&2; exit 1\n")
    broken.chmod(0o755)
    script = """
import os
from fastft_kernels.cpu import library, update
for change in ({"FASTFT_COMPILED": "0"}, {"CC": "no-such-compiler"}, {"CC": os.environ["BROKEN"]}):
    library._built.cache_clear()
    os.environ.pop("FASTFT_COMPILED", None)
    os.environ.update(change)
    print(library.why_not())
"""
    switched_off, absent, failed = reported(
        script, BROKEN=str(broken), XDG_CACHE_HOME=str(tmp_path / "cache")
    ).splitlines()
    assert "FASTFT_COMPILED is 0" in switched_off
    assert "no C compiler" in absent
    assert "no such flag" in failed


@needs_compiled
def test_a_cache_that_cannot_be_written_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert reported(XDG_CACHE_HOME=str(tmp_path / "file")) == "None\n"
    assert reported(XDG_CACHE_HOME=str(tmp_path / "cache")) == "None\n"
    (made,) = (tmp_path / "cache/fastft_kernels").iterdir()
    assert made.suffix == ".so"


@needs_compiled
def test_without_openmp_threads_of_our_own_do_it(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch's OpenMP library lacks GNU's names."""
    torch.set_num_threads(3)
    gradients = [torch.ones(1 << 18)]
    without = dataclasses.replace(library._built()[0], openmp=None)
    monkeypatch.setattr(library, "_built", lambda: (without, None))
    assert update.norm(gradients) == 512
    assert library._threads.cache_info().currsize == 1
