"""Grouped queries, and head dims that are no power of two: what the attention kernels add to `test_attention`."""

from __future__ import annotations

import sys
from typing import Any

import fastft_kernels
import pytest
import torch
from fastft_kernels import plan_attention
from fastft_kernels.attention_decode import attention_decode
from mutants import mutant
from proofs import Run, assert_right, assert_same_bits, drawn, is_wrong, opcheck, results
from torch import Tensor

kernels = sys.modules["fastft_kernels.attention"]
decode_kernels = sys.modules["fastft_kernels.attention_decode"]

PREFIX, DOCUMENTS = 24, (33, 1, 20)
T = PREFIX + sum(DOCUMENTS)


def until() -> Tensor:
    """A prefix that three documents share."""
    ends = PREFIX + torch.tensor(DOCUMENTS).cumsum(0)
    return torch.cat([torch.full((PREFIX,), T), ends.repeat_interleave(torch.tensor(DOCUMENTS))]).to(torch.int32)


def inputs(H: int, G: int, D: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """q, k and v as views of one tensor, as a product of their weights side by side gives them."""
    qkv = drawn(T, H + 2 * G, D, dtype=dtype)
    q, k, v = (x.detach().requires_grad_() for x in qkv.split([H, G, G], dim=1))
    return {"q": q, "k": k, "v": v, "visible_until": until()}


def run(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *rows: Tensor, impl: Any, **options: Any) -> Tensor:
    out: Tensor = fastft_kernels.attention(q, k, v, ends, q_rows=rows[0] if rows else None, impl=impl, **options)
    return out


@pytest.mark.parametrize(("H", "G"), [(4, 2), (3, 1), (6, 2)])
def test_groups_against_float64(H: int, G: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_right(run, inputs(H, G, dtype=dtype))


@pytest.mark.parametrize("D", [48, 80, 96, 256])
def test_head_dims_against_float64(D: int) -> None:
    for dtype in (torch.bfloat16, torch.float16) if D == 256 else (torch.float32, torch.bfloat16, torch.float16):
        assert_right(run, inputs(1, 1, D=D, dtype=dtype))


@pytest.mark.parametrize(("H", "G", "D"), [(2, 1, 80), (4, 2, 96), (2, 1, 256)])
def test_both(H: int, G: int, D: int) -> None:
    made = inputs(H, G, D=D, dtype=torch.bfloat16)
    plan = plan_attention(made["visible_until"], chunk=48)
    assert plan.slots
    assert_right(lambda *x, impl: run(*x, impl=impl, plan=plan), made)


def test_some_queries_and_none() -> None:
    made = inputs(6, 2)
    for rows in ([0], [3, 3, 3, 30, 57, 58, 77], list(range(1, T, 2))):
        q = made["q"].detach()[rows].requires_grad_()
        assert_right(run, {**made, "q": q, "q_rows": torch.tensor(rows)})
    nothing = results(
        run, {**made, "q": made["q"].detach()[:0], "q_rows": torch.tensor([], dtype=torch.int64)}, "triton"
    )
    assert nothing["output 0"].shape == (0, 6, 16)
    assert nothing["d k"].shape == (T, 2, 16)
    assert not nothing["d k"].any()


@pytest.mark.parametrize("rounded", [False, True])
def test_a_long_range_in_chunks(rounded: bool) -> None:
    made = inputs(4, 2)
    plan = plan_attention(made["visible_until"], chunk=20, round_sizes=rounded, most_slots=16)
    assert plan.slots > 2

    def in_chunks(*x: Tensor, impl: Any) -> Tensor:
        return run(*x, impl=impl, plan=plan)

    assert_same_bits(in_chunks, made, assert_right(in_chunks, made))


def test_each_group_is_what_copies_of_its_keys_give() -> None:
    """Bit for bit, forward and dQ: the same sums in the same order."""
    made = inputs(6, 2, dtype=torch.bfloat16)
    copies = {name: made[name].detach().repeat_interleave(3, dim=1).requires_grad_() for name in "kv"}
    grouped, apart = (results(run, x, "triton") for x in (made, {**made, **copies}))
    for name in ("output 0", "d q"):
        assert torch.equal(grouped[name], apart[name])


def test_one_group_changes_no_bit_of_another() -> None:
    made = inputs(4, 2)
    before = run(*made.values(), impl="triton")
    for name in ("k", "v"):
        made[name] = made[name].detach().clone()
        made[name][:, 1] += 1
    after = run(*made.values(), impl="triton")
    assert torch.equal(before[:, :2], after[:, :2])
    assert not (before[1:, 2:] == after[1:, 2:]).all(dim=-1).any()


def test_the_log_sum_exp() -> None:
    made = list(inputs(4, 2).values())
    found, expected = (run(*made, impl=impl, return_lse=True) for impl in ("triton", "reference"))
    assert torch.allclose(found[1], expected[1], atol=1e-6)


def test_the_registered_operations() -> None:
    made = inputs(2, 1, D=48)
    plan = plan_attention(made["visible_until"])
    lists = (plan.query_tiles, plan.key_tiles, plan.items, plan.sums)
    sizes = [plan.BM, plan.BN, plan.BQ, plan.BK, plan.slots]
    opcheck(kernels._forward, *made.values(), None, *lists, sizes, 0.25)
    plain = [x.detach() for x in made.values()]
    out, lse = kernels._forward(*plain, None, *lists, sizes, 0.25)
    opcheck(kernels._backward, out, *plain[:3], out, lse, plain[3], None, *lists, sizes, 0.25)


@pytest.fixture(scope="module")
def chunked() -> tuple[Run, dict[str, Tensor]]:
    """What is right without a planted fault."""
    made = inputs(6, 2, D=48)
    plan = plan_attention(made["visible_until"], chunk=64)
    assert plan.slots

    def chunked(*x: Tensor, impl: Any) -> Tensor:
        return run(*x, impl=impl, plan=plan)

    assert not is_wrong(chunked, made)
    return chunked, made


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("attention_forward", "h // J", "h % (H // J)"),  # heads the wrong way round
        ("attention_forward", "h // J", "0"),
        ("attention_dq", "h // J", "h % (H // J)"),
        ("attention_dkv", "g * J + row % J", "row % J * G + g"),
        ("attention_dkv", "range(first * J, end * J, BQ)", "range(first * J, end * (J - 1), BQ)"),
        ("attention_dkv", "g * J + row % J", "g * J + row % (J - 1)"),  # a head left out, another twice
        ("attention_sum", "* G + g)", "* G + G - 1 - g)"),
        ("_inside", "< D)[None, :]", "< D - 1)[None, :]"),
    ],
)
def test_planted_faults_fail(chunked: tuple[Run, dict[str, Tensor]], kernel: str, old: str, new: str) -> None:
    with mutant(getattr(kernels, kernel), old, new):
        assert is_wrong(*chunked)


