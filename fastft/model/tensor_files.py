"""safetensors files, read lazily and written tensor by tensor."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastft.common import files
from fastft.common.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What weights may be, as safetensors names it."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PROBLEMS_SHOWN = 10
_LFS = "{path} is a pointer of Git LFS, not the weights themselves; fetch them with `git lfs pull`"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a file, not read yet. `dtype` is named as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The stored tensors that make up one parameter: each transposed if need be, then one below the other."""

    names: tuple[str, ...]
    transposed: bool = False

    def stored_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape that each stored tensor must have."""
        shape = (parameter.shape[0] // len(self.names), *parameter.shape[1:])
        return shape[::-1] if self.transposed else shape


@contextlib.contextmanager
def opened_safetensors(paths: Iterable[Path]) -> Iterator[dict[str, Stored]]:
    """The tensors of all `paths`, readable while the block lasts.

    Raises:
        UserError: a file cannot be read, or two hold one name.
    """
    tensors = {}
    with contextlib.ExitStack() as stack:
        for path in paths:
            check_fetched(path)
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    view = file.get_slice(name)
                    stored = Stored(tuple(view.get_shape()), view.get_dtype(), partial(file.get_tensor, name))
                    if name in tensors:
                        raise UserError(f"{path} and another shard both hold {name}, expected one; fetch them again")
                    tensors[name] = stored
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"cannot read {path} ({reason(error)}); expected a whole safetensors file; fetch it again"
                ) from error
        yield tensors


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself beside its tensors.

    Raises:
        UserError: it cannot be read.
    """
    check_fetched(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"cannot read {path} ({reason(error)}); expected a whole safetensors file; fetch it again"
        ) from error


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file tensor by tensor, so that no second copy of a model is ever in memory.

    The format: the header's length (8 bytes, little-endian), the header (JSON, padded to 8 bytes), the data without a
    gap. Wide dtypes come first, which keeps every tensor aligned.

    Args:
        path: of the file.
        tensors: by name.
        dtype: that all are written in; None: each in its own.
        metadata: what the file says of itself.

    Raises:
        UserError: it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    ordered = sorted(tensors.items(), key=lambda item: -(dtype or item[1].dtype).itemsize)
    end = 0
    for name, tensor in ordered:
        kind = dtype or tensor.dtype
        start, end = end, end + tensor.numel() * kind.itemsize
        header[name] = {"dtype": DTYPE_NAMES[kind], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with files.replacing(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, tensor in ordered:
            plain = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
            file.write(plain.view(torch.uint8).numpy().data)


def check_fits(
    source: Path,
    parameters: Mapping[str, Tensor],
    recipes: Mapping[str, Recipe],
    tensors: Mapping[str, Stored],
    *,
    any_float: bool = True,
) -> None:
    """Holds what is stored against the parameters that are to be filled.

    Args:
        source: for the error.
        parameters: by name.
        recipes: by the parameters' names.
        tensors: what is stored.
        any_float: whether other floating dtypes will do than the parameters' own.

    Raises:
        UserError: it names every stored tensor that is missing, misshapen, of a wrong dtype, or too many.
    """
    problems: list[str | None] = []
    known: set[str] = set()
    for name, parameter in parameters.items():
        shape = recipes[name].stored_shape(parameter)
        dtypes = list(DTYPES) if any_float else [DTYPE_NAMES[parameter.dtype]]
        known.update(recipes[name].names)
        problems += [_problem(stored, tensors.get(stored), shape, dtypes) for stored in recipes[name].names]
    found = [problem for problem in problems if problem is not None]
    found += [f"unexpected {name} {list(tensors[name].shape)}" for name in tensors if name not in known]
    if found:
        shown = "; ".join(found[:_PROBLEMS_SHOWN])
        more = f"; and {len(found) - _PROBLEMS_SHOWN} more" if len(found) > _PROBLEMS_SHOWN else ""
        raise UserError(
            f"{source}: the weights do not fit the configured model, {len(found)} found: {shown}{more}; "
            "use weights and a configuration that belong together"
        )


def _problem(name: str, stored: Stored | None, shape: tuple[int, ...], dtypes: list[str]) -> str | None:
    if stored is None:
        return f"missing {name} {list(shape)}"
    if stored.shape != shape:
        return f"{name}: got shape {list(stored.shape)}, expected {list(shape)}"
    if stored.dtype not in dtypes:
        return f"{name}: got dtype {stored.dtype}, expected {' or '.join(dtypes)}"
    return None


@torch.no_grad()
def fill(parameters: Mapping[str, Tensor], recipes: Mapping[str, Recipe], tensors: Mapping[str, Stored]) -> None:
    """Copies every checked tensor into its place, one at a time."""
    for name, parameter in parameters.items():
        recipe = recipes[name]
        for part, stored in zip(parameter.chunk(len(recipe.names)), recipe.names, strict=True):
            tensor = tensors[stored].read()
            part.copy_(tensor.t() if recipe.transposed else tensor)


def check_fetched(path: Path) -> None:
    """Refuses the pointer that Git LFS leaves in a file's place.

    Raises:
        UserError: it is one.
    """
    if files.is_lfs_pointer(path):
        raise UserError(_LFS.format(path=path))


def reason(error: Exception) -> str:
    """The error's type and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
