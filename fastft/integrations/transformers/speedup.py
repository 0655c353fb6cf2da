"""A causal language model of transformers made faster, and given back as it was."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastft.common.errors import UserError
from fastft.common.memory import keep_freed_memory
from fastft.common.optional import need
from fastft.integrations.transformers import ops
from fastft.integrations.transformers.activations import Call, calls_of, silus_of, swap_gelus, swap_silus
from fastft.integrations.transformers.attention import NAME, register
from fastft.integrations.transformers.dropout import dropout_of
from fastft.integrations.transformers.loss import CausalLM, Head, why_not
from fastft.integrations.transformers.norms import swap_norms
from fastft.integrations.transformers.report import Line, Report
from fastft.integrations.transformers.swap import own_class, swap, swap_back
from fastft.integrations.transformers.trial import Tried

PROBE_TOLERANCE = 1e-4
"""How far a probe's loss may be from the model's own, relative; 0.02 where the model computes in 16 bits."""


def accelerate(
    model: nn.Module, *, attention: bool = True, norms: bool = True, activations: bool = True, loss: bool = True,
    skip_logits: bool = False, keep_memory: bool = True,
) -> Report:  # fmt: skip
    """Makes a causal language model faster, with its own outputs, losses and gradients.

    The model stays the object that it is, before or after PEFT and accelerate have wrapped it; no other model in the
    process changes. While it trains and labels are given, its outputs have a loss and no logits.

    Args:
        model: of transformers, or what PEFT made of one.
        attention: set its attention implementation to `fastft`.
        norms: compute layer norms and RMS norms in one operation.
        activations: compute GELU's tanh form in one operation, and gated products (SwiGLU) in one.
        loss: compute the loss without the logits of rows that have no label.
        skip_logits: in evaluation, too, where labels are given. Logits are real there else.
        keep_memory: on a CPU under Linux, tell the process's allocator to keep what is freed, as `fastft train` does. A
            step takes and frees the same hundreds of megabytes, and to fault them in anew is a fifth of it. It is for
            the whole process, and `restore` does not undo it.

    Returns:
        What was accelerated and what was left alone; printed, a table.

    Raises:
        UserError: it is no causal language model, or nothing of it could be accelerated.
    """
    base = base_of(model)
    restore(base)
    try:
        report = _accelerated(base, attention=attention, norms=norms, activations=activations, loss=loss)
    except BaseException:
        restore(base)
        raise
    base.facts["skip_logits"] = skip_logits
    on_cpu = base.get_input_embeddings().weight.device.type == "cpu"
    if not (keep_memory and on_cpu):
        return report
    keep_freed_memory()
    return replace(report, keeps_memory=True)


def _accelerated(base: Any, *, attention: bool, norms: bool, activations: bool, loss: bool) -> Report:
    with evaluating(base):
        with calls_of(silus_of(base)) as calls:
            own_loss = _own_loss(base)
        swap(base, CausalLM, attention=(), loss=False, skip_logits=True)  # a probe evaluates
        lines = (
            _attention(base, own_loss) if attention else Line("attention", "", why="attention=False"),
            *(_norms(base, own_loss) if norms else [Line("norm", "", why="norms=False")]),
            *(_activations(base, own_loss, calls) if activations else [Line("gelu", "", why="activations=False")]),
            _loss(base, own_loss) if loss else Line("loss", "", why="loss=False"),
        )
    report = Report(type(base).__name__, lines)
    if not report.accelerated:
        raise UserError(f"got a {report.model} of which nothing can be accelerated:\n{report}")
    return report


def restore(model: nn.Module) -> None:
    """Gives an accelerated model back as it was; one that is not accelerated is left alone."""
    base = base_of(model)
    if isinstance(base, CausalLM):
        own = [(name, before) for name, before in base.facts["attention"] if _implementation(base, name) == NAME]
        _set_attention(base, tuple(own))  # where another one was set meanwhile, that stays
    for module in base.modules():
        swap_back(module)


@contextmanager
def accelerated(model: nn.Module, **options: bool) -> Iterator[Report]:
    """`accelerate` for as long as it is open, then `restore`.

    Raises:
        UserError: as `accelerate` does, or the model is accelerated already, which it would not be afterwards.
    """
    if isinstance(base_of(model), CausalLM):
        raise UserError("got a model that is accelerated already, expected a plain one: restore(model) before")
    report = accelerate(model, **options)
    try:
        yield report
    finally:
        restore(model)


def base_of(model: Any) -> Any:
    """The causal language model itself, out of what PEFT wrapped around it."""
    need("transformers", extra="transformers")
    from transformers import PreTrainedModel

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    base: Any = inner if isinstance(inner, PreTrainedModel) else None
    if base is None or base.get_output_embeddings() is None:
        raise UserError(
            f"got {type(model).__name__}, expected a causal language model of transformers with its head, such as "
            "AutoModelForCausalLM gives"
        )
    return base


@contextmanager
def evaluating(base: Any, *, training: bool = False) -> Iterator[None]:
    """The model in evaluation, or as it trains, and without gradients; each module as it was afterwards."""
    before = [(module, module.training) for module in base.modules()]
    base.train(training)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in before:
            module.training = was


def _own_loss(base: Any) -> float:
    """The loss of a few tokens, as the model computes it now."""
    vocab = base.get_input_embeddings().weight
    if vocab.is_meta:
        raise UserError("got a model on the meta device, expected one with its weights, to be tried out")
    ids = torch.arange(12, device=vocab.device)[None] * 7 % min(vocab.shape[0], 1000)
    return float(base(input_ids=ids, labels=ids, use_cache=False, return_dict=True).loss)


def _why_not_equal(base: Any, own_loss: float, *needed: str) -> str | None:
    """Tries the model out with operations in place, all of which are to run: why they cannot stay, None where they
    can."""
    try:
        with ops.counted() as ran:
            found = _own_loss(base)
    except (UserError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        return str(error).partition("\n")[0]
    if not all(ran[op] for op in needed):
        return "the model computes it elsewhere"
    weight = base.get_input_embeddings().weight
    narrow = weight.element_size() == 2 or torch.is_autocast_enabled(weight.device.type)
    tolerance = 0.02 if narrow else PROBE_TOLERANCE
    if not math.isclose(found, own_loss, rel_tol=tolerance):
        return f"its loss would be {found:.6g} in place of {own_loss:.6g}"
    return None


def _attention(base: Any, own_loss: float) -> Line:
    from transformers import PreTrainedModel

    if not base._can_set_attn_implementation():
        return Line("attention", "", why="the model computes its attention itself")
    register()
    parts = ((name, module) for name, module in base.named_modules() if isinstance(module, PreTrainedModel))
    before = tuple((name, module.config._attn_implementation) for name, module in parts)
    base.set_attn_implementation(NAME)
    _set_attention(base, tuple(one for one in before if _is_bidirectional(base.get_submodule(one[0]))))
    why_not = _why_not_equal(base, own_loss, "attention")
    if why_not is not None:
        _set_attention(base, before)
        return Line("attention", "", why=why_not)
    base.facts["attention"] = before
    dropout = dropout_of(base)
    why = "" if not dropout else f"by torch in training, where dropout is {dropout:g}: zero_dropout(model)"
    return Line("attention", f"{base.config.get_text_config().num_hidden_layers} layers", NAME, why)


def _is_bidirectional(part: nn.Module) -> bool:
    """Whether all attention of a part says that it is not causal, as that of what sees images does."""
    said = [vars(module)["is_causal"] for module in part.modules() if "is_causal" in vars(module)]
    return bool(said) and not any(said)


def _implementation(base: Any, name: str) -> str:
    return str(base.get_submodule(name).config._attn_implementation)


def _set_attention(base: Any, implementations: tuple[tuple[str, str], ...]) -> None:
    """Gives each model within `base`, by its name, an attention implementation; the outermost comes first."""
    for name, implementation in implementations:
        base.get_submodule(name).config._attn_implementation = implementation


def _norms(base: Any, own_loss: float) -> list[Line]:
    return _lines(base, own_loss, swap_norms(base)) or [Line("norm", "", why="no module that is called a norm")]


def _activations(base: Any, own_loss: float, calls: dict[nn.Module, Call]) -> list[Line]:
    device = base.get_input_embeddings().weight.device
    gelus = _lines(base, own_loss, swap_gelus(base, device))
    gated = _lines(base, own_loss, swap_silus(base, calls))
    return gelus + gated or [Line("gelu", "", why="no module that is a GELU or a SiLU")]


def _lines(base: Any, own_loss: float, tried: Iterable[Tried]) -> list[Line]:
    """A line for each class of modules, and for each reason why some of them were left alone."""
    found = list(tried)
    replaced = {one.op for one in found if one.parts}
    with ops.everywhere():
        why_not = _why_not_equal(base, own_loss, *replaced) if replaced else None
    if why_not is not None:
        for part in (part for one in found for part in one.parts):
            swap_back(part)
        found = [replace(one, parts=(), why_not=one.why_not or why_not) for one in found]
    counts = Counter((one.op, own_class(one.module).__name__, one.why_not, one.on_a_cpu) for one in found)
    return [
        Line(op, f"{n} {name}", "" if why else "one operation", why or on_a_cpu)
        for (op, name, why, on_a_cpu), n in counts.items()
    ]


def _loss(base: Any, own_loss: float) -> Line:
    head = base.get_output_embeddings()
    reason = why_not(base, head)
    if reason is None:
        swap(head, Head)
        base.facts["loss"] = True
        reason = _why_not_equal(base, own_loss, "loss")
        if reason is not None:
            swap_back(head)
            base.facts["loss"] = False
    if reason is not None:
        return Line("loss", type(head).__name__, why=reason)
    return Line("loss", f"{head.out_features} x {head.in_features}", "rows with a label alone", "no logits in training")