def cached(H: int, G: int, D: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Unused places of the caches hold NaN."""
    lengths = [3, 70, 40]
    made = {
        "q": drawn(3, H, D, dtype=dtype, grad=False),
        "k_cache": drawn(3, 70, G, D, dtype=dtype, seed=1, grad=False),
        "v_cache": drawn(3, 70, G, D, dtype=dtype, seed=2, grad=False),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "prefix_k": drawn(33, G, D, dtype=dtype, seed=3, grad=False),
        "prefix_v": drawn(33, G, D, dtype=dtype, seed=4, grad=False),
    }
    for n, length in enumerate(lengths):
        made["k_cache"][n, length:] = made["v_cache"][n, length:] = torch.nan
    return made


def decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, pk: Tensor, pv: Tensor, *, impl: Any) -> Tensor:
    return attention_decode(q, k, v, lengths, prefix_k=pk, prefix_v=pv, impl=impl)


@pytest.mark.parametrize(("H", "G", "D"), [(4, 2, 16), (3, 1, 48), (2, 2, 80), (2, 1, 96), (2, 1, 256)])
def test_decode_against_float64(H: int, G: int, D: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_right(decode, cached(H, G, D, dtype))


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("attention_decode_forward", "h // HEADS_PER_KEY", "h % (tl.num_programs(1) // HEADS_PER_KEY)"),
        ("attention_decode_forward", "g * prefix_head_v", "h * prefix_head_v % (2 * prefix_head_v)"),
        ("_decode_step", "(d < D)", "(d < D - 1)"),
    ],
)
def test_planted_faults_of_decode_fail(kernel: str, old: str, new: str) -> None:
    made = {name: x.nan_to_num(3.0) for name, x in cached(4, 2, 48).items()}
    assert not is_wrong(decode, made)
    with mutant(getattr(decode_kernels, kernel), old, new):
        assert is_wrong(decode, made)
