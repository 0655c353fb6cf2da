"""Whether each kernel is right here: against float64, the same bits twice, in shapes that `fastft doctor` has not."""

from __future__ import annotations

import fastft_kernels
import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.engines import gradients, largest_difference
from fastft.doctor import kernel_checks
from fastft.doctor.child_tasks import Found
from fastft.doctor.kernel_checks import CASES, Sizes
from tools.gpu_day import models
from tools.gpu_day.models import PRETENDED

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
_CASE = {case.name: case for case in CASES}
_SHAPES = {
    "book": kernel_checks.GPU_SIZES,
    "odd": Sizes(prefix=1, documents=7, length=19, H=3, R=1, V=1105),
    "long": Sizes(prefix=900, documents=40, length=70, R=2049, V=1105),  # slots, several chunks
    "D128": Sizes(documents=9, H=8, D=128, R=77, V=1105),
    "D32": Sizes(documents=9, H=12, D=32, R=77, V=1105),
}
_IN = {"book": ("bf16", "fp32", "fp16"), "long": ("bf16",)}
if PRETENDED:  # nothing is computed: float64 of a whole vocabulary, and compiling for each dtype, only take their time
    _SHAPES, _IN = {"book": Sizes(documents=8, R=96, V=1105)}, {"book": ("bf16",)}
_BOOK = _SHAPES["book"]


def tasks() -> list[str]:
    """What training runs comes first."""
    kernels = [
        f"kernel {case.name} {shape} {dtype}"
        for shape in _SHAPES
        for dtype in _IN.get(shape, ("bf16", "fp32"))
        for case in CASES
    ]
    first, others = kernels[: len(CASES)], kernels[len(CASES) :]
    step = "step nano" if PRETENDED else "step gpt2"
    return [*first, "isolation", step, *others, "rows-counted bf16", "rows-counted fp32", "some-queries"]


def do(task: str) -> Found:
    """Does one. `ok` says whether it is right."""
    match task.split():
        case ["kernel", name, shape, dtype]:
            return _kernel(name, shape, dtype)
        case ["isolation"]:
            return {"ok": kernel_checks.is_isolated(_BOOK, torch.bfloat16, torch.device("cuda"), "triton")}
        case ["rows-counted", dtype]:
            return _rows_counted(_DTYPES[dtype])
        case ["some-queries"]:
            return _some_queries()
        case ["step", size]:
            return _step(size)
    raise ValueError(task)


def _kernel(name: str, shape: str, dtype: str) -> Found:
    of = (_CASE[name], _SHAPES[shape], _DTYPES[dtype], torch.device("cuda"), "triton")
    checks = list(kernel_checks.against_float64(*of))
    worst = max(checks, key=lambda check: check.error / check.limit)
    same_bits = kernel_checks.is_deterministic(*of)
    return {
        "ok": same_bits and all(check.ok for check in checks),
        "worst": worst.name,
        "worst_error": worst.error,
        "limit": worst.limit,
        "same_bits": same_bits,
    }


def _rows_counted(dtype: torch.dtype) -> Found:
    """Linear cross-entropy that is not told its rows, of which a third is ignored: the count stays on the GPU."""
    drawn = torch.Generator("cuda").manual_seed(0)
    h, w = (torch.randn(n, 1024, device="cuda", dtype=dtype, generator=drawn) * 0.1 for n in (777, 1105))
    targets = torch.randint(1105, (777,), device="cuda", generator=drawn)
    targets[::3] = -100
    found: dict[str, list[Tensor]] = {}
    for impl in ("reference", "triton"):
        x, y = (t.clone().requires_grad_() for t in (h, w))
        loss = fastft_kernels.linear_cross_entropy(x, y, targets, impl=impl)
        found[impl] = [loss, *torch.autograd.grad(loss, (x, y))]
    return _within(found, dtype)


def _some_queries() -> Found:
    """Attention of every third token alone, as in the last block."""
    sizes, drawn = _BOOK, torch.Generator("cuda").manual_seed(0)
    until = sizes.visible_until().cuda()
    rows = torch.arange(40, sizes.T, 3, device="cuda")
    q, k, v = (
        torch.randn(sizes.T, sizes.H, sizes.D, device="cuda", dtype=torch.bfloat16, generator=drawn).requires_grad_()
        for _ in range(3)
    )
    found: dict[str, list[Tensor]] = {}
    for impl in ("reference", "triton"):
        out = fastft_kernels.attention(q[rows], k, v, until, q_rows=rows, impl=impl)
        assert isinstance(out, Tensor)
        found[impl] = [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]
    return _within(found, torch.bfloat16)


def _within(found: dict[str, list[Tensor]], dtype: torch.dtype) -> Found:
    """Whether the kernels are within a few units in the last place of the reference, which rounds as they do."""
    limit = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-5
    pairs = zip(found["triton"], found["reference"], strict=True)
    errors = [kernel_checks.relative_error(a.double(), b.double()) for a, b in pairs]
    return {"ok": max(errors) <= limit, "errors": errors, "limit": limit}


def _step(size: str) -> Found:
    """A step of a real model by the kernels, beside the reference in float32, and again."""
    ways = {
        "reference": ("reference", "fp32"),
        "reference bf16": ("reference", "bf16"),
        "triton fp32": ("triton", "fp32"),
        "triton bf16": ("triton", "bf16"),
        "again": ("triton", "bf16"),
    }
    losses, found = {}, {}
    for name, (impl, dtype) in ways.items():
        engine = models.engine(size, dtype=dtype, impl=impl, cuda_graphs=False)
        batch = common.batcher_of(engine)(models.examples(), np.arange(8))
        losses[name] = float(engine.accumulate(batch, batch.count)[0])
        found[name] = {key: gradient.clone() for key, gradient in gradients(engine).items()}
    apart = {name: largest_difference(found[name], found["reference"]) for name in list(ways)[1:4]}
    same_bits = all(torch.equal(found["triton bf16"][key], gradient) for key, gradient in found["again"].items())
    # bf16 may be as far from float32 as the reference in bf16 is, and half as much again.
    right = apart["triton fp32"] <= 1e-4 and apart["triton bf16"] <= 1.5 * apart["reference bf16"]
    return {"ok": right and same_bits, "losses": losses, "gradients_apart": apart, "same_bits": same_bits}
