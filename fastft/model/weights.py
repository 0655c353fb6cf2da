"""Weights in and out: a Hugging Face folder or id, the book's `.pth`, and fastft's own checkpoints.

Each layout says which stored tensors make up one of the model's parameters (a `Recipe`). Everything is checked by
name, shape and dtype before memory is taken; then tensor after tensor is copied. No pickle is ever executed.

Letters: C width, V vocab.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from torch import Tensor

from fastft.common import files
from fastft.common.console import warn
from fastft.common.errors import UserError
from fastft.common.keywords import is_keyword
from fastft.common.kinds import kind_of
from fastft.common.nearest import did_you_mean_path
from fastft.common.shell import command
from fastft.data.folder_tokenizer import NAMES as TOKENIZER_FILES
from fastft.data.folder_tokenizer import UNREAD, tokenizer_of
from fastft.data.tokenizer import VOCAB_SIZE, Tokenizer, gpt2_tokenizer
from fastft.model.based import (
    base_named,
    base_of_checkpoint,
    config_adapted,
    load_adapted,
    load_part,
    looking_for_base,
    part_of,
)
from fastft.model.gpt2 import GPT2, SIZES, GPT2Config
from fastft.model.names import ADAPTER, ADAPTER_CONFIG, STATE, WEIGHTS
from fastft.model.peft_reading import is_adapter, read_adapter
from fastft.model.tensor_files import (
    DTYPE_NAMES,
    Recipe,
    Stored,
    check_fetched,
    check_fits,
    fill,
    opened_safetensors,
    reason,
    write_safetensors,
)

_HEAD, _EMBEDDING = "lm_head.weight", "wte.weight"
_INDEX = f"{WEIGHTS}.index.json"
_WHOLE_VOCABULARIES = ("tokenizer.json", "vocab.json")

T = TypeVar("T")

# Conv1D of the original code stores [in, out], where nn.Linear has [out, in].
_HF_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_HF_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_HF_IDS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
_HF_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What another value of changes the function that the model computes.
_HF_REQUIRED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True, False),
}
# What transformers takes where config.json is silent.
_HF_DEFAULTS: dict[str, Any] = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_positions": 1024,
    "vocab_size": VOCAB_SIZE,
    "layer_norm_epsilon": 1e-5,
}

# What modules that are put around others add to names: somewhere in them, or before all of them.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_HOLDERS = ("module.", "model.")
# Under what the weights stand in a checkpoint, which has the optimizer and more beside them.
_AROUND = ("model_state_dict", "state_dict", "model")

_BOOK_MASKS = re.compile(r"trf_blocks\.\d+\.att\.mask")
_BOOK_NAMES = {
    "wte.weight": "tok_emb.weight",
    "wpe.weight": "pos_emb.weight",
    "ln_f.weight": "final_norm.scale",
    "ln_f.bias": "final_norm.shift",
    "lm_head.weight": "out_head.weight",
}
_BOOK_LAYER_NAMES = {
    "ln_1.weight": ("norm1.scale",),
    "ln_1.bias": ("norm1.shift",),
    "attn.c_attn.weight": ("att.W_query.weight", "att.W_key.weight", "att.W_value.weight"),
    "attn.c_attn.bias": ("att.W_query.bias", "att.W_key.bias", "att.W_value.bias"),
    "attn.c_proj.weight": ("att.out_proj.weight",),
    "attn.c_proj.bias": ("att.out_proj.bias",),
    "ln_2.weight": ("norm2.scale",),
    "ln_2.bias": ("norm2.shift",),
    "mlp.c_fc.weight": ("ff.layers.0.weight",),
    "mlp.c_fc.bias": ("ff.layers.0.bias",),
    "mlp.c_proj.weight": ("ff.layers.2.weight",),
    "mlp.c_proj.bias": ("ff.layers.2.bias",),
}


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """An open source: its tensors (mask buffers left out), its configuration, its layout."""

    source: Path
    config: GPT2Config
    tensors: dict[str, Stored]
    recipe: Callable[[str], Recipe]


def load(
    source: str | Path,
    *,
    tie_head: bool | None = None,
    config: GPT2Config | None = None,
    adapter: str | Path | None = None,
) -> GPT2:
    """GPT-2 with the weights of `source`, in float32 on the CPU.

    Args:
        source: a run, or one of its checkpoints; a Hugging Face folder (`config.json`, `model.safetensors` or its
            shards, the files of its tokenizer); a folder with an adapter of PEFT's, which names its base; a `.pth` or
            `.pt` file in the book's layout, also of a compiled or wrapped model, also in a checkpoint's dictionary,
            with the files of its tokenizer beside it where it is not GPT-2's; or a Hugging Face id: `gpt2-medium` means
            `openai-community/gpt2-medium`, also beside a folder of that name, which is `./gpt2-medium`. Else what
            exists on the disk comes before an id; a `Path` is never an id.
        tie_head: None keeps the head as the source has it; False gives a tied one weights of its own, a copy of the
            token embedding (the book); True ties a head that equals the token embedding.
        config: the shape of a `.pth` whose width is none of GPT-2's four, which would leave the number of heads open.
            A folder's `config.json` must agree with it. Its `tie_head` plays no part.
        adapter: a folder or id of an adapter of PEFT's, of which `source` is the base: it is merged, in float64, each
            weight rounded once.

    Raises:
        UserError: nothing there or no download; an unreadable file or one that is not plain tensors; another
            architecture; missing, unexpected or wrongly shaped tensors; a head that cannot be tied; a tokenizer that
            cannot be used, or is not the weights' own; a base that is not there, or not the one that an adapter or a
            checkpoint of a part belongs to.
    """
    if adapter is not None:
        return load_adapted(read_adapter(_adapter_at(adapter)), source, tie_head, partial(load, config=config))
    path = _located(source)
    if path.is_dir():
        if is_adapter(folder := folder_of(path)):
            return load_adapted(read_adapter(folder), None, tie_head, load)
        if is_checkpoint(path) and (part := part_of(path)) is not None:
            return load_part(path, part, config_of(path), tie_head, load)
    with _opened(path, config) as checkpoint:
        return _assembled(checkpoint, tie_head)


def config_of(source: str | Path, *, adapter: str | Path | None = None) -> GPT2Config:
    """The configuration and tokenizer of what `load` would load; no weight is read but an adapter's.

    Raises:
        UserError: as `load` does, as far as it has to do with them.
    """
    if adapter is not None:
        return config_adapted(read_adapter(_adapter_at(adapter)), source, config_of)
    path = _located(source)
    if path.is_dir() and is_adapter(folder := folder_of(path)):
        return config_adapted(read_adapter(folder), None, config_of)
    with _opened(path, None) as checkpoint:
        return checkpoint.config


def files_of(source: str | Path) -> list[Path]:
    """The files of the weights that `load` would load, downloaded where they are an id's.

    Raises:
        UserError: there are none.
    """
    path = _located(source)
    if not path.is_dir():
        return [path]
    if is_checkpoint(path):
        with looking_for_base(path):
            return [path / WEIGHTS, *([] if part_of(path) is None else files_of(base_of_checkpoint(path)))]
    if is_adapter(folder := folder_of(path)):
        with looking_for_base(folder):
            return [folder / ADAPTER, *files_of(base_named(read_adapter(folder)))]
    return _safetensors_of(folder)


def base_of_adapter(adapter: str | Path) -> str | Path | None:
    """The base that an adapter names, as `load` takes it; None where it names none.

    Raises:
        UserError: there is no adapter that fastft reads.
    """
    found = read_adapter(_adapter_at(adapter))
    return None if found.config.base is None else base_named(found)


def is_same_source(one: str | Path, other: str | Path) -> bool:
    """Whether two names mean one model: they do if they are one folder or file, or one id."""
    if Path(one).exists() and Path(other).exists() and not is_keyword("weights", one):
        return Path(one).resolve() == Path(other).resolve()
    return _HF_IDS.get(str(one), str(one)) == _HF_IDS.get(str(other), str(other))


def load_weights(parameters: Mapping[str, Tensor], path: Path) -> None:
    """Copies the file that `save_weights` wrote into weights by their names, bit for bit. On an error they are left as
    they were.

    Raises:
        UserError: an unreadable file; missing or unexpected tensors, or ones of another shape or dtype.
    """
    recipes = {name: Recipe((name,)) for name in parameters}
    with opened_safetensors([path]) as tensors:
        check_fits(path, parameters, recipes, tensors, any_float=False)
        fill(parameters, recipes, tensors)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes weights to one safetensors file, under their names and in their own dtype.

    Raises:
        UserError: the file cannot be written.
    """
    write_safetensors(path, weights)


