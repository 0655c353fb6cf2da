"""TRL's SFTTrainer over an accelerated model: the same losses and token metrics, of packs that share beginnings.

SFTTrainer puts a forward of its own over the model's, after its construction: one that calls the model's inner part and
TRL's own head, past any loss of the model. On a CPU that head scores every token, with a label or without. Here a
forward stands over that one, which answers the same question (`fused_lm_head=True`) from the rows with a label alone,
and hands on every other.

Letters: R rows with a label, C width, V vocab.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastft.common.errors import UserError
from fastft.common.optional import need
from fastft.integrations.transformers import TreeCollator, accelerate, ops
from fastft.integrations.transformers.loss import IGNORE_INDEX, CausalLM, HeadInput, head_input, why_not
from fastft.integrations.transformers.speedup import base_of

if TYPE_CHECKING:
    FastftSFTTrainer: Any

CHUNK_BYTES = 64 << 20
"""Bytes of logits that the token metrics have at a time."""


def use_fused_head(model: nn.Module) -> None:
    """Puts fastft's head over TRL's on a model that is accelerated and that an SFTTrainer has been made for.

    To be called between `SFTTrainer(...)` and its `train()`, which wraps the model's forward once more.

    Raises:
        UserError: the model is not accelerated, or has no head of TRL's.
    """
    base = base_of(model)
    if not isinstance(base, CausalLM) or not base.facts["loss"]:
        raise UserError(f"got a {type(base).__name__} whose loss is not accelerated: accelerate(model)")
    if "forward" not in vars(base):
        raise UserError("got a model without TRL's fused head, expected the model of an SFTTrainer: trainer.model")
    trls = base.forward

    @functools.wraps(trls)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        head = self.get_output_embeddings()
        if not fused_lm_head:
            return trls(*args, **kwargs)
        if why_not(self, head) is not None:
            return trls(*args, fused_lm_head=True, **kwargs)
        return _fused(self, head, *args, **kwargs)

    base.forward = types.MethodType(forward, base)


def _fused(
    model: Any,
    head: nn.Module,
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Any:
    """TRL's `FusedCausalLMOutput`, whose per-token fields are 0 where there is no label."""
    from trl.trainer.utils import FusedCausalLMOutput

    outputs = head_input(model, head, *args, **{**kwargs, "use_cache": False})
    states: HeadInput = outputs.logits
    hidden, targets = states.hidden, shift_labels
    if targets is None:
        if labels is None:
            raise UserError("got fused_lm_head=True without labels, expected labels or shift_labels")
        hidden, targets = hidden[:, :-1], labels[:, 1:]
    targets = targets.to(hidden.device)
    mask = targets != IGNORE_INDEX
    rows, wanted = hidden[mask], targets[mask]
    losses = ops.losses_of_rows(rows, states.weight, wanted)
    entropy, is_top1 = _metrics(rows, states.weight, wanted)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss, aux_loss = losses.sum() / count, getattr(outputs, "aux_loss", None)
    if aux_loss is not None:
        loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
    log_probs, entropy, is_top1 = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in (-losses, entropy, is_top1))
    return FusedCausalLMOutput(
        loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask, aux_loss=aux_loss
    )


@torch.no_grad()
def _metrics(rows: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The entropy of each row's prediction, `[R]` float32, and whether its target is the likeliest, `[R]` boolean.

    Rows `[R, C]`, weight `[V, C]`, targets `[R]`.
    """
    at_a_time = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    entropies, right = [rows.new_zeros(0, dtype=torch.float32)], [targets.new_zeros(0, dtype=torch.bool)]
    for some, wanted in zip(rows.split(at_a_time), targets.split(at_a_time), strict=True):
        log_p = F.linear(some, weight.to(some.dtype)).float().log_softmax(dim=-1)
        right.append(log_p.argmax(dim=-1) == wanted)
        entropies.append(-(log_p.exp() * log_p).sum(dim=-1))
    return torch.cat(entropies), torch.cat(right)


def __getattr__(name: str) -> Any:
    if name != "FastftSFTTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trainer = _trainer_class()
    globals()[name] = trainer
    return trainer


def _trainer_class() -> Any:
    """`FastftSFTTrainer`; TRL is imported here, and not before it is asked for."""
    sft_trainer: Any = need("trl", extra="trl").SFTTrainer

    class FastftSFTTrainer(sft_trainer):  # type: ignore[misc] # of a package that need not be there
        """TRL's SFTTrainer, whose model is accelerated, and whose micro-batches share beginnings.

        Its arguments are SFTTrainer's. A `data_collator` of one's own is kept.

        Raises:
            UserError: `packing`, `eval_packing` or `padding_free` is asked for, which the collator makes needless, or
                the model cannot be accelerated, or has dropout.
        """

        _total_train_tokens: int

        def __init__(self, model: Any, args: Any = None, data_collator: Any = None, **others: Any) -> None:
            asked = [name for name in ("packing", "eval_packing", "padding_free") if getattr(args, name, False)]
            if asked:
                raise UserError(
                    f"got {' and '.join(asked)}, expected neither packing nor padding_free: the collator packs each "
                    "micro-batch without padding"
                )
            super().__init__(model=model, args=args, data_collator=data_collator, **others)
            base = base_of(self.model)
            trls = vars(base).pop("forward")
            try:
                self.report = accelerate(base)
            finally:
                base.forward = trls
            use_fused_head(base)
            if data_collator is None:
                self.data_collator = TreeCollator(self.model)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            """SFTTrainer's; its `num_tokens` counts a shared token for each example that has it, as in padded rows."""
            before = self._total_train_tokens
            result = super().compute_loss(model, inputs, *args, **kwargs)
            if self.model.training and "example_lengths" in inputs:
                of_ranks = self.accelerator.gather_for_metrics(inputs["example_lengths"].sum())
                self._total_train_tokens = before + int(of_ranks.sum()) // self._tp_size
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            return result

    return FastftSFTTrainer
