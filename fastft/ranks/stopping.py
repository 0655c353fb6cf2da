"""How a run is asked to stop, or to save: signals, and a file."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fastft.common.console import discard, say
from fastft.ranks.world import World

SAVE_FILE = "save"
_CAUGHT = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name))
"""Where ranks were asked by several, the first of them counts. A terminal that is closed sends SIGHUP."""
_HANGUP = getattr(signal, "SIGHUP", None)
_SAME_REQUEST_S = 5.0
"""A launcher passes a signal on to its ranks, which may have had it themselves: twice at once means once."""


@dataclass(slots=True)
class StopRequest:
    """A request to stop, on which the ranks agree at the end of each step.

    Attributes:
        asked: the signal that came to this rank. It says nothing to the loop before it was voted on: a rank that
            stopped by itself would leave the others waiting.
        came: when.
        signal: what any rank was asked for, the same on all.
    """

    asked: signal.Signals | None = None
    came: float = 0.0
    signal: signal.Signals | None = None

    def votes(self) -> list[float]:
        """What this rank was asked for, to be summed over the ranks."""
        return [float(self.asked == one) for one in _CAUGHT]

    def settle(self, votes: list[float]) -> None:
        """Takes over what any rank was asked for: all stop after the same step."""
        self.signal = next((one for one, asked in zip(_CAUGHT, votes, strict=True) if asked), None)
        if self.asked is None:  # a launcher's signal for all may still be on its way to this rank
            self.came = time.monotonic()


@contextmanager
def stop_requests(world: World) -> Iterator[StopRequest]:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request; a second one ends the process.

    With several ranks a second SIGTERM does nothing: launchers send it more than once. Nor does a second SIGHUP:
    a closed terminal and its shell both send one. Where SIGHUP is ignored, as under nohup, it stays so.
    """
    request = StopRequest()

    def ask(number: int, _frame: FrameType | None) -> None:
        if number == _HANGUP:
            for stream in terminals:  # they are gone, and an error of a write would cost the checkpoint
                discard(stream)
        if request.asked is not None or request.signal is not None:
            if number == _HANGUP:
                return
            if time.monotonic() - request.came < _SAME_REQUEST_S or number == signal.SIGTERM:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        request.asked, request.came = signal.Signals(number), time.monotonic()
        if world.size == 1:
            for one in caught:
                signal.signal(one, ask if one == _HANGUP else signal.SIG_DFL)
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of printing
            say(f"{request.asked.name}: saving after this step")

    terminals = [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]
    caught = [one for one in _CAUGHT if one != _HANGUP or signal.getsignal(one) != signal.SIG_IGN]
    try:
        before = {one: signal.signal(one, ask) for one in caught}
    except ValueError:  # not the main thread: signals are the host program's affair
        yield request
        return
    try:
        yield request
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def save_is_asked(folder: Path) -> bool:
    """Whether a file named `save` lies in the run's folder; it is taken away.

    What cannot be taken away, such as a folder of that name, asks for nothing: it would ask at every step.
    """
    try:
        (folder / SAVE_FILE).unlink()
    except OSError:
        return False
    return True
