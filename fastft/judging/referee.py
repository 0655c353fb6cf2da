"""A judge's server as the referee between two runs' responses: every reply is kept, and none is asked for twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastft.common.errors import JudgeUnavailable
from fastft.judging.journal import Journal, Reply
from fastft.judging.pairwise import ORDERS, NoVerdict, Pair, RefereeGone, Said, prompt_of
from fastft.judging.questions import Question, fitted, token_bound, wider
from fastft.judging.server import (
    Health,
    Known,
    Server,
    all_thought,
    is_cut,
    keep_refusals,
    look_at,
    question_key,
    who,
)
from fastft.judging.wire import NoAnswerError

_ROOM = 128
"""The most tokens of a verdict."""


class ServerReferee:
    """Compares pairs of responses; `fastft.judging.pairwise.Referee`.

    Attributes:
        problem: why the server cannot be used, in one line that ends with the remedy, or None. What was answered
            before holds all the same.
    """

    def __init__(self, server: Server, journal: Journal, wide_room: int = 4096) -> None:
        """The referee behind a server.

        Args:
            server: who is asked.
            journal: the replies that were read before, and those to come.
            wide_room: the most tokens of a reply that is asked for again because it was all thinking.
        """
        self.problem: str | None = None
        self._wide_room = wide_room
        self._server = server
        self._journal = journal
        self._health = Health(server)
        self._known: Known | None = None
        self._needed = 0
        self._loaded_with: int | None = None
        self._takes_schema = True

    def find(self, pairs: Sequence[Pair], before: Callable[[], object]) -> bool:
        """Looks at the server; one context for all questions about the pairs.

        Args:
            pairs: what it is going to be asked about.
            before: what is done before that, such as pulling the model; it may raise JudgeUnavailable.

        Returns:
            Whether anything is known of the judge, now or from an earlier time: without it no reply can be found.
        """
        self._known, self.problem = look_at(self._server, self._journal, before)
        if self._known is None:
            return False
        self._needed = token_bound([prompt_of(pair, order) for pair in pairs for order in ORDERS])
        self._takes_schema = self._known.takes_schema
        return True

    def identity(self) -> dict[str, Any]:
        """What the replies depend on, as it is recorded."""
        length = None if self._known is None else self._known.context_length
        return who(self._server, self._known, fitted(Question("", _ROOM), self._needed, length))

    def ask(self, prompt: str, schema: Mapping[str, Any] | None = None) -> Said | None:
        """The reply, from the journal where it is there."""
        if self._known is None:
            raise RefereeGone(self.problem or "no judge")
        length = self._known.context_length
        question = fitted(Question(prompt, _ROOM, schema), self._needed, length)
        reply = self._reply(question)
        if reply is None:
            return None
        if (nothing := all_thought(reply, question)) is not None:
            wide = wider(question, self._wide_room, self._needed, length)
            again = None if wide is None else self._reply(wide)
            if wide is not None and again is not None:
                question, reply, nothing = wide, again, all_thought(again, wide)
        ended = reply.finish != "length"
        return Said(reply.content, ended=ended, cut=is_cut(self._server, question, reply), nothing=nothing)

    def _reply(self, question: Question) -> Reply | None:
        """The reply to a question, asked for where the journal has none; None where the server takes no schema."""
        assert self._known is not None, "found before it is asked"
        key = question_key(self._server, self._known, question)
        reply = self._journal.reply(key)
        if reply is None:
            reply = None if question.schema is not None and not self._takes_schema else self._asked(question)
            if reply is not None:
                self._journal.keep(key, reply)
                self._known = keep_refusals(self._server, self._journal, self._known)
        return reply

    def _asked(self, question: Question) -> Reply | None:
        """The server's reply; None where it takes no schema."""
        try:
            self._load(question.num_ctx)
            began = time.perf_counter()
            try:
                reply = self._server.ask(question)
            except NoAnswerError as failure:
                if question.schema is not None and self._server.refuses_schema(failure):
                    self._takes_schema = False
                    return None
                self._health.failed(failure)
                raise NoVerdict(str(failure)) from failure
        except JudgeUnavailable as error:
            self.problem = str(error)
            raise RefereeGone(self.problem) from error
        self._health.answered()
        return replace(reply, seconds=time.perf_counter() - began)

    def _load(self, num_ctx: int) -> None:
        if self.problem is not None:
            raise JudgeUnavailable(self.problem)
        if self._loaded_with != num_ctx:
            self._health.load(num_ctx)
            self._loaded_with = num_ctx
