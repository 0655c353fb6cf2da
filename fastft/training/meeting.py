"""Where the ranks meet behind each step, and agree on what comes next: no rank decides that by itself."""

from __future__ import annotations

from fastft.ranks.stopping import StopRequest, save_is_asked
from fastft.training.checkpoint import Shards
from fastft.training.job import Job
from fastft.training.lines import Lines


class Meeting:
    """What the ranks agree on: whether to stop, or to save though it is not due, and whether one is in trouble."""

    def __init__(self, job: Job, lines: Lines, shards: Shards | None) -> None:
        self._job = job
        self._lines = lines
        self._shards = shards
        self.save_is_asked = False
        """Whether somebody has asked for a checkpoint that is not saved yet."""

    def agree(self, stop: StopRequest) -> bool:
        """Exchanges what each rank has to say.

        Returns:
            Whether they are to stop or to save.

        Raises:
            FastftError: a rank could not write a line, or a callback has raised.
        """
        world = self._job.world
        mine = [
            *stop.votes(),
            float(world.is_first and save_is_asked(self._job.run.folder)),
            float(self._lines.trouble is not None),
            float(self._shards is not None and self._shards.is_written),
        ]
        *stop_votes, asked, trouble, written = world.sum(mine)
        stop.settle(stop_votes)
        if trouble:
            self._raise_trouble()
        if self._shards is not None and written == world.size:
            self._shards.finish()
        self.save_is_asked |= bool(asked)
        return self.save_is_asked or stop.signal is not None

    def at_the_end(self) -> None:
        """Behind the last step, which no other meeting follows.

        Raises:
            FastftError: a rank could not write a line, or a callback has raised.
        """
        if sum(self._job.world.sum([float(self._lines.trouble is not None)])):
            self._raise_trouble()

    def _raise_trouble(self) -> None:
        with self._job.world.together():
            if self._lines.trouble is not None:
                raise self._lines.trouble
