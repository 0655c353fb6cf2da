"""What every kernel is put through: errors against float64, bits from run to run and from order to order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from budget import assert_within_budget, relative_error
from sanitizer import random_order
from torch import Tensor

Run = Callable[..., Tensor | tuple[Tensor, ...]]
"""`run(*inputs, impl=...)` -> the output or outputs."""


def results(run: Run, inputs: Mapping[str, Tensor], impl: str) -> dict[str, Tensor]:
    """Outputs, and gradients of every input that asks for one; what flows in is another number for each element, and
    other for each output. The outputs are used by more than the loss: they are not the last thing computed."""
    outputs = run(*inputs.values(), impl=impl)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    learnt = {name: x for name, x in inputs.items() if x.requires_grad}
    if learnt:
        loss = sum(
            (output.double() * torch.linspace(0.5 + i, 1.5, output.numel(), dtype=torch.float64).view_as(output)).sum()
            for i, output in enumerate(outputs)
        )
        gradients = torch.autograd.grad(loss, list(learnt.values()), allow_unused=True, materialize_grads=True)
        found |= {f"d {name}": gradient for name, gradient in zip(learnt, gradients, strict=True)}
    return found


def exact(run: Run, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same by the reference in float64."""
    wide = {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    return results(run, wide, "reference")


def assert_right(run: Run, inputs: Mapping[str, Tensor], slack: float | None = None) -> dict[str, Tensor]:
    """Holds the kernel against float64, with plain PyTorch's error as its budget; what the kernel gave."""
    truth, plain, got = exact(run, inputs), results(run, inputs, "reference"), results(run, inputs, "triton")
    for name, x in got.items():
        assert_within_budget(name, x, plain[name], truth[name], slack)
    return got


def assert_same_bits(run: Run, inputs: Mapping[str, Tensor], first: Mapping[str, Tensor] | None = None) -> None:
    """Holds a second run, and runs of the programs in other orders, against the first (made here where it is not
    given): bit for bit."""
    first = first or results(run, inputs, "triton")
    assert_equal(first, results(run, inputs, "triton"), "a second run")
    for seed in (1, 2):
        with random_order(seed):
            assert_equal(first, results(run, inputs, "triton"), f"order {seed}")


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str) -> None:
    for name, x in a.items():
        assert torch.equal(x, b[name]), f"{name}: {what} gives other bits"


def is_wrong(run: Run, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the comparison refuses the kernel as it is now: what a planted fault must bring about."""
    try:
        assert_right(run, inputs)
    except (AssertionError, RuntimeWarning):
        return True
    return False


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = True) -> Tensor:
    """Normal numbers, with a gradient."""
    return torch.randn(*shape, generator=random(seed)).to(dtype).requires_grad_(grad)


def largest_error(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return max(relative_error(x, b[name]) for name, x in a.items())


def opcheck(operation: Any, *arguments: Any) -> None:
    """torch's own checks of a registered operation: schema, fake, autograd, and tracing by AOTAutograd."""
    torch.library.opcheck(operation, arguments)
