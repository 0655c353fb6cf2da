"""How fast the kernels are on a CUDA or ROCm GPU, beside what torch and others offer for the same work.

Times are the GPU's own (`fastft.gpu.clock`), its caches emptied before each run. What the host finds out once a step, a
plan or a mask, is made before. The work behind TFLOP/s and GB/s is `fastft_kernels.roofline`'s count of what each
kernel does, tiles and all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from fastft_kernels import plan_attention, roofline
from torch import Tensor
from torch.nn import functional as F

from fastft.doctor.kernel_checks import CASES, Inputs, Outputs, Sizes, inputs_of, learnt
from fastft.gpu import clock as gpu_clock

CASE = {case.name: case for case in CASES}
"""The cases by name."""
OURS = "fastft"
"""The name of our own kernels among the peers'."""


@dataclass(frozen=True, slots=True)
class Speed:
    """One operation by one implementation: forward, and backward where something is learnt.

    Attributes:
        name: the operation.
        by: `fastft`, or the peer's name.
        milliseconds: the GPU's median; `spread` are the tenth and ninetieth percentile.
        host_milliseconds: what the host needs to ask for it, which a GPU that is behind hides.
        peak_mib: memory above what was there before, in MiB.
        tflops, gbytes: the kernel's own count of work by time; None for peers, whose count is not ours to make.
        floor_milliseconds: what this card's peak rates allow for our count of the work; None where it is not known.
        why_not: why there is no figure; the rest is None then.
    """

    name: str
    by: str
    milliseconds: float | None = None
    spread: tuple[float, float] | None = None
    host_milliseconds: float | None = None
    peak_mib: float | None = None
    tflops: float | None = None
    gbytes: float | None = None
    floor_milliseconds: float | None = None
    why_not: str | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """What is timed: a function of nothing, and the tensors whose gradients are asked for."""

    run: Callable[[], Outputs]
    learnt: Sequence[Tensor]

    def both_ways(self) -> Callable[[], object]:
        """A function that runs forward once, and backward where something is learnt."""
        if not self.learnt:
            return self.run
        upstream = [torch.ones_like(x) for x in self._outputs()]

        def once() -> None:
            torch.autograd.grad(self._outputs(), self.learnt, upstream)

        return once

    def _outputs(self) -> tuple[Tensor, ...]:
        out = self.run()
        return out if isinstance(out, tuple) else (out,)


def implementations(name: str) -> list[str]:
    """Ours, and the peers of an operation."""
    return [OURS, *PEERS[name]]


def work_of(name: str, by: str, sizes: Sizes, dtype: torch.dtype, impl: str = "triton") -> Work:
    """An operation on its case's inputs, on the current CUDA device.

    Args:
        name: the operation.
        by: one of its `implementations`.
        sizes, dtype: of the case.
        impl: what ours is computed by.

    Raises:
        ImportError: the peer is not installed.
    """
    inputs = _inputs(name, sizes, dtype)
    if by != OURS:
        return PEERS[name][by](sizes, inputs)
    return _on(inputs, lambda x: CASE[name].run(x, impl))


