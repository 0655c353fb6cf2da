"""Asking a server what is still open about some responses, on a few threads; each answer is kept as soon as it is
read."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fastft.common.console import say, warn
from fastft.common.errors import JudgeUnavailable
from fastft.judging.journal import Journal
from fastft.judging.questions import Question, Style
from fastft.judging.rows import Answers, Row
from fastft.judging.server import Health, Known, Server, keep_refusals
from fastft.judging.wire import NoAnswerError

_Results = queue.SimpleQueue[Row | BaseException | None]
"""What the threads say: a row that is done with, what broke it off, None at a thread's end."""


class Asking:
    """Asks about rows.

    Attributes:
        known: what is known of the server; None where it never was there.
        refusal: why the server takes no JSON schema, as it has said itself.
        failures: by the key of a row, why its last question has no answer.
    """

    def __init__(self, server: Server, journal: Journal, answers: Answers, *, style: Style, parallel: int) -> None:
        self._server = server
        self._journal = journal
        self._answers = answers
        self._style = style
        self._parallel = parallel
        self._health = Health(server)
        self.known: Known | None = None
        self.refusal: str | None = None
        self.failures: dict[str, NoAnswerError] = {}

    def next_question(self, row: Row) -> tuple[str, Question] | None:
        """What is still to be asked about a response, with its key."""
        if (unanswered := self._answers.unanswered(row.first)) is not None:
            return unanswered
        if self._answers.read(row.first).score is not None or not self._can_ask_again():
            return None
        return self._answers.unanswered(row.second)

    def _can_ask_again(self) -> bool:
        return self.refusal is None and self.known is not None and self.known.takes_schema

    def ask(self, todo: Sequence[Row], done: Callable[[Row], object]) -> str | None:
        """Asks about the rows, in order; the reason why it ended before the last one, or None.

        What is asked again with more room comes at the end: its context is a larger one, for which a server loads the
        model anew.

        Args:
            todo: the rows, each once.
            done: called with each row that nothing more is asked about.
        """
        problem = self._ask_with_one_context([row for row in todo if not self._needs_room(row)], done, wide=False)
        all_thinking = [row for row in todo if self._needs_room(row)]
        if problem is not None or not all_thinking:
            return problem
        say(f"{len(all_thinking)} replies were all thinking: they are asked for again with more room")
        return self._ask_with_one_context(all_thinking, done, wide=True)

    def _needs_room(self, row: Row) -> bool:
        """Whether the next question about a response has room for a trace."""
        open_question = self.next_question(row)
        return open_question is not None and open_question[1].wide and row.key not in self.failures

    def _ask_with_one_context(self, todo: Sequence[Row], done: Callable[[Row], object], *, wide: bool) -> str | None:
        if not todo:
            return None
        first = todo[0].first
        question = first.wide if wide and first.wide is not None else first.question
        try:
            self._health.load(question.num_ctx)
        except JudgeUnavailable as error:
            return str(error)
        return self._ask_in_threads(todo, done, wide=wide)

    def _ask_in_threads(self, todo: Sequence[Row], done: Callable[[Row], object], *, wide: bool) -> str | None:
        """Asks on threads of their own, which are left behind where a full disk or Ctrl-C breaks it off."""
        results: _Results = queue.SimpleQueue()
        rows = _Shared(todo)
        for _ in range(self._parallel):
            threading.Thread(target=self._ask_one_by_one, args=(rows, results, wide), daemon=True).start()
        problem: str | None = None
        working = self._parallel
        try:
            while working:
                result = results.get()
                if result is None:
                    working -= 1
                elif isinstance(result, Row):
                    if not self._needs_room(result):
                        done(result)
                elif isinstance(result, JudgeUnavailable):
                    problem = problem or str(result)
                    rows.close()  # the others' questions are under way: their answers are worth waiting for
                else:
                    raise result
        finally:
            rows.close()
        return problem

    def _ask_one_by_one(self, rows: _Shared, results: _Results, wide: bool) -> None:
        try:
            while (row := rows.next()) is not None:
                self._ask_about(row, wide=wide)
                results.put(row)
        except BaseException as error:  # raised again where it is waited for
            results.put(error)
        finally:
            results.put(None)

    def _ask_about(self, row: Row, *, wide: bool) -> None:
        """Asks what is open about one response, up to what needs a trace's room unless `wide`.

        Raises:
            JudgeUnavailable: the server has gone away, takes no schema where the style needs one, or fails too often.
        """
        self.failures.pop(row.key, None)
        while (open_question := self.next_question(row)) is not None:
            key, question = open_question
            if question.wide and not wide:
                return
            began = time.perf_counter()
            try:
                reply = self._server.ask(question)
                self._journal.keep(key, replace(reply, seconds=time.perf_counter() - began))
            except NoAnswerError as failure:
                if question.schema is not None and self._server.refuses_schema(failure):
                    self._refuse(failure)
                    continue
                self.failures[row.key] = failure
                self._health.failed(failure)
                return
            self._health.answered()
            if self.known is not None:
                self.known = keep_refusals(self._server, self._journal, self.known)

    def _refuse(self, failure: NoAnswerError) -> None:
        """The server takes no JSON schema: the book's question goes on without its re-ask, the other style cannot."""
        self.refusal = str(failure)
        if self._style == "reason":
            raise JudgeUnavailable(no_schema(self._server, str(failure)))
        warn(f"the judge takes no JSON schema ({failure}): replies without a score are not asked about again")


def no_schema(server: Server, why: str) -> str:
    """Why a server that takes no JSON schema is no judge of the style that needs one, in a line with the remedy."""
    return (
        f"{server.where} takes no JSON schema for {server.model} ({why}), which --judge_style reason "
        "needs: update the server, or use --judge_style book"
    )


class _Shared:
    """Rows that several threads take, until they are all taken or it is closed."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = iter(rows)
        self._lock = threading.Lock()

    def next(self) -> Row | None:
        with self._lock:
            return next(self._rows, None)

    def close(self) -> None:
        with self._lock:
            self._rows = iter(())
