from __future__ import annotations

import fastft_kernels
import pytest
import torch
from torch.nn import functional as F


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_it_is_torchs(impl: str) -> None:
    random = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 5, 24, generator=random, dtype=torch.float64)).requires_grad_()
    bias = torch.randn(24, generator=random, dtype=torch.float64).requires_grad_()
    got = fastft_kernels.gelu(x, bias, impl=impl)
    assert torch.allclose(got, F.gelu(x + bias, approximate="tanh"), atol=1e-12)
    assert torch.allclose(fastft_kernels.gelu(x, impl=impl), F.gelu(x, approximate="tanh"), atol=1e-12)
    assert not torch.allclose(got, F.gelu(x + bias), atol=1e-5)  # its exact form is another function
    assert torch.autograd.gradcheck(lambda x, bias: fastft_kernels.gelu(x, bias, impl=impl), (x[:1, :2], bias))


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_the_result_has_the_dtype_of_x(impl: str) -> None:
    assert fastft_kernels.gelu(torch.ones(3, 4).bfloat16(), torch.ones(4), impl=impl).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.ones(3, 24, dtype=torch.int64)}, "expected floating"),
        ({"x": torch.ones(3, 0)}, "F at least 1"),
        ({"x": torch.tensor(1.0)}, "expected floating"),
        ({"bias": torch.ones(23)}, r"got bias \(23,\)"),
        ({"bias": torch.ones(24, dtype=torch.int64)}, "bias .* torch.int64, expected floating"),
        ({"bias": torch.ones(24, device="meta")}, "on meta, expected"),
        ({"impl": "fast"}, "got impl='fast'"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], said: str) -> None:
    given = {"x": torch.ones(3, 24), "bias": torch.ones(24), **change}
    with pytest.raises(ValueError, match=said):
        fastft_kernels.gelu(**given)


def test_triton_says_why_it_cannot_run_here() -> None:
    with pytest.raises(ValueError, match='impl="triton", which cannot run here'):
        fastft_kernels.gelu(torch.ones(3, 24), impl="triton")
