"""Where a run's metrics go: `metrics.jsonl`, and TensorBoard where asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastft.common.errors import UserError
from fastft.run.folder import Run
from fastft.run.metrics_file import MetricsFile


class Log:
    """The open files of a run's metrics."""

    def __init__(self, metrics: MetricsFile, board: Any | None) -> None:
        self._metrics = metrics
        self._board = board

    def append(self, line: dict[str, Any]) -> None:
        """Writes one line; its numbers go to TensorBoard too."""
        self._metrics.append(line)
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, line["step"])


@contextmanager
def writers(run: Run, metrics: MetricsFile, *, tensorboard: bool) -> Iterator[Log]:
    """The log of a run; closed at the block's end."""
    board = summary_writer()(str(run.folder / "tensorboard")) if tensorboard else None
    try:
        yield Log(metrics, board)
    finally:
        metrics.close()
        if board is not None:
            board.close()


def summary_writer() -> Any:
    """TensorBoard's writer.

    Raises:
        UserError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package: pip install tensorboard") from error
    return SummaryWriter
