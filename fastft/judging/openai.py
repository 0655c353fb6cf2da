"""The protocol of OpenAI-compatible servers (vLLM, llama.cpp, LM Studio, OpenAI): POST /chat/completions.

Answers come whole, not in a stream: one JSON object whose first choice has a `finish_reason`. An API key comes out of
an environment variable and goes into the requests' headers, nowhere else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from fastft.errors import JudgeUnavailable, UserError
from fastft.judging.journal import Reply
from fastft.judging.questions import SEED, TEMPERATURE, Question
from fastft.judging.server import Known
from fastft.judging.wire import NoAnswerError, Patience, Wire, checked_url, error_text, sound, without_password

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"
_EXAMPLE = "http://localhost:8000/v1"
_SCHEMA_WORDS = re.compile(r"response_format|json_schema|grammar|schema", re.IGNORECASE)
_SHOWN_MODELS = 5


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
        # Servers load a model with its first question, so that this one may take as long as Ollama's warm-up.
        self._silence = self._wire.patience.loading
        self._room_name = "max_tokens"

    @property
    def remembered_as(self) -> str:
        """With the address: a name means a model on this server alone."""
        return f"openai {self.where} {self.model}"

    def check(self) -> Known:
        """Asks for the list of models; a server without one is taken at its word."""
        listed = self._listed()
        if listed and self.model not in listed:
            shown = ", ".join(listed[:_SHOWN_MODELS]) + (", ..." if len(listed) > _SHOWN_MODELS else "")
            raise JudgeUnavailable(
                f"the server at {self.where} has no model {self.model}: give one of its own ({shown}) with "
                "--judge_model"
            )
        return Known(identity=self.remembered_as)

    def warm_up(self, num_ctx: int) -> None:
        """Nothing: the first question waits longer instead, since each one may cost money."""

    def options(self, question: Question) -> dict[str, Any]:
        """The book's options under OpenAI's names; the context is the server's own affair."""
        return {"seed": SEED, "temperature": TEMPERATURE, "max_tokens": question.room}

    def payload(self, question: Question) -> dict[str, Any]:
        """One user message; a schema, if any, as `response_format`."""
        asked = {"model": self.model, "messages": [{"role": "user", "content": question.prompt}]}
        format_: dict[str, Any] = {}
        if question.schema is not None:
            schema = {"name": "judgement", "schema": question.schema}
            format_ = {"response_format": {"type": "json_schema", "json_schema": schema}}
        return {**asked, **self.options(question), **format_}

    def ask(self, question: Question) -> Reply:
        """One answer, whole."""
        return self._wire.retried(lambda: self._ask_once(question))

    def refuses_schema(self, failure: Exception) -> bool:
        """Servers say it in words of their own, under status 400 or one like it."""
        status = failure.status if isinstance(failure, NoAnswerError) else None
        return status in (400, 422, 500, 501) and bool(_SCHEMA_WORDS.search(str(failure)))

    def _ask_once(self, question: Question) -> Reply:
        payload = self.payload(question)
        room_name = self._room_name  # another thread may change it meanwhile
        payload[room_name] = payload.pop("max_tokens")
        try:
            value = self._wire.post("/chat/completions", payload, silence=self._silence)
        except NoAnswerError as failure:
            if failure.status == 400 and "max_completion_tokens" in str(failure) and room_name == "max_tokens":
                self._room_name = "max_completion_tokens"  # OpenAI's newer models know it by this name alone
                return self._ask_once(question)
            if question.schema is not None and self.refuses_schema(failure):
                failure.may_pass = False
            raise
        self._silence = self._wire.patience.silence
        return self._reply(value)

    def _reply(self, value: Mapping[str, Any]) -> Reply:
        if value.get("error"):
            raise NoAnswerError(f"the server reported an error: {self._wire.without_key(error_text(value))}")
        choice = next(iter(_list(value.get("choices"))), None)
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            raise NoAnswerError(f"the answer has no choice with a message: {self._wire.without_key(repr(value))}")
        content = message.get("content") or ""
        if not isinstance(content, str):
            raise NoAnswerError(f"the answer's content is no text: {self._wire.without_key(repr(content))}")
        text = self._wire.without_key(sound(content))
        if not choice.get("finish_reason"):
            failure = NoAnswerError("the answer has no finish_reason: it is not whole")
            failure.partial = text
            raise failure
        usage = value.get("usage") if isinstance(value.get("usage"), dict) else {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
        prompt_tokens, reply_tokens = (count if isinstance(count, int) else None for count in counts or (None, None))
        return Reply(text, str(choice["finish_reason"]), prompt_tokens, reply_tokens)

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


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
