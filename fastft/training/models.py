"""The model that a run starts from, the one that it goes on with, and the one that it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastft.common.console import say, silenced, warn
from fastft.common.errors import UserError
from fastft.common.keywords import hidden_path, is_keyword
from fastft.data.chat_template import template_named
from fastft.data.folder_tokenizer import with_special_tokens
from fastft.data.tokenizer import Tokenizer, gpt2_tokenizer
from fastft.model.gpt2 import GPT2, SIZES, GPT2Config, config_for
from fastft.model.part import Part, saved, sha256_of
from fastft.model.vocabulary import with_tokenizer
from fastft.model.weights import config_of, load
from fastft.run.config import TrainOptions
from fastft.run.folder import Run
from fastft.run.given import weights_of
from fastft.training.checkpoint import shape_of


def tokenizer_to_be(options: TrainOptions, run: Run) -> Tokenizer:
    """The tokenizer of the model that will be trained, before any weight is read: data are read by its end-of-text."""
    if options.resume and shape_of(run.checkpoints) is not None:
        return run.own_tokenizer()
    source = options.weights
    if source is None or is_keyword("weights", source):
        return _with_template(gpt2_tokenizer(), options)
    with silenced(True):  # what is odd about the weights is said where they are loaded
        return _with_template(config_of(source).tokenizer, options)


def _with_template(tokenizer: Tokenizer, options: TrainOptions) -> Tokenizer:
    """The tokenizer with the tokens of the run's template, and the template's end as its own."""
    template = template_named(options.template)
    return with_special_tokens(tokenizer, template.special_tokens, template.end)


def model_to_go_on(options: TrainOptions, run: Run) -> GPT2 | None:
    """A model to put a checkpoint's weights into: of full training, what the run started from is not read again. None
    where it begins anew, or a part is trained, whose base is in no checkpoint."""
    shape = shape_of(run.checkpoints) if options.resume and not options.trains_a_part else None
    if shape is None:
        return None
    model = GPT2(replace(shape, tokenizer=run.own_tokenizer()))
    model.checkpoint_activations = options.activation_checkpointing
    return model


def initial_model(options: TrainOptions) -> GPT2:
    """The model that a run starts from: loaded, or random from the run's seed; with what of it is trained, where that
    is not all.

    Raises:
        UserError: there are no such weights, or a part is to be trained of what is no model.
    """
    base = _base(options)
    known = base.config.tokenizer.size()
    sha256 = sha256_of(base) if options.trains_a_part else ""
    model = _with_rows(base, options)
    if options.trains_a_part:
        _take_part(model, options, known, sha256)
    model.checkpoint_activations = options.activation_checkpointing
    return model


def result(options: TrainOptions, model: GPT2, weights: Mapping[str, Tensor]) -> GPT2:
    """The model that a run leaves. With adapters it has them still, and its other weights are not there.

    Args:
        options: of the run.
        model: that was trained; its shape and part are read.
        weights: what its engine holds of it (`AnyEngine.whole_weights`).

    Raises:
        UserError: a part of the weights was trained, and the rest is not there any more, or another one.
    """
    if model.part is not None and model.part.lora is None:
        with silenced(True):  # what is to say of it was said when the run began
            base = _base(options)  # the engine's is rounded, or parted among ranks
        if (got := sha256_of(base)) != model.part.base_sha256:
            raise UserError(
                f"{weights_of(options)} has changed while the run trained a part of it: got SHA-256 {got}, expected "
                f"{model.part.base_sha256}; put back what the run began with, and --resume writes the model"
            )
        with silenced(True):
            whole = _with_rows(base, options)
        whole.load_state_dict(weights, strict=False)
        return whole
    with torch.device("meta"):
        empty = GPT2(model.config)
        if model.part is not None:
            model.part.take(empty)
    places = saved(empty)
    if places.keys() != weights.keys():
        raise AssertionError(f"the engine holds other weights: {sorted(places.keys() ^ weights.keys())}")
    empty.load_state_dict(weights, strict=False, assign=True)
    return empty


def _base(options: TrainOptions) -> GPT2:
    torch.manual_seed(options.seed)
    source = weights_of(options)
    if source is None:
        if options.trains_a_part and not options.dry_run:
            raise UserError(
                "got --lora_r or --train_only with random weights, most of which would stay random; name those to "
                "start from with --weights, or write some with `fastft train --steps 0`"
            )
        return GPT2(config_for(options.model, tie_head=options.tie_head))
    if both := hidden_path("weights", source):
        say(both)
    _check_shape(options, source)
    model = load(source, tie_head=options.tie_head)
    model.config.tokenizer.check_fits(model.config.vocab_size, source)
    return model


def _check_shape(options: TrainOptions, source: str) -> None:
    """Refuses weights of another shape than `--model` says. Where that is at its default, they say it alone."""
    if options.model == TrainOptions.model:
        return
    with silenced(True):  # what is odd about the weights is said where they are loaded
        given = SIZES[source] if is_keyword("weights", source) else config_of(source)
    if (got := _shape(given)) != (expected := _shape(config_for(options.model, tie_head=True))):
        raise UserError(
            f"got --model {options.model} ({expected}) and --weights {source}, which are of another shape ({got}); "
            "leave --model out: the weights say what they are"
        )


def _shape(config: GPT2Config) -> str:
    return f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context {config.n_ctx}"


def _with_rows(model: GPT2, options: TrainOptions) -> GPT2:
    """The model with rows for the tokens of the run's template."""
    rows = model.config.vocab_size
    model = with_tokenizer(model, _with_template(model.config.tokenizer, options))
    if model.config.vocab_size > rows:
        say(
            f"the tokens of template {options.template} are added to the vocabulary: {rows} rows become "
            f"{model.config.vocab_size}"
        )
    return model


def _take_part(model: GPT2, options: TrainOptions, known: int, sha256: str) -> None:
    """Leaves a part of the model to be trained: adapters with the rows from `known` on, or what is named."""
    new = model.config.tokenizer.size() - known
    lora = options.lora()
    part = Part(
        lora=lora,
        train_only=options.train_only,
        # All rows behind those that the base knows: an adapter is put into a base that has none of them.
        new_rows=(known, model.config.vocab_size - known) if lora is not None and new > 0 else None,
        base_sha256=sha256,
    )
    part.take(model, torch.Generator().manual_seed(options.seed))
    if lora is None and new > 0 and not model.wte.weight.requires_grad:
        warn(
            f"the {new} tokens that template {options.template} adds stay as they begin, all alike: "
            "--train_only does not name wte"
        )
