"""Starts fastft command lines from a warm process, on one rank or several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status (-9 after SIGKILL), its changes in the file system, what it said."""

    exit: int
    changes: int
    said: str


class Launcher:
    """`warm_launcher.py`, one command line at a time."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "said.txt"
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_launcher.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            text=True,
        )

    def start(self, argv: list[str], *, kill_at: int | None = None) -> int:
        """Starts a command line; returns its process id."""
        return self.start_ranks(argv, 1, kill_at=kill_at)[0]

    def start_ranks(
        self, argv: list[str], ranks: int, *, kill_at: int | None = None, fault: str | None = None
    ) -> list[int]:
        """Starts a command line on some ranks; returns their process ids."""
        request = {
            "argv": argv,
            "ranks": ranks,
            "kill_at": kill_at,
            "fault": fault,
            "log": str(self._log),
            "folder": str(self._log.parent),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        pids: list[int] = self._reply()["pids"]
        return pids

    def wait(self) -> Ended:
        """Waits until it has ended."""
        return self.wait_ranks()[0]

    def wait_ranks(self) -> list[Ended]:
        """Waits until all ranks have ended. Where one fails, the others are ended soon after, as launchers do."""
        ended = self._reply()["ended"]
        return [Ended(one["exit"], one["changes"], Path(one["log"]).read_text()) for one in ended]

    def run(self, argv: list[str], *, kill_at: int | None = None) -> Ended:
        """Runs a command line to its end."""
        self.start(argv, kill_at=kill_at)
        return self.wait()

    def run_ranks(self, argv: list[str], ranks: int, *, fault: str | None = None) -> list[Ended]:
        """Runs a command line to its end on some ranks."""
        self.start_ranks(argv, ranks, fault=fault)
        return self.wait_ranks()

    def close(self) -> None:
        """Ends the warm process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        values: dict[str, Any] = json.loads(self._process.stdout.readline())
        return values