def save_hf(
    model: GPT2,
    folder: Path,
    *,
    chat_template: str | None = None,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
) -> None:
    """Writes `model`, with its tokenizer, as a folder that transformers and `load` read.

    Args:
        model: any GPT-2.
        folder: where to.
        chat_template: the Jinja program that writes its conversations, where it has been trained on some template.
        dtype: of the weights in the files.
        shard_bytes: the most bytes of tensors in one file, unless one tensor alone has more; None: all in one file.

    Raises:
        UserError: the folder or a file cannot be written; the vocabulary is smaller than the tokenizer's; a weight is
            beyond `dtype`; GPT-2's own tokenizer files are not installed (the weights are written all the same).
    """
    config = model.config
    config.tokenizer.check_fits(config.vocab_size, f"cannot write {folder}")
    check_range(model, dtype)
    files.make_folder(folder)
    tensors = {}
    for name, parameter in model.named_parameters():
        recipe = _hf_recipe(name, prefix="transformer.")
        tensors[recipe.names[0]] = parameter.detach().t() if recipe.transposed else parameter.detach()
    shards = _shards(tensors, dtype, shard_bytes)
    for file, part in shards.items():
        write_safetensors(folder / file, part, dtype=dtype)
    if len(shards) > 1:
        total = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        weight_map = {name: file for file, part in shards.items() for name in part}
        files.write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    files.write_json(folder / "config.json", _hf_config(config, dtype))
    files.write_json(folder / "generation_config.json", _generation_config(config))
    write_tokenizer(config, folder)
    if chat_template is not None:
        write_chat_template(folder, chat_template)


