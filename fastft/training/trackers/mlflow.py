"""MLflow: the server or database of MLFLOW_TRACKING_URI, or MLflow's own choice where there is none."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from fastft.training.trackers.figures import Point
from fastft.training.trackers.tracker import PROJECT, End, Start

_STATUS: dict[End, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_METRICS_A_CALL = 1000
_PARAMETERS_A_CALL = 100
"""What MLflow's server takes at once."""


class MLflow:
    """A run of MLflow's."""

    forgets: ClassVar[bool] = False

    def __init__(self, start: Start) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        self._client: Any = mlflow.MlflowClient()
        self._metric: Any = Metric
        if start.id is None:
            self.id = self._begun(start)
            # A parameter of MLflow's never changes: of a run that is resumed with others, these are the first ones.
            parameters = [Param(name, str(value)) for name, value in start.config.items()]
            for some in _cut(parameters, _PARAMETERS_A_CALL):
                self._client.log_batch(self.id, params=some)
        else:
            self.id = start.id
            self._client.update_run(self.id, status="RUNNING")
        self.place = f"run {self.id} in {mlflow.get_tracking_uri()}"

    def _begun(self, start: Start) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        known = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        return str(self._client.create_run(known, run_name=start.name).info.run_id)

    def log(self, points: Sequence[Point]) -> None:
        """Takes figures."""
        now = int(time.time() * 1000)
        metrics = [
            self._metric(name, value, now, step) for step, _, figures in points for name, value in figures.items()
        ]
        for some in _cut(metrics, _METRICS_A_CALL):
            self._client.log_batch(self.id, metrics=some)

    def close(self, end: End) -> None:
        """Says how the run ended."""
        self._client.set_terminated(self.id, status=_STATUS[end])


def _cut(things: list[Any], most: int) -> Iterator[list[Any]]:
    return (things[begin : begin + most] for begin in range(0, len(things), most))
