"""What the judge asks of a server, whatever its protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from fastft.common.errors import JudgeUnavailable
from fastft.judging.journal import Journal, Reply
from fastft.judging.questions import Question
from fastft.judging.thoughts import spoken
from fastft.judging.wire import NoAnswerError

_MOST_FAILURES_IN_A_ROW = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a server says of its judge, and what stays true of the answers while it is away."""

    identity: str
    """Equal identities give the same answers: the model's digest, where the server has one."""
    digest: str | None = None
    version: str | None = None
    """The server's."""
    context_length: int | None = None
    """The most tokens of a prompt and its reply, where the server says so."""
    takes_schema: bool = True
    """Whether a reply can be held to a JSON schema."""
    refused: tuple[str, ...] = ()
    """Parameters that its answers were asked for without, since the server takes them not."""

    def as_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return {**asdict(self), "refused": list(self.refused)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> Known | None:
        """What `as_json` gave; None where it is not there, or of another version."""
        fits = value is not None and isinstance(value.get("identity"), str) and set(value) == set(cls.__slots__)
        return cls(**{**value, "refused": tuple(value["refused"])}) if fits and value is not None else None


class Server(Protocol):
    """A language model behind an address."""

    name: str
    """`ollama` or `openai`."""
    model: str
    where: str
    """The address, without a password."""

    @property
    def remembered_as(self) -> str:
        """The name of what is known of the judge, for when its server is away."""

    def check(self) -> Known:
        """Makes sure that the server answers and has the model.

        Raises:
            JudgeUnavailable: it does not; the message is one line that ends with the remedy.
        """

    def warm_up(self, num_ctx: int) -> None:
        """Has the model loaded, where the first question would wait for it.

        Raises:
            NoAnswerError: it cannot be.
        """

    def payload(self, question: Question) -> dict[str, Any]:
        """The request's body."""

    def options(self, question: Question) -> Mapping[str, Any]:
        """What of the payload is no message: as it is recorded."""

    def ask(self, question: Question) -> Reply:
        """The whole answer to one request.

        Raises:
            NoAnswerError: none was read, after every try.
        """

    def refuses_schema(self, failure: Exception) -> bool:
        """Whether a request with a schema failed because of the schema."""

    @property
    def refused(self) -> tuple[str, ...]:
        """Parameters that the server takes not, so that it is asked without them."""

    def leave_out(self, names: Sequence[str]) -> None:
        """Asks without parameters that were refused in an earlier call."""


def look_at(server: Server, journal: Journal, before: Callable[[], object]) -> tuple[Known | None, str | None]:
    """What is known of the judge: by its server, else by the journal, from the last time that it was there.

    Args:
        server: who is looked at.
        journal: remembers what is found.
        before: what is done before that, such as pulling the model; it may raise JudgeUnavailable.

    Returns:
        What is known, or None; and why the server cannot be used now, or None.
    """
    earlier = Known.from_json(journal.judge(server.remembered_as))
    known, why_not = earlier, None
    try:
        before()
        known = server.check()
    except JudgeUnavailable as error:
        why_not = str(error)
    if known is not None and earlier is not None and earlier.identity == known.identity:
        server.leave_out(earlier.refused)
        known = replace(known, refused=earlier.refused)
    if known is not None and why_not is None:
        journal.keep_judge(server.remembered_as, known.as_json())
    return known, why_not


def keep_refusals(server: Server, journal: Journal, known: Known) -> Known:
    """What is known of the judge with what its server has refused since, which the journal remembers too."""
    if set(server.refused) == set(known.refused):
        return known
    known = replace(known, refused=server.refused)
    journal.keep_judge(server.remembered_as, known.as_json())
    return known


def question_key(server: Server, known: Known, question: Question) -> str:
    """SHA-256 (hex) of the judge's identity and all that it is sent: equal keys are the same question."""
    payload = {name: value for name, value in server.payload(question).items() if name != "model"}
    return hashlib.sha256(json.dumps([known.identity, payload], sort_keys=True).encode("ascii")).hexdigest()


def who(server: Server, known: Known | None, question: Question) -> dict[str, Any]:
    """Who was asked, and with which options, as it is recorded."""
    return {
        "name": server.name,
        "model": server.model,
        "digest": None if known is None else known.digest,
        "version": None if known is None else known.version,
        "url": server.where,
        "options": dict(server.options(question)),
    }


def is_cut(server: Server, question: Question, reply: Reply | None) -> bool:
    """Whether the prompt and the reply's room fill the context: a longer prompt loses its front, silently."""
    if reply is None:
        return False
    num_ctx = server.options(question).get("num_ctx")
    return num_ctx is not None and (reply.prompt_tokens or 0) + question.room >= num_ctx


def all_thought(reply: Reply, question: Question) -> str | None:
    """Why a reply of a reasoning model is no answer: it holds a trace alone, or nothing at all in all its tokens."""
    said = spoken(reply.content)
    thought = bool(reply.thinking.strip()) or said.thought or not said.ended
    if said.text or not (thought or reply.finish == "length"):
        return None
    if reply.finish == "length":
        return f"{'its thinking' if thought else 'what it keeps to itself'} took all {question.room} tokens"
    return "it gave its thinking and no answer"


class Health:
    """How a server fares while it is asked: one failed request is bad luck, more are a reason to end the asking."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._failed_in_a_row = 0

    def load(self, num_ctx: int) -> None:
        """Has the model loaded.

        Raises:
            JudgeUnavailable: it cannot be.
        """
        try:
            self._server.warm_up(num_ctx)
        except NoAnswerError as failure:
            raise JudgeUnavailable(
                f"{self._server.model} at {self._server.where} cannot be loaded: {failure}"
            ) from failure

    def answered(self) -> None:
        """A whole answer was read."""
        self._failed_in_a_row = 0

    def failed(self, failure: NoAnswerError) -> None:
        """A question got no answer.

        Raises:
            JudgeUnavailable: the server has gone away, or fails every time.
        """
        self._server.check()
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _MOST_FAILURES_IN_A_ROW:
            raise JudgeUnavailable(
                f"{self._server.model} at {self._server.where} failed {_MOST_FAILURES_IN_A_ROW} questions in a row, "
                f"the last one with: {failure}; see to the server and run it again: what was answered is kept"
            )
