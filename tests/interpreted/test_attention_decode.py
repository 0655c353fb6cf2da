from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from fastft_kernels.attention_decode import attention_decode
from mutants import mutant
from proofs import assert_right, assert_same_bits, drawn, is_wrong, opcheck
from torch import Tensor

kernels = sys.modules["fastft_kernels.attention_decode"]


def inputs(
    lengths: list[int], S: int, P: int = 0, H: int = 2, D: int = 16, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Unused places of the caches hold NaN."""
    N = len(lengths)
    made = {
        "q": drawn(N, H, D, dtype=dtype, grad=False),
        "k_cache": drawn(N, S, H, D, dtype=dtype, seed=1, grad=False),
        "v_cache": drawn(N, S, H, D, dtype=dtype, seed=2, grad=False),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
    }
    for n, length in enumerate(lengths):
        made["k_cache"][n, length:] = made["v_cache"][n, length:] = torch.nan
    if P:
        for seed, name in ((3, "prefix_k"), (4, "prefix_v")):
            made[name] = drawn(P, H, D, dtype=dtype, seed=seed, grad=False)
    return made


def run(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *prefix: Tensor, impl: Any, **options: Any) -> Tensor:
    names = dict(zip(("prefix_k", "prefix_v"), prefix, strict=False))
    out: Tensor = attention_decode(q, k, v, lengths, **names, impl=impl, **options)
    return out


@pytest.mark.parametrize("P", [0, 1, 64, 70])
def test_against_float64(P: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_right(run, inputs([1, 64, 65, 130], S=131, P=P, H=1 + (dtype == torch.float32), dtype=dtype))


@pytest.mark.parametrize("D", [32, 64, 128])
def test_head_dims(D: int) -> None:
    assert_right(run, inputs([3, 40], S=40, P=33, H=1, D=D, dtype=torch.bfloat16))


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_what_sees_nothing_is_zero(impl: str) -> None:
    assert not run(*inputs([0, 0], S=4).values(), impl=impl).any()
    assert not run(*inputs([0, 0], S=0).values(), impl=impl).any()
    made = inputs([0, 2], S=4, P=3)
    before = [x.clone() for x in made.values()]
    out = run(*made.values(), impl=impl)
    weights = (torch.einsum("hd,phd->hp", made["q"][0], made["prefix_k"]) / 4).softmax(dim=-1)
    assert torch.allclose(out[0], torch.einsum("hp,phd->hd", weights, made["prefix_v"]), atol=1e-6)
    assert all(
        torch.equal(
            x,
            y,
        )
        or x.isnan().any()
        for x, y in zip(before, made.values(), strict=True)
    )
    assert run(*(x[:0] for x in inputs([1], S=2).values()), impl=impl).shape == (0, 2, 16)


def test_layouts_and_scale() -> None:
    made = inputs([2, 5], S=6, P=4)
    by_head = {
        name: x.transpose(-3, -2).contiguous().transpose(-3, -2) if x.ndim > 2 else x.long() for name, x in made.items()
    }
    columns_apart = {name: x.transpose(-2, -1).contiguous().transpose(-2, -1) for name, x in made.items() if x.ndim > 2}
    assert not by_head["k_cache"].is_contiguous()
    expected = run(*made.values(), impl="reference", scale=0.7)
    for given in (made, by_head, {**made, **columns_apart}):
        for impl in ("triton", "torch"):
            assert torch.allclose(run(*given.values(), impl=impl, scale=0.7), expected, atol=1e-6)


def test_the_same_bits_each_time() -> None:
    assert_same_bits(run, inputs([3, 70], S=70, P=40, dtype=torch.bfloat16))


def test_other_sequences_change_no_bit() -> None:
    made = inputs([3, 70, 5], S=70, P=40)
    before = run(*made.values(), impl="triton")
    for name in ("q", "k_cache", "v_cache"):
        made[name][1] += 1
    after = run(*made.values(), impl="triton")
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


def test_the_registered_operation() -> None:
    made = list(inputs([2, 0], S=3, P=2).values())
    made[1:3] = [x.nan_to_num() for x in made[1:3]]
    opcheck(kernels._decode, *made, 0.25)
    opcheck(kernels._decode, *made[:4], None, None, 0.25)


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("_decode_step", "tl.where(inside,", "tl.where(s <= end,"),  # one place too far
        ("_decode_step", "out * shrink", "out"),
        ("attention_decode_forward", "range(0, length, BN)", "range(0, length - BN, BN)"),  # the last keys
        ("attention_decode_forward", "range(0, P, BN)", "range(BN, P, BN)"),
        ("attention_decode_forward", "n * sequence_v", "0 * sequence_v"),
    ],
)
def test_planted_faults_fail(kernel: str, old: str, new: str) -> None:
    made = inputs([100, 70], S=110, P=70, H=1)
    made["k_cache"], made["v_cache"] = (made[name].nan_to_num(3.0) for name in ("k_cache", "v_cache"))
    made["k_cache"] *= 3  # the largest score comes late
    assert not is_wrong(run, made)
    with mutant(getattr(kernels, kernel), old, new):
        assert is_wrong(run, made)
