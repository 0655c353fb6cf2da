"""Requests to stop or to save: by signals, which several ranks agree on, and by a file."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import in_fork
from hypothesis import given
from hypothesis import strategies as st

from fastft.common.console import console
from fastft.ranks import stopping
from fastft.ranks.stopping import SAVE_FILE, StopRequest, save_is_asked, stop_requests
from fastft.ranks.world import ALONE, World

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals are sent to forks of this process")

TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
SEVERAL = World(1, 2)


@given(st.lists(st.sampled_from([None, TERM, HUP, INT]), min_size=1, max_size=5))
def test_all_ranks_settle_on_what_any_was_asked_for(asked: list[signal.Signals | None]) -> None:
    """A scheduler's SIGTERM goes before somebody's Ctrl-C: its exit status is that of a run to be queued again."""
    ranks = [StopRequest(asked=one) for one in asked]
    votes = [sum(column) for column in zip(*(rank.votes() for rank in ranks), strict=True)]
    for rank in ranks:
        rank.settle(votes)
    expected = next((one for one in (TERM, HUP, INT) if one in asked), None)
    assert [rank.signal for rank in ranks] == [expected] * len(ranks)


def test_nobody_asks_at_first() -> None:
    assert StopRequest().votes() == [0.0, 0.0, 0.0]
    assert StopRequest().signal is None


def asked(request: StopRequest) -> signal.Signals | None:
    """What a rank would stop for, if it were alone."""
    request.settle(request.votes())
    return request.signal


def after(*signals: signal.Signals, world: World = ALONE) -> Callable[[], object]:
    """What a process has been asked for after some signals."""

    def run() -> object:
        with stop_requests(world) as request:
            for one in signals:
                signal.raise_signal(one)
            return asked(request)

    return run


@pytest.mark.parametrize("world", [ALONE, SEVERAL], ids=["one rank", "several"])
@pytest.mark.parametrize("first", [TERM, INT, HUP])
def test_a_first_signal_is_a_request(first: signal.Signals, world: World) -> None:
    ended = in_fork(after(first, world=world))
    assert (ended.exit, ended.gave) == (0, first)
    assert ended.said == f"{first.name}: saving after this step\n"


@pytest.mark.parametrize("second", [TERM, INT])
@pytest.mark.parametrize("first", [TERM, INT])
def test_a_second_signal_ends_a_process_of_its_own(first: signal.Signals, second: signal.Signals) -> None:
    ended = in_fork(after(first, second))
    assert (ended.exit, ended.gave) == (-second, None)
    assert ended.said == f"{first.name}: saving after this step\n"


@pytest.mark.parametrize("second", [TERM, INT])
@pytest.mark.parametrize("first", [TERM, INT])
def test_a_second_signal_at_once_is_the_launchers_to_one_of_several(
    first: signal.Signals, second: signal.Signals
) -> None:
    ended = in_fork(after(first, second, second, world=SEVERAL))
    assert (ended.exit, ended.gave) == (0, first)
    assert ended.said == f"{first.name}: saving after this step\n"


@pytest.mark.parametrize("first", [TERM, INT])
def test_later_a_second_ctrl_c_ends_one_of_several_and_a_second_sigterm_does_not(
    first: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_SAME_REQUEST_S", 0.0)
    again = in_fork(after(first, TERM, TERM, world=SEVERAL))
    assert (again.exit, again.gave) == (0, first)
    insisted = in_fork(after(first, INT, world=SEVERAL))
    assert (insisted.exit, insisted.gave) == (-INT, None)


@pytest.mark.parametrize("first", [TERM, INT, HUP])
def test_a_closed_terminal_and_its_shell_hang_up_twice_which_ends_nothing(first: signal.Signals) -> None:
    """But whoever insists by another signal is obeyed."""
    ended = in_fork(after(first, HUP, HUP))
    assert (ended.exit, ended.gave) == (0, first)
    assert in_fork(after(HUP, TERM)).exit == -TERM


def test_a_hangup_that_is_ignored_stays_so() -> None:
    def run() -> object:
        signal.signal(HUP, signal.SIG_IGN)  # as nohup has it
        return after(HUP)(), signal.getsignal(HUP) == signal.SIG_IGN

    assert in_fork(run).gave == (None, True)


def test_nothing_is_written_to_a_terminal_that_has_gone() -> None:
    """A write to it is an error, which would cost the checkpoint that is to be saved."""

    def run() -> object:
        os.setsid()
        master, slave = os.openpty()
        os.dup2(slave, 2)
        os.close(slave)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        signal.signal(HUP, signal.SIG_DFL)
        with stop_requests(ALONE) as request:
            os.close(master)
            if tells:
                signal.raise_signal(HUP)
            print("saved", file=sys.stderr)
            return asked(request)

    tells = True
    assert in_fork(run).gave == HUP
    tells = False
    assert isinstance(in_fork(run).gave, OSError)  # which the test must be able to see


def test_a_request_of_another_rank_is_taken_over() -> None:
    def run() -> object:
        with stop_requests(SEVERAL) as request:
            before = request.votes()
            request.settle([1.0, 0.0, 0.0])
            return before, request.signal

    assert in_fork(run).gave == ([0.0, 0.0, 0.0], TERM)


def test_a_signal_is_kept_for_the_next_vote_when_it_comes_too_late_for_this_one() -> None:
    """While the votes are summed, or while a checkpoint is saved: no rank stops by itself, and none forgets it."""

    def run() -> object:
        with stop_requests(SEVERAL) as request:
            votes = request.votes()
            signal.raise_signal(TERM)
            request.settle(votes)
            found = [request.signal]
            request.settle(request.votes())
            return [*found, request.signal]

    assert in_fork(run).gave == [None, TERM]


def test_a_signal_alone_stops_no_rank_before_the_vote() -> None:
    def run() -> object:
        with stop_requests(SEVERAL) as request:
            signal.raise_signal(TERM)
            return request.signal

    assert in_fork(run).gave is None


def test_a_ctrl_c_that_reaches_a_rank_after_the_vote_is_the_same_one() -> None:
    """A terminal sends it to all ranks, and another one has voted before."""

    def run() -> object:
        with stop_requests(SEVERAL) as request:
            request.settle([0.0, 0.0, 1.0])
            signal.raise_signal(INT)
            return request.signal

    ended = in_fork(run)
    assert (ended.exit, ended.gave, ended.said) == (0, INT, "")


def test_ranks_that_are_silenced_stop_without_a_word() -> None:
    def run() -> object:
        console.quiet = True
        return after(TERM, world=SEVERAL)()

    ended = in_fork(run)
    assert (ended.gave, ended.said) == (TERM, "")


def test_after_the_block_signals_do_what_they_did_before() -> None:
    def run() -> object:
        signal.signal(TERM, before)
        signal.signal(INT, signal.default_int_handler)  # a shell's background job ignores it
        with stop_requests(ALONE) as request:
            inside = signal.getsignal(TERM) is not before, signal.getsignal(INT) is not signal.default_int_handler
        try:
            with stop_requests(ALONE):
                signal.raise_signal(TERM)
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        restored = signal.getsignal(TERM) is before, signal.getsignal(INT) is signal.default_int_handler
        signal.raise_signal(TERM)
        return inside, restored, heard, asked(request)

    def before(number: int, frame: object) -> None:
        heard.append(number)

    heard: list[int] = []
    assert in_fork(run).gave == ((True, True), (True, True), [TERM], None)


def test_in_a_thread_signals_are_the_host_programs_affair() -> None:
    """Python sets handlers in the main thread alone; training goes on without."""
    found: list[object] = []

    def run() -> None:
        with stop_requests(ALONE) as request:
            found.append((signal.getsignal(TERM), request.signal))

    before = signal.getsignal(TERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(before, None)]


def test_a_file_named_save_asks_once(tmp_path: Path) -> None:
    assert SAVE_FILE == "save"  # which --whole_every's help promises
    assert not save_is_asked(tmp_path)
    (tmp_path / "saved").touch()
    assert not save_is_asked(tmp_path)
    (tmp_path / "save").write_text("now, please")
    assert save_is_asked(tmp_path)
    assert not save_is_asked(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "save").mkdir()
    assert not save_is_asked(tmp_path)
    assert not save_is_asked(tmp_path / "not there")
