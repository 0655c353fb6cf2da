"""The watchdog ends a run that hangs and says where it stood; a rank that is slower than the others is named."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forks import Ended, in_forks

from fastft.common.errors import EXIT_FAILED
from fastft.ranks import watch
from fastft.ranks.watch import LOOK_EVERY, SLOWER, Stragglers, Watchdog, probe_seconds
from fastft.ranks.world import ALONE, World

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks of this process")

CPU = torch.device("cpu")
SECONDS = 0.5
"""Without progress, after which a watchdog bites here."""
GRACE_S = 2.0
LONG_S = 30.0
"""A hang that nobody ends: no test waits so long."""


def waiting_for_a_rank_that_does_not_come() -> None:
    time.sleep(LONG_S)


def hanging(
    rank: int, ranks: int, folder: Path, *, beats: bool = True, after_s: float = 0.0, mute: bool = False
) -> Callable[[], object]:
    """A rank that hangs in the second batch of a step, or before its first one; to one that is mute nobody listens."""

    def run() -> object:
        watch._GRACE_S = GRACE_S
        time.sleep(after_s)
        if mute:
            listener, pipe = os.pipe()
            os.close(listener)
            os.dup2(pipe, 2)
        with Watchdog(World(rank, ranks), folder, SECONDS).watching() as watchdog:
            for doing in ("step 3, batch 1 of 2", "step 3, batch 2 of 2") if beats else ():
                watchdog.beat(doing)
            waiting_for_a_rank_that_does_not_come()
        return "not ended"

    return run


def working(folder: Path, *, beats: bool) -> Callable[[], object]:
    """A rank whose steps take longer in all than its watchdog's patience, each of them less."""

    def run() -> object:
        watch._GRACE_S = 0.0
        with Watchdog(World(0, 2), folder, 2.0).watching() as watchdog:
            for _ in range(30):
                if beats:
                    watchdog.beat("a step")
                time.sleep(0.1)
        return "done"

    return run


@dataclass(frozen=True)
class Hung:
    """How the ranks of `hung` ended, and their folders."""

    folders: dict[str, Path]
    ended: dict[str, Ended]


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> Hung:
    """Ranks that hang, all at the same time, as each of them takes seconds of waiting."""
    folders = {
        name: tmp_path_factory.mktemp("hangs")
        for name in ("alone", "together", "stale", "early", "alive", "lazy", "apart", "mute")
    }
    folders |= {"new": folders["alone"] / "new", "unwritable": folders["early"] / "file" / "hangs"}
    folders["unwritable"].parent.write_text("")
    (folders["stale"] / "rank-1.txt").write_text("of an earlier run")
    (folders["stale"] / "other.txt").write_text("not a watchdog's")
    acts = {
        "alone": hanging(0, 4, folders["new"]),
        "first of two": hanging(0, 2, folders["together"]),
        "second of two": hanging(1, 2, folders["together"]),
        "stale": hanging(0, 2, folders["stale"]),
        "unwritable": hanging(0, 2, folders["unwritable"]),
        "early": hanging(1, 2, folders["early"], beats=False),
        "mute": hanging(0, 2, folders["mute"], mute=True),
        "first, early": hanging(0, 2, folders["apart"]),
        "second, late": hanging(1, 2, folders["apart"], after_s=0.6 * GRACE_S),
        "alive": working(folders["alive"], beats=True),
        "lazy": working(folders["lazy"], beats=False),
    }
    return Hung(folders, dict(zip(acts, in_forks(*acts.values()), strict=True)))


def check_hang(ended: Ended, folder: Path, rank: int) -> None:
    """The rank has ended with where it stood in its file and on standard error."""
    assert (ended.exit, ended.gave) == (EXIT_FAILED, None)
    for text in (ended.said, (folder / f"rank-{rank}.txt").read_text()):
        assert f"rank {rank} has not got on for {SECONDS:g} s; it was in: step 3, batch 2 of 2\n" in text
        assert "batch 1 of 2" not in text
        assert "in waiting_for_a_rank_that_does_not_come\n" in text  # the main thread's stack
        assert f'File "{__file__}", line ' in text


def error_lines(ended: Ended) -> list[str]:
    return [line for line in ended.said.splitlines() if line.startswith("error:")]


def test_a_rank_that_hangs_alone_names_those_that_say_nothing(hung: Hung) -> None:
    ended, folder = hung.ended["alone"], hung.folders["new"]
    check_hang(ended, folder, 0)
    expected = (
        "error: the run hangs; nothing from rank 1, 2, 3: stopped, or gone with its machine; the stacks are in "
        f"{folder}; go on with --resume"
    )
    assert error_lines(ended) == ended.said.splitlines()[-1:] == [expected]


