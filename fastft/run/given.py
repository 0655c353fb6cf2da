"""A model that is asked for by what holds it: a run, its folder of weights, a checkpoint, or any other weights."""

from __future__ import annotations

from pathlib import Path

from fastft.common import files
from fastft.common.console import say
from fastft.common.errors import UserError
from fastft.data.chat_template import AnyTemplate, template_beside, template_named
from fastft.run.config import TrainOptions
from fastft.run.folder import Run

DEFAULT_TEMPLATE = "alpaca"


def run_of(model: str) -> Run | None:
    """The run that a model is of: itself, its `model`, or one of its `checkpoints`; None for other weights."""
    path = Path(model).expanduser()
    places = (path, path.resolve()) if path.is_dir() else ()  # a link to a checkpoint, and a run whose `model` is one
    for folder in (folder for place in places for folder in (place, place.parent, place.parent.parent)):
        run = Run(folder)
        if run.config.is_file() and path.resolve() in (
            folder.resolve(), run.model.resolve(), *(one.resolve() for one in run.checkpoints.glob("*")),
        ):  # fmt: skip
            return run
    return None


def weights_of(options: TrainOptions) -> str | None:
    """What a run with these options starts from, as `fastft.model.weights.load` takes it; None for random weights."""
    source = options.weights or (options.model if options.model.startswith("gpt2") else "none")
    return None if source == "none" else source


def template_name_for(model: str, named: str | None) -> str:
    """The template that a model is asked by, as an option: the one that is named, that of its run, the chat template
    beside it, or alpaca.

    Args:
        model: as `fastft.model.weights.load` takes it.
        named: `--template`; None where it is not given.
    """
    if named is not None:
        return named
    if (run := run_of(model)) is not None:
        return run.options().template
    beside = Path(model).expanduser() / "chat_template.jinja"
    if beside.is_file():
        return template_beside(beside)
    if (config := beside.with_name("tokenizer_config.json")).is_file() and "chat_template" in files.object_or_empty(
        config
    ):
        return str(config)
    say(f"{model} has no chat template: its prompts are {DEFAULT_TEMPLATE}'s; --template names another one")
    return DEFAULT_TEMPLATE


def template_for(model: str, named: str | None) -> AnyTemplate:
    """The same as a template; of a run what was written down of it, as a file may have changed since.

    Raises:
        UserError: there is no such template, or the one beside the model cannot be used.
    """
    if named is None and (run := run_of(model)) is not None:
        return run.template()
    try:
        return template_named(template_name_for(model, named))
    except UserError as error:
        raise error if named is not None else UserError(f"{error}; or name another one with --template") from error
