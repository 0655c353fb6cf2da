"""What all parts of a run look at: what it is asked, what it trains on and with, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass

from fastft.common.console import say
from fastft.engines.engine import AnyEngine
from fastft.engines.zero import ZeroEngine
from fastft.model.part import numbers_of
from fastft.ranks.stopping import StopRequest
from fastft.ranks.watch import Watchdog
from fastft.ranks.world import World
from fastft.run.config import TrainOptions
from fastft.run.folder import Run
from fastft.training.checkpoint import Progress
from fastft.training.prepared import Prepared


@dataclass(frozen=True, slots=True)
class Job:
    """A run. While it trains, the engine's model and `progress` change, and nothing else.

    Attributes:
        run: where its files are.
        options: what is asked for.
        prepared: its data.
        engine: its model, and what trains it.
        watchdog: hears that there is progress.
        progress: how far it has come.
    """

    run: Run
    options: TrainOptions
    prepared: Prepared
    engine: AnyEngine
    watchdog: Watchdog
    progress: Progress

    @property
    def world(self) -> World:
        """The ranks that train together."""
        return self.engine.world

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, where its patience lasts."""
        return self.prepared.plan.total_steps

    @property
    def is_out_of_patience(self) -> bool:
        """Whether so many evaluations as `--patience` says were no better than the best one."""
        return 0 < self.options.patience <= self.progress.evaluations_since_best

    @property
    def is_over(self) -> bool:
        """Whether all steps are done that are to be done."""
        return self.is_out_of_patience or self.progress.step >= self.total_steps

    def leaves(self, stop: StopRequest) -> bool:
        """Whether a signal ends the run before its end."""
        return stop.signal is not None and not self.is_over

    def say_hello(self) -> None:
        """Says what is trained, on what, for how long."""
        engine, plan = self.engine, self.prepared.plan
        trains, has = numbers_of(engine.model.config, engine.model.part)
        parameters = f"{has:,}" if trains == has else f"{trains:,} of {has:,}"
        ranks = "" if self.world.size == 1 else f" on each of {self.world.size} ranks"
        zero = f", ZeRO stage {engine.stage}" if isinstance(engine, ZeroEngine) else ""
        say(
            f"{parameters} parameters on {engine.device}{ranks} in {engine.dtype}{zero}; "
            f"{len(self.prepared.train_set)} examples, {plan.total_steps} steps of {plan.batch_size}"
        )