def save_book(model: GPT2, path: Path) -> None:
    """Writes `model` in float32 as the `state_dict` of the book's `GPTModel`, which takes it with `strict=True`: a head
    of its own, a copy of the token embedding where they are tied, and each block's causal mask.

    Raises:
        UserError: the file cannot be written.
    """
    n_ctx = model.config.n_ctx
    mask = torch.ones(n_ctx, n_ctx).triu(diagonal=1)
    tensors = {f"trf_blocks.{layer}.att.mask": mask for layer in range(model.config.n_layer)}  # stored once
    parameters = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    for name, parameter in {_HEAD: model.head.detach().float(), **parameters}.items():
        recipe = _book_recipe(name)
        parts = parameter.chunk(len(recipe.names))
        # A view would take the whole tensor that it is seen of along into the file, and two names one memory.
        tensors |= {stored: part.clone() for stored, part in zip(recipe.names, parts, strict=True)}
    with files.replacing(path) as file:
        try:
            torch.save(tensors, file)
        except RuntimeError as error:  # of what wraps an error of the disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def check_range(model: GPT2, dtype: torch.dtype) -> None:
    """Refuses to round weights to a dtype in which some would become infinite.

    Raises:
        UserError: a weight is beyond it.
    """
    limit = torch.finfo(dtype).max
    for name, parameter in model.named_parameters():
        largest = float(parameter.detach().abs().max())
        if not largest <= limit:
            kind = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{name} holds {largest:g}, beyond {kind}'s {limit:g}; export it as bfloat16 or float32"
                if math.isfinite(largest)
                else f"{name} holds what is no finite number; take an earlier checkpoint"
            )


