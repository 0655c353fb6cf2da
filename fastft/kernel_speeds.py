"""How fast the kernels are on a CUDA or ROCm GPU, beside what torch and others offer for the same work.

Times come from events on the device, each run after a pass over a buffer larger than its caches. The work behind
TFLOP/s and GB/s is `fastft_kernels.roofline`'s count of what each kernel does, tiles and all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from fastft_kernels import plan_attention, roofline
from torch import Tensor
from torch.nn import functional as F

from fastft.kernel_checks import CASES, Case, Inputs, Sizes, inputs_of

_FLUSHED_BYTES = 256 << 20
_WARMUP = 5

CASE = {case.name: case for case in CASES}
"""The cases by name."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Forward and backward of one operation by one implementation.

    Attributes:
        name: the operation.
        impl: `triton`, or the peer's name.
        milliseconds: the median; `spread` are the tenth and ninetieth percentile.
        peak_mib: memory above what was there before, in MiB.
        tflops, gbytes: the kernel's own count of work by time; None for peers, whose count is not ours to make.
        why_not: why it could not run; the rest is None then.
    """

    name: str
    impl: str
    milliseconds: float | None = None
    spread: tuple[float, float] | None = None
    peak_mib: float | None = None
    tflops: float | None = None
    gbytes: float | None = None
    why_not: str | None = None


def device_milliseconds(run: Callable[[], object], rounds: int = 20) -> list[float]:
    """Times of `run` by events on the current CUDA device, the cache flushed before each."""
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(_WARMUP):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for begin, end in events:
        flushed.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that `run` holds on the current CUDA device above what was held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def forward_backward(run: Callable[[Inputs], Tensor], inputs: Inputs) -> Callable[[], object]:
    """A function that runs forward once, and backward where an input has a gradient."""
    learnt = [x for x in inputs.values() if x.requires_grad]
    if not learnt:
        return lambda: run(inputs)
    upstream = torch.ones_like(run(inputs))

    def once() -> None:
        torch.autograd.grad(run(inputs), learnt, upstream)

    return once


def measure(case: Case, sizes: Sizes, dtype: torch.dtype, impl: str) -> list[Speed]:
    """The case's speed by `impl` on the current CUDA device, and its peers'."""
    inputs = inputs_of(case, sizes, dtype, torch.device("cuda"))
    ours = _measured(case.name, impl, lambda x: case.run(x, impl), inputs)
    cost = cost_of(case.name, sizes, dtype.itemsize)
    seconds = (ours.milliseconds or 0) / 1e3
    work = cost.matrix_flops + cost.other_flops
    speeds = [replace(ours, tflops=work / seconds / 1e12, gbytes=cost.bytes / seconds / 1e9)]
    for name, peer in PEERS[case.name].items():
        try:
            speeds.append(_measured(case.name, name, peer(sizes), inputs))
        except Exception as error:  # a peer that does not run here is a finding, not an end
            speeds.append(Speed(case.name, name, why_not=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"))
    return speeds


def cost_of(name: str, sizes: Sizes, element: int) -> roofline.Cost:
    """What forward and backward of a case's kernels need, counted from their shapes and tiles."""
    T, R, C, V = sizes.T, sizes.R, sizes.C, sizes.V
    if name == "attention":
        plan = plan_attention(sizes.visible_until())
        shape = (plan.scores, T, T, sizes.H, sizes.D, element)
        return roofline.attention_cost(*shape) + roofline.attention_cost(
            *shape, backward=True, scores_dkv=plan.scores_dkv, slots=plan.slots
        )
    if name == "attention_decode":  # each key and value is read once, the prefix by every sequence
        read = sizes.documents * (2 * sizes.prefix + sizes.length + 1) // 2 * C * 2 * element
        return roofline.moved(read, 2 * sizes.documents * C * element, flops=2 * read // element)
    costs: dict[str, Callable[[bool], roofline.Cost]] = {
        "linear_cross_entropy": lambda back: roofline.linear_cross_entropy_cost(R, C, V, element, T=T, backward=back),
        "cross_entropy": lambda back: roofline.cross_entropy_cost(R, R - -(-R // 3), V, element, backward=back),
        "layer_norm": lambda back: roofline.layer_norm_cost(T, C, element, stream=element, backward=back),
        "gelu": lambda back: roofline.gelu_cost(T, 4 * C, element, bias=element, backward=back),
    }
    return costs[name](False) + costs[name](True)


def card_of(name: str) -> roofline.Card | None:
    """The peak rates of a GPU by the name that torch gives it; None where they are not known here."""
    return next((card for key, card in roofline.CARDS.items() if key in name), None)


def _measured(name: str, impl: str, run: Callable[[Inputs], Tensor], inputs: Inputs) -> Speed:
    once = forward_backward(run, inputs)
    peak = peak_bytes(once)
    times = sorted(device_milliseconds(once))
    tenth = len(times) // 10
    return Speed(name, impl, statistics.median(times), (times[tenth], times[-1 - tenth]), peak / 2**20)


def _sdpa(sizes: Sizes) -> Callable[[Inputs], Tensor]:
    until = sizes.visible_until().cuda()
    token = torch.arange(sizes.T, device="cuda")
    mask = (token[None] <= token[:, None]) & (token[:, None] < until[None])

    def run(x: Inputs) -> Tensor:
        q, k, v = (x[name].transpose(0, 1)[None] for name in "qkv")
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return run


def _flex(sizes: Sizes) -> Callable[[Inputs], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    until = sizes.visible_until().cuda()

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < until[key])

    mask = create_block_mask(visible, None, None, sizes.T, sizes.T, device="cuda")
    compiled = torch.compile(flex_attention)

    def run(x: Inputs) -> Tensor:
        q, k, v = (x[name].transpose(0, 1)[None] for name in "qkv")
        out: Tensor = compiled(q, k, v, block_mask=mask)
        return out[0].transpose(0, 1)

    return run


def _copied_prefix(_sizes: Sizes) -> Callable[[Inputs], Tensor]:
    return lambda x: CASE["attention_decode"].run(x, "reference")


def _all_logits(_sizes: Sizes) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        logits = F.linear(x["hidden"][x["rows"]], x["weight"])
        return (F.cross_entropy(logits.float(), x["targets"], reduction="none") * x["row_weights"]).sum()

    return run


def _liger_linear(_sizes: Sizes) -> Callable[[Inputs], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x: loss(x["weight"], x["hidden"][x["rows"]], x["targets"])


def _liger_cross_entropy(_sizes: Sizes) -> Callable[[Inputs], Tensor]:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss()
    # It writes the gradient over the logits that it is given.
    return lambda x: loss(x["logits"].clone(), x["targets"])


def _torch_cross_entropy(_sizes: Sizes) -> Callable[[Inputs], Tensor]:
    return lambda x: F.cross_entropy(x["logits"].float(), x["targets"])


def _torch_layer_norm(_sizes: Sizes) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        summed = x["x"] + x["residual"]
        return torch.cat([F.layer_norm(summed, summed.shape[-1:], x["weight"], x["bias"]), summed])

    return run


def _torch_gelu(_sizes: Sizes) -> Callable[[Inputs], Tensor]:
    return lambda x: F.gelu(x["x"] + x["bias"], approximate="tanh")


PEERS: dict[str, dict[str, Callable[[Sizes], Callable[[Inputs], Tensor]]]] = {
    "attention": {"torch SDPA, dense mask": _sdpa, "torch flex-attention": _flex},
    "attention_decode": {"torch, the prefix copied": _copied_prefix},
    "linear_cross_entropy": {"torch, all logits": _all_logits, "Liger": _liger_linear},
    "cross_entropy": {"torch F.cross_entropy": _torch_cross_entropy, "Liger": _liger_cross_entropy},
    "layer_norm": {"torch F.layer_norm": _torch_layer_norm},
    "gelu": {"torch F.gelu": _torch_gelu},
}
"""What does the same work, by operation: a function of the sizes that makes a function of the case's inputs. It raises
ImportError where the peer is not installed."""
