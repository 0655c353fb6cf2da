"""Weights & Biases: its server, or, where WANDB_MODE is offline or nobody is logged in, a folder for `wandb sync`."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from fastft.training.trackers.figures import Point
from fastft.training.trackers.tracker import PROJECT, End, Start

_FINISH_S = 25.0
"""Without a network it would wait for ever at the end. What is not sent lies in its folder, for `wandb sync`."""


class Wandb:
    """A run of Weights & Biases'."""

    forgets: ClassVar[bool] = False

    def __init__(self, start: Start) -> None:
        import wandb

        settings: Any = wandb.setup(wandb.Settings(silent=True)).settings
        # It would ask for a key, and wait. That nobody is logged in costs no figure: they can be sent later.
        nobody = settings.mode == "online" and not wandb.login(prompt=False)
        self.id = start.id or secrets.token_hex(4)
        self._run: Any = wandb.init(
            project=settings.project or PROJECT,
            name=start.name,
            id=self.id,
            resume="allow",
            config=dict(start.config),
            allow_val_change=True,  # how far a resumed run goes
            mode="offline" if nobody else None,
            settings=wandb.Settings(console="off", silent=True, finish_timeout=_FINISH_S, finish_timeout_raises=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.place = self._run.url or f"offline; `wandb sync {shlex.quote(str(Path(self._run.dir).parent))}` sends it"

    def log(self, points: Sequence[Point]) -> None:
        """Takes figures. Its own count of steps only ever grows, over resumed runs too: an evaluation has the number
        behind its step's."""
        for step, evaluation, figures in points:
            self._run.log({"step": step, **figures}, step=2 * step + evaluation)

    def close(self, end: End) -> None:
        """Waits until all is sent, or written."""
        self._run.finish(exit_code=1 if end == "failed" else 0)
