"""Layer norms and RMS norms, of torch and of any model: found by their names, known by what they compute.

A module whose class is called `...Norm` is tried out (`trial.py`) as each form that its weights allow. So it does not
matter who wrote it: an RMS norm that multiplies by its weight before or after it rounds, Gemma's that adds 1 to it,
T5's that is called a layer norm. What is none of them stays as it is, and the report says why.

Letters: C width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastft.integrations.transformers import ops
from fastft.integrations.transformers.replaced import Replaced, is_plain
from fastft.integrations.transformers.swap import swap
from fastft.integrations.transformers.trial import Tried, why_not, why_not_in_place

EPS = ("variance_epsilon", "eps")
"""What norms call the number that they add to the variance."""


class LayerNorm(Replaced):
    """A layer norm with weight and bias. Its `facts`: `eps`, the name of that number."""

    op = "layer_norm"
    on_a_cpu = "on a CPU torch's own, which is no slower"

    def learnt(self) -> tuple[Any, ...]:
        """Weight and bias, `[C]` each."""
        return self.weight, self.bias

    def compute(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C]`."""
        weight, bias = self.learnt()
        return ops.layer_norm(x, weight, bias, getattr(self, self.facts["eps"]), self.out_dtype(x))


class RMSNorm(Replaced):
    """An RMS norm with a weight. Its `facts`: `eps`, the name of that number, and `offset`, what the weight is added
    to."""

    op = "rms_norm"
    on_a_cpu = "on a CPU torch's own without gradients and in 16 bits, which is no slower"

    def learnt(self) -> tuple[Any, ...]:
        """The weight `[C]`."""
        return (self.weight,)

    def pays(self, x: Tensor) -> bool:
        """On a CPU it does where there is a backward pass, whose gradients it makes from less."""
        (weight,) = self.learnt()
        backward = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return ops.runs(x, on_a_cpu=backward and not x.element_size() == weight.element_size() == 2)

    def compute(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C]`."""
        eps, offset = getattr(self, self.facts["eps"]), self.facts["offset"]
        return ops.rms_norm(x, self.learnt()[0], eps, offset, self.out_dtype(x))


Form = tuple[type[Replaced], dict[str, Any]]


def norms_of(model: nn.Module) -> list[nn.Module]:
    """The modules that are called norms."""
    return [module for module in model.modules() if type(module).__name__.endswith("Norm")]


def swap_norms(model: nn.Module) -> Iterator[Tried]:
    """Replaces each norm of a model that can be."""
    forms: dict[Any, Form | str] = {}  # modules of one class and the same settings compute the same
    for module in norms_of(model):
        form: Form | str | None = why_not_in_place(module) or _why_not_weights(module)
        if form is None:
            kind = (type(module), _settings(module), module.weight.shape, module.weight.device)
            form = forms[kind] = forms.get(kind) or _form(module)
        if isinstance(form, str):
            yield Tried(module, "norm", why_not=form)
        else:
            mixin, facts = form
            swap(module, mixin, dtypes={}, **facts)
            yield Tried(module, mixin.op, (module,), on_a_cpu=mixin.on_a_cpu)


def _why_not_weights(module: nn.Module) -> str | None:
    held = dict(module.named_parameters())
    if "weight" not in held:
        return "it has no weight"
    if set(held) - {"weight", "bias"}:
        return "it has weights of its own kind"
    if "bias" in module._parameters and "bias" not in held:
        return "it has no bias"
    if not is_plain(*held.values()):
        return "its weights are cut into parts or quantised"
    if any(x.ndim != 1 or not x.is_floating_point() for x in held.values()):
        return "its weights are no vectors"
    return None


def _settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Whatever a module computes with beside its weights."""
    return tuple((name, repr(value)) for name, value in vars(module).items() if not name.startswith("_"))


def _form(module: Any) -> Form | str:
    """What a norm is, or why it is none of the known."""
    eps = next((name for name in EPS if isinstance(vars(module).get(name), float)), None)
    if eps is None:
        return "it does not say its eps"
    forms: tuple[Form, ...] = (
        ((LayerNorm, {"eps": eps}),)
        if "bias" in module._parameters
        else ((RMSNorm, {"eps": eps, "offset": 0.0}), (RMSNorm, {"eps": eps, "offset": 1.0}))
    )
    reasons = []
    for mixin, facts in forms:
        reason = why_not(module, mixin, module.weight.shape[0], module.weight.device, **facts)
        if reason is None:
            return mixin, facts
        reasons.append(reason)
    return reasons[0]
