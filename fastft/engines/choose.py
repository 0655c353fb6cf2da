"""Which engine a run trains with: the one place that knows all of them."""

from __future__ import annotations

from dataclasses import replace

from fastft.common.console import warn
from fastft.common.errors import UserError
from fastft.engines.engine import AnyEngine, Engine
from fastft.engines.gpu_engine import GpuEngine
from fastft.engines.zero import ZeroEngine
from fastft.engines.zero_config import read_zero_config
from fastft.model import ops
from fastft.model.gpt2 import GPT2
from fastft.model.precision import choose_device, choose_dtype
from fastft.ranks.world import World
from fastft.run.config import TrainOptions


def make_engine(model: GPT2, options: TrainOptions, world: World) -> AnyEngine:
    """The engine that the options ask for; all ranks call it.

    Raises:
        UserError: the options and DeepSpeed's file disagree, or DeepSpeed refuses the file.
    """
    with world.together():
        device = choose_device(options.device, world.local_rank)
        path = options.deepspeed_config
        config = None if path is None else read_zero_config(path, options, world.size)
        dtype = (config and config.dtype) or choose_dtype(options.dtype, device)
        if config is not None:
            config.check_dtype(dtype)
        if options.compile and ops.resolve(options.impl, device) == "cpu":
            raise UserError(
                "got --compile true with the torch path (--impl cpu, or auto without a GPU for the kernels), which "
                "cannot be compiled: each batch has tiles of its own; leave --compile out"
            )
    with world.together():
        odd = world.differing(dtype)  # what `auto` takes depends on the machine
        if odd is not None:
            raise UserError(f"got --dtype {options.dtype}, which is not the same on {odd} as on rank 0; say which one")
    with world.together():
        if config is not None and config.stage > 0:
            return ZeroEngine(model, options, world, config, dtype)
        if config is not None and config.unused:
            warn(f"{config.path}: stage 0 trains without DeepSpeed, and does not read {', '.join(config.unused)}")
        engine = GpuEngine if device.type == "cuda" else Engine
        return engine(model, replace(options, dtype=dtype), world)