def test_ranks_that_hang_together_all_say_where_they_stand(hung: Hung) -> None:
    first, second, folder = hung.ended["first of two"], hung.ended["second of two"], hung.folders["together"]
    check_hang(first, folder, 0)
    check_hang(second, folder, 1)
    assert error_lines(first) == [f"error: the run hangs; the stacks are in {folder}; go on with --resume"]
    assert error_lines(second) == []  # the first one speaks for all


def test_the_first_waits_for_a_rank_whose_last_beat_was_later(hung: Hung) -> None:
    """As after an unequal batch: it hangs too, and is not gone."""
    first, second, folder = hung.ended["first, early"], hung.ended["second, late"], hung.folders["apart"]
    check_hang(first, folder, 0)
    check_hang(second, folder, 1)
    assert error_lines(first) == [f"error: the run hangs; the stacks are in {folder}; go on with --resume"]


def test_a_rank_that_nobody_listens_to_ends_all_the_same(hung: Hung) -> None:
    assert hung.ended["mute"].exit == EXIT_FAILED
    assert "it was in: step 3" in (hung.folders["mute"] / "rank-0.txt").read_text()


def test_what_an_earlier_hang_has_left_does_not_speak_for_a_rank(hung: Hung) -> None:
    assert "nothing from rank 1: stopped" in error_lines(hung.ended["stale"])[0]
    assert sorted(path.name for path in hung.folders["stale"].iterdir()) == ["other.txt", "rank-0.txt"]


def test_a_folder_that_cannot_be_written_does_not_keep_a_run_hanging(hung: Hung) -> None:
    ended = hung.ended["unwritable"]
    assert (ended.exit, ended.gave) == (EXIT_FAILED, None)
    assert "in waiting_for_a_rank_that_does_not_come\n" in ended.said
    assert len(error_lines(ended)) == 1


def test_a_hang_before_the_first_beat_is_noticed(hung: Hung) -> None:
    assert hung.ended["early"].exit == EXIT_FAILED
    assert "it was in: starting\n" in (hung.folders["early"] / "rank-1.txt").read_text()


def test_beats_keep_a_run_alive(hung: Hung) -> None:
    alive, lazy = hung.ended["alive"], hung.ended["lazy"]
    assert (alive.exit, alive.gave, alive.said) == (0, "done", "")
    assert list(hung.folders["alive"].iterdir()) == []
    assert (lazy.exit, lazy.gave) == (EXIT_FAILED, None)


def watchdogs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "watchdog"]


@pytest.mark.parametrize(("world", "seconds"), [(ALONE, 0.01), (World(0, 2), 0.0)], ids=["one rank", "0 seconds"])
def test_where_nobody_is_to_be_watched_nobody_watches(world: World, seconds: float, tmp_path: Path) -> None:
    (tmp_path / "rank-1.txt").write_text("of an earlier run")
    with Watchdog(world, tmp_path, seconds).watching() as watchdog:
        watchdog.beat("a step")
        assert watchdogs() == []
        time.sleep(5 * seconds)
    assert [path.name for path in tmp_path.iterdir()] == ["rank-1.txt"]


def test_after_the_block_nobody_is_watched(tmp_path: Path) -> None:
    with Watchdog(World(0, 2), tmp_path, LONG_S).watching():
        assert len(watchdogs()) == 1
    assert watchdogs() == []
    with pytest.raises(ZeroDivisionError), Watchdog(World(0, 2), tmp_path, LONG_S).watching():
        raise ZeroDivisionError
    assert watchdogs() == []


@dataclass(frozen=True)
class Told(World):
    """A rank that hears what the others have measured: their products' times and those of building batches."""

    others: list[tuple[float, float]] = field(default_factory=list)
    heard: list[object] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.heard.append(value)
        return [*self.others[: self.rank], value, *self.others[self.rank :]]


EVEN = (1.0, 0.1)


class Run:
    """A rank of three, of which the two others measure what is set."""

    def __init__(self, others: list[tuple[float, float]], mine: tuple[float, float] = EVEN, rank: int = 0) -> None:
        self.world = Told(rank, 3, rank, 3, others)
        self.mine = mine
        self.stragglers = Stragglers(self.world, CPU, probe=lambda _: self.mine[0])
        self.step = 0

    def look(self, *, step_seconds: float = 1.0) -> list[str]:
        """Runs to the next look."""
        lines = []
        for _ in range(LOOK_EVERY):
            self.step += 1
            self.stragglers.built(self.mine[1])
            lines += self.stragglers.look(self.step, step_seconds)
            if self.step % LOOK_EVERY:
                assert lines == []
        return lines

    def set(self, *others: tuple[float, float]) -> None:
        self.world.others[:] = others


