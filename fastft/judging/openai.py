"""The protocol of OpenAI-compatible servers (vLLM, llama.cpp, LM Studio, OpenAI): POST /chat/completions.

Answers come whole, not in a stream: one JSON object. A body that the connection broke off is none; where some servers
(KoboldCpp) leave `finish_reason` out, its length says whether the room was full. An API key comes out of an environment
variable and goes into the requests' headers, nowhere else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastft.common.errors import JudgeUnavailable, UserError
from fastft.judging.journal import Reply, with_finish
from fastft.judging.ollama import full_name
from fastft.judging.questions import SEED, TEMPERATURE, Question
from fastft.judging.refusals import Refusals
from fastft.judging.server import Known
from fastft.judging.wire import (
    NoAnswerError,
    Patience,
    Wire,
    checked_url,
    error_text,
    one_line,
    sound,
    without_password,
)

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"
_EXAMPLE = "http://localhost:8000/v1"
_SCHEMA_WORDS = re.compile(r"response_format|json_schema|grammar|schema", re.IGNORECASE)
_SHOWN_MODELS = 5
_BROKEN_OFF = {"content_filter": False, "error": True, "abort": True, "cancelled": True}
"""Reasons to end within an answer, and whether another try may go better."""


class OpenAIServer:
    """An OpenAI-compatible server and one of its models.

    Args:
        url: the address of its API, `http://host:port/v1`; without a path `/v1` is meant, and `/chat/completions` at
            the end may be there.
        model: the judge's name there.
        key: the API key, where one is needed.
        key_variable: where the key came from, for messages.
        patience: how long to wait.

    Raises:
        UserError: the address has another form, the model's name is empty, or the key cannot stand in a header.
    """

    name = "openai"

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        patience: Patience | None = None,
        *,
        key_variable: str = DEFAULT_KEY_VARIABLE,
    ) -> None:
        if not model.strip():
            raise UserError(f"--judge_model: got {model!r}, expected the name of a model of the server")
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(f"--judge_key_env: ${key_variable} holds no API key: expected letters without white space")
        address = checked_url(url, _EXAMPLE).removesuffix("/chat/completions").rstrip("/")
        self.model = model
        self._url = address if address.count("/") > 2 else f"{address}/v1"
        self.where = without_password(self._url)
        self._key_variable = key_variable
        self._wire = Wire(self._url, patience or Patience(), key=key, proxies=True)
        # Servers load a model with its first question, so that this one may take as long as Ollama's warm-up more.
        self._loading = self._wire.patience.loading
        # OpenAI's newer models know the room by the other name alone.
        self._refusals = Refusals(("temperature", "seed", "max_tokens"), model, {"max_tokens": "max_completion_tokens"})
        self._served_as = model

    @property
    def refused(self) -> tuple[str, ...]:
        """What of a request the server takes not."""
        return self._refusals.names

    def leave_out(self, names: Sequence[str]) -> None:
        """Leaves out of requests what was refused in an earlier call."""
        self._refusals.remember(names)

    @property
    def remembered_as(self) -> str:
        """With the address: a name means a model on this server alone."""
        return f"openai {self.where} {self.model}"

    def check(self) -> Known:
        """Asks for the list of models; a server without one is taken at its word."""
        listed = self._listed()
        found = served_name(self.model, listed)
        if listed and found is None:
            shown = one_line(", ".join(listed[:_SHOWN_MODELS]) + (", ..." if len(listed) > _SHOWN_MODELS else ""))
            raise JudgeUnavailable(
                f"the server at {self.where} has no model {self.model}: give one of its own ({shown}) with "
                "--judge_model"
            )
        self._served_as = found or self.model
        return Known(identity=f"openai {self.where} {self._served_as}")

    def warm_up(self, num_ctx: int) -> None:
        """Nothing: the first question waits longer instead, since each one may cost money."""

    def options(self, question: Question) -> dict[str, Any]:
        """The book's options under OpenAI's names, those that it takes; the context is the server's own affair."""
        return {name: value for name, value in _options(question).items() if name not in self._refusals.names}

    def payload(self, question: Question) -> dict[str, Any]:
        """One user message; a schema, if any, as `response_format`. What is refused of it shows when it is sent."""
        asked = {"model": self._served_as, "messages": [{"role": "user", "content": question.prompt}]}
        format_: dict[str, Any] = {}
        if question.schema is not None:
            schema = {"name": "judgement", "schema": question.schema}
            format_ = {"response_format": {"type": "json_schema", "json_schema": schema}}
        return {**asked, **_options(question), **format_}

    def ask(self, question: Question) -> Reply:
        """One answer, whole."""
        return self._wire.retried(lambda: self._ask_once(question))

    def refuses_schema(self, failure: Exception) -> bool:
        """Servers say it in words of their own, under status 400 or one like it."""
        if not isinstance(failure, NoAnswerError):
            return False
        return failure.status in (400, 422, 500, 501) and bool(_SCHEMA_WORDS.search(failure.reason))

    def _ask_once(self, question: Question) -> Reply:
        return self._refusals.asked(self.payload(question), lambda payload: self._post(payload, question))

    def _post(self, payload: Mapping[str, Any], question: Question) -> Reply:
        patience = self._wire.patience
        # An answer comes in one piece: while a trace is being written there is nothing to be heard.
        silence = max(self._loading or patience.silence, patience.whole if question.wide else 0.0)
        try:
            value = self._wire.post("/chat/completions", payload, silence=silence, whole=patience.whole + self._loading)
        except NoAnswerError as failure:
            if question.schema is not None and self.refuses_schema(failure):
                failure.may_pass = False
            raise
        self._loading = 0.0
        return self._reply(value, question.room)

    def _reply(self, value: Mapping[str, Any], room: int) -> Reply:
        choice = next(iter(_list(value.get("choices"))), None)
        said = self._wire.without_key(error_text(value))
        if value.get("error") or (choice is None and said):
            raise NoAnswerError(f"the server reported an error: {said}")
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            raise NoAnswerError(f"the answer has no choice with a message: {self._wire.without_key(repr(value))}")
        content = _text(message.get("content"))
        if content is None:
            raise NoAnswerError(f"the answer's content is no text: {self._wire.without_key(repr(message['content']))}")
        finish = str(choice["finish_reason"]) if choice.get("finish_reason") else None
        text = self._wire.without_key(sound(content))
        if finish in _BROKEN_OFF:
            failure = NoAnswerError(f"the answer was broken off: finish_reason {finish}", may_pass=_BROKEN_OFF[finish])
            failure.partial = text
            raise failure
        prompt_tokens, reply_tokens = (_count(value, name) for name in ("prompt_tokens", "completion_tokens"))
        thinking = self._wire.without_key(sound(_trace(message)))
        return with_finish(Reply(text, finish, prompt_tokens, reply_tokens, thinking=thinking), room)

    def _listed(self) -> list[str]:
        try:
            listed = self._wire.get("/models")
        except NoAnswerError as failure:
            if failure.status in (401, 403):
                raise JudgeUnavailable(
                    f"the server at {self.where} refuses the API key ({failure}): put a good one into the environment "
                    f"variable {self._key_variable}, or name another variable with --judge_key_env"
                ) from failure
            if failure.status is not None and failure.status < 500:
                return []
            raise JudgeUnavailable(
                f"no OpenAI-compatible server answers at {self.where} ({failure}): start one, or give its address "
                "with --judge_url"
            ) from failure
        models = [item for item in _list(listed.get("data")) if isinstance(item, dict) and "id" in item]
        return [str(name) for item in models for name in (item["id"], *_list(item.get("aliases")))]


