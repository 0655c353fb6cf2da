"""The stage RUN/model -> RUN/export/FORMAT: the trained model in the files of other programs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastft.common import files
from fastft.common.effects import check_effects
from fastft.common.errors import UserError
from fastft.common.optional import need
from fastft.common.options import Condition, check_values, names_checked, option
from fastft.common.shell import command
from fastft.data.chat_template import as_jinja
from fastft.export.base import base_of
from fastft.export.card import model_card
from fastft.export.gguf_adapter import check_adapter, write_gguf_adapter
from fastft.export.gguf_file import Quantize, write_gguf
from fastft.export.hub import check_id, push
from fastft.export.modelfile import model_name, modelfile
from fastft.export.places import new_files
from fastft.export.prompt_ids import warn_of_other_ids
from fastft.model.gpt2 import GPT2, GPT2Config
from fastft.model.peft_reading import Adapter, is_adapter, read_adapter
from fastft.model.weights import base_of_adapter, config_of, save_book, save_hf, write_tokenizer
from fastft.run.folder import EXPORT_MADE, EXPORTED, Run
from fastft.run.given import weights_of
from fastft.run.trained import trained_model

_HF = Condition(lambda o, _: o.to == "hf", "--to hf")
_FOLDER = Condition(lambda o, _: o.to in ("hf", "peft"), "--to hf or peft")
_GGUF = Condition(lambda o, _: o.to in ("gguf", "ollama"), "--to gguf or ollama")
_OLLAMA = Condition(lambda o, _: o.to == "ollama", "--to ollama")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", re.IGNORECASE)


@names_checked
@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported."""

    run: Path
    """The folder of a trained run."""
    to: Literal["hf", "peft", "gguf", "gguf-adapter", "ollama", "book"]
    """hf: a folder for transformers and vLLM; gguf: a file for llama.cpp; ollama: that and a Modelfile; book: the .pth
    of the book's GPTModel. Of a run with adapters these are merged; the adapter by itself is peft: a folder for PEFT;
    gguf-adapter: a file that llama.cpp puts into a GGUF of the base."""
    out: Path | None = None
    """The folder to write to; not given: RUN/export/FORMAT."""
    overwrite: bool = False
    """Replace an earlier export there; other files are never touched."""
    dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", needs=_HF)
    """Of the weights in the folder."""
    shard_size: str = option("5GB", needs=_HF)
    """The most that one file of weights holds, such as 500MB or 2GiB."""
    push: str | None = option(None, needs=_FOLDER)
    """Also upload to the Hugging Face hub, as OWNER/NAME; where there is no such repository, a private one is made."""
    quantize: Quantize = option("f16", needs=_GGUF)
    """How matrices are stored."""
    name: str | None = option(None, needs=_OLLAMA)
    """What Ollama is to call the model; not given: as the run's folder."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.out == Path():
            raise UserError("got an empty --out, expected a folder for the export")
        _ = self.shard_bytes

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes.

        Raises:
            UserError: it is none.
        """
        found = _SIZE.fullmatch(self.shard_size.strip())
        if not found or not float(found[1]):
            raise UserError(f"got --shard_size {self.shard_size}, expected a size such as 500MB, 5GB or 2GiB")
        unit = found[2].upper()
        return int(float(found[1]) * (1024 if "I" in unit else 1000) ** (1 + "KMGT".index(unit[0])))

    @property
    def folder(self) -> Path:
        """Where to."""
        return self.out or Run(self.run).exported(self.to)


def export(options: ExportOptions) -> list[str]:
    """Writes a run's model in another format.

    Returns:
        What there is to be told: the folder, and what to do with it.

    Raises:
        UserError: the run has no model, or another one before the end; the folder holds something; the format cannot
            hold the model; an option can have no effect.
    """
    check_effects(options)
    run = Run(options.run)
    run.options()  # that there is a run is said first
    if not run.weights.is_file():
        raise UserError(
            f"no model in {run.folder}: expected {run.weights}; "
            f"finish the run with `{command('train', resume=True, out=run.folder)}`"
        )
    _check_possible(options, run)
    there = _version(run.weights)
    weights_sha256 = str(files.identity(run.weights)["sha256"])
    chosen = {name: getattr(options, name) for name in _CHOICES[options.to]}
    adapter = read_adapter(run.model) if run.has_adapter else None
    made_of = {"run": run.folder.resolve().name, "weights_sha256": weights_sha256, "to": options.to, **chosen}
    if adapter is not None:
        made_of["base_sha256"] = adapter.base_sha256
    with new_files(options.folder, overwrite=options.overwrite, made_of=made_of) as folder:
        config = _write(options, run, adapter, folder)
        if options.to not in ("book", "gguf-adapter"):  # which have no templates of their own
            warn_of_other_ids(run.template(), config.tokenizer)
        if options.to in ("hf", "peft"):
            card = model_card(run, run.template(), weights_sha256, config.n_ctx, adapter, merged=options.to == "hf")
            files.write_text(folder / "README.md", card)
        if _version(run.weights) != there:
            raise UserError(f"{run.weights} was replaced while it was exported, by a training that ended; export again")
    return _told(options)


