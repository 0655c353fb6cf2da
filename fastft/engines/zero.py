"""`ZeroEngine`: training over DeepSpeed's ZeRO, which parts moments, gradients and weights among the ranks.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054.

DeepSpeed averages gradients over the ranks, and would divide by its own count of accumulated batches. Here every
batch's loss is a part of one sum over one count, so that gradients are to be summed: `accumulate` multiplies by the
number of ranks, and nothing else in fastft knows of it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastft.batches.batch import Batch
from fastft.common.errors import UserError
from fastft.engines.engine import Moments, Update, abandoned_on_error
from fastft.engines.optim import BETAS, EPSILON, parameter_groups
from fastft.engines.zero_config import ZeroConfig, settings_for_deepspeed
from fastft.gpu.staging import Staging
from fastft.model import ops
from fastft.model.gpt2 import GPT2, Block
from fastft.model.names import DType
from fastft.model.precision import choose_device
from fastft.model.weights import load_weights
from fastft.ranks.world import World, group_of_one
from fastft.run.config import TrainOptions

_MOMENTS = ("exp_avg", "exp_avg_sq")


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
        _check(options, dtype, config.stage, self.device)
        deepspeed = _deepspeed(self.device)
        torch.backends.cuda.matmul.allow_tf32 = options.tf32
        self._adamw = _GuardedAdamW(
            parameter_groups(model, weight_decay=options.weight_decay, decay_all=options.decay_all),
            lr=options.lr,
            betas=BETAS,
            eps=EPSILON,
            fused=True,
        )
        if self.stage == 3:
            _gather_with_their_readers(deepspeed, model)
            # A reentrant checkpoint runs a block again as a whole, hooks included; the other kind compares what it
            # saves with what it saved, which is another thing when a weight has been gathered anew.
            model.reentrant_checkpoints = True
        group_of_one()  # where there is one rank alone
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed asks for it; srun does not set it
        settings = settings_for_deepspeed(config, options, dtype, world.size)
        # Of many classes, where a section is not what DeepSpeed takes it for; pydantic's errors are ValueErrors.
        refusals = (ValueError, TypeError, AttributeError, AssertionError, RuntimeError, deepspeed.DeepSpeedConfigError)
        try:
            self.zero, *_ = deepspeed.initialize(
                model=model, optimizer=self._adamw, config=settings, dist_init_required=False
            )
        except refusals as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(f"DeepSpeed refuses {config.path}: {' '.join(str(error).split())[:400]}") from error
        from fastft.engines.shards import BackgroundWriter

        self.shard_writer = BackgroundWriter()
        self.zero.checkpoint_engine = self.shard_writer
        copy_scripts = self.zero._copy_recovery_script

        def copy_scripts_if_there_is_room(folder: str) -> None:
            with contextlib.suppress(OSError):  # a full disk is told by `shard_writer`, and to all ranks
                copy_scripts(folder)

        self.zero._copy_recovery_script = copy_scripts_if_there_is_room
        if dtype == "fp16":  # at its least scale DeepSpeed would end the run, with no checkpoint: `--max_skipped` does
            self.zero.optimizer.loss_scaler.raise_error_at_min_scale = False
        self._begin_state()

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

    def answering(self) -> AbstractContextManager[object]:
        """See `fastft.engines.engine.AnyEngine`: what the root reads is gathered for the length of the block."""
        if self.stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(_outside_blocks(self.model))
        return context

    @torch.no_grad()
    def whole_model(self) -> GPT2 | None:
        """See `fastft.engines.engine.AnyEngine`. Tensor after tensor is gathered, and kept in the first rank's host
        memory."""
        from deepspeed.utils import safe_get_full_fp32_param

        whole = None
        if self.world.is_first:
            with torch.device("meta"):
                empty = GPT2(self.model.config)
            whole = empty.to_empty(device="cpu")
        places = dict(whole.named_parameters()) if whole is not None else {}
        for name, parameter in self.model.named_parameters():
            value = safe_get_full_fp32_param(parameter)
            if whole is not None:
                places[name].copy_(value.view_as(places[name]))
        return whole

    @torch.no_grad()
    def whole_moments(self) -> Moments | None:
        """See `fastft.engines.engine.AnyEngine`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = next(iter(self._adamw.state.values()))["step"].cpu()
        if step == 0:
            return {} if self.world.is_first else None
        moments: Moments = {}
        for name, parameter in self.model.named_parameters():
            for key in _MOMENTS:
                value = safe_get_full_optimizer_state(parameter, key)
                if self.world.is_first:
                    moments[f"{name}/{key}"] = value.view(_shape(parameter)).cpu()
            moments[f"{name}/step"] = step.clone()
        return moments if self.world.is_first else None

    @torch.no_grad()
    def load(self, weights: Path, moments: Moments) -> None:
        """See `fastft.engines.engine.AnyEngine`. Every rank reads the files, and keeps its part."""
        with torch.device("meta"):
            empty = GPT2(self.model.config)
        whole = empty.to_empty(device="cpu")
        load_weights(whole, weights)
        values = dict(whole.named_parameters())
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            self._set_weight(parameter, values[name])
            self._set_master(parameter, values[name])
        if not moments:
            return
        for state in self._adamw.state.values():  # in place: DeepSpeed holds on to parts of these tensors
            state["step"].copy_(moments["wte.weight/step"])
        for name, parameter in parameters.items():
            for key in _MOMENTS:
                self._set_master(parameter, moments[f"{name}/{key}"], key)

    def save_shards(self, folder: Path) -> None:
        """Takes a copy of every rank's part, which `shard_writer` writes to `folder`. All ranks call it."""
        self.zero.save_checkpoint(str(folder), tag=self.shard_writer.tag, save_latest=False)

    def load_shards(self, folder: Path) -> None:
        """Puts back what `save_shards` has written, on the same number of ranks. All ranks call it.

        Raises:
            UserError: a file cannot be read, or holds something that DeepSpeed does not write.
        """
        loaded, _ = self.zero.load_checkpoint(str(folder), tag=self.shard_writer.tag)
        if loaded is None:
            raise UserError(f"DeepSpeed finds no checkpoint in {folder}; start from another with --overwrite")
        if self.stage < 3:  # it has made new tensors, and finds the parameters' parts of them at the next update only
            self.zero.optimizer._hp_optimizer_states_linked = False
            self.zero.optimizer._lazy_init_hp_params_optimizer_state()

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

    def _set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets what the model computes with; its float32 master is set apart from it."""
        if self.stage < 3:
            parameter.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if self.world.is_first:
                parameter.copy_(value)

    def _set_master(self, parameter: Any, value: Tensor, key: str | None = None) -> None:
        """Sets this rank's part of a parameter's float32 master, or of its moment `key`, from the whole value."""
        from deepspeed import utils

        value = value.to(self.device)
        if self.stage == 3:
            # The parts are equal: the last one is padded, which DeepSpeed does where it reads, and not where it sets.
            size = parameter.ds_tensor.numel()
            value = F.pad(value.flatten(), (0, size * self.world.size - value.numel()))
            value = value.narrow(0, size * self.world.rank, size)
        which = "local" if self.stage == 3 else "full"
        if key is None:
            getattr(utils, f"safe_set_{which}_fp32_param")(parameter, value)
        else:
            getattr(utils, f"safe_set_{which}_optimizer_state")(parameter, value, key)

    def _begin_state(self) -> None:
        """Makes AdamW's state of each flat partition, as its first update would.

        DeepSpeed finds the parameters' parts of the state after the first group's first update, when that of the other
        groups is not there yet: so it is made before.
        """
        optimizer = self.zero.optimizer
        in_groups = [partition for group in self._adamw.param_groups for partition in group["params"]]
        for partition in optimizer.fp32_partitioned_groups_flat if self.stage == 3 else in_groups:
            self._adamw.state[partition] = {
                "step": torch.zeros((), device=partition.device),
                **{key: torch.zeros_like(partition) for key in _MOMENTS},
            }
        if self.stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()


class _GuardedAdamW(torch.optim.AdamW):
    """torch's AdamW, which does nothing while it is `idle`."""

    idle = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override] # torch's overloads return a loss
        """Updates the weights, unless the optimizer step is to be left out."""
        if not self.idle:
            super().step(closure)


