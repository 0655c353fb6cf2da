"""Trackio: its database in TRACKIO_DIR, or the Space of TRACKIO_SPACE_ID."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

from fastft.training.trackers.figures import Point
from fastft.training.trackers.tracker import PROJECT, End, Start


class Trackio:
    """A run of Trackio's, which is found again by its name."""

    forgets: ClassVar[bool] = False

    def __init__(self, start: Start) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        self.id = start.id or f"{start.name}-{secrets.token_hex(4)}"
        with contextlib.redirect_stdout(sys.stderr):  # it talks, and standard output is for results
            self._run: Any = trackio.init(
                project=project,
                name=self.id,
                config=dict(start.config),
                resume="never" if start.id is None else "must",
                embed=False,
            )
        self.place = f"trackio show --project {project}, run {self.id}"

    def log(self, points: Sequence[Point]) -> None:
        """Takes figures."""
        for step, _, figures in points:
            self._run.log(figures, step=step)

    def close(self, end: End) -> None:
        """Waits until all is written."""
        del end
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()
