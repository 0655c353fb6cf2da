"""Who is asked for judgements, and how long it is waited for: the options that every asking stage takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from fastft.errors import JudgeUnavailable, UserError
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
        self.check_use(name for name in given(self, JudgeOptions) if name != "judge")
        if self.pull and self.judge != "ollama":
            raise UserError(
                f"--pull: got it with --judge {self.judge}, expected --judge ollama, which alone has models to pull"
            )
        if self.judge_key_env is not None and self.judge != "openai":
            raise UserError(
                f"--judge_key_env: got it with --judge {self.judge}, expected --judge openai, which alone sends a key"
            )
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

    def check_use(self, names: Iterable[str]) -> None:
        """Holds the options that were given for the asking against `--judge none`.

        Raises:
            UserError: nobody is asked, so that one of them has no effect.
        """
        for name in names if self.judge == "none" else ():
            raise UserError(f"--{name}: got it with --judge none, which asks nobody; leave one of the two out")

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


def given(options: Any, of: type[Any]) -> list[str]:
    """The fields of a dataclass whose values in `options` are not the defaults."""
    return [field.name for field in fields(of) if getattr(options, field.name) != field.default]


def server_of(judge: Mapping[str, Any]) -> OllamaServer | OpenAIServer | None:
    """The server of a judge as it was recorded (`name`, `model`, `url`); None where none is recorded."""
    kinds = {"ollama": OllamaServer, "openai": OpenAIServer}
    kind = kinds.get(str(judge.get("name")))
    try:
        return None if kind is None else kind(str(judge.get("url")), str(judge.get("model")))
    except UserError:
        return None
