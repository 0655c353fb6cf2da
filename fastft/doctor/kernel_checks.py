"""What proves the kernels on a user's machine: each against float64, isolation, and determinism.

The same cases serve the kernels' speeds (`fastft.doctor.kernel_speeds`): a case is what one operation computes at the
shapes of a real step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import fastft_kernels
import torch
from torch import Tensor

Inputs = dict[str, Any]
"""Tensors, and under `plan` what the host finds out once a step, which is not an operation's own work."""
Outputs = Tensor | tuple[Tensor, ...]
Run = Callable[[Inputs, str], Outputs]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The shapes of the cases: documents behind a shared prefix, and a model's width.

    Attributes:
        prefix, documents, length: tokens of the shared prefix, how many documents follow it, tokens of each.
        H, D: heads and their dim; `H * D` is the width C.
        R, V: loss rows and vocabulary.
    """

    prefix: int = 32
    documents: int = 60
    length: int = 33
    H: int = 16
    D: int = 64
    R: int = 1024
    V: int = 50257

    @property
    def T(self) -> int:
        """Tokens of the pack."""
        return self.prefix + self.documents * self.length

    @property
    def C(self) -> int:
        """The model's width."""
        return self.H * self.D

    def visible_until(self) -> Tensor:
        """`[T]` int32: the prefix is visible to all, a document to itself."""
        ends = self.prefix + self.length * torch.arange(1, self.documents + 1, dtype=torch.int32)
        return torch.cat([torch.full((self.prefix,), self.T, dtype=torch.int32), ends.repeat_interleave(self.length)])


GPU_SIZES = Sizes()
"""A pack of the book's examples, at gpt2-medium's width."""
CPU_SIZES = Sizes(documents=8, H=4, R=96)
"""The same, smaller: float64 at full size would take a CPU minutes."""


@dataclass(frozen=True, slots=True)
class Case:
    """One operation: `make` draws its inputs in float32 on the host, `run` computes it by an implementation.

    Floating inputs are given in the dtype under test, but for those named in `keep`, and get gradients if it `learns`.
    A `plan` is moved to the device as it is.
    """

    name: str
    make: Callable[[Sizes, torch.Generator], Inputs]
    run: Run
    keep: tuple[str, ...] = ()
    learns: bool = True


def _attention_inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    q, k, v = (torch.randn(sizes.T, sizes.H, sizes.D, generator=generator) for _ in range(3))
    until = sizes.visible_until()
    return {"q": q, "k": k, "v": v, "visible_until": until, "plan": fastft_kernels.plan_attention(until)}


def _linear_cross_entropy_inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    return {
        "hidden": torch.randn(sizes.T, sizes.C, generator=generator),
        "weight": torch.randn(sizes.V, sizes.C, generator=generator) * 0.02,
        "targets": torch.randint(sizes.V, (sizes.R,), generator=generator),
        "rows": torch.randint(sizes.T, (sizes.R,), generator=generator).sort().values,
        "row_weights": torch.randint(1, 4, (sizes.R,), generator=generator) / (2 * sizes.R),
    }


def _cross_entropy_inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    targets = torch.randint(sizes.V, (sizes.R,), generator=generator)
    targets[::3] = -100
    return {"logits": torch.randn(sizes.R, sizes.V, generator=generator), "targets": targets}


def _layer_norm_inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    return {
        "x": torch.randn(sizes.T, sizes.C, generator=generator),
        "residual": torch.randn(sizes.T, sizes.C, generator=generator),
        "weight": 1 + 0.1 * torch.randn(sizes.C, generator=generator),
        "bias": 0.1 * torch.randn(sizes.C, generator=generator),
    }


def _gelu_inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    return {
        "x": torch.randn(sizes.T, 4 * sizes.C, generator=generator),
        "bias": torch.randn(4 * sizes.C, generator=generator),
    }


def _attention(x: Inputs, impl: Any) -> Tensor:
    q = x["q"]
    # Wide heads in float32 take smaller tiles, which the operation plans by itself.
    plan = None if q.dtype == torch.float32 and q.shape[-1] > 64 else x["plan"]
    out: Any = fastft_kernels.attention(q, x["k"], x["v"], x["visible_until"], plan=plan, impl=impl)
    return cast(Tensor, out)


def _cross_entropy(x: Inputs, impl: Any) -> Tensor:
    return fastft_kernels.cross_entropy(x["logits"], x["targets"], impl=impl)


def _gelu(x: Inputs, impl: Any) -> Tensor:
    return fastft_kernels.gelu(x["x"], x["bias"], impl=impl)


def _decode_inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """The documents as sequences that are being answered, each with another number of its tokens so far."""
    shape = (sizes.documents, sizes.length, sizes.H, sizes.D)
    drawn = {name: torch.randn(*shape, generator=generator) for name in ("k_cache", "v_cache")}
    prefix = {name: torch.randn(sizes.prefix, *shape[2:], generator=generator) for name in ("prefix_k", "prefix_v")}
    lengths = torch.arange(sizes.documents, dtype=torch.int32) % sizes.length + 1
    q = torch.randn(sizes.documents, *shape[2:], generator=generator)
    return {"q": q, **drawn, "lengths": lengths, **prefix}


