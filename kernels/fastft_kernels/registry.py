"""Operations registered with torch: how a function that launches kernels becomes one that autograd and `torch.compile`
know.

`torch.library.custom_op` does the same in several layers of Python, which cost more than a launch does: over the calls
of a whole step, more than the GPU needs for it. Here the dispatcher calls the body itself, and autograd a function of
ours.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, infer_schema, register_fake

from fastft_kernels.once import differentiable_once

NAMESPACE = "fastft_kernels"
DEVICES = ("CPU", "CUDA")
"""Dispatch keys that the bodies are for: a ROCm GPU is `CUDA` too, and on a CPU they run in Triton's interpreter."""

Body = Callable[..., Any]

_library = Library(NAMESPACE, "FRAGMENT")
_bodies: dict[Any, Body] = {}


def operation(name: str, *, mutates: Sequence[str] = ()) -> Callable[[Body], Any]:
    """Registers the decorated body as the operation `fastft_kernels::name`, and gives that operation in its place.

    Its schema is that of the body's annotations, and it is called with positional arguments. The body returns new
    tensors, never an argument or a view of one: nothing looks after that at run time, `opcheck` does in the tests.

    Args:
        name: of the operation.
        mutates: names of the arguments that the body writes, which are its first ones; it then returns nothing.
    """

    def register(body: Body) -> Any:
        # Compiled code hands the body tensors with the strides that they would have without compilation.
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
        _library.define(name + infer_schema(body, mutates_args=mutates), tags=tags)
        for key in DEVICES:
            _library.impl(name, body, key)
        made = getattr(getattr(torch.ops, NAMESPACE), name).default
        if mutates:
            _library.impl(name, _noting_writes(made, len(mutates)), "ADInplaceOrView", with_keyset=True)
        _bodies[made] = body
        return made

    return register


def fake(made: Any) -> Callable[[Body], Body]:
    """Registers the decorated function as what `made` is while nothing is computed: it returns empty tensors of the
    shapes and dtypes that the body's have, without a look at data."""

    def register(function: Body) -> Body:
        register_fake(made.name(), function, lib=_library)
        return function

    return register


def body_of(made: Any) -> Body:
    """The body of one of our operations."""
    return _bodies[made]


def _noting_writes(made: Any, n: int) -> Body:
    """Tells autograd that the first `n` arguments are written, as torch's own operations in place do."""
    after = torch._C._after_ADInplaceOrView_keyset

    def noting(keyset: Any, *inputs: Any) -> None:
        for written in inputs[:n]:
            torch.autograd.graph.increment_version(written)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            made.redispatch(keyset & after, *inputs)

    return noting


def differentiable(made: Any, *, save: Body, gradient: Body) -> None:
    """Gives an operation its gradient.

    Args:
        made: what `operation` gave.
        save: `save(ctx, inputs, output)` keeps what the gradient needs.
        gradient: `gradient(ctx, *flowing)` returns a gradient, or None, for each input. It has none itself.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = made(*inputs)
        save(ctx, inputs, output)
        return output

    name = made._opname
    both = {"forward": staticmethod(forward), "backward": staticmethod(differentiable_once(gradient))}
    function: Any = type(name, (torch.autograd.Function,), both)

    def with_autograd(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return made(*inputs)

    _library.impl(name, with_autograd, "Autograd")


def prepare_compile() -> None:
    """Tells inductor of every operation here, before `torch.compile` meets it: called once, or any number of times.

    Inductor gives an operation that has no lowering one that calls it. In torch 2.11 it first writes the operation down
    with all that its arguments are computed from, for a log that nobody reads. That text doubles with every layer: the
    compilation of a model of eight does not end.
    """
    from torch._inductor import lowering

    for made in _bodies:
        if made not in lowering.lowerings:
            lowering.make_fallback(made, warn=False)
