"""Who is asked for judgements, and how long it is waited for: the options that every asking stage takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastft.common.effects import check_effects
from fastft.common.errors import JudgeUnavailable, UserError
from fastft.common.options import Condition, check_values, option
from fastft.judging.ollama import DEFAULT_MODEL, DEFAULT_URL, OllamaServer
from fastft.judging.openai import DEFAULT_KEY_VARIABLE, OpenAIServer, key_from_environment
from fastft.judging.questions import LARGEST_ROOM
from fastft.judging.wire import Patience

_LONGEST_S = 1_000_000
"""Eleven days; a clock takes no more than some 10^9."""


_IN_PAIRS = Condition(lambda o, _: getattr(o, "pairwise", True), "--pairwise, which alone asks a judge")
_ASKED = Condition(lambda o, _: o.judge != "none", "a --judge other than none, which asks nobody")
_WITH_KEY = Condition(lambda o, _: o.judge == "openai", "--judge openai, which alone sends a key")
_PULLING = Condition(lambda o, _: o.judge == "ollama", "--judge ollama, which alone has models to pull")
_ENDING_FIRST = Condition(
    lambda o, _: not o.judge_timeout > o.judge_total_timeout,
    "a --judge_total_timeout that is no shorter, and ends a request sooner",
)
_RETRYING = Condition(lambda o, _: o.judge_retries != 0, "--judge_retries of at least 1, before which it pauses")


def asking(default: Any, *more: Condition, at_least: float | None = None) -> Any:
    """An option about the asking: it needs somebody who is asked."""
    return option(default, needs=(_IN_PAIRS, _ASKED, *more), at_least=at_least)


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """A judge's server, and the patience with it."""

    judge: Literal["ollama", "openai", "none"] = option("ollama", needs=_IN_PAIRS)
    """Who gives scores from 0 to 100: a model behind Ollama, or behind any OpenAI-compatible server; none leaves it at
    the text metrics."""
    judge_model: str = asking(DEFAULT_MODEL)
    """Name of the judge's model there."""
    judge_url: str | None = asking(None)
    """Address of the server: of Ollama http://localhost:11434 unless given, of another one such as
    http://localhost:8000/v1."""
    judge_key_env: str | None = asking(None, _WITH_KEY)
    """Name of the environment variable that holds the API key of an OpenAI-compatible server; OPENAI_API_KEY, where it
    is set, unless given. The key is written nowhere."""
    judge_tokens: int = asking(4096)
    """The most tokens of a reply that is asked for once more because a reasoning model's thinking took all the room of
    the first one."""
    judge_timeout: float = asking(120.0, _ENDING_FIRST)
    """Seconds without a byte after which a request has failed."""
    judge_load_timeout: float = asking(600.0)
    """The same while the judge's model is being loaded or pulled."""
    judge_total_timeout: float = asking(600.0)
    """Seconds for one whole answer."""
    judge_retries: int = asking(4, at_least=0)
    """How often a request is tried again of which no whole answer was read."""
    judge_pause: float = asking(0.5, _RETRYING)
    """Seconds before the first of them; each further one waits twice as long, give or take half."""
    pull: bool = asking(False, _PULLING)
    """Have Ollama download the judge's model where it is missing."""
    require_judge: bool = asking(False)
    """Exit with status 3 where no judge can be used, instead of leaving it out."""

    def __post_init__(self) -> None:
        check_values(self)
        check_effects(self)
        if self.judge == "openai" and self.judge_url is None:
            raise UserError("--judge openai: expected --judge_url with it, such as http://localhost:8000/v1")
        if self.judge_tokens <= LARGEST_ROOM:
            raise UserError(
                f"got --judge_tokens {self.judge_tokens}, expected more than the {LARGEST_ROOM} of a first reply"
            )
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


def server_of(judge: Mapping[str, Any]) -> OllamaServer | OpenAIServer | None:
    """The server of a judge as it was recorded (`name`, `model`, `url`); None where none is recorded."""
    kinds = {"ollama": OllamaServer, "openai": OpenAIServer}
    kind = kinds.get(str(judge.get("name")))
    try:
        return None if kind is None else kind(str(judge.get("url")), str(judge.get("model")))
    except UserError:
        return None