def _deepspeed(device: torch.device) -> Any:
    """The package, told which accelerator to take before it looks for one."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"--deepspeed_config needs DeepSpeed, which cannot be imported ({error}): pip install deepspeed"
        ) from error
    deepspeed.utils.set_log_level_from_string("error")
    # Compiled when ranks first meet on a CPU, for inference alone; where there is no compiler, they would not meet.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
    return deepspeed


def _check(options: TrainOptions, dtype: DType, stage: int, device: torch.device) -> None:
    if dtype == "fp64":
        raise UserError(f"got --dtype fp64 with ZeRO stage {stage}, whose masters are float32; expected another dtype")
    if device.type == "mps":
        raise UserError(f"got --device mps with ZeRO stage {stage}, expected cpu or cuda")
    if options.compile:
        raise UserError(
            f"got --compile true with ZeRO stage {stage}, whose hooks torch.compile does not see; leave it out, or "
            "train without --deepspeed_config"
        )
    if options.cuda_graphs:
        raise UserError(
            f"got --cuda_graphs true with ZeRO stage {stage}, whose hooks cannot be captured; leave it out, or train "
            "without --deepspeed_config"
        )


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _outside_blocks(model: GPT2) -> list[nn.Parameter]:
    """The parameters that `GPT2.forward` reads itself, the tied head among them."""
    in_blocks = {id(parameter) for parameter in model.h.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in in_blocks]


def _gather_with_their_readers(deepspeed: Any, model: GPT2) -> None:
    """Stage 3 gathers a module's own weights when it is called. A block reads its parts' weights without calling them,
    and the model those of embeddings and head: blocks are gathered as a whole, the others with the model."""
    deepspeed.utils.set_z3_leaf_modules(model, [Block])
    for parameter in _outside_blocks(model):
        deepspeed.zero.register_external_parameter(model, parameter)
