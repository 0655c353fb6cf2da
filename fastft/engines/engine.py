"""The engines: forward, backward and update, with the arithmetic that `--dtype` names.

`Engine` is plain torch; with several ranks each has the whole model and its part of every step. `GpuEngine` in
`fastft.engines.gpu_engine` is the same for CUDA, where nothing waits within a step. `fastft.engines.zero.ZeroEngine`
runs over DeepSpeed, which parts moments, gradients and weights among the ranks.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fastft.batches.batch import Batch
from fastft.common.errors import UserError
from fastft.engines.moments import Moments, laid_out, states_of
from fastft.engines.optim import CpuAdamW, adamw, gradient_norm
from fastft.model import ops
from fastft.model.gpt2 import GPT2
from fastft.model.names import DType
from fastft.model.part import saved, trained
from fastft.model.precision import BF16Copies, autocast, choose_device, choose_dtype, narrow_base
from fastft.model.weights import load_weights
from fastft.ranks.world import ALONE, World
from fastft.run.config import TrainOptions


@dataclass(frozen=True, slots=True)
class Update:
    """What became of an optimizer step."""

    loss: float
    """The mean over the supervised targets of the whole step, of all ranks, before the update."""
    grad_norm: float
    applied: bool
    rescaled: bool = False
    """Not applied because fp16's loss scale was too high, which has been lowered: part of finding it."""


class AnyEngine(Protocol):
    """What training needs of an engine. Every call but `whole_weights`' result is the same on all ranks."""

    device: torch.device
    dtype: DType
    impl: str
    model: GPT2
    world: World
    in_flight: int
    """Steps that may be under way when another one is begun, before the first one's result is asked for."""
    holds_moments: bool
    """Whether AdamW's moments are in memory from the beginning."""

    def accumulate(self, batch: Batch, count: int, *, last: bool = True) -> tuple[Tensor, Tensor]:
        """Forward and backward of one batch of a step.

        Args:
            batch: this rank's, on the host.
            count: supervised targets of the whole optimizer step, over all ranks: the divisor of its loss.
            last: whether this rank has no further batch in this step.

        Returns:
            The batch's part of the step's mean loss, a scalar on the device, and the loss of each of its rows, `[R]`
            or padded, on the device or the host (`Batch.example_losses`). Neither has a gradient. On a GPU their
            values are there when the step's `Update` is.
        """

    def abandon(self) -> None:
        """Gives up the step that is under way: what `accumulate` has added so far goes into no update.

        `accumulate` does so itself when it is broken off, so that a caller who goes on after an error (out of memory,
        say) has no part of that step in the next one.
        """

    def update(self, lr: float, loss: Tensor) -> Callable[[], Update]:
        """Clips the gradient, updates the weights at rate `lr` and clears the gradient.

        A non-finite loss or gradient, on whichever rank, leaves weights and moments as they are (`applied` is False).

        Args:
            lr: the rate.
            loss: the sum of this step's losses that `accumulate` gave on this rank, a scalar.

        Returns:
            What gives the result: when it is called, it waits until the device is done with this step. All ranks call
            it, in the order of the steps.
        """

    def evaluate(self, batch: Batch) -> Tensor:
        """The sum of the losses of this rank's batch, a scalar on the device."""

    def answering(self) -> AbstractContextManager[GPT2]:
        """A block with a model that can be asked for hidden states and its head, by all ranks alike: with the weights
        as they are now."""

    def whole_weights(self) -> dict[str, Tensor] | None:
        """What a checkpoint holds of the model (`fastft.model.part.saved`) by name, in float32 (float64 with `--dtype
        fp64`), on the first rank; None on the others. All ranks call it."""

    def whole_moments(self) -> Moments | None:
        """AdamW's state on the first rank, in host memory; None on the others. All ranks call it."""

    def load(self, weights: Path, moments: Moments) -> None:
        """Puts weights (a file of `save_weights`) and moments back."""

    def loss_scale(self) -> dict[str, Any]:
        """The state of fp16's loss scaling: `scale`, and for how many `good_steps` it has stood; empty without it."""

    def load_loss_scale(self, state: dict[str, Any]) -> None:
        """Puts the state of fp16's loss scaling back."""


@contextlib.contextmanager
def abandoned_on_error(engine: AnyEngine) -> Iterator[None]:
    """A block of a step; an error within it gives up the whole step."""
    try:
        yield
    except BaseException:
        engine.abandon()
        raise


class WholeModel(ABC):
    """What engines have in common whose ranks have the whole model each."""

    model: GPT2
    world: World

    @abstractmethod
    def computing(self) -> GPT2:
        """The model that steps compute with: `model`, or one with narrow copies of its weights."""

    def answering(self) -> AbstractContextManager[GPT2]:
        """See `AnyEngine`: the model is as it is. Of a part in a narrow dtype the one that computes, as a matrix that
        is trained may be wider than the bias that stays beside it."""
        return contextlib.nullcontext(self.model if self.model.part is None else self.computing())

    def whole_weights(self) -> dict[str, Tensor] | None:
        """See `AnyEngine`: the model's own, as all ranks have the same."""
        if not self.world.is_first:
            return None
        return {name: weight.detach() for name, weight in saved(self.model).items()}


