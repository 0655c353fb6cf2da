"""The engine: forward, backward and update on one device, with the arithmetic that `--dtype` names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft import ops
from fastft.batch import Batch
from fastft.config import TrainOptions
from fastft.model import GPT2
from fastft.optim import MixedAdamW, adamw
from fastft.precision import BF16Copies, autocast, choose_device, choose_dtype, total_norm


@dataclass(frozen=True, slots=True)
class Update:
    """What became of an optimizer step."""

    grad_norm: float
    applied: bool
    rescaled: bool = False
    """Not applied because fp16's loss scale was too high, which has been lowered: part of finding it."""


class Engine:
    """A model, its optimizer, and one optimizer step in two calls: `accumulate` for each batch, then `update`."""

    def __init__(self, model: GPT2, options: TrainOptions) -> None:
        self.device = choose_device(options.device)
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
        if self._to_be_compiled(options):
            # Sizes are rounded to few (`Batcher.round_sizes`), and from the second one on they are symbols.
            self.model.compile(fullgraph=True)
        # fp16's range is too small for raw gradients. Other dtypes need no scaling, and the scaler passes through.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == "fp16")

    def accumulate(self, batch: Batch, count: int) -> tuple[Tensor, Tensor]:
        """Forward and backward of one batch of a step.

        Args:
            batch: on any device.
            count: supervised targets of the whole optimizer step, the divisor of its loss.

        Returns:
            The batch's part of the step's mean loss, a scalar, and the sum of each example's losses, `[examples]`;
            both without gradient, on the device.
        """
        batch = batch.to(self.device)
        if self.copies is not None:
            self.copies.sum_up()  # of the step's earlier batches
        loss, row_losses = self._forward(batch, row_weights=batch.weights / count)
        torch.autograd.backward(self.scaler.scale(loss))
        return loss.detach(), batch.example_losses(row_losses)

    def update(self, lr: float, *, loss_is_finite: bool = True) -> Update:
        """Clips the gradient, updates the weights at rate `lr` and clears the gradient.

        A non-finite loss or gradient leaves weights and moments as they are (`applied` is False).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
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
        """The sum of the losses of a batch's supervised targets, and their count."""
        loss, _ = self._forward(batch.to(self.device))
        return loss.item(), batch.count

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

    def _to_be_compiled(self, options: TrainOptions) -> bool:
        if options.compile is None:
            return self.impl == "triton" and self.device.type == "cuda"
        return options.compile

    def _scale_gradients(self, gradients: list[Tensor], factor: float) -> None:
        if isinstance(self.optimizer, MixedAdamW):
            self.optimizer.scale = factor
        elif factor < 1:  # at 1 it would be a pass over memory for nothing
            torch._foreach_mul_(gradients, factor)

    def _clear_gradients(self) -> None:
        if self.copies is not None:
            self.copies.clear_gradients()
        self.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate_batch(model: GPT2, batch: Batch) -> tuple[float, int]:
    """The sum of the losses of a batch's supervised targets, and their count, as the model is."""
    loss, _ = model(batch.to(model.wte.weight.device))
    return loss.item(), batch.count
