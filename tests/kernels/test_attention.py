"""Attention outside the interpreter: its errors, its torch path beside the reference, and its relatives."""

from __future__ import annotations

from typing import Any

import fastft_kernels
import pytest
import torch
from fastft_kernels import plan_attention
from fastft_kernels.attention_decode import attention_decode
from fastft_kernels.attention_varlen import attention_varlen, visible_until_of
from torch import Tensor


def packed(T: int = 12, H: int = 2, D: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(T, H, D, generator=generator, dtype=dtype) for _ in range(3)]


UNTIL = torch.tensor([12, 12, 5, 5, 5, 9, 9, 9, 9, 12, 12, 12], dtype=torch.int32)  # a prefix of 2, three documents


@pytest.mark.parametrize("q_rows", [None, [0, 4, 4, 11]])
def test_the_log_sum_exp_of_the_torch_path(q_rows: list[int] | None) -> None:
    q, k, v = packed()
    rows = None if q_rows is None else torch.tensor(q_rows)
    q = q if rows is None else q[rows]
    found = {
        impl: fastft_kernels.attention(q, k, v, UNTIL, q_rows=rows, return_lse=True, impl=impl)
        for impl in ("torch", "reference")
    }
    for a, b in zip(found["torch"], found["reference"], strict=True):
        assert a.dtype == b.dtype == torch.float64
        assert torch.allclose(a, b, atol=1e-12)
    out, lse = found["torch"]
    assert lse.shape == (2, len(q))
    assert torch.allclose(out, fastft_kernels.attention(q, k, v, UNTIL, q_rows=rows), atol=1e-12)


def test_rows_of_equal_length() -> None:
    q, k, v = packed()
    until = torch.arange(4, 13, 4).repeat_interleave(4)
    for impl in ("torch", "reference"):
        by_rows = fastft_kernels.attention(q, k, v, until, row_length=4, impl=impl)
        assert torch.allclose(by_rows, fastft_kernels.attention(q, k, v, until, impl="reference"), atol=1e-12)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(11, 2, 8, dtype=torch.float64)}, r"got q \(11, 2, 8\), k \(12, 2, 8\)"),
        ({"v": torch.zeros(12, 2, 8)}, "v torch.float32, expected one floating dtype"),
        ({"visible_until": UNTIL[:-1]}, r"got visible_until \(11,\)"),
        ({"visible_until": UNTIL.float()}, r"torch.float32, expected \[12\] integers"),
        ({"row_length": 5}, "got row_length 5, expected a divisor of T = 12"),
        ({"impl": "cuda"}, "got impl='cuda', expected one of auto, triton, compiled, torch, reference"),
        ({"impl": "triton"}, 'got impl="triton", which cannot run here'),
        ({"visible_until": UNTIL.to("meta")}, "got tensors on different devices"),
    ],
)
def test_errors(changed: dict[str, Any], message: str) -> None:
    q, k, v = packed()
    arguments = {"q": q, "k": k, "v": v, "visible_until": UNTIL, **changed}
    with pytest.raises(ValueError, match=message):
        fastft_kernels.attention(**arguments)


@pytest.mark.parametrize(("changed", "message"), [
    ({"D": 40}, "got head dim 40, expected a multiple of 16 up to 256"),
    ({"D": 272}, "got head dim 272, expected a multiple of 16 up to 256 with impl=.triton."),
    ({"D": 256}, "got head dim 256 in float32, expected at most 128, or 16 bits, with impl=.triton."),
    ({"dtype": torch.float64}, "got torch.float64, expected float32, float16 or bfloat16"),
    ({"T": 6, "D": 16}, "got a plan for T = 12"),
])  # fmt: skip
def test_errors_of_the_kernels(changed: dict[str, Any], message: str) -> None:
    """As for a GPU: the errors come before anything is launched."""
    q, k, v = packed(**{"dtype": torch.float32, **changed})
    with fastft_kernels.support.offline("sm_80"), pytest.raises(ValueError, match=message):
        fastft_kernels.attention(q, k, v, UNTIL[: len(q)], plan=plan_attention(UNTIL), impl="triton")


