"""The engines: forward, backward and update, with the arithmetic that `--dtype` names.

`Engine` is plain torch, on one device or, with several ranks, each with the whole model and its part of every step.
`fastft.zero.ZeroEngine` is the same over DeepSpeed, which parts moments, gradients and weights among the ranks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fastft import ops
from fastft.batch import Batch
from fastft.config import DType, TrainOptions
from fastft.model import GPT2
from fastft.optim import MixedAdamW, adamw
from fastft.precision import BF16Copies, autocast, choose_device, choose_dtype, total_norm
from fastft.weights import load_weights
from fastft.world import ALONE, World

Moments = dict[str, Tensor]
"""AdamW's state as `NAME/exp_avg`, `NAME/exp_avg_sq`, `NAME/step`, whole and in float32."""


@dataclass(frozen=True, slots=True)
class Update:
    """What became of an optimizer step."""

    grad_norm: float
    applied: bool
    rescaled: bool = False
    """Not applied because fp16's loss scale was too high, which has been lowered: part of finding it."""


class AnyEngine(Protocol):
    """What training needs of an engine. Every call but `whole_model`'s result is the same on all ranks."""

    device: torch.device
    dtype: DType
    impl: str
    model: GPT2
    world: World

    def accumulate(self, batch: Batch, count: int, *, last: bool = True) -> tuple[Tensor, Tensor]:
        """Forward and backward of one batch of a step.

        Args:
            batch: this rank's, on any device.
            count: supervised targets of the whole optimizer step, over all ranks: the divisor of its loss.
            last: whether this rank has no further batch in this step.

        Returns:
            The batch's part of the step's mean loss, a scalar, and the sum of each example's losses, `[examples]`;
            both without gradient, on the device.
        """

    def update(self, lr: float, *, loss_is_finite: bool = True) -> Update:
        """Clips the gradient, updates the weights at rate `lr` and clears the gradient.

        A non-finite loss or gradient, on whichever rank, leaves weights and moments as they are (`applied` is False).
        """

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """The sum of the losses of this rank's batch, and the count of its supervised targets."""

    def answering(self) -> AbstractContextManager[object]:
        """A block in which `model` can be asked for hidden states and its head, by all ranks alike."""

    def whole_model(self) -> GPT2 | None:
        """The model with its float32 weights, on the first rank; None on the others. All ranks call it."""

    def whole_moments(self) -> Moments | None:
        """AdamW's state on the first rank, in host memory; None on the others. All ranks call it."""

    def load(self, weights: Path, moments: Moments) -> None:
        """Puts weights (a file of `save_weights`) and moments back."""

    def loss_scale(self) -> dict[str, Any]:
        """The state of fp16's loss scaling; empty without it."""

    def load_loss_scale(self, state: dict[str, Any]) -> None:
        """Puts the state of fp16's loss scaling back."""


