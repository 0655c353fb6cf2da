"""What a call of one of fastft's kernels costs the host, by how it is registered with torch.

    python -m tools.pretended_gpu run FOLDER -m tools.pretended_gpu.measure_operation

GELU's forward kernel, called as it is, by `torch.library.custom_op`, by `Library.impl` and by `triton_op`; and from
within a compiled function. The difference to the kernel alone is what registering costs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import fastft_kernels
import torch
from fastft_kernels.support import triton
from torch import Tensor
from torch.library import Library, custom_op, triton_op, wrap_triton

from tools.pretended_gpu import measuring

gelu_forward = sys.modules[fastft_kernels.gelu.__module__].gelu_forward
BN, BF = 4, 512
CHAINED = 50
"""Calls of an operation in a compiled function."""

Operation = Callable[[Tensor, Tensor], Tensor]


def _launch(kernel: object, x: Tensor, bias: Tensor) -> Tensor:
    """`[N, F]` -> `[N, F]`."""
    N, F = x.shape
    y = torch.empty_like(x)
    kernel[(triton.cdiv(N, BN), triton.cdiv(F, BF))](  # type: ignore[index] # a jitted kernel
        x, bias, y, N, F, x.stride(0), HAS_BIAS=True, BN=BN, BF=BF, num_warps=4, num_stages=1
    )
    return y


def _fake(x: Tensor, _: Tensor) -> Tensor:
    return torch.empty_like(x)


def alone(x: Tensor, bias: Tensor) -> Tensor:
    """The kernel without an operation."""
    return _launch(gelu_forward, x, bias)


def by_custom_op() -> Operation:
    """`torch.library.custom_op`."""

    @custom_op("pretended_gpu::custom", mutates_args=())
    def operation(x: Tensor, bias: Tensor) -> Tensor:
        return _launch(gelu_forward, x, bias)

    operation.register_fake(_fake)
    return torch.ops.pretended_gpu.custom.default


def by_library(library: Library) -> Operation:
    """`Library.define` and `Library.impl`."""
    library.define("plain(Tensor x, Tensor bias) -> Tensor")
    library.impl("plain", alone, "CUDA")
    library.impl("plain", _fake, "Meta")
    return torch.ops.pretended_gpu.plain.default


def by_triton_op() -> Operation:
    """`triton_op`, through which inductor sees the kernel."""

    @triton_op("pretended_gpu::triton", mutates_args=())
    def operation(x: Tensor, bias: Tensor) -> Tensor:
        return _launch(wrap_triton(gelu_forward), x, bias)

    return torch.ops.pretended_gpu.triton.default


def compiled_chain(operation: Operation) -> Operation:
    """A compiled function that calls an operation `CHAINED` times."""

    @torch.compile
    def chain(x: Tensor, bias: Tensor) -> Tensor:
        for _ in range(CHAINED):
            x = operation(x, bias)
        return x

    return chain


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--compiled", action="store_true", help="also within a compiled function")
    options = parser.parse_args()
    x = torch.empty(2048, 4096, device="cuda", dtype=torch.bfloat16)
    bias = torch.empty(4096, device="cuda")
    library = Library("pretended_gpu", "FRAGMENT")
    ways = {"custom_op": by_custom_op(), "Library.impl": by_library(library), "triton_op": by_triton_op()}
    results = {}

    def measure(name: str, run: Callable[[], object], calls: int, repeated: int = 1) -> None:
        least, median = (time / repeated for time in measuring.microseconds(run, calls=calls))
        results[name] = {"us": round(median, 2), "least_us": round(least, 2)}

    measure("the kernel alone", partial(alone, x, bias), options.calls)
    for name, operation in ways.items():
        measure(name, partial(operation, x, bias), options.calls)
    for name, operation in ways.items() if options.compiled else ():
        measure(f"{name}, compiled", partial(compiled_chain(operation), x, bias), 20, CHAINED)
    lines = [f"{name}: {each['us']:.1f} us a call (least {each['least_us']:.1f})" for name, each in results.items()]
    measuring.say_and_write(results, lines, options.json)


if __name__ == "__main__":
    main()
