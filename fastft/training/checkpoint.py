"""Checkpoints that are whole or passed over.

A checkpoint is a folder, written beside its place under a hidden name and renamed into it. Its DONE file is written
last and holds the size and the SHA-256 of every other file, so a torn or corrupted checkpoint is never resumed.

    step-N/     model.safetensors, optimizer.safetensors, rng.safetensors, state.json, DONE
    best-N/     model.safetensors, state.json, DONE: the weights with the best validation loss. A state names its own
                best, which stays as long as a checkpoint is there that names it
    shards-N/   zero/*.pt of DeepSpeed, rng.safetensors, state.json, DONE: of a ZeRO run, each rank's part by itself

step-N does not depend on ranks: weights and moments are whole and in float32, whichever engine wrote them, and any
engine on any number of ranks goes on from it. shards-N is for the same number of ranks and the same stage.

Nothing that is read back is executed: tensors are safetensors, the rest is JSON, and DeepSpeed's files are read with
`weights_only`.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastft.common import files
from fastft.common.console import warn
from fastft.common.errors import UserError
from fastft.engines.engine import AnyEngine
from fastft.engines.zero import ZeroEngine
from fastft.model.gpt2 import GPT2Config
from fastft.model.names import STATE, WEIGHTS
from fastft.model.ops import why_no_compiled
from fastft.model.part import Part
from fastft.model.weights import save_weights
from fastft.ranks.world import World

_DONE = "DONE"
MODEL, MOMENTS = WEIGHTS, "optimizer.safetensors"
"""The files of a whole checkpoint that hold weights and moments."""
_RNG, _STATE = "rng.safetensors", STATE
_WHOLE, _BEST, _SHARDS = "step", "best", "shards"
_MUST_HAVE = {_WHOLE: {MODEL, _STATE}, _BEST: {MODEL, _STATE}, _SHARDS: {_RNG, _STATE}}


@dataclass(slots=True)
class Progress:
    """How far a run has come: all that training's loop remembers beside weights, moments and random states."""

    step: int = 0
    """Optimizer steps done (or skipped)."""
    skipped: int = 0
    """Steps skipped for a non-finite loss or gradient."""
    tokens_seen: int = 0
    """Positions computed so far, padding included, as the book counts them."""
    evaluated: int | None = None
    """The last step whose evaluation is behind it. A checkpoint is saved before its step's own evaluation, which a run
    that goes on from it does again."""
    best_val_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    data_fingerprint: str = ""
    """SHA-256 over the records of all splits, the ids and masks of the training and validation examples, and the
    tokenizer: a position, or a best loss, in other data would mean nothing."""

    def become(self, other: Progress) -> None:
        """Takes over all of another one: whoever looks at this one sees how far the run is now."""
        for name in _PROGRESS:
            setattr(self, name, getattr(other, name))


_PROGRESS = tuple(field.name for field in fields(Progress))
_BESIDE_PROGRESS = {_WHOLE: ("scaler",), _SHARDS: ("ranks", "stage", "dtype")}


def save_checkpoint(folder: Path, engine: AnyEngine, progress: Progress, *, keep: int) -> None:
    """Writes `folder/step-N` and removes all but the newest `keep` up to it. All ranks call it.

    Raises:
        UserError: the disk is full or the folder cannot be written; older checkpoints stay as they are.
    """
    weights, moments = engine.whole_weights(), engine.whole_moments()
    with engine.world.together():
        if weights is None or moments is None:
            return  # the first rank writes

        def write(into: Path) -> None:
            save_weights(weights, into / MODEL)
            _save_tensors(moments, into / MOMENTS)
            _save_tensors(_random_states(), into / _RNG)
            state = {**_described(engine, progress), "scaler": engine.loss_scale()}
            files.write_json(into / _STATE, state)

        _write_whole(checkpoint_at(folder, progress), write)
        _prune(folder, _WHOLE, progress.step, keep)
        _prune_best(folder, progress)


def checkpoint_at(folder: Path, progress: Progress) -> Path:
    """The folder of the whole checkpoint of a step."""
    return folder / f"{_WHOLE}-{progress.step}"