PRODUCTS = "the same matrix products"
BATCHES = "building its batches"


def test_a_slow_rank_is_named_at_the_second_look() -> None:
    run = Run([(2.0, 0.1), EVEN])
    assert run.look() == []
    expected = f"rank 1 takes 2.0 times as long as the fastest for {PRODUCTS}"
    assert run.look() == [expected]
    assert run.look() == [expected]


def test_it_is_the_average_of_the_steps_since_the_last_look_that_is_told() -> None:
    run = Run([EVEN, EVEN])
    run.look()
    run.mine = (3.0, 0.5)
    run.look()
    assert run.world.heard == [pytest.approx((1.0, 0.1)), pytest.approx((3.0, 0.5))]


def test_every_rank_names_the_same() -> None:
    measured = [(1.0, 0.1), (1.1, 0.4), (3.0, 0.1)]
    for rank in range(3):
        run = Run([one for at, one in enumerate(measured) if at != rank], measured[rank], rank)
        run.look()
        assert run.look() == [
            f"rank 2 takes 3.0 times as long as the fastest for {PRODUCTS}",
            f"rank 1 takes 4.0 times as long as the fastest for {BATCHES}",
        ]


def test_one_slow_look_is_forgotten() -> None:
    slow = [(2.0, 0.1), EVEN]
    run = Run([*slow])
    assert run.look() == []
    run.set(EVEN, EVEN)
    assert run.look() == []
    run.set(*slow)
    assert run.look() == []
    run.set(*reversed(slow))  # another rank
    assert run.look() == []
    run.set(EVEN, (1.0, 0.3))  # the same rank, by something else
    assert run.look() == []
    assert run.look() == [f"rank 2 takes 3.0 times as long as the fastest for {BATCHES}"]


def test_a_rank_that_turns_slow_is_named_beside_one_that_has_been_all_along() -> None:
    run = Run([(2.0, 0.1), EVEN])
    run.look()
    assert len(run.look()) == 1
    run.set((2.0, 0.1), (3.0, 0.1))
    assert [line.partition(" takes ")[0] for line in run.look()] == ["rank 1"]
    assert [line.partition(" takes ")[0] for line in run.look()] == ["rank 1", "rank 2"]


@pytest.mark.parametrize(("seconds", "named"), [(1.0, False), (SLOWER - 0.01, False), (SLOWER + 0.01, True)])
def test_a_rank_is_slow_from_a_limit_on(seconds: float, named: bool) -> None:
    run = Run([(seconds, 0.1), EVEN])
    run.look()
    assert bool(run.look()) == named


@pytest.mark.parametrize(("step_seconds", "named"), [(1.0, True), (3.9, True), (4.1, False), (100.0, False)])
def test_batches_that_hold_nobody_up_are_not_spoken_of(step_seconds: float, named: bool) -> None:
    """0.2 s more for building a step's batches, and a step takes so many seconds: less than a twentieth is nothing."""
    run = Run([(1.0, 0.3), EVEN])
    run.look(step_seconds=step_seconds)
    assert run.look(step_seconds=step_seconds) == (
        [f"rank 1 takes 3.0 times as long as the fastest for {BATCHES}"] if named else []
    )


def test_one_rank_alone_is_never_slow() -> None:
    def measured(device: torch.device) -> float:
        raise AssertionError

    stragglers = Stragglers(ALONE, CPU, probe=measured)
    assert [stragglers.look(step, 1.0) for step in range(1, 3 * LOOK_EVERY)] == [[]] * (3 * LOOK_EVERY - 1)


def test_the_probe_is_the_least_of_some_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what disturbs one of them counts for nothing."""
    assert 0 < probe_seconds(CPU, repeats=2) < LONG_S
    clock = iter([0.0, 9.0, 10.0, 10.25, 20.0, 21.0])
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert probe_seconds(CPU, repeats=3) == 0.25


def test_building_times_that_nobody_looks_at_are_not_kept() -> None:
    alone = Stragglers(World(), torch.device("cpu"))
    for step in range(100):
        alone.built(0.1)
        assert alone.look(step, 1.0) == []
    assert alone._building == []
