"""What a tracker's adapter is given, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from fastft.training.trackers.figures import Point

End = Literal["finished", "stopped", "failed"]
"""How a call of `train` ended; one that was stopped can be resumed."""

PROJECT = "fastft"
"""The project, or experiment, that a run belongs to where the tracker's own settings name none."""


@dataclass(frozen=True, slots=True)
class Start:
    """The run, as a tracker is told of it.

    Attributes:
        folder: of the run; its name is the run's.
        config: its options.
        step: how many steps are done.
        id: of the tracker's own run, where one was begun before; None where it is to begin one.
    """

    folder: Path
    config: Mapping[str, Any]
    step: int
    id: str | None = None

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.folder.resolve().name


class Tracker(Protocol):
    """An open run of a tracker: made of a `Start`. Whatever a method raises ends the tracking and nothing else.

    Attributes:
        forgets: whether it drops what it had behind the step at which a run goes on; else it is not told these steps
            again, and keeps what it has.
        id: by which the run is found again.
        place: where it is to be seen, in words.
    """

    forgets: ClassVar[bool]
    id: str
    place: str

    def log(self, points: Sequence[Point]) -> None:
        """Takes figures, in the order of their steps."""

    def close(self, end: End) -> None:
        """Sees to it that all that it took is kept."""
