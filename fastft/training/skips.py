"""Steps whose update is skipped, since their loss or gradient is not finite: how many of them a run takes."""

from __future__ import annotations

from typing import Any

from fastft.common.errors import TrainingError
from fastft.data.encode import name_rows
from fastft.training.job import Job


class Skips:
    """The limit of skipped steps."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._last_straw: dict[str, Any] | None = None
        """The line of the step with which too many were skipped."""

    def are_too_many(self, line: dict[str, Any]) -> bool:
        """Whether too many steps were skipped, that of this line among them."""
        if self._last_straw is None and line.get("skipped") and not line["rescaled"]:
            self._last_straw = line if self._job.progress.skipped > self._job.options.max_skipped else None
        return self._last_straw is not None

    def error(self) -> TrainingError | None:
        """What ends the run on all ranks, where too many were skipped."""
        if self._last_straw is None:
            return None
        skipped, allowed = self._job.progress.skipped, self._job.options.max_skipped
        error = TrainingError(
            f"{why_skipped(self._last_straw)}; that was skipped step {skipped}, --max_skipped allows {allowed}; look "
            "at these rows, lower --lr or use --dtype fp32. A checkpoint is saved"
        )
        error.common = True
        return error


def why_skipped(line: dict[str, Any]) -> str:
    """What a skipped step's line says, in words."""
    found = f"loss {line['loss']} and gradient norm {line['grad_norm']}"
    rows = name_rows(line["rows"], most=len(line["rows"]))
    return f"step {line['step']} has {found}: its update is skipped ({rows})"
