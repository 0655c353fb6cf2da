"""Ollama's own protocol (github.com/ollama/ollama, docs/api.md).

POST /api/chat answers with one JSON object a line, the last one with `done: true`. An error after the first line comes
as a line `{"error": ...}` under status 200, and a stream can end without `done: true` and without an error. Both are
failed requests here, never short answers. A pull fails in the same way: under status 200, by a line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastft.common.console import say
from fastft.common.errors import JudgeUnavailable, UserError
from fastft.judging.journal import Reply, with_finish
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

DEFAULT_URL = "http://localhost:11434"
DEFAULT_MODEL = "llama3"

_SCHEMA_SINCE = (0, 5, 0)
_SCHEMA_WORDS = re.compile(r"format|grammar|schema", re.IGNORECASE)
_TENTHS = 10
_NOT_ASKED = ("load", "unload")


class OllamaServer:
    """An Ollama server and one of its models.

    Args:
        url: the server's address, `http://host:port`; the book's `.../api/chat` means the same.
        model: the judge's name in Ollama.
        patience: how long to wait.

    Raises:
        UserError: the address is not of the form http(s)://host[:port], or the model's name is empty.
    """

    name = "ollama"

    def __init__(self, url: str = DEFAULT_URL, model: str = DEFAULT_MODEL, patience: Patience | None = None) -> None:
        if not model.strip():
            raise UserError(f"--judge_model: got {model!r}, expected the name of a model in Ollama such as llama3")
        address = checked_url(url, DEFAULT_URL).removesuffix("/api/chat").rstrip("/")
        self.model = model
        self.where = without_password(address)
        self._wire = Wire(address, patience or Patience())
        self._refusals = Refusals(("think",), model)

    @property
    def refused(self) -> tuple[str, ...]:
        """What of a request the server takes not."""
        return self._refusals.names

    def leave_out(self, names: Sequence[str]) -> None:
        """Leaves out of requests what was refused in an earlier call."""
        self._refusals.remember(names)

    @property
    def remembered_as(self) -> str:
        """Without the address: a model of the same digest answers the same wherever it runs."""
        return f"ollama {full_name(self.model).casefold()}"

    def check(self) -> Known:
        """Asks for the server's version, its models, and what it knows of the judge."""
        version = self._get("/api/version").get("version")
        if not isinstance(version, str):
            raise self._not_ollama("/api/version has no version")
        listed = self._listed()
        if listed is None:
            raise JudgeUnavailable(
                f"the Ollama server at {self.where} has no model {self.model}: get it with `ollama pull {self.model}`, "
                "or give --pull"
            )
        shown = self._show()
        self._check_chats(shown)
        digest = str(listed.get("digest") or "") or None
        return Known(
            # Without a digest, a name means a model on this server alone.
            identity=f"ollama {digest or f'{self.where} {full_name(self.model)}'}",
            digest=digest,
            version=version,
            context_length=_context_length(shown),
            takes_schema=_numbers(version) >= _SCHEMA_SINCE or not any(_numbers(version)),
        )

    def pull(self) -> None:
        """Has the server download the model, where it is missing, and says how far it is.

        Raises:
            JudgeUnavailable: it cannot be had; the message is one line.
        """
        self._get("/api/version")
        if self._listed() is not None:
            return
        say(f"pulling {self.model} into the Ollama server at {self.where}")
        progress = _Progress(self.model)
        silence = self._wire.patience.loading
        payload = {"model": self.model}
        try:
            # A download takes as long as it takes: only silence ends it. Ollama goes on with what it has got.
            self._wire.retried(
                lambda: self._wire.post_lines("/api/pull", payload, progress.take, silence=silence, whole=_FOREVER_S)
            )
        except NoAnswerError as failure:
            raise JudgeUnavailable(
                f"the Ollama server at {self.where} could not pull {self.model} ({failure}): check the name at "
                "https://ollama.com/library and the server's network and disk"
            ) from failure

    def warm_up(self, num_ctx: int) -> None:
        """A chat without messages loads the model and answers nothing; its context must be that of the questions."""
        payload = {"model": self.model, "messages": [], "options": {"num_ctx": num_ctx}, "stream": False}
        loading = self._wire.patience.loading
        self._wire.retried(lambda: _check_done(self._wire.post("/api/chat", payload, silence=loading, whole=loading)))

    def options(self, question: Question) -> dict[str, Any]:
        """The book's options, and a bound for the reply."""
        return {"seed": SEED, "temperature": TEMPERATURE, "num_ctx": question.num_ctx, "num_predict": question.room}

    def payload(self, question: Question) -> dict[str, Any]:
        """The book's payload, without a thinking model's trace, which would eat the reply's room."""
        format_ = {} if question.schema is None else {"format": question.schema}
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": question.prompt}],
            "options": self.options(question),
            "think": False,
            **format_,
        }

    def ask(self, question: Question) -> Reply:
        """Streams, so that a server that hangs is told from one that is slow."""
        return self._wire.retried(lambda: self._ask_once(question))

    def refuses_schema(self, failure: Exception) -> bool:
        """Ollama finds a bad schema in its runner: 500 `invalid format`; before 0.5 a schema is a 400."""
        if not isinstance(failure, NoAnswerError):
            return False
        return failure.status in (400, 500) and bool(_SCHEMA_WORDS.search(failure.reason))

    def _ask_once(self, question: Question) -> Reply:
        return self._refusals.asked(self.payload(question), lambda payload: self._post(payload, question))

    def _post(self, payload: Mapping[str, Any], question: Question) -> Reply:
        answer = _Answer()
        try:
            self._wire.post_lines("/api/chat", payload, answer.take, silence=self._wire.patience.silence)
        except NoAnswerError as failure:
            failure.partial = self._wire.without_key("".join(answer.pieces))
            if question.schema is not None and self.refuses_schema(failure):
                failure.may_pass = False
            raise
        return answer.reply(question.room)

    def _listed(self) -> dict[str, Any] | None:
        """The model among those that the server has."""
        models = self._get("/api/tags").get("models")
        if not isinstance(models, list):
            raise self._not_ollama("/api/tags has no list of models")
        wanted = full_name(self.model).casefold()  # Ollama itself takes Llama3 for llama3
        named = [item for item in models if isinstance(item, dict)]
        return next((m for m in named if wanted in {str(m.get(key)).casefold() for key in ("name", "model")}), None)

    def _show(self) -> dict[str, Any]:
        """What the server knows of the model; nothing where it does not say."""
        try:
            return self._wire.post("/api/show", {"model": self.model}, silence=self._wire.patience.checking)
        except NoAnswerError:
            return {}

    def _check_chats(self, shown: Mapping[str, Any]) -> None:
        can = shown.get("capabilities")
        if isinstance(can, list) and can and "completion" not in can:
            named = one_line(", ".join(map(str, can)))
            raise JudgeUnavailable(
                f"{self.model} at {self.where} cannot chat (it can: {named}): give a language model with --judge_model"
            )

    def _get(self, path: str) -> dict[str, Any]:
        try:
            return self._wire.get(path)
        except NoAnswerError as failure:
            if failure.status is not None or "JSON" in str(failure):
                raise self._not_ollama(str(failure) if failure.status is None else f"{path}: {failure}") from failure
            raise JudgeUnavailable(
                f"no Ollama server answers at {self.where} ({failure}): start one with `ollama serve`, "
                "or give its address with --judge_url"
            ) from failure

    def _not_ollama(self, what: str) -> JudgeUnavailable:
        return JudgeUnavailable(
            f"{self.where} does not answer as an Ollama server does ({what}): start one with `ollama serve`, give its "
            "address with --judge_url, or ask an OpenAI-compatible server with --judge openai"
        )


