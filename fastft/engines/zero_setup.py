"""Making DeepSpeed's engine: what it is told, what is refused, and where fastft stands in for its own."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from typing import Any

import torch
from torch import nn

from fastft.common.errors import UserError
from fastft.engines.zero_config import ZeroConfig, settings_for_deepspeed
from fastft.model.gpt2 import GPT2, Block
from fastft.model.names import DType
from fastft.ranks.world import World, group_of_one
from fastft.run.config import TrainOptions


class GuardedAdamW(torch.optim.AdamW):
    """torch's AdamW, which does nothing while it is `idle`."""

    idle = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override] # torch's overloads return a loss
        """Updates the weights, unless the optimizer step is to be left out."""
        if not self.idle:
            super().step(closure)


def check_options(options: TrainOptions, dtype: DType, stage: int, device: torch.device) -> None:
    """Refuses what DeepSpeed's engine cannot do."""
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


def deepspeed_for(device: torch.device) -> Any:
    """The package, told which accelerator to take before it looks for one.

    Raises:
        UserError: it is not installed.
    """
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


def initialized(
    deepspeed: Any,
    model: GPT2,
    optimizer: GuardedAdamW,
    config: ZeroConfig,
    options: TrainOptions,
    dtype: DType,
    world: World,
) -> Any:
    """DeepSpeed's engine over a model, which it parts among the ranks.

    Raises:
        UserError: DeepSpeed refuses its settings.
    """
    if config.stage == 3:
        _gather_with_their_readers(deepspeed, model)
        # A reentrant checkpoint runs a block again as a whole, hooks included; the other kind compares what it saves
        # with what it saved, which is another thing when a weight has been gathered anew.
        model.reentrant_checkpoints = True
    group_of_one()  # where there is one rank alone
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed asks for it; srun does not set it
    settings = settings_for_deepspeed(config, options, dtype, world.size)
    # Of many classes, where a section is not what DeepSpeed takes it for; pydantic's errors are ValueErrors.
    refusals = (ValueError, TypeError, AttributeError, AssertionError, RuntimeError, deepspeed.DeepSpeedConfigError)
    try:
        zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    except refusals as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"DeepSpeed refuses {config.path}: {' '.join(str(error).split())[:400]}") from error
    if dtype == "fp16":  # at its least scale DeepSpeed would end the run, with no checkpoint: `--max_skipped` does
        zero.optimizer.loss_scaler.raise_error_at_min_scale = False
    return zero


def writes_with(zero: Any, writer: Any) -> None:
    """Has DeepSpeed's files written by a `fastft.engines.shards.BackgroundWriter`."""
    zero.checkpoint_engine = writer
    copy_scripts = zero._copy_recovery_script

    def copy_scripts_if_there_is_room(folder: str) -> None:
        with contextlib.suppress(OSError):  # a full disk is told by the writer, and to all ranks
            copy_scripts(folder)

    zero._copy_recovery_script = copy_scripts_if_there_is_room


def outside_blocks(model: GPT2) -> list[nn.Parameter]:
    """The parameters that `GPT2.forward` reads itself, the tied head among them."""
    in_blocks = {id(parameter) for parameter in model.h.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in in_blocks]


def _gather_with_their_readers(deepspeed: Any, model: GPT2) -> None:
    """Stage 3 gathers a module's own weights when it is called. A block reads its parts' weights without calling them,
    and the model those of embeddings and head: blocks are gathered as a whole, the others with the model."""
    deepspeed.utils.set_z3_leaf_modules(model, [Block])
    for parameter in outside_blocks(model):
        deepspeed.zero.register_external_parameter(model, parameter)
