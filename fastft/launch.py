"""`fastft train` for launchers: `deepspeed --module fastft.launch`, `torchrun -m fastft.launch`, `srun python -m
fastft.launch`. A checkout's `launch/train.py` is the same.

Takes the options of `fastft train`, and `--local_rank`, which deepspeed passes on although LOCAL_RANK says it too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn


def main() -> NoReturn:
    """Runs the command line, and leaves with its exit status."""
    # Importing takes seconds. A scheduler that ends the job meanwhile ends nothing yet: it may start it again.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    from fastft.cli import main as command_line

    status = command_line(["train", *without_local_rank(sys.argv[1:])])
    # A launcher's late SIGTERM, or a thread of torch's that Python's end catches halfway, would make it another status.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The arguments but `--local_rank N` and `--local_rank=N`."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument.startswith(("--local_rank=", "--local-rank=")):
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        else:
            kept.append(argument)
    return kept


if __name__ == "__main__":
    main()
