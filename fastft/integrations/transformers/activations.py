"""GELU in its tanh form, and the SiLU of gated products, `silu(gate) * up`.

No model's code is copied: of a gated product the SiLU alone is replaced. It gives a `Gate`, and what the model then
multiplies by it computes both in one operation. Projections, and whatever was put around them (adapters, quantised
weights, hooks), stay what they are. Should a model do anything else with its SiLU, that fails at once, as a `Gate` can
do nothing; the module in which it stands is tried out before.

Letters: N rows, F width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastft.integrations.transformers import ops
from fastft.integrations.transformers.replaced import Replaced, is_listened_to, is_plain
from fastft.integrations.transformers.swap import Swapped, swap, swap_back
from fastft.integrations.transformers.trial import Tried, difference, why_not, why_not_in_place


class Gelu(Replaced):
    """GELU in its tanh form, which most of transformers' classes put together of eight operations."""

    op = "gelu"

    def compute(self, x: Tensor) -> Tensor:
        """Of any shape; in float32 where the original gives that, as some do in autocast."""
        return ops.gelu(x.to(self.out_dtype(x)))


class TorchGelu(Gelu):
    """The same where the original calls torch's."""

    on_a_cpu = "on a CPU torch's own, which is no slower"


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """In place of `silu(gate)` `[N, F]`: what is to be multiplied."""

    gate: Tensor

    def __mul__(self, up: Any) -> Tensor:
        """`silu(gate) * up`."""
        if is_plain(up) and (up.shape, up.dtype, up.device) == (self.gate.shape, self.gate.dtype, self.gate.device):
            return ops.swiglu(self.gate, up)
        product: Tensor = F.silu(self.gate) * up
        return product

    __rmul__ = __mul__


class Silu(Swapped, nn.Module):
    """The SiLU of a gated product."""

    on_a_cpu = "on a CPU torch's own, which is faster, as it keeps silu(gate)"

    def forward(self, input: Tensor) -> Any:
        """`silu(input)`, or the `Gate` that waits for the other factor."""
        if ops.is_recorded() or not is_plain(input) or is_listened_to(self):
            return super().forward(input)
        return Gate(input) if ops.runs(input, on_a_cpu=False) else super().forward(input)


def gelus_of(model: nn.Module) -> list[nn.Module]:
    """The GELUs of both forms."""
    from transformers import activations as own

    classes = (own.NewGELUActivation, own.FastGELUActivation, own.AccurateGELUActivation, own.GELUTanh)
    erf = (own.GELUActivation, nn.GELU)
    return [module for module in model.modules() if type(module) in (*classes, *erf)]


def _is_erf(module: nn.Module) -> bool:
    from transformers.activations import GELUActivation

    return type(module) is GELUActivation or getattr(module, "approximate", "tanh") == "none"


def swap_gelus(model: nn.Module, device: torch.device) -> Iterator[Tried]:
    """Replaces each GELU of a model on a device that has the tanh form."""
    from transformers.activations import GELUTanh

    known: dict[Any, str] = {}
    for module in gelus_of(model):
        reason = why_not_in_place(module) or "its form is the error function's" * _is_erf(module)
        if not reason:
            kind = (type(module), repr(module), repr(vars(module).get("act")))
            if kind not in known:
                known[kind] = why_not(module, Gelu, 64, device) or ""
            reason = known[kind]
        if reason:
            yield Tried(module, Gelu.op, why_not=reason)
        else:
            mixin = TorchGelu if type(module) in (GELUTanh, nn.GELU) else Gelu
            swap(module, mixin, dtypes={})
            yield Tried(module, mixin.op, (module,), on_a_cpu=mixin.on_a_cpu)


def silus_of(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The modules in which SiLUs stand, with these."""
    from transformers.activations import SiLUActivation

    found = {
        module: [child for child in module.children() if type(child) in (SiLUActivation, nn.SiLU)]
        for module in model.modules()
    }
    return {module: silus for module, silus in found.items() if silus}


Call = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def calls_of(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Call]]:
    """With what each module is called first, while it is open."""
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, (args, kwargs))

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield calls


def swap_silus(model: nn.Module, calls: dict[nn.Module, Call]) -> Iterator[Tried]:
    """Replaces the SiLUs of each module that multiplies by them.

    Args:
        model: is not called.
        calls: with what the modules of `silus_of` are called.
    """
    found = silus_of(model)
    times = Counter(silu for silus in found.values() for silu in silus)
    for module, silus in found.items():
        reason = next((why for silu in silus if (why := _why_not_silu(silu, times[silu])) is not None), None)
        if reason is None:
            reason = _try(module, silus, calls[module]) if module in calls else "it is not called for a few tokens"
        yield Tried(module, "swiglu", () if reason else tuple(silus), reason or "", Silu.on_a_cpu)


def _why_not_silu(silu: nn.Module, times: int) -> str | None:
    if times > 1:
        return "its SiLU is another module's too"
    if getattr(silu, "inplace", False):
        return "its SiLU writes in place"
    if is_listened_to(silu):
        return "something listens to its SiLU"
    return why_not_in_place(silu)


def _try(module: nn.Module, silus: list[nn.Module], call: Call) -> str | None:
    """Replaces the SiLUs of a module where it gives the same with them, called with random numbers in place of what it
    was called with; the reason why not, None where they stay."""
    tensors = [x for x in (*call[0], *call[1].values()) if isinstance(x, Tensor) and x.is_floating_point()]
    if len(tensors) != 1:
        return "it takes more than one tensor"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tensors[0].shape, generator=generator).to(tensors[0])
    for autocast in (False, True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            reason = _compare(module, silus, call, x)
        if reason is not None:
            return reason
    for silu in silus:
        swap(silu, Silu)
    return None


def _compare(module: nn.Module, silus: list[nn.Module], call: Call, x: Tensor) -> str | None:
    """Why a module is not itself with its SiLUs replaced; None where it is. It has its own back afterwards."""
    try:
        expected = _outcome(module, call, x)
        for silu in silus:
            swap(silu, Silu)
        with ops.everywhere(), ops.counted() as ran:
            found = _outcome(module, call, x)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        return str(error).partition("\n")[0]
    finally:
        for silu in silus:
            swap_back(silu)
    return difference(found, expected) if ran["swiglu"] else "it multiplies nothing by its SiLU"


def _outcome(module: nn.Module, call: Call, x: Tensor) -> dict[str, Tensor]:
    """What a module gives for a call, with x in place of its tensor, and the gradient of that."""

    def put(value: Any) -> Any:
        return leaf if isinstance(value, Tensor) and value.is_floating_point() else value

    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = module(*map(put, call[0]), **{name: put(value) for name, value in call[1].items()})
        if not isinstance(y, Tensor):
            raise TypeError(f"it gives a {type(y).__name__}")
        flow = torch.linspace(-1, 2, y.shape[-1], dtype=torch.float64, device=y.device).to(y.dtype).expand_as(y)
        (grad,) = torch.autograd.grad(y, leaf, flow)
    return {"output": y.detach(), "gradient of input": grad}
