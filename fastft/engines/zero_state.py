"""Weights, masters and moments that DeepSpeed has parted among the ranks: made whole, and parted again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastft.engines.moments import MOMENTS, STEP, Moments, State, begun, laid_out, states_of
from fastft.engines.zero_setup import GuardedAdamW
from fastft.model.gpt2 import GPT2
from fastft.model.part import saved, trained
from fastft.model.weights import load_weights
from fastft.ranks.world import World


class ZeroState:
    """The parted state of a model. All ranks make every call.

    Args:
        zero: DeepSpeed's engine.
        adamw: its optimizer, of which every rank has a part.
        model: its model.
        stage: of ZeRO.
        world: the ranks.
        device: of this rank.
    """

    def __init__(
        self, zero: Any, adamw: GuardedAdamW, model: GPT2, stage: int, world: World, device: torch.device
    ) -> None:
        self._zero = zero
        self._adamw = adamw
        self._model = model
        self._stage = stage
        self._world = world
        self._device = device
        self._begin()

    def _begin(self) -> None:
        """Makes AdamW's state of each flat partition, as its first update would.

        DeepSpeed finds the parameters' parts of the state after the first group's first update, when that of the other
        groups is not there yet: so it is made before.
        """
        optimizer = self._zero.optimizer
        in_groups = [partition for group in self._adamw.param_groups for partition in group["params"]]
        for partition in optimizer.fp32_partitioned_groups_flat if self._stage == 3 else in_groups:
            self._adamw.state[partition] = begun(partition)
        if self._stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def whole_weights(self) -> dict[str, Tensor] | None:
        """See `fastft.engines.engine.AnyEngine`. Tensor after tensor is gathered, and kept in the first rank's host
        memory."""
        from deepspeed.utils import safe_get_full_fp32_param

        whole = {}
        for name, parameter in saved(self._model).items():
            value = safe_get_full_fp32_param(parameter)
            if self._world.is_first:
                whole[name] = value.view(_shape(parameter)).to("cpu", torch.float32, copy=True)
        return whole if self._world.is_first else None

    @torch.no_grad()
    def whole_moments(self) -> Moments | None:
        """See `fastft.engines.engine.AnyEngine`. Tensor after tensor is gathered, as the weights are."""
        step = next(iter(self._adamw.state.values()))[STEP].cpu()
        moments = laid_out(self._gathered(step)) if step > 0 else {}
        return moments if self._world.is_first else None

    def _gathered(self, step: Tensor) -> Iterator[tuple[str, State]]:
        """Each weight's state, on the first rank; nothing on the others."""
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, parameter in trained(self._model).items():
            state = {STEP: step.clone()}
            for moment in MOMENTS:
                value = safe_get_full_optimizer_state(parameter, moment)
                if self._world.is_first:
                    state[moment] = value.view(_shape(parameter)).cpu()
            if self._world.is_first:
                yield name, state

    @torch.no_grad()
    def load(self, weights: Path, moments: Moments) -> None:
        """See `fastft.engines.engine.AnyEngine`. Every rank reads the files, and keeps its part."""
        parameters = saved(self._model)
        values = {name: torch.empty(_shape(parameter)) for name, parameter in parameters.items()}
        load_weights(values, weights)
        for name, parameter in parameters.items():
            self._set_weight(parameter, values[name])
        self.set_masters(values)
        if not moments:
            return
        states = dict(states_of(moments))
        for state in self._adamw.state.values():  # in place: DeepSpeed holds on to parts of these tensors
            state[STEP].copy_(next(iter(states.values()))[STEP])  # of all weights alike
        for name, parameter in parameters.items():
            for moment in MOMENTS:
                self._set_master(parameter, states[name][moment], moment)

    @torch.no_grad()
    def set_masters(self, values: Mapping[str, Tensor]) -> None:
        """Sets the float32 masters by the parameters' names; what the model computes with stays."""
        for name, parameter in saved(self._model).items():
            self._set_master(parameter, values[name])

    def find_again(self) -> None:
        """Has DeepSpeed find the parameters' parts of the state, of which it has made new tensors."""
        if self._stage < 3:  # it would do so at the next update only
            self._zero.optimizer._hp_optimizer_states_linked = False
            self._zero.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets what the model computes with; its float32 master is set apart from it."""
        if self._stage < 3:
            parameter.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if self._world.is_first:
                parameter.copy_(value)

    def _set_master(self, parameter: Any, value: Tensor, moment: str | None = None) -> None:
        """Sets this rank's part of a parameter's float32 master, or of its `moment`, from the whole value."""
        from deepspeed import utils

        value = value.to(self._device)
        if self._stage == 3:
            # The parts are equal: the last one is padded, which DeepSpeed does where it reads, and not where it sets.
            size = parameter.ds_tensor.numel()
            value = F.pad(value.flatten(), (0, size * self._world.size - value.numel()))
            value = value.narrow(0, size * self._world.rank, size)
        which = "local" if self._stage == 3 else "full"
        if moment is None:
            getattr(utils, f"safe_set_{which}_fp32_param")(parameter, value)
        else:
            getattr(utils, f"safe_set_{which}_optimizer_state")(parameter, value, moment)


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
