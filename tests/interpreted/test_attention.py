from __future__ import annotations

import sys
from typing import Any

import fastft_kernels
import pytest
import torch
from fastft_kernels import plan_attention
from mutants import mutant
from proofs import Run, assert_right, assert_same_bits, drawn, is_wrong, opcheck, results
from torch import Tensor

kernels = sys.modules["fastft_kernels.attention"]
Trie = list[tuple[int, list[Any]]]


def until_of(trie: Trie, begin: int = 0) -> list[int]:
    """`visible_until` of segments in depth-first order: each is its length and the segments that continue it."""
    found: list[int] = []
    for length, children in trie:
        at = begin + len(found)
        inner = until_of(children, at + length)
        found += [at + length + len(inner)] * length + inner
    return found


def documents(*lengths: int) -> Trie:
    return [(length, []) for length in lengths]


SHAPES: dict[str, Trie] = {
    "one token": documents(1),
    "63, causal": documents(63),
    "257, causal": documents(257),
    "documents": documents(17, 1, 40, 1, 1, 70),
    "prefix of 1": [(1, documents(20, 33, 5))],
    "prefix of 24": [(24, documents(33, 41, 1, 20))],
    "prefix of 32": [(32, documents(33, 33, 33))],
    "prefix of 40, two groups": [(40, documents(20, 30)), (40, documents(9, 25))],
    "three levels": [(10, [(20, documents(5, 7)), (3, [(30, documents(1, 2, 8))]), (4, [])]), (6, [])],
}


def inputs(trie: Trie, H: int = 2, D: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """q, k and v as views of one tensor, as a model has them."""
    until = torch.tensor(until_of(trie), dtype=torch.int32)
    qkv = drawn(len(until), 3, H, D, dtype=dtype)
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(1))
    return {"q": q, "k": k, "v": v, "visible_until": until}


def run(q: Tensor, k: Tensor, v: Tensor, until: Tensor, *rest: Tensor, impl: Any, **options: Any) -> Tensor:
    out: Tensor = fastft_kernels.attention(q, k, v, until, q_rows=rest[0] if rest else None, impl=impl, **options)
    return out


