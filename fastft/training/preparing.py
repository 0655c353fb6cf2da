"""Before anything is trained or written: the options settled, the folder looked at, the model to begin with."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from fastft.common.console import say, silenced
from fastft.common.effects import check_effects
from fastft.common.errors import UserError
from fastft.common.keywords import hidden_path, is_keyword
from fastft.data.chat_template import template_named
from fastft.data.folder_tokenizer import with_special_tokens
from fastft.data.tokenizer import Tokenizer, gpt2_tokenizer
from fastft.model.gpt2 import GPT2, SIZES, config_for
from fastft.model.vocabulary import with_tokenizer
from fastft.model.weights import config_of, load
from fastft.ranks.world import World
from fastft.run.config import TrainOptions, changed_settings, defaults_of
from fastft.run.folder import Run
from fastft.run.given import weights_of
from fastft.run.log import summary_writer
from fastft.training.checkpoint import shape_of


def settled(options: TrainOptions, run: Run) -> TrainOptions:
    """The options with what a resumed run's own say; refuses what cannot be done before anything is changed."""
    if options.resume and options.dtype == "auto" and run.config.is_file():
        options = replace(options, dtype=run.options().dtype)  # another machine may find another one fast
    check_effects(options, defaults=defaults_of(options))
    check_folder(run, options)
    if options.tensorboard:
        summary_writer()  # that it is missing is said before anything is changed
    return options


def check_folder(run: Run, options: TrainOptions) -> None:
    """Refuses to run over another run or over files of somebody else's, or to resume with settings that compute
    something else."""
    if not run.folder.is_dir() and (run.folder.exists() or run.folder.is_symlink()):
        raise UserError(f"got --out {run.folder}, which is there and is no folder; expected a folder for the run")
    files = [(name, Path(file)) for name, file in options.inputs() if not is_keyword("data", file)]
    zero = [] if options.deepspeed_config is None else [("deepspeed_config", options.deepspeed_config)]
    run.refuse_files_of_others([*files, *zero])
    if options.resume:
        if run.config.is_file() and (changed := changed_settings(run.options(), options)):
            raise UserError(
                f"--resume would compute something else than {run.folder} did: {'; '.join(changed)}; "
                "take these settings back, or start another run in another --out"
            )
    elif run.holds_something() and not (options.overwrite or options.dry_run):
        raise UserError(f"{run.folder} already holds a run; go on with --resume, replace it with --overwrite")


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
    """A model to put a checkpoint's weights into: what the run started from is not read again. None where it begins
    anew."""
    shape = shape_of(run.checkpoints) if options.resume else None
    if shape is None:
        return None
    model = GPT2(replace(shape, tokenizer=run.own_tokenizer()))
    model.checkpoint_activations = options.activation_checkpointing
    return model


def initial_model(options: TrainOptions) -> GPT2:
    """The model that a run starts from: loaded, or random from the run's seed."""
    torch.manual_seed(options.seed)
    named = config_for(options.model, tie_head=options.tie_head)
    source = weights_of(options)
    if source is not None and (both := hidden_path("weights", source)):
        say(both)
    if source is None:
        model = GPT2(named)
    else:
        model = load(source, tie_head=options.tie_head)
        model.config.tokenizer.check_fits(model.config.vocab_size, source)
        if replace(model.config, tie_head=True) != SIZES[options.model]:
            config = model.config
            say(
                f"the weights give the model's shape, not --model {options.model}: "
                f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context {config.n_ctx}"
            )
    rows, tokenizer = model.config.vocab_size, _with_template(model.config.tokenizer, options)
    model = with_tokenizer(model, tokenizer)
    if model.config.vocab_size > rows:
        say(
            f"the tokens of template {options.template} are added to the vocabulary: {rows} rows become "
            f"{model.config.vocab_size}"
        )
    model.checkpoint_activations = options.activation_checkpointing
    return model


def set_threads(threads: int | None, world: World, device: torch.device) -> None:
    """CPU threads: those asked for, else, where several ranks compute on one machine's CPU, its share."""
    if threads is not None:
        torch.set_num_threads(threads)
    elif device.type == "cpu" and world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // world.local_size))