def write_tokenizer(config: GPT2Config, folder: Path) -> None:
    """Writes the files of a model's tokenizer, by which transformers and `fastft.data.folder_tokenizer` know it.

    Raises:
        UserError: the folder or a file cannot be written; GPT-2's own files are not installed.
    """
    try:
        contents = config.tokenizer.files(config.n_ctx)
    except UserError as error:
        raise UserError(f"{folder}: the weights are written, but {error}") from error
    files.make_folder(folder)
    for name, content in contents.items():
        with files.replacing(folder / name) as file:
            file.write(content)


def write_chat_template(folder: Path, chat_template: str) -> None:
    """Writes a template's Jinja program beside a tokenizer's files, of which none then names another one.

    Raises:
        UserError: it cannot be written.
    """
    files.write_text(folder / "chat_template.jinja", chat_template)
    named = files.object_or_empty(folder / "tokenizer_config.json")
    if named.pop("chat_template", None) is not None:  # that of the model it was trained from
        files.write_json(folder / "tokenizer_config.json", named)


# Sources


def _located(source: str | Path) -> Path:
    """The folder or `.pth` file that `source` means, downloaded where it is an id."""
    if isinstance(source, str) and is_keyword("weights", source):
        return _downloaded(_HF_IDS[source])
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        if path.suffix not in (".pth", ".pt"):
            raise UserError(
                f"got {source}, expected the book's .pth or .pt; for safetensors give the folder that holds config.json"
            )
        return path
    model_id = _HF_IDS.get(str(source), str(source))
    if isinstance(source, Path) or path.suffix in (".pth", ".pt") or not _HF_ID.fullmatch(model_id):
        raise UserError(
            f"no weights at {source}{did_you_mean_path(path)}: expected a Hugging Face folder, a .pth of the book, or "
            f"a Hugging Face id ({', '.join(_HF_IDS)}, or owner/name)"
        )
    return _downloaded(model_id)


def _downloaded(model_id: str) -> Path:
    try:
        folder = huggingface_hub.snapshot_download(
            model_id,
            allow_patterns=[
                *("config.json", "*.safetensors", "*.safetensors.index.json", ADAPTER_CONFIG),
                *(*TOKENIZER_FILES, *UNREAD),
            ],
        )
    except Exception as error:  # the hub's own, its HTTP library's, the disk's: all mean "no weights"
        if isinstance(error, GatedRepoError):
            remedy = f"accept its terms at https://huggingface.co/{model_id}, then `hf auth login` or set HF_TOKEN"
        elif isinstance(error, RepositoryNotFoundError | HFValidationError):
            remedy = "there is no such folder either: check the name; a private model needs `hf auth login` or HF_TOKEN"
        else:
            remedy = "check the network and HF_HUB_OFFLINE, or give a folder with its config.json and *.safetensors"
        raise UserError(f"cannot download {model_id} from Hugging Face ({reason(error)}); {remedy}") from error
    return Path(folder)


def _adapter_at(named: str | Path) -> Path:
    """The folder of an adapter, downloaded where it is an id."""
    path = _located(named)
    return folder_of(path) if path.is_dir() else path.parent


def _opened(path: Path, config: GPT2Config | None) -> contextlib.AbstractContextManager[_Checkpoint]:
    if not path.is_dir():
        return _opened_book(path, config)
    if is_checkpoint(path):
        return _opened_checkpoint(path)
    return _opened_folder(folder_of(path), config)


