"""Low-rank adapters: each chosen matrix `W` stays, and what is learned is a product of two thin ones beside it.

    y = x (W + s B A)^T + b,  s = alpha / r        Hu et al. 2021, "LoRA", arXiv:2106.09685
                              s = alpha / sqrt(r)  Kalajdzievski 2023, "rsLoRA", arXiv:2312.03732
    y = x (m (W + s B A) / |W + s B A|)^T + b      Liu et al. 2024, "DoRA", arXiv:2402.09353; |.| of each row, which
                                                   counts as constant in the backward pass (its section 4.3)

The names are PEFT's: `c_attn, c_proj, c_fc`, of which `c_proj` is both the attention's and the MLP's, and `lora_A`,
`lora_B`, `lora_magnitude_vector`.

Letters: T tokens, I inputs and O outputs of a layer, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastft.common.errors import UserError
from fastft.model.lora_spec import LoRA

if TYPE_CHECKING:
    from fastft.model.gpt2 import GPT2


class LoRALinear(nn.Module):
    """A linear layer with an adapter. Its weight and bias are those of the layer that it stands for, which stay.

    Attributes:
        weight: `[O, I]`; bias: `[O]`.
        lora_A: `[r, I]`; lora_B: `[O, r]`, in the weight's dtype, or wider: then they are cast at each product.
        lora_magnitude_vector: `[O]`, of DoRA; else None.
    """

    def __init__(self, linear: nn.Linear, lora: LoRA) -> None:
        super().__init__()
        outputs, inputs = linear.weight.shape
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias.requires_grad_(False)
        self.scaling = lora.scaling
        self.lora_A = nn.Parameter(self.weight.new_empty(lora.r, inputs))
        self.lora_B = nn.Parameter(self.weight.new_zeros(outputs, lora.r))
        self.lora_magnitude_vector = nn.Parameter(self.weight.new_empty(outputs)) if lora.dora else None
        self._squares: Tensor | None = None

    def begin(self, generator: torch.Generator | None = None) -> None:
        """The beginning, which changes nothing of what the layer computes: A uniform as a linear layer's weight is,
        B zero, the magnitude that of the weight's rows. As PEFT begins."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_B)
        if self.lora_magnitude_vector is not None:
            with torch.no_grad():
                self.lora_magnitude_vector.copy_(self.weight.double().norm(dim=1))

    def settle(self) -> None:
        """Notes the lengths of the weight's rows, which DoRA reads at every step. To be called again whenever the
        weight has got another dtype or other values."""
        self._squares = None
        if self.lora_magnitude_vector is not None:
            self._squares = _row_squares(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, I]` -> `[T, O]`."""
        return self.product(x)

    def product(self, x: Tensor, outputs: slice = slice(None), *, with_bias: bool = True) -> Tensor:
        """`[T, I]` -> `[T, O]`, or some of the outputs alone; `with_bias` says whether the bias is added."""
        weight, bias = _some(self.weight, outputs), _some(self.bias, outputs) if with_bias else None
        A, B = self.lora_A, _some(self.lora_B, outputs)
        if self.lora_magnitude_vector is None:
            return low_rank_product(x, weight, bias, A, B, self.scaling)
        scale = self.lora_magnitude_vector[outputs] / self._row_lengths(outputs)
        product = low_rank_product(x, weight, None, A, B, self.scaling)
        scale = scale.to(product.dtype)
        return product * scale if bias is None else torch.addcmul(bias.to(product.dtype), product, scale)

    @torch.no_grad()
    def _row_lengths(self, outputs: slice) -> Tensor:
        """`|W + s B A|` of each row, `[O]`, in float32 or wider.

        From `|w|^2 + 2 s (W A^T) b + s^2 b (A A^T) b`, so that nothing of the weight's size is made.
        """
        weight = self.weight[outputs]
        wide = torch.promote_types(weight.dtype, torch.float32)
        if self._squares is not None and self._squares.device != weight.device:
            self._squares = self._squares.to(weight.device)
        squares = _row_squares(weight) if self._squares is None else self._squares[outputs]
        A, B = self.lora_A.to(wide), self.lora_B[outputs].to(wide)
        with torch.autocast(weight.device.type, enabled=False):
            crossed = (weight @ A.to(weight.dtype).t()).to(wide)
            squares = squares + 2 * self.scaling * (crossed * B).sum(1)
            squares = squares + self.scaling**2 * ((B @ (A @ A.t())) * B).sum(1)
        # Float32 leaves a small square below zero where an adapter has cancelled a row.
        lengths: Tensor = squares.clamp(min=torch.finfo(wide).tiny).sqrt()
        return lengths

    def merged(self) -> Tensor:
        """The weight `[O, I]` that computes the same without an adapter: in float64, rounded once to its dtype."""
        return merged_weight(self.weight, self.lora_A, self.lora_B, self.scaling, self.lora_magnitude_vector)


@torch.no_grad()
def merged_weight(weight: Tensor, A: Tensor, B: Tensor, scaling: float, magnitude: Tensor | None) -> Tensor:
    """A weight `[O, I]` with its adapter in it: in float64, rounded once to the weight's dtype.

    Args:
        weight: `[O, I]`.
        A: `[r, I]`; B: `[O, r]`.
        scaling: s.
        magnitude: `[O]`, of DoRA.
    """
    wide = weight.double() + scaling * (B.double() @ A.double())
    if magnitude is not None:
        lengths = wide.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros stays one, as in a step
        wide = wide * (magnitude.double() / lengths)[:, None]
    return wide.to(weight.dtype)


def _some(weight: Tensor, outputs: slice) -> Tensor:
    """Those outputs; of all the weight itself: a view that is saved would hold on to what stage 3 of ZeRO gives
    back."""
    return weight if outputs == slice(None) else weight[outputs]


def _row_squares(weight: Tensor) -> Tensor:
    """The sum of squares of each row, `[O]`, in float32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    lengths: Tensor = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=wide)
    return lengths.square()


def low_rank_product(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """`x W^T + b + s (x A^T) B^T`, with no tensor `[T, O]` or `[T, I]` beside the results.

    Args:
        x: `[T, I]`.
        weight: `[O, I]`, which gets no gradient; bias: `[O]`, likewise, or None.
        A: `[r, I]`; B: `[O, r]`; both are cast to the dtype of the product.
        scaling: s.

    Returns:
        `[T, O]` in the dtype of the product: the weight's, or autocast's.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        bias = None if bias is None else bias.to(dtype)
        x, weight, A, B = x.to(dtype), weight.to(dtype), A.to(dtype), B.to(dtype)
        if torch.compiler.is_compiling():  # which fuses what it sees itself
            plain: Tensor = F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, A), B)
            return plain
        return cast(Callable[..., Tensor], _LowRankProduct.apply)(x, weight, bias, A, B, scaling)


class _LowRankProduct(torch.autograd.Function):
    """Both products of the inputs into one tensor, and both of the gradient into one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        thin = x @ A.t()  # [T, r]
        ctx.save_for_backward(x, weight, A, B, thin)
        ctx.scaling = scaling
        return F.linear(x, weight, bias).addmm_(thin, B.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, thin = ctx.saved_tensors
        dy = grads[0]
        d_thin = (dy @ B).mul_(ctx.scaling)  # [T, r]
        dx = (dy @ weight).addmm_(d_thin, A) if ctx.needs_input_grad[0] else None
        dA = d_thin.t() @ x if ctx.needs_input_grad[3] else None
        dB = (dy.t() @ thin).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        return dx, None, None, dA, dB, None


def attach(model: GPT2, lora: LoRA, generator: torch.Generator | None = None) -> None:
    """Gives a model's matrices adapters, in place, in the order of their names. Nothing else of it stays trainable.

    Args:
        model: with linear layers.
        lora: which ones, and of what kind.
        generator: of the random beginning; torch's own where it is not given.

    Raises:
        UserError: a layer is not there, or the model has adapters already.
    """
    names = lora.chosen(model.config.n_layer)
    if any(True for _ in adapters(model)):
        raise UserError("LoRA: got a model with adapters, expected one without; merge them first")
    model.requires_grad_(False)
    for name in names:
        where, _, last = name.rpartition(".")
        parent = model.get_submodule(where)
        adapted = LoRALinear(getattr(parent, last), lora)
        if not adapted.weight.is_meta:
            adapted.begin(generator)
        setattr(parent, last, adapted)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """A model's adapted layers by their names."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def settle(model: nn.Module) -> None:
    """`LoRALinear.settle` of all adapted layers."""
    for _, module in adapters(model):
        module.settle()


@torch.no_grad()
def merge(model: GPT2) -> GPT2:
    """The model, changed in place: each adapter is in its layer's weight, and new rows are in the embedding. Exact
    but for one rounding of each weight."""
    for name, module in [*adapters(model)]:
        where, _, last = name.rpartition(".")
        linear = nn.Linear(1, 1, device="meta")
        linear.out_features, linear.in_features = module.weight.shape
        linear.weight = nn.Parameter(module.merged())
        linear.bias = nn.Parameter(module.bias.detach())
        setattr(model.get_submodule(where), last, linear)
    if model.new_rows is not None:
        model.new_rows.write(model.wte.weight, None if model.lm_head is None else model.lm_head.weight)
        model.new_rows = None
    model.part = None
    return model.requires_grad_(True)
