"""A module of one tensor whose forward is another one wherever that is right, and its own everywhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from fastft.integrations.transformers import ops
from fastft.integrations.transformers.swap import Swapped


def is_plain(*tensors: Any) -> bool:
    """Whether these are tensors that lie in this process whole: no part of one, no quantised or traced one."""
    return all(type(x) in (Tensor, nn.Parameter) and not hasattr(x, "ds_id") for x in tensors)


def is_listened_to(module: nn.Module) -> bool:
    """Whether anything is called with what a module gives."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or torch_modules._has_any_global_hook()


class Replaced(Swapped, nn.Module):
    """What such modules have. Its `facts` have `dtypes`, what `out_dtype` found out."""

    op: str
    """What `compute` is counted as."""
    on_a_cpu = ""
    """What is to be known of it on a CPU; where torch's own is as fast there, that runs."""

    @classmethod
    def members(cls, original: type) -> dict[str, Any]:
        """A forward with the original's signature."""
        return {"forward": _forward_of(cls, original)}

    def compute(self, x: Tensor) -> Tensor:
        """What the original's forward gives, made by `ops`."""
        raise NotImplementedError  # each kind of module has its own: `Gelu`, `LayerNorm`, `RMSNorm`

    def learnt(self) -> tuple[Any, ...]:
        """The weights that `compute` reads."""
        return ()

    def pays(self, x: Tensor) -> bool:
        """Whether `compute` is to run."""
        return ops.runs(x, on_a_cpu=not self.on_a_cpu)

    def out_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the original's result, which a few of its own rows show: it hangs on those of x and the weights,
        and on autocast, whose rules are not the same on all devices. Asked once for each of these."""
        autocast = torch.is_autocast_enabled(x.device.type)
        key = (x.device.type, autocast, x.dtype, *(weight.dtype for weight in self.learnt()))
        known: dict[Any, torch.dtype] = self.facts["dtypes"]
        if key not in known:
            with torch.no_grad():
                own: Any = self.original  # a class of modules, which `type` does not say
                known[key] = own.forward(self, x.reshape(-1, x.shape[-1])[:1]).dtype
        return known[key]


def _forward_of(mixin: type[Replaced], original: Any) -> Callable[..., Any]:
    own = original.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The module may have got its own class back: what wraps a forward keeps it. The compiler gets the model's own
        # operations, which it fuses with their neighbours.
        if ops.is_recorded() or not isinstance(self, mixin):
            return own(self, *args, **kwargs)
        given = (*args, *kwargs.values())
        if len(given) == 1 and is_plain(*given, *self.learnt()) and self.pays(given[0]):
            return self.compute(given[0])
        return own(self, *args, **kwargs)

    return forward
