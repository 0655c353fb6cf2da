"""AdamW, its parameter groups, and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastft_kernels.cpu import library, update
from torch import Tensor, nn

from fastft.engines.moments import MEAN, SQUARE, STEP, begun
from fastft.model.part import trained
from fastft.model.precision import BF16Copies, total_norm
from fastft.run.config import Schedule

BETAS = (0.9, 0.999)
EPSILON = 1e-8
"""torch's defaults, as in the book."""

_BLOCK = 1 << 20
"""Elements that are updated at a time: casting the gradient, the update and the copy find them in the cache."""


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    decay_all: bool,
    copies: BF16Copies | None = None,
    in_one_pass: bool = False,
) -> torch.optim.AdamW:
    """AdamW with torch's default betas and epsilon, fused, over `parameter_groups`.

    Args:
        model: what of it is trained.
        lr: the rate.
        weight_decay, decay_all: see `parameter_groups`.
        copies: whose gradients are taken, and which an update refreshes.
        in_one_pass: of float32 weights on a CPU: `CpuAdamW`, as with copies.
    """
    groups = parameter_groups(model, weight_decay=weight_decay, decay_all=decay_all)
    if copies is None and not in_one_pass:
        return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPSILON, fused=True)
    return CpuAdamW(groups, copies, lr=lr)


def parameter_groups(model: nn.Module, *, weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    """AdamW's groups of what is trained: weight matrices decay; biases, layer norms, embeddings and DoRA's magnitudes
    do only with `decay_all`."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in trained(model).items():
        (decayed if decays(name, parameter, decay_all=decay_all) else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def decays(name: str, parameter: Tensor, *, decay_all: bool) -> bool:
    """Whether weight decay is for this weight: weight matrices, or all."""
    return decay_all or (parameter.ndim >= 2 and not name.startswith(("wte.", "wpe.", "new_rows.")))


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """The 2-norm over all gradients: by compiled code where there is some for them, else by `total_norm`."""
    has_code = all(
        g.device.type == "cpu" and g.is_contiguous() and g.dtype in (torch.float32, torch.bfloat16) for g in gradients
    )
    if has_code and library.why_not() is None:
        return update.norm(gradients)
    return total_norm(gradients).item()


class CpuAdamW(torch.optim.AdamW):
    """AdamW of float32 weights, from their gradients, or from those of their bf16 copies, which it refreshes.

    An update is bound by memory: by compiled code it is one pass over it (`fastft_kernels.cpu.update`). Where there is
    none, what belongs together is done block by block through torch, while it is in the cache. State as in torch's own
    AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], copies: BF16Copies | None, *, lr: float) -> None:
        super().__init__(groups, lr=lr, betas=BETAS, eps=EPSILON, fused=True)
        self.copies = copies
        self.scale = 1.0
        """Factor of the gradients in the next step, such as clipping gives."""
        self.is_compiled = groups[0]["params"][0].device.type == "cpu" and library.why_not() is None
        self._scratch = torch.empty(0 if self.is_compiled else _BLOCK, device=groups[0]["params"][0].device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # torch's overloads return a loss
        """Updates the weights that have a gradient, and their copies."""
        del closure
        pairs = self._pairs()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight in pairs]
            self._begin(weights)
            if self.is_compiled:
                self._update_in_one_pass(weights, pairs, group)
            else:
                for block in _blocks(piece for weight in weights for piece in self._pieces(weight, *pairs[weight])):
                    self._update(block, group)
        if self.copies is not None:
            self.copies.refreshed()

    def _pairs(self) -> dict[Tensor, tuple[Tensor, Tensor | None]]:
        """Of each weight that has a gradient: that, and its copy where it has one."""
        if self.copies is not None:
            return {weight: (gradient, copy) for weight, gradient, copy in self.copies.pairs()}
        weights = [weight for group in self.param_groups for weight in group["params"]]
        return {weight: (weight.grad, None) for weight in weights if weight.grad is not None}

    def _begin(self, weights: list[Tensor]) -> None:
        """Counts the step; makes the state in the first one."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight].update(begun(weight))
        if weights:
            torch._foreach_add_([self.state[weight][STEP] for weight in weights], 1)

    def _update_in_one_pass(
        self, weights: list[Tensor], pairs: dict[Tensor, tuple[Tensor, Tensor | None]], group: dict[str, Any]
    ) -> None:
        pieces = []
        for weight in weights:
            state, (gradient, copy) = self.state[weight], pairs[weight]
            mean, square = state[MEAN], state[SQUARE]
            gradient = gradient.contiguous()
            step, decay = int(state[STEP]), group["weight_decay"]
            pieces.append(update.Piece(weight, gradient, mean, square, copy, step, decay))
        update.adamw(pieces, lr=group["lr"], betas=group["betas"], epsilon=group["eps"], scale=self.scale)

    def _pieces(self, weight: Tensor, gradient: Tensor, copy: Tensor | None) -> Iterator[_Piece]:
        state = self.state[weight]
        # A gradient may be copied; of what is written to, a copy would take the update and be gone.
        flat = [x.view(-1).split(_BLOCK) for x in (weight, gradient.contiguous(), state[MEAN], state[SQUARE])]
        copies = [None] * len(flat[0]) if copy is None else copy.view(-1).split(_BLOCK)
        for w, g, m, v, c in zip(*flat, copies, strict=True):
            yield _Piece(w, g, m, v, c, state[STEP])

    def _update(self, block: list[_Piece], group: dict[str, Any]) -> None:
        sizes = [piece.gradient.numel() for piece in block]
        gradients = list(self._scratch[: sum(sizes)].split(sizes))
        torch._foreach_copy_(gradients, [piece.gradient for piece in block])
        if self.scale != 1:
            torch._foreach_mul_(gradients, self.scale)
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(  # what torch.optim.AdamW(fused=True) calls, for all of a weight at once
            [piece.weight for piece in block],
            gradients,
            [piece.exp_avg for piece in block],
            [piece.exp_avg_sq for piece in block],
            [],
            [piece.step for piece in block],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        for piece in block:
            if piece.copy is not None:
                piece.copy.copy_(piece.weight)


@dataclass(slots=True)
class _Piece:
    """Of a weight and all that belongs to it, each `[n]`; its gradient and its copy may be bf16."""

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None
    step: Tensor


def _blocks(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces put together up to a block's size: a model has many small weights."""
    block: list[_Piece] = []
    size = 0
    for piece in pieces:
        if block and size + piece.weight.numel() > _BLOCK:
            yield block
            block, size = [], 0
        block.append(piece)
        size += piece.weight.numel()
    if block:
        yield block


def learning_rate(step: int, *, peak: float, schedule: Schedule, warmup: int, total_steps: int) -> float:
    """The rate of `step` (from 0): a linear climb over `warmup` steps, then constant, or falling to zero.

    The last step's rate is above zero: a rate of exactly zero would be a step for nothing.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total_steps - warmup)
    return peak * (1 - done) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * done))