def measure(name: str, by: str, sizes: Sizes, dtype: torch.dtype, impl: str = "triton") -> Speed:
    """The speed of an operation by one of its `implementations`. A peer that does not run here is a finding."""
    try:
        once = work_of(name, by, sizes, dtype, impl).both_ways()
        times, host = gpu_clock.gpu_times(once), gpu_clock.host_times(once)
    except gpu_clock.HostNotAhead:
        wall = gpu_clock.wall_times(once).median
        return Speed(
            name, by, why_not=f"no GPU time, as it waits for the GPU within; {wall:.3f} ms by the host's clock"
        )
    except Exception as error:
        if by == OURS:
            raise
        return Speed(name, by, why_not=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
    peak = gpu_clock.peak_bytes(once) / 2**20
    speed = Speed(name, by, times.median, times.spread, host.median, peak)
    if by != OURS:
        return speed
    cost, seconds = cost_of(name, sizes, dtype.itemsize), times.median / 1e3
    card = roofline.card_named(torch.cuda.get_device_name())
    return replace(
        speed,
        tflops=(cost.matrix_flops + cost.other_flops) / seconds / 1e12,
        gbytes=cost.bytes / seconds / 1e9,
        floor_milliseconds=None if card is None else 1e3 * roofline.predicted_seconds(cost, card),
    )


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


@functools.lru_cache(maxsize=1)  # of the case whose peers are asked for one after another
def _inputs(name: str, sizes: Sizes, dtype: torch.dtype) -> Inputs:
    return inputs_of(CASE[name], sizes, dtype, torch.device("cuda"))


def _on(inputs: Inputs, run: Callable[[Inputs], Outputs]) -> Work:
    return Work(lambda: run(inputs), list(learnt(inputs).values()))


def _compiled(run: Callable[[Inputs], Outputs]) -> Peer:
    """By torch's inductor."""
    return lambda _sizes, inputs: _on(inputs, torch.compile(run, dynamic=False))


def _plain(run: Callable[[Inputs], Outputs]) -> Peer:
    """By torch, operation by operation."""
    return lambda _sizes, inputs: _on(inputs, run)


def _sdpa(sizes: Sizes, inputs: Inputs) -> Work:
    until = sizes.visible_until().cuda()
    token = torch.arange(sizes.T, device="cuda")
    mask = (token[None] <= token[:, None]) & (token[:, None] < until[None])

    def run(x: Inputs) -> Tensor:
        q, k, v = (x[name].transpose(0, 1)[None] for name in "qkv")
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return _on(inputs, run)


def _flex(sizes: Sizes, inputs: Inputs) -> Work:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    until = sizes.visible_until().cuda()

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < until[key])

    mask = create_block_mask(visible, None, None, sizes.T, sizes.T, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(x: Inputs) -> Tensor:
        q, k, v = (x[name].transpose(0, 1)[None] for name in "qkv")
        out: Tensor = compiled(q, k, v, block_mask=mask)
        return out[0].transpose(0, 1)

    return _on(inputs, run)


def _varlen(sizes: Sizes, inputs: Inputs) -> Work:
    """Every document with a copy of the prefix, as others pack: more tokens, the same attention."""
    from torch.nn.attention.varlen import varlen_attn

    longest = sizes.prefix + sizes.length
    ends = torch.arange(sizes.documents + 1, dtype=torch.int32, device="cuda") * longest
    document = torch.arange(sizes.documents, device="cuda")[:, None] * sizes.length
    token = torch.arange(longest, device="cuda")
    tokens = torch.where(token < sizes.prefix, token, token + document).flatten()
    q, k, v = copied = [inputs[name].detach()[tokens].requires_grad_() for name in "qkv"]

    return Work(lambda: varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0)), copied)


def _copied_prefix(x: Inputs) -> Outputs:
    return CASE["attention_decode"].run(x, "reference")


def _all_logits(x: Inputs) -> Tensor:
    logits = F.linear(x["hidden"][x["rows"]], x["weight"])
    losses = F.cross_entropy(logits.float(), x["targets"], reduction="none")
    return torch.dot(losses, x["row_weights"])


def _liger_linear(_sizes: Sizes, inputs: Inputs) -> Work:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return _on(inputs, lambda x: loss(x["weight"], x["hidden"][x["rows"]], x["targets"]))


def _liger_cross_entropy(_sizes: Sizes, inputs: Inputs) -> Work:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss()
    # It writes the gradient over the logits that it is given.
    return _on(inputs, lambda x: loss(x["logits"].clone(), x["targets"]))


def _torch_cross_entropy(x: Inputs) -> Tensor:
    return F.cross_entropy(x["logits"].float(), x["targets"])


def _torch_layer_norm(x: Inputs) -> tuple[Tensor, Tensor]:
    summed = x["x"] + x["residual"]
    return F.layer_norm(summed, summed.shape[-1:], x["weight"], x["bias"]), summed


def _liger_layer_norm(_sizes: Sizes, inputs: Inputs) -> Work:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        summed = x["x"] + x["residual"]
        return LigerLayerNormFunction.apply(summed, x["weight"], x["bias"], 1e-5), summed

    return _on(inputs, run)


def _torch_gelu(x: Inputs) -> Tensor:
    return F.gelu(x["x"] + x["bias"], approximate="tanh")


Peer = Callable[[Sizes, Inputs], Work]
PEERS: dict[str, dict[str, Peer]] = {
    "attention": {
        "torch SDPA, dense mask": _sdpa,
        "torch flex-attention": _flex,
        "torch varlen, prefix copied": _varlen,
    },
    "attention_decode": {"torch, prefix copied": _plain(_copied_prefix)},
    "linear_cross_entropy": {
        "torch, all logits": _plain(_all_logits),
        "inductor, all logits": _compiled(_all_logits),
        "Liger": _liger_linear,
    },
    "cross_entropy": {
        "torch": _plain(_torch_cross_entropy),
        "inductor": _compiled(_torch_cross_entropy),
        "Liger": _liger_cross_entropy,
    },
    "layer_norm": {
        "torch": _plain(_torch_layer_norm),
        "inductor": _compiled(_torch_layer_norm),
        "Liger": _liger_layer_norm,
    },
    "gelu": {"torch": _plain(_torch_gelu), "inductor": _compiled(_torch_gelu)},
}
"""What does the same work, by operation. A peer raises ImportError where it is not installed."""