def folder_of(path: Path) -> Path:
    """The Hugging Face folder, or PEFT's, that a folder is: of a run, that of its result."""
    of_a_run = path / "model"
    is_run = (path / "config.yaml").is_file() and not (path / "config.json").is_file() and of_a_run.is_dir()
    return of_a_run if is_run else path


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one of those that a training writes: `RUN/checkpoints/step-N` or `best-N`."""
    return all((folder / name).is_file() for name in (WEIGHTS, STATE, "DONE")) and not (folder / "config.json").exists()


@contextlib.contextmanager
def _opened_checkpoint(folder: Path) -> Iterator[_Checkpoint]:
    """A checkpoint of a training: the parameters by their own names, and in another place the run's tokenizer; one that
    was copied out of its run has that which was put beside it."""
    shape = files.object_or_empty(folder / STATE).get("model")
    try:
        own = GPT2Config(**shape)  # type: ignore[arg-type] # what is not its fields is refused
    except TypeError as error:
        raise UserError(
            f"{folder / STATE} does not say the model's shape; expected a checkpoint of this version of fastft"
        ) from error
    run = folder.resolve().parent.parent
    if (run / "config.yaml").is_file():
        tokenizer = (tokenizer_of(run / "tokenizer") if (run / "tokenizer").is_dir() else None) or gpt2_tokenizer()
    else:
        tokenizer = _tokenizer_of(folder, own.vocab_size)
    with opened_safetensors([folder / WEIGHTS]) as tensors:
        yield _Checkpoint(folder, replace(own, tokenizer=tokenizer), dict(tensors), lambda name: Recipe((name,)))


@contextlib.contextmanager
def _opened_folder(folder: Path, config: GPT2Config | None) -> Iterator[_Checkpoint]:
    paths = _safetensors_of(folder)
    own = _config_of(folder / "config.json")
    if config is not None and replace(config, tie_head=own.tie_head) != own:
        raise UserError(f"{folder / 'config.json'}: got {own}, expected {config}; leave the configuration to the file")
    own = replace(own, tokenizer=_tokenizer_of(folder, own.vocab_size))
    with opened_safetensors(paths) as stored:
        tensors = _own_names(folder, stored)
        prefix = "transformer." if any(name.startswith("transformer.") for name in tensors) else ""
        kept = {name: t for name, t in tensors.items() if not _HF_MASKS.fullmatch(name.removeprefix(prefix))}
        yield _Checkpoint(folder, own, kept, partial(_hf_recipe, prefix=prefix))


def _tokenizer_of(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer that lies beside weights. Without one they are taken to be GPT-2's, as of a size that allows it."""
    found = tokenizer_of(folder)
    if found is not None:
        found.check_fits(vocab_size, folder)
        return found
    if vocab_size >= VOCAB_SIZE:
        warn(f"{folder} holds no tokenizer: its ids are taken to be those of GPT-2's own")
    return gpt2_tokenizer()


def _tokenizer_beside(path: Path, config: GPT2Config) -> Tokenizer:
    """The tokenizer of a `.pth` file: the one in its folder, which is said, as the folder may be about something else;
    without one that which `config` names, usually GPT-2's."""
    folder = path.parent
    if not any((folder / name).is_file() for name in _WHOLE_VOCABULARIES):
        if unread := [name for name in (*TOKENIZER_FILES, *UNREAD) if (folder / name).is_file()]:
            said = ", ".join(unread)
            warn(f"{path}: {said} beside it tells no tokenizer that is read: its ids are taken to be GPT-2's own")
        return config.tokenizer
    found = tokenizer_of(folder)
    if found is None:
        return config.tokenizer
    found.check_fits(config.vocab_size, path.parent)
    if found is not config.tokenizer:
        warn(f"{path}: the tokenizer beside it is taken for its own; put it into a folder by itself if it is not")
    return found


@contextlib.contextmanager
def _opened_book(path: Path, config: GPT2Config | None) -> Iterator[_Checkpoint]:
    tensors = {name: t for name, t in _book_tensors(path).items() if not _BOOK_MASKS.fullmatch(name)}
    own = replace(config, tie_head=False) if config is not None else _book_config(path, tensors)
    own = replace(own, tokenizer=_tokenizer_beside(path, own))
    stored = {
        name: Stored(tuple(t.shape), DTYPE_NAMES.get(t.dtype, str(t.dtype)), lambda t=t: t)  # type: ignore[misc] # a default binds it
        for name, t in tensors.items()
    }
    yield _Checkpoint(path, own, stored, _book_recipe)


