"""Models whose files hold but a part of them, and name the base that the rest is from: adapters in PEFT's layout, and
checkpoints of a run that trains a part. What is loaded is whole: adapters are merged, new rows are there.

How a base is loaded is given to each function, as it may be of any kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import yaml
from torch import Tensor, nn

from fastft.common import files
from fastft.common.errors import UserError
from fastft.common.keywords import is_keyword
from fastft.data.folder_tokenizer import tokenizer_of
from fastft.data.tokenizer import Tokenizer
from fastft.model.gpt2 import GPT2, GPT2Config
from fastft.model.lora import merge
from fastft.model.names import ADAPTER_CONFIG, STATE, WEIGHTS
from fastft.model.part import Part, saved, sha256_of
from fastft.model.peft_reading import Adapter
from fastft.model.tensor_files import Recipe, check_fits, fill, opened_safetensors
from fastft.model.vocabulary import with_tables, with_tokenizer

T = TypeVar("T")

_holders: ContextVar[tuple[Path, ...]] = ContextVar("holders", default=())
"""Whose bases are being looked for, the one for the other."""


class LoadBase(Protocol):
    """Loads what a name or path means."""

    def __call__(self, source: str | Path, *, tie_head: bool | None) -> GPT2:
        """See `fastft.model.weights.load`."""


def load_adapted(adapter: Adapter, base: str | Path | None, tie_head: bool | None, load: LoadBase) -> GPT2:
    """A base with an adapter merged into it.

    Args:
        adapter: that was read.
        base: None for the one that the adapter names.
        tie_head: as `fastft.model.weights.load` has it.
        load: how to load the base.

    Raises:
        UserError: the base is not there, or not the one that the adapter was trained on; they do not fit each other.
    """
    source, untied = base if base is not None else base_named(adapter), False if adapter.unties else None
    model = _said_of(adapter.folder, base, lambda: load(source, tie_head=untied))
    check_base(adapter.folder, source, got=sha256_of(model), expected=adapter.base_sha256)
    tokenizer = _tokenizer_of(adapter, model.config)
    V = adapter.vocabulary(model.config.vocab_size)
    tokenizer.check_fits(V, adapter.folder)
    if model.config.vocab_size != V:
        # What is new is the adapter's: it has a value for each row that is not the base's.
        model = with_tables(model, V, tokenizer, lambda table: _resized(table, V))
    model.config = replace(model.config, tokenizer=tokenizer)
    adapter.merge_into(model)
    if any(table.isnan().any() for table in (model.wte.weight, model.head)):
        raise UserError(
            f"{adapter.folder} makes the vocabulary larger, {V} rows, and has no values for all of them in both "
            "embedding and head; save it again with PEFT, `save_pretrained(FOLDER, save_embedding_layers=True)`"
        )
    return _with_head(model, adapter.folder, tie_head)


def config_adapted(
    adapter: Adapter, base: str | Path | None, config_of: Callable[[str | Path], GPT2Config]
) -> GPT2Config:
    """The configuration and tokenizer of what `load_adapted` gives."""
    source = base if base is not None else base_named(adapter)
    config = _said_of(adapter.folder, base, lambda: config_of(source))
    V, tokenizer = adapter.vocabulary(config.vocab_size), _tokenizer_of(adapter, config)
    tokenizer.check_fits(V, adapter.folder)
    tied = config.tie_head and not adapter.unties
    return replace(config, vocab_size=V, tokenizer=tokenizer, tie_head=tied)


def base_named(adapter: Adapter) -> str | Path:
    """The base that an adapter names: an id, or what lies at that path, seen from here or else from the adapter.

    Raises:
        UserError: it names none, or itself.
    """
    said = adapter.config.base
    if said is None:
        raise UserError(
            f"{adapter.folder}: {ADAPTER_CONFIG} names no base (base_model_name_or_path); name it with --model BASE "
            f"--adapter {adapter.folder}"
        )
    if is_keyword("weights", said):
        return said
    for path in (Path(said).expanduser(), adapter.folder / said):
        if path.exists():
            if path.resolve() == adapter.folder.resolve():
                raise UserError(f"{adapter.folder} names itself as its base; correct {ADAPTER_CONFIG}")
            return path
    return said


def part_of(checkpoint: Path) -> Part | None:
    """What a checkpoint of a training holds, where that is not the whole model.

    Raises:
        UserError: it does not say it in this version's words.
    """
    said = files.object_or_empty(checkpoint / STATE).get("part")
    if said is None:
        return None
    try:
        return Part.of_json(said)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{checkpoint / STATE} does not say what part of a model it holds ({error})") from error


def base_of_checkpoint(checkpoint: Path) -> str:
    """What the run of a checkpoint started from.

    Raises:
        UserError: the checkpoint lies in no run, or in one that started from random weights.
    """
    config = checkpoint.resolve().parent.parent / "config.yaml"
    if not config.is_file():
        raise UserError(
            f"{checkpoint} holds a part of a model, and its base is named by the run that it was copied out of; "
            "expected RUN/checkpoints/NAME: put it back, or take RUN/model, which can be moved"
        )
    try:
        said: Any = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {config}: {error}") from error
    named = (said.get("weights") or said.get("model")) if isinstance(said, dict) else None
    if not isinstance(named, str) or named == "none":
        raise UserError(f"{config} names no weights that {checkpoint} is a part of; expected `weights`")
    return named


def load_part(checkpoint: Path, part: Part, config: GPT2Config, tie_head: bool | None, load: LoadBase) -> GPT2:
    """The model that a checkpoint of a part gives: its base with what the checkpoint holds, adapters merged.

    Args:
        checkpoint: its folder.
        part: that it holds.
        config: of the model whose part it is, with its tokenizer.
        tie_head: as `fastft.model.weights.load` has it.
        load: how to load the base.

    Raises:
        UserError: the base is not there, or another one; the checkpoint does not hold what it says.
    """
    source = base_of_checkpoint(checkpoint)
    with looking_for_base(checkpoint):
        base = load(source, tie_head=config.tie_head)
    check_base(checkpoint, source, got=sha256_of(base), expected=part.base_sha256)
    model = with_tokenizer(base, config.tokenizer)
    if model.config.shape() != config.shape():
        raise UserError(f"{checkpoint}: got a base that makes {model.config.shape()}, expected {config.shape()}")
    part.take(model)
    places = saved(model)
    recipes = {name: Recipe((name,)) for name in places}
    with opened_safetensors([checkpoint / WEIGHTS]) as tensors:
        check_fits(checkpoint, places, recipes, tensors, any_float=False)
        fill(places, recipes, tensors)
    return _with_head(merge(model), checkpoint, tie_head)


@contextlib.contextmanager
def looking_for_base(holder: Path) -> Iterator[None]:
    """A block in which the base of an adapter, or of a checkpoint of a part, is looked for.

    Raises:
        UserError: what needs a base is needed for that base, as where two adapters name each other.
    """
    holders, path = _holders.get(), holder.resolve()
    if path in holders:
        raise UserError(
            f"{holder} is a part of a model whose base is made of {holder} itself, over {len(holders)} names; correct "
            "one of them, or name the base that it was trained on"
        )
    token = _holders.set((*holders, path))
    try:
        yield
    finally:
        _holders.reset(token)


def check_base(holder: Path, base: str | Path, *, got: str, expected: str | None) -> None:
    """Refuses a base that is not the one that something was trained on, where that is known.

    Raises:
        UserError: it is another one.
    """
    if expected is not None and got != expected:
        raise UserError(
            f"{holder} belongs to other weights than those of {base}: got SHA-256 {got}, expected {expected}; put back "
            "what it was trained on, or name it (an adapter's base: --model BASE --adapter FOLDER)"
        )


def _said_of(folder: Path, base: str | Path | None, do: Callable[[], T]) -> T:
    """Whose base it is, in the error where it cannot be loaded."""
    try:
        with looking_for_base(folder):
            return do()
    except UserError as error:
        if base is not None:
            raise
        raise UserError(
            f"the base of {folder}: {error}; name another place of it with --model BASE --adapter {folder}"
        ) from error


def _tokenizer_of(adapter: Adapter, base: GPT2Config) -> Tokenizer:
    """The tokenizer beside an adapter, which may have more tokens than its base's; without one the base's.

    Raises:
        UserError: ids that the base knows mean other texts.
    """
    found = tokenizer_of(adapter.folder)
    if found is None or found is base.tokenizer:
        return base.tokenizer
    both = min(found.size(), base.tokenizer.size(), base.vocab_size)
    if base.tokenizer.size() <= base.vocab_size:  # else it is nobody's: the base came without one
        odd = next((n for n in range(both) if found.decode([n]) != base.tokenizer.decode([n])), None)
        if odd is not None:
            raise UserError(
                f"{adapter.folder} has a tokenizer in which id {odd} is {found.decode([odd])!r}, and its base's says "
                f"{base.tokenizer.decode([odd])!r}; expected the base's with further tokens behind"
            )
    return found


def _resized(table: Tensor, V: int) -> Tensor:
    return torch.cat([table[:V], table.new_full((max(0, V - len(table)), table.shape[1]), torch.nan)])


def _with_head(model: GPT2, folder: Path, tie_head: bool | None) -> GPT2:
    """The model with its head tied or not, as asked for."""
    if tie_head is None or tie_head == model.config.tie_head:
        return model
    if tie_head and not torch.equal(model.head, model.wte.weight):
        raise UserError(
            f"{folder}: its head differs from its embedding; to tie them they must be the same: use tie_head = false"
        )
    model.lm_head = None
    if not tie_head:
        with torch.device("meta"):
            model.lm_head = nn.Linear(model.config.n_embd, model.config.vocab_size, bias=False)
        model.lm_head.weight = nn.Parameter(model.wte.weight.detach().clone())
    model.config = replace(model.config, tie_head=tie_head)
    return model
