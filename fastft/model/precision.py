"""The arithmetic that `--dtype` names: which one a device does fast, and bf16 copies of float32 weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastft.common.errors import UserError
from fastft.model.gpt2 import GPT2
from fastft.model.lora import settle
from fastft.model.names import Device, DType
from fastft.model.part import of_base, trained

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes whose weights and their update stay float32."""
_NORM_PIECE = 1 << 17
_BY_PREFERENCE: tuple[Device, ...] = ("cuda", "mps", "cpu")


def choose_device(device: Device, local_rank: int = 0) -> torch.device:
    """The device that `--device` names; `auto` takes CUDA, else MPS, else the CPU.

    Of several GPUs that this process sees, each rank of a machine takes the one with its number, and makes it torch's
    current one: on that, and not on their tensors' own, kernels are launched and graphs captured.

    Raises:
        UserError: the device is not there, or there are fewer GPUs than ranks.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name in _BY_PREFERENCE if available[name])
    if not available[device]:
        raise UserError(f"got --device {device}, which torch does not find here; expected auto or cpu")
    if device != "cuda":
        return torch.device(device)
    count = torch.cuda.device_count()
    if local_rank >= count > 1:
        raise UserError(
            f"got {local_rank + 1} ranks or more on a machine with {count} GPUs; start one rank for each GPU"
        )
    chosen = torch.device("cuda", local_rank if count > 1 else 0)
    if count > 1:
        torch.cuda.set_device(chosen)
    return chosen


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
    if dtype not in NARROW:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=NARROW[dtype])


Model = TypeVar("Model", bound=nn.Module)


def is_narrowed(name: str) -> bool:
    """Whether a weight has a copy in the narrow dtype: as under autocast, layer norms and positions are float32, and so
    are DoRA's magnitudes."""
    return ".ln_" not in f".{name}" and not name.startswith("wpe.") and not name.endswith("lora_magnitude_vector")


def with_weights(model: Model, weights: Mapping[str, nn.Parameter]) -> Model:
    """A model like the given one, which computes with `weights` in place of those with the same names.

    It shares all other weights with it. What reads its weights again in the backward pass, such as a block that is
    computed a second time there, finds the same ones: it is a module of its own, not a call with other weights.
    """
    others = {id(given): weights.get(name, given) for name, given in model.named_parameters()}
    return copy.deepcopy(model, others)


def narrow_base(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Rounds what is not trained to the narrow dtype, in place: nothing updates it, so that it needs no float32 copy.

    Args:
        model: of which a part is trained, or all.
        dtype: that it computes with; None where that is the weights' own.
    """
    if dtype is not None:
        for name, weight in of_base(model).items():
            if is_narrowed(name):
                weight.data = weight.data.to(dtype)
    settle(model)


class BF16Copies:
    """bf16 copies of a model's float32 weights, which compute in their place (Micikevicius et al. 2018,
    "Mixed Precision Training", arXiv:1710.03740). What is not trained is in bf16 alone.

    Autocast casts every weight in every step, and every gradient back. Here the copies stay, the optimizer refreshes
    them while it has the weights at hand, and the gradients are as narrow as the products that made them. As under
    autocast, the residual stream is float32 too. On a GPU `fastft.engines.flat` does the same.
    """

    def __init__(self, model: GPT2) -> None:
        narrow_base(model, torch.bfloat16)
        self._weights = trained(model)
        narrow = {
            name: nn.Parameter(weight.detach().to(torch.bfloat16))
            for name, weight in self._weights.items()
            if is_narrowed(name)
        }
        self.computes = with_weights(model, narrow)
        """The model that computes with the copies."""
        self._tensors: dict[str, Tensor] = {**trained(self.computes)}
        self._sums: dict[str, Tensor] = {}
        self._versions = self._current_versions()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with the copies in place of its weights."""
        return self.current()(*args, **kwargs)

    def current(self) -> GPT2:
        """`computes`, whose copies agree with their weights."""
        self._follow()
        return self.computes

    def gradients(self) -> dict[str, Tensor]:
        """The gradients by the weights' names: bf16 of one backward pass, float32 where several were summed."""
        if self._sums:
            self.sum_up()
            return self._sums
        return {name: tensor.grad for name, tensor in self._tensors.items() if tensor.grad is not None}

    def sum_up(self) -> None:
        """Moves the gradients so far into float32 sums: adding many packs' gradients in bf16 would lose the small
        ones. To be called before each backward pass."""
        for name, tensor in self._tensors.items():
            if tensor.grad is not None:
                grad, tensor.grad = tensor.grad, None
                self._sums[name] = self._sums[name].add_(grad) if name in self._sums else grad.float()

    def clear_gradients(self) -> None:
        """Forgets all gradients."""
        self._sums.clear()
        for tensor in self._tensors.values():
            tensor.grad = None

    def pairs(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Each weight with its gradient, and its copy where it has one."""
        for name, gradient in self.gradients().items():
            copy = self._tensors[name]
            yield self._weights[name], gradient, None if copy is self._weights[name] else copy

    def refreshed(self) -> None:
        """Notes that the copies agree with their weights."""
        self._versions = self._current_versions()

    def _follow(self) -> None:
        """Refreshes the copies if somebody else, a checkpoint being loaded say, has written to the weights."""
        if self._versions == (now := self._current_versions()):
            return
        with torch.no_grad():
            for name, weight in self._weights.items():
                if self._tensors[name] is not weight:
                    self._tensors[name].copy_(weight)
        self._versions = now

    def _current_versions(self) -> list[int]:
        return [weight._version for weight in self._weights.values()]


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm over all gradients, float32 (float64 of float64), a scalar.

    On a CPU from norms of pieces, since there the sum of squares of tens of millions of elements is off by 0.3% in
    float32; a GPU sums by pieces itself. The norm of a bf16 piece is rounded to bf16, so that of bf16 gradients is
    within 2^-9 of the exact one.
    """
    pieces = [
        piece
        for gradient in gradients
        for piece in (gradient.reshape(-1).split(_NORM_PIECE) if gradient.device.type == "cpu" else [gradient])
    ]
    if not pieces:
        return torch.zeros(())
    norms = torch._foreach_norm(pieces)
    wide = torch.promote_types(norms[0].dtype, torch.float32)
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(wide) for norm in norms]))
    return total
