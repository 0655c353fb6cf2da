"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any, ClassVar

from fastft.training.trackers.figures import Point
from fastft.training.trackers.tracker import End, Start

FOLDER = "tensorboard"
_FLUSH_S = 10


class TensorBoard:
    """A run of TensorBoard's: a folder."""

    forgets: ClassVar[bool] = True

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = start.folder / FOLDER
        purge = None if start.id is None else start.step + 1
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge, flush_secs=_FLUSH_S)
        # As Markdown has text that is to stay as it is: indented.
        config = json.dumps(dict(start.config), indent=2, ensure_ascii=False)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in config.splitlines()), start.step)
        self.id = FOLDER
        self.place = f"tensorboard --logdir {shlex.quote(str(folder))}"

    def log(self, points: Sequence[Point]) -> None:
        """Takes figures."""
        for step, _, figures in points:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def close(self, end: End) -> None:
        """Writes what is not yet written."""
        del end
        self._writer.close()
