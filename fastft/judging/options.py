"""Who is asked for judgements, and how long it is waited for: the options that every asking stage takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from fastft.common.errors import JudgeUnavailable, UserError
from fastft.judging.ollama import DEFAULT_MODEL, DEFAULT_URL, OllamaServer
from fastft.judging.openai import DEFAULT_KEY_VARIABLE, OpenAIServer, key_from_environment
from fastft.judging.questions import LARGEST_ROOM
from fastft.judging.wire import Patience

_LONGEST_S = 1_000_000
"""Eleven days; a clock takes no more than some 10^9."""


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """A judge's server, and the patience with it."""

    judge: Literal["ollama", "openai", "none"] = "ollama"
    """Who gives scores from 0 to 100: a model behind Ollama, or behind any OpenAI-compatible server; none leaves it at
    the text metrics."""
    judge_model: str = DEFAULT_MODEL
    """Name of the judge's model there."""
    judge_url: str | None = None
    """Address of the server: of Ollama http://localhost:11434 unless given, of another one such as
    http://localhost:8000/v1."""
    judge_key_env: str | None = None
    """Name of the environment variable that holds the API key of an OpenAI-compatible server; OPENAI_API_KEY, where it
    is set, unless given. The key is written nowhere."""
    judge_tokens: int = 4096
    """The most tokens of a reply that is asked for once more because a reasoning model's thinking took all the room of
    the first one."""
    judge_timeout: float = 120.0
    """Seconds without a byte after which a request has failed."""
    judge_load_timeout: float = 600.0
    """The same while the judge's model is being loaded or pulled."""
    judge_total_timeout: float = 600.0
    """Seconds for one whole answer."""
    judge_retries: int = 4
    """How often a request is tried again of which no whole answer was read."""
    judge_pause: float = 0.5
    """Seconds before the first of them; each further one waits twice as long, give or take half."""
    pull: bool = False
    """Have Ollama download the judge's model where it is missing."""
    require_judge: bool = False
    """Exit with status 3 where no judge can be used, instead of leaving it out."""

    def __post_init__(self) -> None:
        check_effects(self)
        if self.judge == "openai" and self.judge_url is None:
            raise UserError("--judge openai: expected --judge_url with it, such as http://localhost:8000/v1")
        if self.judge_tokens <= LARGEST_ROOM:
            raise UserError(
                f"got --judge_tokens {self.judge_tokens}, expected more than the {LARGEST_ROOM} of a first reply"
            )
        if self.judge_retries < 0:
            raise UserError(f"got --judge_retries {self.judge_retries}, expected at least 0")
        for name in ("judge_timeout", "judge_load_timeout", "judge_total_timeout", "judge_pause"):
            if not 0 < getattr(self, name) <= _LONGEST_S:
                raise UserError(f"got --{name} {getattr(self, name)}, expected seconds above 0, at most {_LONGEST_S:,}")

    def patience(self) -> Patience:
        """How long the judge is waited for."""
        return Patience(
            silence=self.judge_timeout,
            loading=self.judge_load_timeout,
            whole=self.judge_total_timeout,
            retries=self.judge_retries,
            pause=self.judge_pause,
        )

    def server(self) -> OllamaServer | OpenAIServer:
        """Who is asked; with `--judge none` Ollama's usual server, for want of another that was asked before.

        Raises:
            UserError: its address is no address, or the variable of its key is not set.
        """
        if self.judge == "openai":
            variable = self.judge_key_env
            return OpenAIServer(
                self.judge_url or "",
                self.judge_model,
                key_from_environment(variable),
                self.patience(),
                key_variable=variable or DEFAULT_KEY_VARIABLE,
            )
        return OllamaServer(self.judge_url or DEFAULT_URL, self.judge_model, self.patience())

    def before(self, server: OllamaServer | OpenAIServer) -> None:
        """What comes before the server is looked at.

        Raises:
            JudgeUnavailable: nobody is to be asked, or the model cannot be pulled.
        """
        if self.judge == "none":
            raise JudgeUnavailable("--judge none")
        if self.pull and isinstance(server, OllamaServer):
            server.pull()


@dataclass(frozen=True, slots=True)
class Condition:
    """Under which an option has an effect.

    Attributes:
        holds: whether it is so.
        needs: the condition in words, behind `needs`.
    """

    holds: Callable[[JudgeOptions], bool]
    needs: str


_IN_PAIRS = Condition(lambda o: getattr(o, "pairwise", True), "--pairwise, which alone asks a judge")
_ASKED = Condition(lambda o: o.judge != "none", "a --judge other than none, which asks nobody")
_ALWAYS = (_IN_PAIRS, _ASKED)

CONDITIONS: dict[str, tuple[Condition, ...]] = {
    "judge": (_IN_PAIRS,),
    "judge_model": _ALWAYS,
    "judge_url": _ALWAYS,
    "judge_key_env": (
        *_ALWAYS,
        Condition(lambda o: o.judge == "openai", "--judge openai, which alone sends a key"),
    ),
    "judge_tokens": _ALWAYS,
    "judge_timeout": (
        *_ALWAYS,
        Condition(
            lambda o: not o.judge_timeout > o.judge_total_timeout,
            "a --judge_total_timeout that is no shorter, and ends a request sooner",
        ),
    ),
    "judge_load_timeout": _ALWAYS,
    "judge_total_timeout": _ALWAYS,
    "judge_retries": _ALWAYS,
    "judge_pause": (
        *_ALWAYS,
        Condition(lambda o: o.judge_retries != 0, "--judge_retries of at least 1, before which it pauses"),
    ),
    "pull": (
        *_ALWAYS,
        Condition(lambda o: o.judge == "ollama", "--judge ollama, which alone has models to pull"),
    ),
    "require_judge": _ALWAYS,
    "judge_style": _ALWAYS,
    "judge_rubric": _ALWAYS,
    "judge_parallel": _ALWAYS,
}
"""Options of `fastft score` and `fastft compare` about the judge, to what each needs."""


def check_effects(options: JudgeOptions) -> None:
    """Refuses options about the judge that are not at their defaults and can have no effect.

    Raises:
        UserError: one has none.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        for condition in CONDITIONS.get(field.name, ()):
            if value != field.default and not condition.holds(options):
                said = str(value).lower() if isinstance(value, bool) else value
                raise UserError(
                    f"got --{field.name} {said}, which has no effect here: it needs {condition.needs}; "
                    "leave it out, or see to what it needs"
                )


def server_of(judge: Mapping[str, Any]) -> OllamaServer | OpenAIServer | None:
    """The server of a judge as it was recorded (`name`, `model`, `url`); None where none is recorded."""
    kinds = {"ollama": OllamaServer, "openai": OpenAIServer}
    kind = kinds.get(str(judge.get("name")))
    try:
        return None if kind is None else kind(str(judge.get("url")), str(judge.get("model")))
    except UserError:
        return None