class Engine:
    """Plain torch: see `AnyEngine`. With several ranks the gradients are summed before each update."""

    def __init__(self, model: GPT2, options: TrainOptions, world: World | None = None) -> None:
        self.world = world or ALONE
        self.device = choose_device(options.device, self.world.local_rank)
        self.dtype = choose_dtype(options.dtype, self.device)
        self.impl = ops.resolve(options.impl, self.device)
        self.clip = options.clip or math.inf
        torch.backends.cuda.matmul.allow_tf32 = options.tf32
        self.model = model.to(self.device, torch.float64 if self.dtype == "fp64" else torch.float32)
        # On a GPU autocast's casts are cheap beside the products; there the weights stay as they are.
        self.copies = BF16Copies(self.model) if self.dtype == "bf16" and self.device.type == "cpu" else None
        self.optimizer = adamw(
            self.model,
            lr=options.lr,
            weight_decay=options.weight_decay,
            decay_all=options.decay_all,
            copies=self.copies,
        )
        if to_be_compiled(options, self.impl, self.device):
            # Sizes are rounded to few (`Batcher.round_sizes`), and from the second one on they are symbols.
            self.model.compile(fullgraph=True)
        # fp16's range is too small for raw gradients. Other dtypes need no scaling, and the scaler passes through.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == "fp16")

    def accumulate(self, batch: Batch, count: int, *, last: bool = True) -> tuple[Tensor, Tensor]:
        """See `AnyEngine`."""
        del last  # gradients are summed over the ranks by `update`
        batch = batch.to(self.device)
        if self.copies is not None:
            self.copies.sum_up()  # of the step's earlier batches
        loss, row_losses = self._forward(batch, row_weights=batch.weights / count)
        torch.autograd.backward(self.scaler.scale(loss))
        return loss.detach(), batch.example_losses(row_losses)

    def update(self, lr: float, *, loss_is_finite: bool = True) -> Update:
        """See `AnyEngine`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._sum_over_ranks()
        self.scaler.unscale_(self.optimizer)
        gradients = self.gradients()
        grad_norm = total_norm(gradients).item()
        applied = loss_is_finite and math.isfinite(grad_norm)
        if applied:
            self._scale_gradients(gradients, min(1.0, self.clip / (grad_norm + 1e-6)))
            self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        self._clear_gradients()
        return Update(grad_norm, applied, rescaled=loss_is_finite and not applied and scale > 1)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """See `AnyEngine`."""
        loss, _ = self._forward(batch.to(self.device))
        return loss.item(), batch.count

    def answering(self) -> AbstractContextManager[object]:
        """See `AnyEngine`: the model is as it is."""
        return contextlib.nullcontext()

    def whole_model(self) -> GPT2 | None:
        """See `AnyEngine`: the model itself, as all ranks have the same."""
        return self.model if self.world.is_first else None

    def whole_moments(self) -> Moments | None:
        """See `AnyEngine`."""
        if not self.world.is_first:
            return None
        return {
            f"{name}/{key}": value.detach().cpu()
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def load(self, weights: Path, moments: Moments) -> None:
        """See `AnyEngine`."""
        load_weights(self.model, weights)
        parameters = dict(self.model.named_parameters())
        for name, value in moments.items():
            parameter_name, _, key = name.rpartition("/")
            parameter = parameters[parameter_name]
            self.optimizer.state[parameter][key] = value.to(parameter.device)

    def loss_scale(self) -> dict[str, Any]:
        """See `AnyEngine`."""
        return self.scaler.state_dict()

    def load_loss_scale(self, state: dict[str, Any]) -> None:
        """See `AnyEngine`."""
        if state:
            self.scaler.load_state_dict(state)

    def gradients(self) -> list[Tensor]:
        """The gradients of the step so far, before clipping."""
        if self.copies is not None:
            return list(self.copies.gradients().values())
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _forward(self, batch: Batch, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`GPT2.forward` in the engine's arithmetic."""
        with contextlib.nullcontext() if self.copies is not None else autocast(self.dtype, self.device):
            call: Callable[..., tuple[Tensor, Tensor]] = self.model if self.copies is None else self.copies
            return call(batch, impl=self.impl, **kwargs)

    def _sum_over_ranks(self) -> None:
        """Adds up the gradients of all ranks. Each is a part of one sum over one count: nothing is averaged."""
        if self.world.size == 1:
            return
        if self.copies is not None:
            self.copies.sum_up()  # in float32: summing in bf16 would round again with every rank
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in self.gradients()]:
            work.wait()

    def _scale_gradients(self, gradients: list[Tensor], factor: float) -> None:
        if isinstance(self.optimizer, MixedAdamW):
            self.optimizer.scale = factor
        elif factor < 1:  # at 1 it would be a pass over memory for nothing
            torch._foreach_mul_(gradients, factor)

    def _clear_gradients(self) -> None:
        if self.copies is not None:
            self.copies.clear_gradients()
        self.optimizer.zero_grad(set_to_none=True)


def to_be_compiled(options: TrainOptions, impl: str, device: torch.device) -> bool:
    """What `--compile` means where it is not given."""
    if options.compile is None:
        return impl == "triton" and device.type == "cuda"
    return options.compile


@torch.no_grad()
def evaluate_batch(model: GPT2, batch: Batch) -> tuple[float, int]:
    """The sum of the losses of a batch's supervised targets, and their count, as the model is."""
    loss, _ = model(batch.to(model.wte.weight.device))
    return loss.item(), batch.count
