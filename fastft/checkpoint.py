"""Checkpoints that are whole or passed over.

A checkpoint is a folder, written beside its place under a hidden name and renamed into it. Its DONE file is written
last and holds the size and the SHA-256 of every other file, so a torn or corrupted checkpoint is never resumed.

    step-N/   model.safetensors, optimizer.safetensors, rng.safetensors, state.json, DONE
    best-N/   model.safetensors, state.json, DONE: the weights with the best validation loss

Nothing is pickled: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastft import files
from fastft.console import warn
from fastft.engine import Engine
from fastft.errors import UserError
from fastft.weights import load_weights, save_weights

_DONE = "DONE"
_MODEL, _OPTIMIZER, _RNG, _STATE = "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"


@dataclass(slots=True)
class Progress:
    """How far a run has come: all that training's loop remembers beside weights, moments and random states."""

    step: int = 0
    """Optimizer steps done (or skipped)."""
    skipped: int = 0
    """Steps skipped for a non-finite loss or gradient."""
    tokens_seen: int = 0
    """Positions computed so far, padding included, as the book counts them."""
    best_val_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    data_fingerprint: str = ""
    """SHA-256 of the training examples' ids and masks: a position in other data would mean nothing."""


def save_checkpoint(folder: Path, engine: Engine, progress: Progress, *, keep: int) -> None:
    """Writes `folder/step-N` and removes all but the newest `keep` up to it.

    Raises:
        UserError: the disk is full or the folder cannot be written; older checkpoints stay as they are.
    """

    def write(into: Path) -> None:
        save_weights(engine.model, into / _MODEL)
        _save_tensors(_optimizer_tensors(engine), into / _OPTIMIZER)
        _save_tensors(_random_states(), into / _RNG)
        files.write_json(into / _STATE, {**asdict(progress), "scaler": engine.scaler.state_dict()})

    _write_whole(folder / f"step-{progress.step}", write)
    prune(folder, progress.step, keep=keep)


def prune(folder: Path, step: int, *, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints up to `step-N`: what a killed run was about to remove, too."""
    _prune(folder, "step", step, keep)


def save_best(folder: Path, engine: Engine, progress: Progress) -> None:
    """Writes the weights to `folder/best-N` in place of an earlier best."""

    def write(into: Path) -> None:
        save_weights(engine.model, into / _MODEL)
        files.write_json(into / _STATE, asdict(progress))

    _write_whole(folder / f"best-{progress.step}", write)
    _prune(folder, "best", progress.step, 1)


def newest_whole(folder: Path) -> Path | None:
    """The newest whole `step-N` of a folder of checkpoints, None where there are none at all.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    faults = []
    for path in _newest_first(folder, "step"):
        fault = _fault(path)
        if fault is None:
            return path
        warn(f"checkpoint {path} is passed over: {fault}")
        faults.append(path.name)
    if faults:
        raise UserError(f"no whole checkpoint in {folder} ({', '.join(faults)} are torn); start again with --overwrite")
    return None


def load_checkpoint(path: Path, engine: Engine) -> Progress:
    """Puts weights, moments, loss scale and random states back into the engine and torch; returns the progress."""
    state = files.read_json(path / _STATE, what="checkpoint state")
    load_weights(engine.model, path / _MODEL)
    _restore_optimizer(engine, load_tensors(path / _OPTIMIZER))
    _restore_random_states(load_tensors(path / _RNG))
    if scaler := state.pop("scaler"):  # empty where the run did not scale its loss
        engine.scaler.load_state_dict(scaler)
    return Progress(**state)


def load_best(folder: Path, engine: Engine) -> int | None:
    """Puts the best weights into the engine's model; returns their step, None where there are none."""
    for path in _newest_first(folder, "best"):
        fault = _fault(path)
        if fault is None:
            load_weights(engine.model, path / _MODEL)
            return _step_of(path)
        warn(f"the best weights in {path} are passed over: {fault}")
    return None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    if path.is_dir() and _fault(path) is None:
        return  # a resumed run has come here before and computed the same
    beside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    files.make_folder(beside)
    try:
        write(beside)
        manifest = {file.name: _identity(file) for file in sorted(beside.iterdir())}
        for name in manifest:
            _fsync(beside / name)
        files.write_json(beside / _DONE, manifest)
        _fsync(beside)
        shutil.rmtree(path, ignore_errors=True)
        beside.replace(path)
        _fsync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write the checkpoint {path}: {error.strerror or error}; free space") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _identity(path: Path) -> dict[str, str | int]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _fault(path: Path) -> str | None:
    """Why a checkpoint is not whole; None where it is."""
    try:
        manifest = json.loads((path / _DONE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it has no DONE file"
    except (OSError, ValueError):
        return "its DONE file cannot be read"
    if not isinstance(manifest, dict) or not all(isinstance(entry, dict) for entry in manifest.values()):
        return "its DONE file is not a list of files"
    if not {_MODEL, _STATE} <= manifest.keys():
        return f"its DONE file does not name {_MODEL} and {_STATE}"
    for name, identity in manifest.items():
        file = path / name
        try:
            if (size := file.stat().st_size) != identity.get("bytes"):
                return f"{name} has {size} bytes, expected {identity.get('bytes')}"
            if _identity(file) != identity:
                return f"{name} does not match its SHA-256"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _newest_first(folder: Path, kind: str) -> Iterator[Path]:
    if folder.is_dir():
        found = [path for path in folder.iterdir() if re.fullmatch(rf"{kind}-\d+", path.name)]
        yield from sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _prune(folder: Path, kind: str, step: int, keep: int) -> None:
    """Removes all but the newest `keep` up to `step`. What is newer was passed over as torn, or belongs to steps that
    a resumed run is still to do again; it must not push out what has just been written."""
    paths = list(_newest_first(folder, kind))
    kept = [path for path in paths if _step_of(path) <= step][:keep]
    for path in paths:
        if path in kept:
            continue
        (path / _DONE).unlink(missing_ok=True)  # first: a half-removed checkpoint must not look whole
        shutil.rmtree(path, ignore_errors=True)


def _fsync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    if os.name == "posix":  # elsewhere folders cannot be opened, nor read-only files flushed
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; free space") from error


def _optimizer_tensors(engine: Engine) -> dict[str, Tensor]:
    """AdamW's state as `NAME/exp_avg`, `NAME/exp_avg_sq`, `NAME/step`."""
    return {
        f"{name}/{key}": value.detach().cpu()
        for name, parameter in engine.model.named_parameters()
        for key, value in engine.optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(engine: Engine, tensors: dict[str, Tensor]) -> None:
    parameters = dict(engine.model.named_parameters())
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        engine.optimizer.state[parameter][key] = value.to(parameter.device)


def _random_states() -> dict[str, Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), **{f"cuda.{i}": state for i, state in enumerate(cuda)}}


def _restore_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states.pop("cpu"))
    for name, state in states.items():
        index = int(name.removeprefix("cuda."))
        if torch.cuda.is_available() and index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, index)