def _version(weights: Path) -> tuple[int, ...]:
    """What is another one when a file has been replaced."""
    found = weights.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _check_possible(options: ExportOptions, run: Run) -> None:
    """Refuses before anything large is read what would be refused at the end."""
    if options.push is not None:
        check_id(options.push)
    if run.has_place_for(options.folder):
        raise UserError(f"got --out {options.folder}, which is a place of the run's own; take another --out")
    if options.to in ("gguf", "gguf-adapter", "ollama"):
        need("gguf", extra="gguf")
    if options.to in _OF_ADAPTERS and not run.has_adapter:
        raise UserError(
            f"got --to {options.to} and {run.folder}, which has no adapter: {run.weights} holds a whole model; "
            "expected a run with --lora_r; --to hf and --to gguf export this one"
        )
    if options.to == "gguf-adapter":
        check_adapter(read_adapter(run.model))
    if options.to == "peft" and (base := _adapter_below(run)) is not None:
        raise UserError(
            f"got --to peft and {run.folder}, whose base {base} is an adapter itself: PEFT would put the one in the "
            "other's place, and compute another model; --to hf has both merged"
        )
    if options.to == "peft" and options.push is not None and base_of(run.options()).hub_id is None:
        raise UserError(
            f"got --push {options.push} and an adapter whose base is not on the hub ({weights_of(run.options())}), "
            "which nobody else would find; --to hf --push publishes the merged model"
        )
    if options.to == "ollama":
        model_name(options.name, run.folder)
        modelfile(_GGUF_FILE, run.template(), config_of(run.model))


def _adapter_below(run: Run) -> Path | None:
    """The base of a run's adapter, where that is an adapter too."""
    base = base_of_adapter(run.model)
    return base if isinstance(base, Path) and is_adapter(base) else None


def _write(options: ExportOptions, run: Run, adapter: Adapter | None, folder: Path) -> GPT2Config:
    """Writes the files of the weights; gives the configuration of the model that they are, or change."""
    if adapter is None or options.to not in _OF_ADAPTERS:
        model = trained_model(run)
        _WRITERS[options.to](options, run, model, folder)
        return model.config
    if options.to == "gguf-adapter":
        write_gguf_adapter(adapter, folder / "adapter.gguf", name=run.folder.resolve().name)
    else:
        for path in sorted(path for name in EXPORTED["peft"] for path in run.model.glob(name)):
            with files.replacing(folder / path.name) as file:
                file.write(path.read_bytes())
    return config_of(run.model)


def _hf(options: ExportOptions, run: Run, model: GPT2, folder: Path) -> None:
    save_hf(
        model, folder, chat_template=as_jinja(run.template()), dtype=_DTYPES[options.dtype],
        shard_bytes=options.shard_bytes,
    )  # fmt: skip


def _gguf(options: ExportOptions, run: Run, model: GPT2, folder: Path) -> None:
    write_gguf(
        model,
        folder / _GGUF_FILE,
        quantize=options.quantize,
        chat_template=as_jinja(run.template()),
        name=options.name or run.folder.resolve().name,
    )


def _ollama(options: ExportOptions, run: Run, model: GPT2, folder: Path) -> None:
    _gguf(options, run, model, folder)
    files.write_text(folder / "Modelfile", modelfile(_GGUF_FILE, run.template(), model.config))


def _book(options: ExportOptions, run: Run, model: GPT2, folder: Path) -> None:
    del options, run
    save_book(model, folder / "model.pth")
    write_tokenizer(model.config, folder)


_GGUF_FILE = "model.gguf"
_OF_ADAPTERS = ("peft", "gguf-adapter")
_WRITERS: dict[str, Callable[[ExportOptions, Run, GPT2, Path], None]] = {
    "hf": _hf, "gguf": _gguf, "ollama": _ollama, "book": _book,
}  # fmt: skip
_CHOICES: dict[str, tuple[str, ...]] = {
    "hf": ("dtype", "shard_size"), "gguf": ("quantize",), "ollama": ("quantize",), "book": (), "peft": (),
    "gguf-adapter": (),
}  # fmt: skip
"""The options that an export is made by, for `export.json`."""


def _told(options: ExportOptions) -> list[str]:
    told = [str(options.folder)]
    if options.to == "ollama":
        name = model_name(options.name, options.run)
        told.append(f"ollama create {name} -f {shlex.quote(str(options.folder / 'Modelfile'))}")
    if options.push is not None:
        made: dict[str, Any] = files.object_or_empty(options.folder / EXPORT_MADE)
        told.append(push(options.folder, list(made["files"]), options.push))
    return told