def key_from_environment(variable: str | None) -> str | None:
    """The API key in an environment variable; None where none was named and the usual one is not set.

    Raises:
        UserError: the named variable is not set.
    """
    key = os.environ.get(variable or DEFAULT_KEY_VARIABLE, "").strip()
    if not key and variable is not None:
        raise UserError(f"--judge_key_env: the environment variable {variable} is not set; export the API key in it")
    return key or None


def served_name(model: str, listed: Sequence[str]) -> str | None:
    """The name under which a server lists a model: its own, else `llama3:latest` for `llama3`, in any case of letters.

    None where it lists none such, or several.
    """
    if model in listed:
        return model
    for same in (full_name, lambda name: full_name(name).casefold()):
        found = {name for name in listed if same(name) == same(model)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _options(question: Question) -> dict[str, Any]:
    return {"seed": SEED, "temperature": TEMPERATURE, "max_tokens": question.room}


def _text(content: Any) -> str | None:
    """A message's content: text, nothing, or parts of which those with a text count; None for anything else."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content):
            return None
        parts = [part.get("text") for part in content if part["type"] in ("text", "output_text")]
        return "".join(parts) if all(isinstance(part, str) for part in parts) else None
    return content if isinstance(content, str) else "" if content is None else None


def _trace(message: Mapping[str, Any]) -> str:
    """A reasoning model's trace, where the server gives it apart: under one of three names, or as parts of content."""
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(name), str) and message[name]:
            return str(message[name])
    parts = [part for part in _list(message.get("content")) if part["type"] in ("thinking", "reasoning")]
    return " ".join(str(part.get("thinking") or part.get("text") or "") for part in parts)


def _count(value: Mapping[str, Any], name: str) -> int | None:
    usage = value.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