def with_rows(made: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    q = made["q"].detach()[rows].requires_grad_()
    return {**made, "q": q, "q_rows": torch.tensor(rows)}


def test_the_tries_are_tries() -> None:
    assert until_of([(2, documents(1, 2)), (1, [])]) == [5, 5, 3, 5, 5, 6]


@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_right(run, inputs(SHAPES[shape], H=1 if "257" in shape else 2, dtype=dtype))


@pytest.mark.parametrize("D", [32, 64, 128])
def test_head_dims_and_fp16(D: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_right(run, inputs(SHAPES["prefix of 24"], H=1, D=D, dtype=dtype))


@pytest.mark.parametrize(
    "rows",
    [
        [0],
        [118],
        [3, 3, 3, 30, 57, 58, 59, 118],
        list(range(100, 119)),
        sorted([*range(0, 119, 2), *range(24, 90), 118, 118, 118]),  # 129 queries
    ],
)
def test_some_queries(rows: list[int]) -> None:
    made = with_rows(inputs(SHAPES["prefix of 24"], H=1), rows)
    assert_right(run, made)
    assert_right(
        run, {name: x.detach().bfloat16().requires_grad_() if name in "qkv" else x for name, x in made.items()}
    )


def test_no_query() -> None:
    made = with_rows(inputs(SHAPES["prefix of 24"]), [])
    found = results(run, made, "triton")
    assert found["output 0"].shape == (0, 2, 16)
    assert not found["d k"].any()


@pytest.mark.parametrize("rounded", [False, True])
def test_a_long_range_in_chunks(rounded: bool) -> None:
    """Keys that many queries see: their gradients are sums of slots."""
    made = inputs([(20, documents(33, 33, 33, 33))], H=1)
    plan = plan_attention(made["visible_until"], chunk=48, round_sizes=rounded, most_slots=16)
    assert plan.slots > 2

    def in_chunks(*x: Tensor, impl: Any) -> Tensor:
        return run(*x, impl=impl, plan=plan)

    assert_same_bits(in_chunks, made, assert_right(in_chunks, made))


def test_padding_of_rounded_packs_sees_itself() -> None:
    until = torch.tensor([*until_of(SHAPES["documents"]), *range(131, 145)], dtype=torch.int32)
    q, k, v = (drawn(144, 1, 16, seed=seed) for seed in range(3))
    plan = plan_attention(until, round_sizes=True)
    assert_right(lambda *x, impl: run(*x, impl=impl, plan=plan), {"q": q, "k": k, "v": v, "visible_until": until})


def test_one_example_changes_no_bit_of_another() -> None:
    made = inputs(SHAPES["prefix of 24"])
    before = run(*made.values(), impl="triton")
    for name in ("k", "v", "q"):
        made[name] = made[name].detach().clone()
        made[name][57:98] += 1  # the second document
    after = run(*made.values(), impl="triton")
    same = (before == after).flatten(1).all(dim=1)
    assert same[:57].all()
    assert same[98:].all()
    assert not same[57:98].any()


def test_the_log_sum_exp() -> None:
    made = with_rows(inputs(SHAPES["three levels"]), [0, 5, 40, 40, 85])
    found = fastft_kernels.attention(*list(made.values())[:4], q_rows=made["q_rows"], return_lse=True, impl="triton")
    for impl in ("reference", "torch"):
        expected = fastft_kernels.attention(*list(made.values())[:4], q_rows=made["q_rows"], return_lse=True, impl=impl)
        assert torch.allclose(found[1], expected[1], atol=1e-6)
        assert torch.allclose(found[0], expected[0], atol=1e-6)


def test_scale_layouts_and_gradients_that_are_not_asked_for() -> None:
    made = inputs(SHAPES["documents"])
    assert_right(lambda *x, impl: run(*x, impl=impl, scale=0.5), made)
    assert_right(run, {**made, "k": made["k"].detach()})
    assert_right(run, {name: x.detach() for name, x in made.items()})
    apart = made["q"].detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    assert_right(lambda *x, impl: run(*x, impl=impl).transpose(0, 2), {**made, "q": apart})


def test_the_same_bits_each_time() -> None:
    assert_same_bits(run, inputs(SHAPES["prefix of 24"], H=1, dtype=torch.bfloat16))


def test_the_registered_operations() -> None:
    made = inputs(documents(5, 3), H=1)
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
    made = inputs([(40, documents(30, 35, 40))], H=1)
    plan = plan_attention(made["visible_until"], chunk=64)
    assert plan.slots

    def chunked(*x: Tensor, impl: Any) -> Tensor:
        return run(*x, impl=impl, plan=plan)

    assert not is_wrong(chunked, made)
    return chunked, made


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("_forward_step", "n[None, :] <= position", "n[None, :] < position"),  # a token does not see itself
        ("_forward_step", "position[:, None] < until", "position[:, None] <= until"),  # one token too far
        ("_dq_step", "position[:, None] < until", "position[:, None] <= until"),
        ("attention_dkv", "position[None, :] < until", "position[None, :] <= until"),
        ("attention_forward", "range(masked, end)", "range(masked, end - 1)"),
        ("attention_dq", "range(begin, masked)", "range(begin, masked - 1)"),
        ("attention_dq", "dq * scale", "dq"),
        ("attention_dkv", "range(first * J, end * J, BQ)", "range(first * J, end * J - BQ, BQ)"),
        ("attention_dkv", "dk *= scale", "dk *= 1.0"),
        ("attention_sum", "range(begin, end)", "range(begin, end - 1)"),
    ],
)
def test_planted_faults_fail(chunked: tuple[Run, dict[str, Tensor]], kernel: str, old: str, new: str) -> None:
    with mutant(getattr(kernels, kernel), old, new):
        assert is_wrong(*chunked)
