"""SwiGLU outside the interpreter: its torch path is plain PyTorch's to the bit, and keeps less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastft_kernels import swiglu
from torch import Tensor
from torch.nn import functional as F


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate, up = (3 * torch.randn(2, 2, 5, 24, generator=generator, dtype=torch.float64)).to(dtype).unbind()
    return gate.requires_grad_(), up.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_bits_of_plain_pytorch(dtype: torch.dtype) -> None:
    given = inputs(dtype)
    plain = F.silu(given[0]) * given[1]
    found = swiglu(*given, impl="torch")
    assert torch.equal(found, plain)
    flowing = torch.linspace(0.5, 1.5, plain.numel()).view_as(plain).to(dtype)
    for got, right in zip(*(torch.autograd.grad(y, given, flowing) for y in (found, plain)), strict=True):
        assert torch.equal(got, right)
    assert not torch.equal(swiglu(given[1], given[0], impl="torch"), plain)  # the gate is the first


def test_the_reference_and_second_halves() -> None:
    both = torch.cat(inputs(torch.float64), dim=-1)
    gate, up = both.chunk(2, dim=-1)
    for impl in ("torch", "reference"):
        assert torch.allclose(swiglu(gate, up, impl=impl), F.silu(gate) * up, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_it_keeps_its_inputs_alone(impl: Any) -> None:
    kept: list[Tensor] = []
    gate, up = inputs(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        swiglu(gate, up, impl=impl)
    assert [x.data_ptr() for x in kept] == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize(
    ("gate", "up", "options", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), {}, r"got up \(2, 4\) torch.float32 on cpu"),
        (torch.zeros(2, 3), torch.zeros(2, 3).double(), {}, r"got up \(2, 3\) torch.float64"),
        (torch.zeros(2, 3).int(), torch.zeros(2, 3).int(), {}, r"got gate \(2, 3\) torch.int32, expected floating"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"impl": "triton"}, 'got impl="triton", which cannot run here'),
    ],
)
def test_errors(gate: Tensor, up: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu(gate, up, **options)