def prune(folder: Path, progress: Progress, *, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints of each kind up to the progress: what a killed run was about to
    remove, too; and best weights that none of them names."""
    for kind in (_WHOLE, _SHARDS):
        _prune(folder, kind, progress.step, keep)
    _prune_best(folder, progress)


def save_best(folder: Path, engine: AnyEngine, progress: Progress) -> None:
    """Writes the weights to `folder/best-N`, and removes earlier ones that no checkpoint names. All ranks call it."""
    weights = engine.whole_weights()
    with engine.world.together():
        if weights is None:
            return  # the first rank writes

        def write(into: Path) -> None:
            save_weights(weights, into / MODEL)
            files.write_json(into / _STATE, _described(engine, progress))

        _write_whole(folder / f"{_BEST}-{progress.step}", write)
        _prune_best(folder, progress)


class Shards:
    """A ZeRO run's checkpoints in shards: begun at one step, whole some steps later. All ranks make every call."""

    def __init__(self, folder: Path, engine: ZeroEngine, *, keep: int) -> None:
        self._folder = folder
        self._engine = engine
        self._keep = keep
        self._begun: Progress | None = None
        self._random: dict[str, Tensor] = {}

    def begin(self, progress: Progress) -> None:
        """Copies every rank's part to host memory and has it written in the background.

        Raises:
            UserError: the one before could not be written.
        """
        self.finish()
        path = self._path(progress)
        beside = _beside(path)
        with self._engine.world.together():
            if self._engine.world.is_first:
                shutil.rmtree(beside, ignore_errors=True)
                files.make_folder(beside)
        self._begun, self._random = replace(progress), _random_states()
        self._engine.save_shards(beside)

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of the one begun is on the disk: `finish` will not wait for this rank."""
        return self._begun is not None and self._engine.shard_writer.finished()

    def finish(self) -> None:
        """Waits for all parts of the one begun, if any, and marks it as whole.

        Raises:
            UserError: a part could not be written; older checkpoints stay as they are.
        """
        progress, self._begun = self._begun, None
        if progress is None:
            return
        world = self._engine.world
        try:
            with world.together():
                mine = self._engine.shard_writer.finish()
            manifests = world.gather(mine)
            with world.together():
                if world.is_first:
                    self._seal(progress, {name: entry for part in manifests for name, entry in part.items()})
        finally:
            if world.is_first:  # nothing is left of what could not be made whole
                shutil.rmtree(_beside(self._path(progress)), ignore_errors=True)

    def _seal(self, progress: Progress, manifest: dict[str, dict[str, str | int]]) -> None:
        path, engine = self._path(progress), self._engine
        beside = _beside(path)
        try:
            _save_tensors(self._random, beside / _RNG)
            ranks = {"ranks": engine.world.size, "stage": engine.stage, "dtype": engine.dtype}
            files.write_json(beside / _STATE, {**_described(engine, progress), **ranks})
            for file in beside.iterdir():
                if file.is_file():
                    manifest[file.name] = files.identity(file)
            _seal(beside, path, manifest)
        except OSError as error:
            raise _cannot_write(path, error) from error
        _prune(self._folder, _SHARDS, progress.step, self._keep)
        _prune_best(self._folder, progress)

    def _path(self, progress: Progress) -> Path:
        return self._folder / f"{_SHARDS}-{progress.step}"


def newest_whole(folder: Path, engine: AnyEngine | None = None) -> Path | None:
    """The newest whole checkpoint of a folder that `engine` can go on from, None where there are none at all.

    Any engine can go on from `step-N`; `shards-N` is taken where it is of the same ranks and stage.

    Raises:
        UserError: there are checkpoints, but none that can be taken.
    """
    torn, of_others = [], []
    for path in _newest_first(folder, _SHARDS, _WHOLE):
        if fault := _fault(path):
            torn.append(path.name)
        elif fault := _misfit(path, engine):
            of_others.append(path.name)
        else:
            return path
        warn(f"checkpoint {path} is passed over: {fault}")
    if of_others:
        raise UserError(
            f"no checkpoint in {folder} for any number of ranks ({', '.join(of_others)} are in shards); go on as they "
            "were written, and have a whole one written by a file named save in the run's folder; or start again with "
            "--overwrite"
        )
    if torn:
        raise UserError(f"no whole checkpoint in {folder} ({', '.join(torn)} are torn); start again with --overwrite")
    return None


def load_checkpoint(path: Path, engine: AnyEngine) -> Progress:
    """Puts weights, moments, loss scale and random states back into the engine and torch; returns the progress. All
    ranks call it, and read the files.

    Raises:
        UserError: a file cannot be read, or is of another model.
    """
    state = _state_of(path)
    _check_part(path, state["part"], engine.model.part)
    _say_whose_code(path, state["computed_by"], _whose_code(engine))
    if path.name.startswith(_SHARDS):
        assert isinstance(engine, ZeroEngine)  # `newest_whole` gives them to no other
        engine.load_shards(path)
    else:
        engine.load(path / MODEL, load_tensors(path / MOMENTS))
        engine.load_loss_scale(state["scaler"])
    _restore_random_states(load_tensors(path / _RNG))
    return Progress(**{name: state[name] for name in _PROGRESS})


def shape_of(folder: Path) -> GPT2Config | None:
    """The shape of the model whose checkpoints a folder holds; None where none says it. A run that goes on needs no
    other file to make the model that it puts its weights into."""
    for path in _newest_first(folder, _SHARDS, _WHOLE):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # torn: an older one has the same shape
            return GPT2Config(**json.loads((path / _STATE).read_text(encoding="utf-8"))["model"])
    return None


def load_best(folder: Path, engine: AnyEngine, progress: Progress) -> bool:
    """Puts the weights that the progress names as its best into the engine's model; returns whether they are there. All
    ranks call it."""
    path = _from_first(engine.world, lambda: _best_of(folder, progress))
    if path is not None:
        engine.load(path / MODEL, {})
    return path is not None


def resumable(folder: Path, engine: AnyEngine) -> Path | None:
    """`newest_whole`, which the first rank looks for: all go on from the same."""
    return _from_first(engine.world, lambda: newest_whole(folder, engine))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _state_of(path: Path) -> dict[str, Any]:
    """What `state.json` of a whole checkpoint holds, all of it and nothing else.

    Raises:
        UserError: it holds something else, as that of another version of fastft does.
    """
    state = files.read_json(path / _STATE, what="checkpoint state")
    got = set(state) if isinstance(state, dict) else set()
    expected = {*_PROGRESS, "model", "part", "computed_by", *_BESIDE_PROGRESS[path.name.partition("-")[0]]}
    if odd := sorted(got ^ expected):
        lacking = [f"no {name}" for name in odd if name not in got]
        unknown = [f"an unknown {name}" for name in odd if name in got]
        raise UserError(
            f"{path / _STATE}: got {', '.join(lacking + unknown)}; another version of fastft wrote it: go on with that "
            "one, or start again with --overwrite"
        )
    found: dict[str, Any] = state
    return found


def _described(engine: AnyEngine, progress: Progress) -> dict[str, Any]:
    """How far a run is, the shape of its model, what of it is trained, where that is not all, and whose code did."""
    model, part = engine.model, engine.model.part
    return {
        **asdict(progress), "model": model.config.shape(), "part": None if part is None else part.as_json(),
        "computed_by": _whose_code(engine),
    }  # fmt: skip


def _whose_code(engine: AnyEngine) -> str:
    """Whose code computes what stands between a step's products, and the update."""
    may_be_compiled = engine.device.type == "cpu" and engine.dtype in ("fp32", "bf16")
    return "compiled code" if may_be_compiled and why_no_compiled() is None else "torch"


def _say_whose_code(path: Path, before: str, now: str) -> None:
    """Says where a run goes on by other code than wrote the checkpoint: what follows is the same up to rounding."""
    if before != now:
        reason = f" ({why_no_compiled()})" if now == "torch" and why_no_compiled() else ""
        warn(
            f"{path} was computed by {before}, and here it goes on by {now}{reason}: the same but for rounding, so "
            "that bits may differ"
        )


def _check_part(path: Path, held: Any, part: Part | None) -> None:
    """Refuses a checkpoint that holds another part of a model than is trained, or one of another base.

    Raises:
        UserError: it does.
    """
    try:
        of = None if held is None else Part.of_json(held)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{path / _STATE} does not say what part of a model it holds ({error})") from error
    if of == part:
        return
    if of is None or part is None or replace(of, base_sha256="") != replace(part, base_sha256=""):
        names = ["all weights" if one is None else one.in_words() for one in (of, part)]
        raise UserError(f"{path} holds {names[0]}, and this run trains {names[1]}; start another in another --out")
    raise UserError(
        f"{path} belongs to other weights than the run starts from now: got SHA-256 {part.base_sha256}, expected "
        f"{of.base_sha256}; put back what --weights named"
    )


def _from_first(world: World, find: Callable[[], Path | None]) -> Path | None:
    found = None
    with world.together():
        if world.is_first:
            found = find()
    return world.gather(found)[0]


def _best_of(folder: Path, progress: Progress) -> Path | None:
    if progress.best_step is None:
        return None
    path = folder / f"{_BEST}-{progress.best_step}"
    if fault := _fault(path):
        warn(f"the best weights in {path} are passed over: {fault}")
        return None
    return path


def _misfit(path: Path, engine: AnyEngine | None) -> str | None:
    """Why an engine cannot go on from a whole checkpoint; None where it can."""
    if not path.name.startswith(_SHARDS):
        return None
    state = files.read_json(path / _STATE, what="checkpoint state")
    wrote = f"it is in shards, of {state['ranks']} ranks with ZeRO stage {state['stage']} in {state['dtype']}"
    if not isinstance(engine, ZeroEngine):
        return f"{wrote}, and this run has no ZeRO"
    if (state["ranks"], state["stage"], state["dtype"]) == (engine.world.size, engine.stage, engine.dtype):
        return None
    return f"{wrote}, and this run has {engine.world.size} with stage {engine.stage} in {engine.dtype}"


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    if path.is_dir() and _fault(path) is None:
        return  # a resumed run has come here before and computed the same
    beside = _beside(path)
    shutil.rmtree(beside, ignore_errors=True)
    files.make_folder(beside)
    try:
        write(beside)
        _seal(beside, path, {file.name: files.identity(file) for file in sorted(beside.iterdir())})
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _seal(beside: Path, path: Path, manifest: Mapping[str, dict[str, str | int]]) -> None:
    """Marks a written folder as whole, and renames it into its place."""
    for name in manifest:
        files.fsync(beside / name)
    files.write_json(beside / _DONE, manifest)
    for folder in {beside, *(parent for name in manifest if (parent := (beside / name).parent) != beside)}:
        files.fsync(folder)
    shutil.rmtree(path, ignore_errors=True)
    beside.replace(path)
    files.fsync(path.parent)


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write the checkpoint {path}: {error.strerror or error}; free space")


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
    if missing := _MUST_HAVE[path.name.partition("-")[0]] - manifest.keys():
        return f"its DONE file does not name {' and '.join(sorted(missing))}"
    for name, identity in manifest.items():
        file = path / name
        try:
            if (size := file.stat().st_size) != identity.get("bytes"):
                return f"{name} has {size} bytes, expected {identity.get('bytes')}"
            if files.identity(file) != identity:
                return f"{name} does not match its SHA-256"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _newest_first(folder: Path, *kinds: str) -> Iterator[Path]:
    """The checkpoints of some kinds; of two of the same step, that of the kind named first comes first."""
    if folder.is_dir():
        found = [path for path in folder.iterdir() if re.fullmatch(rf"({'|'.join(kinds)})-\d+", path.name)]
        yield from sorted(found, key=lambda path: (-_step_of(path), kinds.index(path.name.partition("-")[0])))


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _prune(folder: Path, kind: str, step: int, keep: int) -> None:
    """Removes all but the newest `keep` up to `step`. What is newer was passed over as torn, or belongs to steps that
    a resumed run is still to do again; it must not push out what has just been written. Newer shards stay until the
    run has come so far: another number of ranks can still go on from them."""
    paths = list(_newest_first(folder, kind))
    if kind == _SHARDS:
        paths = [path for path in paths if _step_of(path) <= step]
    kept = [path for path in paths if _step_of(path) <= step][:keep]
    for path in paths:
        if path not in kept:
            _remove(path)


def _prune_best(folder: Path, progress: Progress) -> None:
    """Removes the best weights that neither the progress nor a checkpoint names: a run may go on from any of those, and
    end before it finds a better one."""
    named = {progress.best_step, *map(_best_named_by, _newest_first(folder, _SHARDS, _WHOLE))}
    for path in list(_newest_first(folder, _BEST)):
        if _step_of(path) not in named:
            _remove(path)


def _best_named_by(path: Path) -> int | None:
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # torn: nothing goes on from it
        return None
    return state.get("best_step") if isinstance(state, dict) else None


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
        return
    with contextlib.suppress(FileNotFoundError):
        (path / _DONE).unlink()  # first: a half-removed checkpoint must not look whole
    shutil.rmtree(path, ignore_errors=True)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; free space") from error


def _random_states() -> dict[str, Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), **{f"cuda.{i}": state for i, state in enumerate(cuda)}}


def _restore_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states.pop("cpu"))
    for name, state in states.items():
        index = int(name.removeprefix("cuda."))
        if torch.cuda.is_available() and index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, index)