class Engine(WholeModel):
    """Plain torch: see `AnyEngine`. With several ranks the gradients are summed before each update."""

    in_flight = 0
    holds_moments = False

    def __init__(self, model: GPT2, options: TrainOptions, world: World | None = None) -> None:
        self.world = world or ALONE
        self.device = choose_device(options.device, self.world.local_rank)
        self.dtype = choose_dtype(options.dtype, self.device)
        self.impl = ops.resolve(options.impl, self.device)
        if options.cuda_graphs:
            raise UserError(f"got --cuda_graphs true on {self.device}, expected CUDA; leave it out")
        self.clip = options.clip or math.inf
        torch.backends.cuda.matmul.allow_tf32 = options.tf32
        self.model = model.to(self.device, torch.float64 if self.dtype == "fp64" else torch.float32)
        if self.dtype != "bf16":
            narrow_base(self.model, None)
        self.copies = BF16Copies(self.model) if self.dtype == "bf16" else None
        self.optimizer = adamw(
            self.model,
            lr=options.lr,
            weight_decay=options.weight_decay,
            decay_all=options.decay_all,
            copies=self.copies,
            in_one_pass=self.dtype == "fp32" and self.device.type == "cpu",
        )
        if options.compile:
            ops.compile_model(self.model if self.copies is None else self.copies.computes)
        # fp16's range is too small for raw gradients. Other dtypes need no scaling, and the scaler passes through.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == "fp16")

    def accumulate(self, batch: Batch, count: int, *, last: bool = True) -> tuple[Tensor, Tensor]:
        """See `AnyEngine`."""
        del last  # gradients are summed over the ranks by `update`
        with abandoned_on_error(self):
            batch = batch.to(self.device)
            if self.copies is not None:
                self.copies.sum_up()  # of the step's earlier batches
            weights = batch.weights.double() if self.dtype == "fp64" else batch.weights  # 1 / count is rounded
            # The scale is in the weights, not at the loss: some gradients of logits are there before the backward pass.
            loss, row_losses = self._forward(batch, row_weights=self.scaler.scale(weights / count))
            torch.autograd.backward(loss)
        return loss.detach() / self.scaler.get_scale(), row_losses

    def abandon(self) -> None:
        """See `AnyEngine`."""
        self._clear_gradients()

    def update(self, lr: float, loss: Tensor) -> Callable[[], Update]:
        """See `AnyEngine`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        (of_all_ranks,) = self.world.sum([loss.item()])
        self._sum_over_ranks()
        self.scaler.unscale_(self.optimizer)
        gradients = self.gradients()
        grad_norm = gradient_norm(gradients)
        applied = math.isfinite(of_all_ranks) and math.isfinite(grad_norm)
        if applied:
            self._scale_gradients(gradients, min(1.0, self.clip / (grad_norm + 1e-6)))
            self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        if self.scaler.get_scale() < 1:  # no scale was the cause: a lower one would lose small gradients for long
            self.scaler.update(1.0)
        self._clear_gradients()
        rescaled = math.isfinite(of_all_ranks) and not applied and scale > 1
        update = Update(of_all_ranks, grad_norm, applied, rescaled)
        return lambda: update

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """See `AnyEngine`."""
        return self._forward(batch.to(self.device))[0]

    def computing(self) -> GPT2:
        """See `WholeModel`."""
        return self.model if self.copies is None else self.copies.current()

    def whole_moments(self) -> Moments | None:
        """See `AnyEngine`."""
        if not self.world.is_first:
            return None
        state = self.optimizer.state
        return laid_out((name, state.get(weight, {})) for name, weight in trained(self.model).items())

    def load(self, weights: Path, moments: Moments) -> None:
        """See `AnyEngine`."""
        load_weights(saved(self.model), weights)
        parameters = trained(self.model)
        for name, state in states_of(moments):
            weight = parameters[name]
            self.optimizer.state[weight].update({key: value.to(weight.device) for key, value in state.items()})

    def loss_scale(self) -> dict[str, Any]:
        """See `AnyEngine`."""
        state = self.scaler.state_dict()
        return {"scale": state["scale"], "good_steps": state["_growth_tracker"]} if state else {}

    def load_loss_scale(self, state: dict[str, Any]) -> None:
        """See `AnyEngine`."""
        if state and self.scaler.is_enabled():
            own = {"scale": state["scale"], "_growth_tracker": state["good_steps"]}
            self.scaler.load_state_dict({**self.scaler.state_dict(), **own})

    def gradients(self) -> list[Tensor]:
        """The gradients of the step so far, before clipping."""
        if self.copies is not None:
            return list(self.copies.gradients().values())
        return [p.grad for p in trained(self.model).values() if p.grad is not None]

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
        if isinstance(self.optimizer, CpuAdamW):
            self.optimizer.scale = factor
        elif factor < 1:  # at 1 it would be a pass over memory for nothing
            torch._foreach_mul_(gradients, factor)

    def _clear_gradients(self) -> None:
        if self.copies is not None:
            self.copies.clear_gradients()
        self.optimizer.zero_grad(set_to_none=True)
