"""A copy of a module tried out against what is to replace it: on random rows, in each dtype, forward and backward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.integrations.transformers.replaced import Replaced
from fastft.integrations.transformers.swap import swap

SCALES = (1e-3, 0.1, 1.0, 8.0)
"""Of the rows: the squares of the smallest are what a norm's eps is."""
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
)
"""Of what goes in, and of the weights."""
TOLERANCE = 1e-5
"""How far a row may be from the original's, of its largest entry. transformers computes norms in float32 always."""
TOLERANCE_OF_16_BITS = 2e-2
"""The same where something has 16 bits: the original rounds several times, the replacement once."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of a module.

    Attributes:
        module: that was tried.
        op: as `counted` calls what computes it now, or would.
        parts: the modules that have another class now, itself or some of its children.
        why_not: why there are none.
        on_a_cpu: what is to be known of it there.
    """

    module: nn.Module
    op: str
    parts: tuple[nn.Module, ...] = ()
    why_not: str = ""
    on_a_cpu: str = ""


def why_not_in_place(module: nn.Module) -> str | None:
    """Why a module cannot be replaced, whatever it computes; None where it can."""
    if "forward" in vars(module):
        return "its forward is replaced already"
    if len(inspect.signature(type(module).forward).parameters) != 2:  # itself, and one tensor
        return "it takes more than one tensor"
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return "it is made of further parts"
    return None


def why_not(module: nn.Module, mixin: type[Replaced], width: int, device: torch.device, **facts: Any) -> str | None:
    """Why `mixin` is no replacement for a module of `[..., width]`; None where it is one.

    The module itself is left as it is: a copy with random weights is tried.
    """
    generator = torch.Generator().manual_seed(0)
    tried = 0
    for x_dtype, weight_dtype in DTYPES:
        for autocast in (False, True) if x_dtype != torch.float64 else (False,):
            own = _random_copy(module, weight_dtype, generator)
            x = _rows(width, generator).to(device, x_dtype)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                try:
                    expected = _outcome(own, type(own).forward, x)
                except RuntimeError:
                    continue  # dtypes that it does not take: its replacement asks it first
                swap(own, mixin, dtypes={}, **facts)
                try:
                    found = _outcome(own, mixin.compute, x)
                except (RuntimeError, ValueError, AttributeError) as error:
                    return str(error).partition("\n")[0]
            tried += 1
            reason = difference(found, expected)
            if reason is not None:
                return f"{reason} for {_name(x_dtype)} and weights of {_name(weight_dtype)}" + " in autocast" * autocast
    return None if tried else "it fails on random rows"


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """What differs between two outcomes, in a few words; None where they are equal up to rounding."""
    if found.keys() != expected.keys():
        return "it has other gradients"
    narrow = any(x.element_size() == 2 for outcome in (found, expected) for x in outcome.values())
    limit = TOLERANCE_OF_16_BITS if narrow else TOLERANCE
    for name, x in expected.items():
        if found[name].dtype != x.dtype:
            return f"its {name} would be {_name(found[name].dtype)} in place of {_name(x.dtype)}"
        ours, own = found[name].double(), x.double()
        if not ((ours - own).abs().amax(-1) <= limit * own.abs().amax(-1)).all():
            return f"its {name} would have other values"
    return None


def _outcome(module: nn.Module, forward: Callable[..., Any], x: Tensor) -> dict[str, Tensor]:
    """What a forward gives, and its gradients."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = forward(module, x)
        leaves = {"input": x, **dict(module.named_parameters())}
        flow = torch.linspace(-1, 2, y.shape[-1], dtype=torch.float64, device=y.device).to(y.dtype).expand_as(y)
        grads = torch.autograd.grad(y, tuple(leaves.values()), flow, allow_unused=True)
    named = zip(leaves, grads, strict=True)
    return {"output": y.detach(), **{f"gradient of {name}": grad for name, grad in named if grad is not None}}


def _random_copy(module: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    own = copy.deepcopy(module).to(dtype)
    for parameter in own.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.device, dtype)
        parameter.requires_grad_()
    return own


def _rows(width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(len(SCALES), width, generator=generator) * torch.tensor(SCALES)[:, None]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