_FOREVER_S = 30 * 24 * 3600.0


def full_name(model: str) -> str:
    """The name under which Ollama lists a model: `llama3` is `llama3:latest`."""
    return model if ":" in model.rsplit("/", 1)[-1] else f"{model}:latest"


class _Answer:
    """A streamed answer while it is being read."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self._thoughts: list[str] = []
        self._last: Mapping[str, Any] = {}

    def take(self, value: Mapping[str, Any]) -> bool:
        """Adds the text of one line of a stream; whether the line was the last one."""
        if "error" in value or "detail" in value:
            raise NoAnswerError(f"the server reported an error: {error_text(value)}")
        message = value.get("message") or {}
        content, thinking = (
            message.get(name) or "" if isinstance(message, dict) else None for name in ("content", "thinking")
        )
        if not isinstance(content, str):
            raise NoAnswerError(f"a line of the stream has no text in message.content: {value!r}")
        self.pieces.append(sound(content))
        self._thoughts.append(sound(thinking) if isinstance(thinking, str) else "")
        self._last = value
        return value.get("done") is True

    def reply(self, room: int) -> Reply:
        """What was read, once the last line was.

        Raises:
            NoAnswerError: the model was loaded or unloaded and not asked.
        """
        finish = str(self._last["done_reason"]) if self._last.get("done_reason") else None
        if finish in _NOT_ASKED:
            raise NoAnswerError(f"the server has no answer: it says done_reason {finish}")
        reply = Reply(
            "".join(self.pieces),
            finish,
            _count(self._last.get("prompt_eval_count")),
            _count(self._last.get("eval_count")),
            thinking="".join(self._thoughts),
        )
        return with_finish(reply, room)


class _Progress:
    """What a pull says, in lines: each status once, and each layer's tenths."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._said: set[tuple[str, int]] = set()

    def take(self, value: Mapping[str, Any]) -> bool:
        if "error" in value:
            raise NoAnswerError(error_text(value), may_pass=False)
        status = one_line(str(value.get("status", "")))
        total, completed = _count(value.get("total")) or 0, _count(value.get("completed")) or 0
        tenth = _TENTHS * completed // total if total else 0
        if (status, tenth) not in self._said:
            self._said.add((status, tenth))
            size = f" {10 * tenth}% of {total / 1e9:.2f} GB" if total else ""
            say(f"pulling {self._model}: {status}{size}")
        return status == "success"


def _check_done(value: Mapping[str, Any]) -> None:
    if "error" in value:
        raise NoAnswerError(f"the server reported an error: {error_text(value)}")
    if value.get("done") is not True:
        raise NoAnswerError("the answer has no done:true")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _context_length(shown: Mapping[str, Any]) -> int | None:
    """`model_info` has it under the architecture's name: `llama.context_length`."""
    info = shown.get("model_info")
    found = (
        [value for name, value in info.items() if name.endswith(".context_length")] if isinstance(info, dict) else []
    )
    return _count(found[0]) if found else None


def _numbers(version: str) -> tuple[int, ...]:
    """`0.5.0-rc1` as (0, 5, 0); (0, 0, 0), as builds from source say, where there are none."""
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(part or 0) for part in found.groups()) if found else (0, 0, 0)
