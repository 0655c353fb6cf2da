"""Before anything is trained or written: the options settled, the folder looked at."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from fastft.common.effects import check_effects
from fastft.common.errors import UserError
from fastft.common.keywords import is_keyword
from fastft.common.nearest import did_you_mean_path
from fastft.model.weights import files_of
from fastft.ranks.world import World
from fastft.run.config import TrainOptions, changed_settings, defaults_of
from fastft.run.folder import Run
from fastft.run.given import weights_of


def settled(options: TrainOptions, run: Run) -> TrainOptions:
    """The options with what a resumed run's own say; refuses what cannot be done before anything is changed."""
    if options.resume and options.dtype == "auto" and run.config.is_file():
        options = replace(options, dtype=run.options().dtype)  # another machine may find another one fast
    check_effects(options, defaults=defaults_of(options))
    check_folder(run, options)
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
        if not run.holds_something():
            near = "" if run.folder.exists() else did_you_mean_path(run.folder)
            raise UserError(
                f"got --resume, and there is no run in {run.folder}{near}; name the folder of one with --out, or begin "
                "one without --resume"
            )
        if run.config.is_file() and (changed := changed_settings(run.options(), options)):
            raise UserError(
                f"--resume would compute something else than {run.folder} did: {'; '.join(changed)}; "
                "take these settings back, or start another run in another --out"
            )
    elif run.holds_something() and not (options.overwrite or options.dry_run):
        raise UserError(f"{run.folder} already holds a run; go on with --resume, replace it with --overwrite")
    elif options.overwrite and not options.dry_run:
        _keep_weights(run, options)


def _keep_weights(run: Run, options: TrainOptions) -> None:
    """Refuses to remove the weights that the run starts from, or those that they in turn are a part of."""
    source = weights_of(options)
    if source is None or is_keyword("weights", source) or not Path(source).expanduser().exists():
        return
    removed = {path.resolve() for path in run.written()}
    if lost := [file for file in files_of(source) if file.resolve() in removed]:
        raise UserError(
            f"got --weights {source} and --overwrite, which would remove {lost[0]}, of which these weights are; take "
            "another --out"
        )


def set_threads(threads: int | None, world: World, device: torch.device) -> None:
    """CPU threads: those asked for, else, where several ranks compute on one machine's CPU, its share."""
    if threads is not None:
        torch.set_num_threads(threads)
    elif device.type == "cpu" and world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // world.local_size))