def _decode(x: Inputs, impl: Any) -> Tensor:
    return fastft_kernels.attention_decode(
        x["q"],
        x["k_cache"],
        x["v_cache"],
        x["lengths"],
        prefix_k=x["prefix_k"],
        prefix_v=x["prefix_v"],
        impl=impl,
    )


def _layer_norm(x: Inputs, impl: Any) -> Outputs:
    return fastft_kernels.layer_norm(x["x"], x["weight"], x["bias"], residual=x["residual"], impl=impl)


def _linear_cross_entropy(x: Inputs, impl: Any) -> Tensor:
    return fastft_kernels.linear_cross_entropy(
        x["hidden"],
        x["weight"],
        x["targets"],
        rows=x["rows"],
        row_weights=x["row_weights"],
        reduction="sum",
        impl=impl,
    )


CASES = (
    Case("attention", _attention_inputs, _attention),
    Case("attention_decode", _decode_inputs, _decode, learns=False),
    Case("linear_cross_entropy", _linear_cross_entropy_inputs, _linear_cross_entropy, keep=("row_weights",)),
    Case("cross_entropy", _cross_entropy_inputs, _cross_entropy),
    Case("layer_norm", _layer_norm_inputs, _layer_norm),
    Case("gelu", _gelu_inputs, _gelu),
)


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one comparison.

    Attributes:
        name: the operation, and what of it: `attention`, `d q`.
        dtype: of inputs and outputs.
        error: relative error against float64, `max|a - b| / max|b|` over the whole tensor.
        plain: the same of plain PyTorch in the same dtype.
        limit: what `error` may be.
    """

    name: str
    dtype: str
    error: float
    plain: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the error is within its limit; NaN is not."""
        return self.error <= self.limit


def inputs_of(case: Case, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The case's inputs on a device; floating ones in `dtype`, with gradients if it learns."""
    made = case.make(sizes, torch.Generator().manual_seed(0))
    return {
        name: x.to(device, dtype).requires_grad_(case.learns) if _is_drawn(name, x, case) else x.to(device)
        for name, x in made.items()
    }


def learnt(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs that get gradients."""
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}


def _is_drawn(name: str, x: object, case: Case) -> bool:
    """Whether an input is one of the numbers under test."""
    return isinstance(x, Tensor) and x.is_floating_point() and name not in case.keep


def results(case: Case, inputs: Inputs, impl: str) -> dict[str, Tensor]:
    """The outputs and every gradient of `(output * g).sum()`, g fixed and smooth, in float64 on the inputs' device."""
    output = case.run(inputs, impl)
    outputs = output if isinstance(output, tuple) else (output,)
    named = {"output" if len(outputs) == 1 else f"output {i}": x for i, x in enumerate(outputs)}
    if of := learnt(inputs):
        upstream = [torch.linspace(0.5, 1.5, x.numel(), device=x.device).view_as(x).to(x.dtype) for x in outputs]
        gradients = torch.autograd.grad(outputs, list(of.values()), upstream)
        named |= {f"d {name}": g for name, g in zip(of, gradients, strict=True)}
    return {name: x.detach().double() for name, x in named.items()}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """`max|a - b| / max|b|` over the whole tensor."""
    return float((got - exact).abs().max() / exact.abs().max().clamp_min(1e-300))


def against_float64(case: Case, sizes: Sizes, dtype: torch.dtype, device: torch.device, impl: str) -> Iterator[Check]:
    """Holds output and gradients of an implementation against float64.

    Its error may be that of plain PyTorch in the same dtype, and half a unit of the dtype's last place.
    """
    inputs = inputs_of(case, sizes, dtype, device)
    wide = {
        name: x.detach().double().requires_grad_(x.requires_grad) if _is_drawn(name, x, case) else x
        for name, x in inputs.items()
    }
    exact = results(case, wide, "reference")
    plain, got = results(case, inputs, "reference"), results(case, inputs, impl)
    slack = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 2e-6
    for name, truth in exact.items():
        error_of_plain = relative_error(plain[name], truth)
        yield Check(
            f"{case.name}: {name}",
            str(dtype).removeprefix("torch."),
            relative_error(got[name], truth),
            error_of_plain,
            error_of_plain + slack,
        )


def is_deterministic(case: Case, sizes: Sizes, dtype: torch.dtype, device: torch.device, impl: str) -> bool:
    """Whether two runs give the same bits, output and gradients."""
    inputs = inputs_of(case, sizes, dtype, device)
    first, second = results(case, inputs, impl), results(case, inputs, impl)
    return all(torch.equal(first[name], second[name]) for name in first)


def is_isolated(sizes: Sizes, dtype: torch.dtype, device: torch.device, impl: str) -> bool:
    """Whether other keys and values in one document change no bit of what all other tokens get from attention."""
    case = CASES[0]
    inputs = inputs_of(replace(case, learns=False), sizes, dtype, device)
    begin = sizes.prefix + sizes.length * (sizes.documents // 2)
    changed = dict(inputs)
    for name in ("k", "v"):
        changed[name] = inputs[name].clone()
        changed[name][begin : begin + sizes.length] += math.pi
    before, after = (cast(Tensor, case.run(x, impl)) for x in (inputs, changed))
    same = (before == after).flatten(1).all(dim=1)
    touched = torch.zeros_like(same)
    touched[begin : begin + sizes.length] = True
    return bool(same[~touched].all()) and not bool(same[touched].any())