def _safetensors_of(folder: Path) -> list[Path]:
    """The one file, or the shards that the index names."""
    if (folder / WEIGHTS).is_file():
        if (folder / _INDEX).is_file():
            warn(f"{folder} holds {WEIGHTS} and shards by {_INDEX}: {WEIGHTS} is taken")
        return [folder / WEIGHTS]
    if not (folder / _INDEX).is_file():
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            raise UserError(
                f"{folder} holds a run without a model; give one of its checkpoints, or finish it with "
                f"`{command('train', resume=True, out=folder)}`"
            )
        found = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".h5", ".msgpack")))
        raise UserError(
            f"{folder} holds no {WEIGHTS}{f' but {found}' if found else ''}; only safetensors is read, as no "
            "pickle is ever executed: convert with transformers, "
            "`AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)`"
        )
    index = files.read_json(folder / _INDEX, what="the index of the shards")
    shards = index.get("weight_map") if isinstance(index, dict) else None
    # A shard lies beside the index: a name that leads elsewhere is refused.
    if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
        raise UserError(f"{folder / _INDEX}: expected a weight_map from tensor names to file names; download it again")
    return [folder / name for name in sorted(set(shards.values()))]


# Layouts


def _hf_recipe(name: str, *, prefix: str) -> Recipe:
    stored = name if name == _HEAD else prefix + name
    return Recipe((stored,), transposed=name.endswith(_HF_TRANSPOSED))


def _book_recipe(name: str) -> Recipe:
    if name in _BOOK_NAMES:
        return Recipe((_BOOK_NAMES[name],))
    _, layer, rest = name.split(".", 2)
    return Recipe(tuple(f"trf_blocks.{layer}.{stored}" for stored in _BOOK_LAYER_NAMES[rest]))


def _config_of(path: Path) -> GPT2Config:
    """The configuration that a `config.json` of transformers describes."""
    given = files.read_json(path, what="the model's configuration")
    if not isinstance(given, dict):
        raise UserError(f"{path}: got {kind_of(given)}, expected an object")
    said = _HF_DEFAULTS | given
    for key, accepted in _HF_REQUIRED.items():
        if said.get(key) not in accepted:
            expected = " or ".join(json.dumps(value) for value in accepted)
            raise UserError(
                f"{path}: got {key} = {json.dumps(said.get(key))}, expected {expected}; fastft is GPT-2 alone"
            )
    for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        if type(said[key]) is not int:
            raise UserError(f"{path}: got {key} = {json.dumps(said[key])}, expected a whole number")
    if said.get("n_inner") not in (None, 4 * said["n_embd"]):
        raise UserError(f"{path}: got n_inner = {said['n_inner']}, expected 4 n_embd = {4 * said['n_embd']}")
    epsilon = said["layer_norm_epsilon"]
    if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
        raise UserError(f"{path}: got layer_norm_epsilon = {json.dumps(epsilon)}, expected a number between 0 and 1")
    return GPT2Config(
        n_layer=said["n_layer"],
        n_head=said["n_head"],
        n_embd=said["n_embd"],
        n_ctx=said["n_positions"],
        vocab_size=said["vocab_size"],
        tie_head=said["tie_word_embeddings"],
        layer_norm_epsilon=float(epsilon),
    )


def _hf_config(config: GPT2Config, dtype: torch.dtype) -> dict[str, Any]:
    """The inverse of `_config_of`. Dropout is 0, as fastft trains."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_ctx,
        "n_ctx": config.n_ctx,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "use_cache": True,
        **config.tokenizer.special_ids(),
        "tie_word_embeddings": config.tie_head,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _generation_config(config: GPT2Config) -> dict[str, Any]:
    """How transformers' `generate` ends, and the ids that no answer may hold, as in `fastft.decoding`."""
    without_text = config.tokenizer.without_text(config.vocab_size)
    never = [] if without_text is None else without_text.nonzero()[0].tolist()
    return {**config.tokenizer.special_ids(), **({"suppress_tokens": never} if never else {})}


