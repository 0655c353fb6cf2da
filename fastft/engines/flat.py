"""The weights of a model laid out flat: one tensor each of weights, gradients, moments and narrow copies.

An optimizer step goes through all weights several times. Weight by weight that is thousands of small calls; laid end to
end it is a few large ones, and ranks exchange gradients in a few large pieces. Every parameter is a part of the whole,
so the model, checkpoints and exports see what they always saw.

The order is that in which a backward pass is done with them: the head, the last block, ..., the first block, the
embeddings. Each of these is a bucket, in which weights of one kind lie together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastft.engines.moments import MEAN, SQUARE, STEP, State
from fastft.engines.optim import BETAS, EPSILON, decays
from fastft.model.gpt2 import GPT2
from fastft.model.part import trained
from fastft.model.precision import is_narrowed, narrow_base, total_norm, with_weights

_ALIGNED = 64
"""Elements: where each weight begins is a multiple, so that its 16-bit copy too begins at 128 bytes."""


@dataclass(frozen=True, slots=True)
class Run:
    """Places `begin` to `end` of the flat tensors, whose weights are of one kind."""

    begin: int
    end: int
    decays: bool
    is_narrow: bool


@dataclass(frozen=True, slots=True)
class Bucket:
    """Weights whose gradients are there at about the same time: places `begin` to `end`."""

    names: tuple[str, ...]
    begin: int
    end: int


class FlatWeights:
    """What a model trains: weights, gradients and AdamW's moments, each `[N]` in the dtype of the weights, and narrow
    copies.

    Attributes:
        weights, gradients, exp_avg, exp_avg_sq: `[N]`; what lies between two weights stays zero.
        copies: `[N]` in the narrow dtype; None where the model computes with its weights.
        step: AdamW's count of steps, a float32 scalar on the device.
        computes: the model that computes: with the copies in place of the weights, where there are some.
        tensors: by name, what it computes with.
        buckets: in the order in which a backward pass is done with them.
    """

    def __init__(self, model: GPT2, narrow: torch.dtype | None, *, weight_decay: float, decay_all: bool) -> None:
        """Lays out a model's weights, which become parts of `weights`.

        Args:
            model: on its device, in float32 or float64.
            narrow: the dtype of the copies, for those weights that have one.
            weight_decay: AdamW's, for those weights that decay.
            decay_all: see `fastft.engines.optim.decays`.
        """
        self._weight_decay = weight_decay
        narrow_base(model, narrow)
        parameters = trained(model)
        self._places: dict[str, tuple[int, torch.Size]] = {}
        self._runs: list[Run] = []
        self.buckets: list[Bucket] = []
        end = 0
        for names in _buckets(model):
            begin = end
            end = self._lay_out(names, parameters, begin, narrow is not None, decay_all)
            self.buckets.append(Bucket(names, begin, end))
        like = next(iter(parameters.values()))
        self.weights, self.gradients, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(end, dtype=like.dtype, device=like.device) for _ in range(4)
        )
        self.step = torch.zeros((), device=like.device)
        for name, parameter in parameters.items():
            place = self.part(self.weights, name)
            place.copy_(parameter.detach())
            parameter.data = place
        self.copies = None if narrow is None else torch.zeros(end, dtype=narrow, device=like.device)
        self.computes = model if self.copies is None else with_weights(model, self._narrowed(parameters))
        self.tensors = trained(self.computes)
        self._gradient_of = {name: self.part(self.gradients, name) for name in self._places}
        self.refresh()

    def part(self, whole: Tensor, name: str) -> Tensor:
        """The part of a flat tensor that belongs to a weight, in its shape."""
        begin, shape = self._places[name]
        return whole[begin : begin + shape.numel()].view(shape)

    def take(self, names: tuple[str, ...], gradients: list[Tensor], *, add: bool) -> None:
        """Puts gradients of the tensors in their places: in place of what is there, or added to it."""
        places = [self._gradient_of[name] for name in names]
        (torch._foreach_add_ if add else torch._foreach_copy_)(places, gradients)

    def gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients, a scalar."""
        return total_norm(self._gradient_of.values())

    def adamw(self, lr: Tensor, grad_scale: Tensor, found_inf: Tensor) -> None:
        """One update of all weights, with torch's default betas and epsilon; nothing of it waits for the device.

        Args:
            lr: the rate, a float32 scalar.
            grad_scale: what the gradients are divided by, a float32 scalar.
            found_inf: 1 to leave weights and moments as they are, else 0; a float32 scalar.
        """
        self.step += 1 - found_inf
        for decay in (True, False):
            runs = [run for run in self._runs if run.decays == decay]
            if not runs:  # of nothing torch's kernel for CUDA would read the first tensor
                continue
            weights, gradients, exp_avgs, exp_avg_sqs = (
                [whole[run.begin : run.end] for run in runs]
                for whole in (self.weights, self.gradients, self.exp_avg, self.exp_avg_sq)
            )
            torch._fused_adamw_(  # what torch.optim.AdamW(fused=True) calls
                weights,
                gradients,
                exp_avgs,
                exp_avg_sqs,
                [],
                [self.step] * len(runs),
                lr=lr,
                beta1=BETAS[0],
                beta2=BETAS[1],
                weight_decay=self._weight_decay if decay else 0.0,
                eps=EPSILON,
                amsgrad=False,
                maximize=False,
                grad_scale=grad_scale,
                found_inf=found_inf,
            )

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the copies those of the weights as they are now."""
        narrow = [(run.begin, run.end) for run in self._runs if run.is_narrow]
        if self.copies is None or not narrow:  # where layer norms alone are trained, say
            return
        copies, weights = ([whole[begin:end] for begin, end in narrow] for whole in (self.copies, self.weights))
        torch._foreach_copy_(copies, weights)

    def states(self) -> Iterator[tuple[str, State]]:
        """Each weight's name, and AdamW's state of it: the parts of `exp_avg` and `exp_avg_sq`, and `step`."""
        for name in self._places:
            mean, square = self.part(self.exp_avg, name), self.part(self.exp_avg_sq, name)
            yield name, {MEAN: mean, SQUARE: square, STEP: self.step}

    def _lay_out(
        self, names: tuple[str, ...], parameters: dict[str, nn.Parameter], begin: int, narrows: bool, decay_all: bool
    ) -> int:
        """Gives a bucket's weights their places from `begin` on; returns where they end."""
        kinds = {
            name: (decays(name, parameters[name], decay_all=decay_all), narrows and is_narrowed(name)) for name in names
        }
        for kind in sorted(set(kinds.values()), reverse=True):
            start = begin
            for name in names:
                if kinds[name] == kind:
                    self._places[name] = begin, parameters[name].shape
                    begin += -(-parameters[name].numel() // _ALIGNED) * _ALIGNED
            self._runs.append(Run(start, begin, *kind))
        return begin

    def _narrowed(self, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        assert self.copies is not None
        return {name: nn.Parameter(self.part(self.copies, name)) for name in parameters if is_narrowed(name)}


def _buckets(model: GPT2) -> list[tuple[str, ...]]:
    """The names of what is trained, in the order in which a backward pass is done with them."""
    named = [*trained(model)]
    blocks = [tuple(name for name in named if name.startswith(f"h.{layer}.")) for layer in range(len(model.h))]
    last = tuple(name for name in named if name.startswith(("ln_f.", "lm_head.")))
    first = tuple(name for name in named if name.startswith(("wte.", "wpe.", "new_rows.")))
    return [names for names in (last, *reversed(blocks), first) if names]