def test_cu_seqlens_are_an_interval() -> None:
    assert visible_until_of(torch.tensor([0, 3, 3, 4], dtype=torch.int32), 6).tolist() == [3, 3, 3, 4, 5, 6]
    assert visible_until_of(torch.tensor([0]), 2).tolist() == [1, 2]
    assert visible_until_of(torch.tensor([0, 2]), 2).dtype == torch.int32


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_varlen(impl: Any) -> None:
    q, k, v = packed()
    bounds = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    out, lse, nothing = attention_varlen(
        q, k, v, bounds, bounds, 6, 6, 0.0, 0.3, True, return_attn_probs=True, impl=impl
    )
    assert nothing is None
    assert lse.shape == (2, 12)
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        heads = [x[begin:end].transpose(0, 1) for x in (q, k, v)]
        alone = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=0.3)
        assert torch.allclose(out[begin:end], alone.transpose(0, 1), atol=1e-12)
    alone = attention_varlen(q, k, v, bounds, bounds, 6, 6, softmax_scale=0.3, impl=impl)
    assert torch.allclose(out, alone, atol=1e-12)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dropout_p": 0.1}, "got dropout_p=0.1, expected 0"),
        ({"causal": False}, "got causal=False, expected True"),
        ({"window_size": (8, 0)}, r"got window_size=\(8, 0\)"),
        ({"softcap": 30.0}, "got softcap=30.0"),
        ({"alibi_slopes": torch.ones(2)}, "got alibi_slopes"),
        ({"block_table": torch.ones(2)}, "got a block_table"),
        ({"cu_seqlens_k": torch.tensor([0, 12])}, r"cu_seqlens_k \(2,\), expected both \[N \+ 1\] integers"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 12])}, "that differ, expected them equal"),
        (dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 5, 13])), "rise from 0 to at most 12"),
        (dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 7, 5])), "rise from 0 to at most 12"),
        (dict.fromkeys("kv", torch.zeros(12, 3, 8, dtype=torch.float64)), "heads of keys that divide the heads of que"),
    ],
)
def test_errors_of_varlen(changed: dict[str, Any], message: str) -> None:
    q, k, v = packed()
    bounds = torch.tensor([0, 5, 12])
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, **changed}
    with pytest.raises(ValueError, match=message):
        attention_varlen(**arguments, max_seqlen_q=7, max_seqlen_k=7)


def cached(N: int = 3, S: int = 5, P: int = 4, H: int = 2, D: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (N, H, D), "k_cache": (N, S, H, D), "v_cache": (N, S, H, D), "prefix_k": (P, H, D)}
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in {**shapes, "prefix_v": (P, H, D)}.items()
    }
    return {**made, "lengths": torch.tensor([0, 2, 5])}


def test_decode_is_the_last_row_of_attention() -> None:
    made = cached()
    for impl in ("torch", "reference", "auto"):
        out = attention_decode(**made, impl=impl)
        for n, length in enumerate(made["lengths"].tolist()):
            k, v = (torch.cat([made[f"prefix_{x}"], made[f"{x}_cache"][n, :length]]) for x in "kv")
            until = torch.full((len(k),), len(k))
            last = fastft_kernels.attention(
                made["q"][n : n + 1], k, v, until, q_rows=torch.tensor([len(k) - 1]), impl="reference"
            )
            assert torch.allclose(out[n], last[0], atol=1e-12)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(3, 2, 4, dtype=torch.float64)}, r"got k_cache \(3, 5, 2, 8\), expected \[3, S, G, 4\]"),
        ({"q": torch.zeros(3, 3, 8, dtype=torch.float64)}, r"expected \[3, S, G, 8\] with G dividing 3"),
        ({"v_cache": torch.zeros(3, 4, 2, 8, dtype=torch.float64)}, r"v_cache \(3, 4, 2, 8\), expected"),
        ({"lengths": torch.ones(2)}, r"got lengths \(2,\)"),
        ({"prefix_v": None}, "expected both or none"),
        ({"prefix_v": torch.zeros(3, 2, 8, dtype=torch.float64)}, r"expected both \[P, 2, 8\]"),
        ({"q": torch.zeros(3, 2, 8)}, "expected one floating dtype"),
        ({"q": torch.zeros(3, 2, 8, dtype=torch.float64, requires_grad=True)}, r"call it within torch.no_grad\(\)"),
        ({"lengths": torch.ones(3, dtype=torch.int32, device="meta")}, "got tensors on different devices"),
    ],
)
def test_errors_of_decode(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_decode(**{**cached(), **changed})


def test_decode_takes_parameters_within_no_grad() -> None:
    made = cached()
    made["q"].requires_grad_()
    with torch.no_grad():
        assert not attention_decode(**made).requires_grad
