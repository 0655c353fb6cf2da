"""What the judge asks of a server, whatever its protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from fastft.judging.journal import Reply
from fastft.judging.questions import Question


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

    def as_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> Known | None:
        """What `as_json` gave; None where it is not there, or of another version."""
        fits = value is not None and isinstance(value.get("identity"), str) and set(value) == set(cls.__slots__)
        return cls(**value) if fits and value is not None else None


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
