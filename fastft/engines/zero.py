"""`ZeroEngine`: training over DeepSpeed's ZeRO, which parts moments, gradients and weights among the ranks.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054.

DeepSpeed averages gradients over the ranks, and would divide by its own count of accumulated batches. Here every
batch's loss is a part of one sum over one count, so that gradients are to be summed: `accumulate` multiplies by the
number of ranks, and nothing else in fastft knows of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastft.batches.batch import Batch
from fastft.common.errors import UserError
from fastft.engines.engine import Update, abandoned_on_error
from fastft.engines.moments import Moments
from fastft.engines.optim import BETAS, EPSILON, parameter_groups
from fastft.engines.zero_config import ZeroConfig
from fastft.engines.zero_setup import (
    GuardedAdamW,
    check_options,
    deepspeed_for,
    initialized,
    outside_blocks,
    writes_with,
)
from fastft.engines.zero_state import ZeroState
from fastft.gpu.staging import Staging
from fastft.model import ops
from fastft.model.gpt2 import GPT2
from fastft.model.lora import settle
from fastft.model.names import DType
from fastft.model.part import saved
from fastft.model.precision import choose_device
from fastft.ranks.world import World
from fastft.run.config import TrainOptions


class ZeroEngine:
    """Training over DeepSpeed: see `fastft.engines.engine.AnyEngine`. Stages 1 to 3; stage 0 is the plain engine.

    Its steps are not captured as CUDA graphs: hooks of DeepSpeed's decide on the host what is exchanged when.
    """

    in_flight = 0
    holds_moments = True

    def __init__(self, model: GPT2, options: TrainOptions, world: World, config: ZeroConfig, dtype: DType) -> None:
        """Parts the model among the ranks.

        Args:
            model: with the same float32 weights on all ranks, on the CPU.
            options: of the run.
            world: the ranks, which have met.
            config: DeepSpeed's file, read.
            dtype: fp32, or bf16 or fp16 with float32 masters of the weights.

        Raises:
            UserError: DeepSpeed is not installed or refuses its settings, or the options ask for what it cannot do.
        """
        self.world = world
        self.config = config
        self.stage = config.stage
        self.dtype = dtype
        self.device = choose_device(options.device, world.local_rank)
        self.impl = ops.resolve(options.impl, self.device)
        self.model = model
        self._staging = Staging(self.device)
        self._is_broken = False
        check_options(options, dtype, config.stage, self.device)
        deepspeed = deepspeed_for(self.device)
        torch.backends.cuda.matmul.allow_tf32 = options.tf32
        settle(model)  # before its weights are parted
        model.copies_tables = self.stage == 3
        groups = parameter_groups(model, weight_decay=options.weight_decay, decay_all=options.decay_all)
        self._adamw = GuardedAdamW(groups, lr=options.lr, betas=BETAS, eps=EPSILON, fused=True)
        given = {name: parameter.detach() for name, parameter in saved(model).items()}
        self.zero = initialized(deepspeed, model, self._adamw, config, options, dtype, world)
        from fastft.engines.shards import BackgroundWriter

        self.shard_writer = BackgroundWriter()
        writes_with(self.zero, self.shard_writer)
        self._state = ZeroState(self.zero, self._adamw, model, self.stage, world, self.device)
        if dtype != "fp32":  # DeepSpeed makes the masters of weights that it has rounded already
            self._state.set_masters(given)

    def accumulate(self, batch: Batch, count: int, *, last: bool = True) -> tuple[Tensor, Tensor]:
        """See `fastft.engines.engine.AnyEngine`."""
        if self._is_broken:
            raise RuntimeError("a step was given up, and DeepSpeed cannot forget its gradients: make a new engine")
        with abandoned_on_error(self):
            return self._forward_backward(self._staging.put(batch).batch, count, last=last)

    def abandon(self) -> None:
        """See `fastft.engines.engine.AnyEngine`. DeepSpeed holds a step's gradients in many places: no step can
        follow."""
        self._is_broken = True

    def _forward_backward(self, batch: Batch, count: int, *, last: bool) -> tuple[Tensor, Tensor]:
        self.zero.set_gradient_accumulation_boundary(last)
        # By the number of ranks the mean that DeepSpeed takes over them becomes a sum. It goes into the weights, since
        # a factor at the loss would be one more pass over the head's gradient; so does fp16's scale, since some
        # gradients of logits are there before the backward pass. DeepSpeed scales what it is given, to the same end.
        ranks, scale = self.world.size, self.loss_scale().get("scale", 1.0)
        weights = batch.weights * (ranks / count) * scale
        loss, row_losses = self.zero(batch, row_weights=weights, impl=self.impl)
        loss = loss / scale
        self.zero.backward(loss, scale_wrt_gas=False)
        return loss.detach() / ranks, row_losses

    def update(self, lr: float, loss: Tensor) -> Callable[[], Update]:
        """See `fastft.engines.engine.AnyEngine`. DeepSpeed leaves a step out whose gradients' norm is not finite."""
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
        (of_all_ranks,) = self.world.sum([loss.item()])
        loss_is_finite = math.isfinite(of_all_ranks)
        self._adamw.idle = not loss_is_finite
        can_rescale = self._can_lower_scale()
        self.zero.step()
        norm_is_finite = self.zero.was_step_applied()
        # Of a step that it leaves out, DeepSpeed does not always say the norm, but that of the step before.
        grad_norm = float(self.zero.get_global_grad_norm() or 0.0) if norm_is_finite else math.inf
        rescaled = loss_is_finite and not norm_is_finite and can_rescale
        update = Update(of_all_ranks, grad_norm, loss_is_finite and norm_is_finite, rescaled)
        return lambda: update

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """See `fastft.engines.engine.AnyEngine`."""
        loss: Tensor = self.zero(self._staging.put(batch).batch, impl=self.impl)[0]
        return loss

    @contextlib.contextmanager
    def answering(self) -> Iterator[GPT2]:
        """See `fastft.engines.engine.AnyEngine`: what the root reads is gathered for the length of the block."""
        if self.stage < 3:
            yield self.model
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(outside_blocks(self.model)):
            yield self.model

    def whole_weights(self) -> dict[str, Tensor] | None:
        """See `fastft.engines.engine.AnyEngine`."""
        return self._state.whole_weights()

    def whole_moments(self) -> Moments | None:
        """See `fastft.engines.engine.AnyEngine`."""
        return self._state.whole_moments()

    def load(self, weights: Path, moments: Moments) -> None:
        """See `fastft.engines.engine.AnyEngine`."""
        self._state.load(weights, moments)

    def save_shards(self, folder: Path) -> None:
        """Takes a copy of every rank's part, which `shard_writer` writes to `folder`. All ranks call it."""
        self.zero.save_checkpoint(
            str(folder), tag=self.shard_writer.tag, save_latest=False, exclude_frozen_parameters=True
        )

    def load_shards(self, folder: Path) -> None:
        """Puts back what `save_shards` has written, on the same number of ranks. All ranks call it.

        Raises:
            UserError: a file cannot be read, or holds something that DeepSpeed does not write.
        """
        is_part = self.model.part is not None  # the base is in no checkpoint
        loaded, _ = self.zero.load_checkpoint(str(folder), tag=self.shard_writer.tag, load_module_strict=not is_part)
        if loaded is None:
            raise UserError(f"DeepSpeed finds no checkpoint in {folder}; start from another with --overwrite")
        self._state.find_again()

    def _can_lower_scale(self) -> bool:
        """Whether a norm that is not finite may be the loss scale's doing: not where it is at its least, or fixed."""
        if self.dtype != "fp16":
            return False
        scaler = self.zero.optimizer.loss_scaler
        return bool(scaler.dynamic and scaler.loss_scale > scaler.min_scale)

    def loss_scale(self) -> dict[str, Any]:
        """See `fastft.engines.engine.AnyEngine`."""
        if self.dtype != "fp16":
            return {}
        return {"scale": float(self.zero.optimizer.loss_scaler.loss_scale), "good_steps": 0}

    def load_loss_scale(self, state: dict[str, Any]) -> None:
        """See `fastft.engines.engine.AnyEngine`."""
        if state and self.dtype == "fp16":
            self.zero.optimizer.loss_scaler.cur_scale = float(state["scale"])
