"""How a run is asked to stop, or to save: signals, and a file."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fastft.console import say
from fastft.world import World

SAVE_FILE = "save"
_CAUGHT = (signal.SIGTERM, signal.SIGINT)
_SAME_REQUEST_S = 5.0
"""A launcher passes a signal on to its ranks, which may have had it themselves: twice at once means once."""


@dataclass(slots=True)
class StopRequest:
    """A signal that asks to stop; the loop looks at it after each step."""

    signal: signal.Signals | None = None
    came: float = field(default=0.0)

    def votes(self) -> list[float]:
        """What this rank was asked for, to be summed over the ranks."""
        return [float(self.signal == one) for one in _CAUGHT]

    def settle(self, votes: list[float]) -> None:
        """Takes over what any rank was asked for: all stop after the same step."""
        self.signal = next((one for one, asked in zip(_CAUGHT, votes, strict=True) if asked), None)


@contextmanager
def stop_requests(world: World) -> Iterator[StopRequest]:
    """Turns the first Ctrl-C or SIGTERM into a request; a second one ends the process.

    With several ranks a second SIGTERM does nothing: launchers send it more than once.
    """
    request = StopRequest()

    def ask(number: int, _frame: FrameType | None) -> None:
        if request.signal is not None:
            if time.monotonic() - request.came < _SAME_REQUEST_S or number == signal.SIGTERM:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        request.signal, request.came = signal.Signals(number), time.monotonic()
        if world.size == 1:
            for one in _CAUGHT:
                signal.signal(one, signal.SIG_DFL)
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of printing
            say(f"{request.signal.name}: saving after this step")

    try:
        before = {one: signal.signal(one, ask) for one in _CAUGHT}
    except ValueError:  # not the main thread: signals are the host program's affair
        yield request
        return
    try:
        yield request
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def save_is_asked(folder: Path) -> bool:
    """Whether a file named `save` lies in the run's folder; it is taken away."""
    try:
        (folder / SAVE_FILE).unlink()
    except FileNotFoundError:
        return False
    return True
