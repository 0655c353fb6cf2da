"""The engine: forward, backward and update on one device, with the arithmetic that `--dtype` names."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastft.batch import Batch
from fastft.config import Device, DType, TrainOptions
from fastft.errors import UserError
from fastft.model import GPT2
from fastft.optim import adamw

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(device: Device) -> torch.device:
    """The device that `--device` names; `auto` takes CUDA, else MPS, else the CPU.

    Raises:
        UserError: the device is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available[device]:
        raise UserError(f"got --device {device}, which torch does not find here; expected auto or cpu")
    return torch.device(device)


def choose_dtype(dtype: DType, device: torch.device) -> DType:
    """The arithmetic that `--dtype` names; `auto` takes what the hardware does fast.

    bf16 on a GPU that has it and on a CPU with bf16 instructions; fp16 on a GPU without bf16; else fp32.
    """
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        cpu = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "fp32"
    return "fp32"


def autocast(dtype: DType, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The autocast context of a dtype; none for fp32 and fp64."""
    if dtype not in _AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[dtype])


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
        self.impl = options.impl
        self.clip = options.clip or math.inf
        torch.backends.cuda.matmul.allow_tf32 = options.tf32
        self.model = model.to(self.device, torch.float64 if self.dtype == "fp64" else torch.float32)
        self.optimizer = adamw(
            self.model, lr=options.lr, weight_decay=options.weight_decay, decay_all=options.decay_all
        )
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
        with autocast(self.dtype, self.device):
            loss, row_losses = self.model(batch, row_weights=batch.weights / count, impl=self.impl)
        torch.autograd.backward(self.scaler.scale(loss))
        return loss.detach(), batch.example_losses(row_losses)

    def update(self, lr: float, *, loss_is_finite: bool = True) -> Update:
        """Clips the gradient, updates the weights at rate `lr` and clears the gradient.

        A non-finite loss or gradient leaves weights and moments as they are (`applied` is False).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        grad_norm = norm.item()
        applied = loss_is_finite and math.isfinite(grad_norm)
        if applied and grad_norm > self.clip:  # below it, clipping would be a pass over memory for nothing
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        if applied:
            self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(grad_norm, applied, rescaled=loss_is_finite and not applied and scale > 1)

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """The sum of the losses of a batch's supervised targets, and their count."""
        return evaluate_batch(self.model, batch, dtype=self.dtype, impl=self.impl)


@torch.no_grad()
def evaluate_batch(model: GPT2, batch: Batch, *, dtype: DType = "fp32", impl: str = "auto") -> tuple[float, int]:
    """The sum of the losses of a batch's supervised targets, and their count, without gradients."""
    device = model.wte.weight.device
    batch = batch.to(device)
    with autocast(dtype, device):
        loss, _ = model(batch, impl=impl)
    return loss.item(), batch.count