def _book_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, mapped rather than read where the file is a zip archive (torch 1.6 and later)."""
    check_fetched(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, OSError, ...: torch promises none of them
        raise UserError(
            f"cannot read {path} ({reason(error)}); expected tensors alone, as pickled code is never executed: "
            "save them again with `torch.save(model.state_dict(), PATH)`"
        ) from error
    while isinstance(loaded, dict) and (inner := [key for key in _AROUND if isinstance(loaded.get(key), dict)]):
        if len(inner) > 1:
            raise UserError(f"{path} holds weights under {' and '.join(inner)}; save the one that is meant by itself")
        loaded = loaded[inner[0]]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(
            f"{path} is not a state_dict, names to tensors, nor a dictionary with one under {', '.join(_AROUND)}; "
            "save `model.state_dict()`"
        )
    return _own_names(path, loaded)


def _own_names(path: Path, tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors by the names that the model itself gives them, without those of modules that were put around it or
    its parts: by torch.compile, DataParallel, FSDP, or a trainer that holds the network as its `model`.

    Raises:
        UserError: two tensors would have one name.
    """
    named = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    while named and (around := next((a for a in _HOLDERS if all(name.startswith(a) for name in named)), None)):
        named = {name.removeprefix(around): tensor for name, tensor in named.items()}
    if len(named) < len(tensors):
        raise UserError(
            f"{path} holds some weights twice, by themselves and wrapped (as torch.compile and the like name them); "
            "save one model's `state_dict()` alone"
        )
    return named


def _book_config(path: Path, tensors: Mapping[str, Tensor]) -> GPT2Config:
    """The configuration that the shapes tell, and the number of heads that goes with the width."""
    for name in ("tok_emb.weight", "pos_emb.weight"):
        if name not in tensors or tensors[name].ndim != 2:
            raise UserError(f"{path} is not in the book's layout: expected a matrix {name}, got {_some(tensors)}")
    layers = {name.split(".")[1] for name in tensors if name.startswith("trf_blocks.")}
    vocab_size, n_embd = tensors["tok_emb.weight"].shape
    heads = {size.n_embd: size.n_head for name, size in SIZES.items() if name in _HF_IDS}
    if n_embd not in heads:
        raise UserError(
            f"{path}: got width {n_embd}, expected one of GPT-2's ({', '.join(map(str, heads))}), which tell the "
            "number of heads; pass config=GPT2Config(...) for another"
        )
    return GPT2Config(
        n_layer=len(layers),
        n_head=heads[n_embd],
        n_embd=n_embd,
        n_ctx=tensors["pos_emb.weight"].shape[0],
        vocab_size=vocab_size,
        tie_head=False,
    )


# Checks and copies


def _assembled(checkpoint: _Checkpoint, tie_head: bool | None) -> GPT2:
    """The model, which takes memory only once everything fits."""
    tied = checkpoint.config.tie_head if tie_head is None else tie_head
    with torch.device("meta"):
        model = GPT2(replace(checkpoint.config, tie_head=tied)).float()
    parameters = dict(model.named_parameters())
    recipes = {name: checkpoint.recipe(name) for name in parameters}
    tensors = dict(checkpoint.tensors)
    head, embedding = checkpoint.recipe(_HEAD).names[0], checkpoint.recipe(_EMBEDDING).names[0]
    spare = tensors.pop(head, None) if tied else None
    if not tied and checkpoint.config.tie_head and head not in tensors:
        recipes[_HEAD] = recipes[_EMBEDDING]
    check_fits(checkpoint.source, parameters, recipes, tensors)
    if spare is not None and not torch.equal(spare.read().float(), tensors[embedding].read().float()):
        raise UserError(
            f"{checkpoint.source}: {head} differs from {embedding}, expected the same to tie them; use tie_head = false"
        )
    model.to_empty(device="cpu")
    fill(dict(model.named_parameters()), recipes, tensors)
    return model


# Writing


def _shards(tensors: Mapping[str, Tensor], dtype: torch.dtype, most: int | None) -> dict[str, dict[str, Tensor]]:
    """By file name, the tensors of each file, in their order."""
    parts: list[dict[str, Tensor]] = [{}]
    room = math.inf if most is None else most
    held = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if parts[-1] and held + size > room:
            parts.append({})
            held = 0
        parts[-1][name] = tensor
        held += size
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    stem, suffix = WEIGHTS.rsplit(".", 1)
    return {f"{stem}-{n:05}-of-{len(parts):05}.{suffix}": part for n, part in enumerate(parts, start=1)}


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "") if listed else "no tensors"
