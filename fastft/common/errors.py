"""The errors that a user meets, and the exit status that each one means."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_NO_JUDGE = 3


class FastftError(Exception):
    """An error with a message made for the user: one line, printed without a traceback."""

    exit_status = EXIT_FAILED
    common = False
    """Raised on all ranks of a run, of which one is enough to say it."""


class UserError(FastftError, ValueError):
    """The user's mistake: an option, a file, a record. The message says what was got, what was expected, the remedy."""

    exit_status = EXIT_USER_ERROR


class TrainingError(FastftError):
    """Training cannot go on for a reason of its own, such as too many non-finite steps."""


class LostRank(FastftError):
    """Another rank of the run has gone away."""


class JudgeUnavailable(FastftError):
    """`--require_judge` was given and no usable judge answered."""

    exit_status = EXIT_NO_JUDGE
