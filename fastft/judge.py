"""The judge: asks a language model behind Ollama for a score from 0 to 100, as the book's chapter 7 does.

Prompt and payload are those of `ollama_evaluate.py` (github.com/rasbt/LLMs-from-scratch, ch07/01_main-chapter-code).
The protocol is Ollama's (github.com/ollama/ollama, docs/api.md): POST /api/chat answers with one JSON object a line,
the last one with `done: true`. An error after the first line comes as a line `{"error": ...}` under status 200, and a
stream can end without `done: true` and without an error. Both are failed requests here, never short answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3

from fastft.errors import JudgeUnavailable, UserError
from fastft.prompts import ALPACA

DEFAULT_URL = "http://localhost:11434"
DEFAULT_MODEL = "llama3"
# A num_ctx that changes between requests makes Ollama reload the model: it is one constant for every request.
OPTIONS: Mapping[str, int] = {"seed": 123, "temperature": 0, "num_ctx": 2048}
EMPTY_RESPONSE = "empty response"

_CHECK_TIMEOUT_S = 5.0
_RETRIES = 2
_WORTH_RETRYING = {408, 429}  # of the statuses below 500: request timeout, too many requests
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What came of judging one response."""

    score: int | None
    """0 to 100, or None where there is no score."""
    raw: str = ""
    """The judge's reply as it was read, also where it was read in part."""
    reason: str | None = None
    """One line: why there is no score, or why there is one without a call."""
    key: str
    """`judgement_key` of what was asked."""
    answered: bool
    """Whether a whole answer was read (or none was needed), so that asking again would be of no use."""

    def as_json(self) -> dict[str, Any]:
        """The fields as a JSON object, without `reason` where there is none."""
        return {name: value for name, value in asdict(self).items() if name != "reason" or value is not None}


def judge_prompt(entry: Mapping[str, Any]) -> str:
    """The book's question about one entry (`instruction`, `input`, `output`, `model_response`).

    The entry is always formatted in Alpaca style, whatever template the model was trained with: scores of different
    templates stay comparable, and equal to the book's.
    """
    asked = ALPACA.prompt(entry["instruction"], entry.get("input") or "")
    return (
        f"Given the input `{asked}` "
        f"and correct output `{entry['output']}`, "
        f"score the model response `{entry['model_response']}`"
        " on a scale from 0 to 100, where 100 is the best score. "
        "Respond with the integer number only."
    )


def judgement_key(model: str, prompt: str) -> str:
    """SHA-256 (hex) of the model's full name, the options and the prompt: equal keys are the same question.

    The server's address is not part of it: the same model answers the same wherever it runs.
    """
    question = json.dumps([full_name(model), dict(OPTIONS), prompt], sort_keys=True)
    return hashlib.sha256(question.encode("ascii")).hexdigest()


def full_name(model: str) -> str:
    """The name under which Ollama lists a model: `llama3` is `llama3:latest`."""
    return model if ":" in model.rsplit("/", 1)[-1] else f"{model}:latest"


def parse_score(raw: str) -> tuple[int | None, str | None]:
    """The score in a whole answer, or why there is none: `(score, None)` or `(None, reason)`.

    As in the book the answer must be an integer and nothing else; unlike there it must also lie in 0..100.
    """
    try:
        score = int(raw.strip())
    except ValueError:
        return None, f"not an integer: {_one_line(repr(raw))}"
    if not 0 <= score <= 100:
        return None, f"not in 0..100: {_one_line(str(score))}"
    return score, None


class OllamaJudge:
    """A client of one Ollama server and one of its models.

    Args:
        url: the server's address, `http://host:port`; the book's `.../api/chat` means the same.
        model: the judge's name in Ollama.
        timeout: seconds to wait for the next byte. The first one can take long: the model is loaded on the first
            request, and a busy server makes clients wait without a word.
        total_timeout: seconds that one whole answer may take.
        pause: seconds before the first retry; the second one waits twice as long.

    Raises:
        UserError: the address is not of the form http(s)://host[:port], or the model's name is empty.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        model: str = DEFAULT_MODEL,
        *,
        timeout: float = 120.0,
        total_timeout: float = 600.0,
        pause: float = 0.5,
    ) -> None:
        if not model.strip():
            raise UserError(f"--judge_model: got {model!r}, expected the name of a model in Ollama such as llama3")
        self.url = checked_url(url)
        self.model = model
        self._timeout = timeout
        self._total_timeout = total_timeout
        self._pause = pause
        self._session = requests.Session()
        # The server is mostly this machine, which a proxy from the environment cannot reach.
        self._session.trust_env = False

    def check(self) -> None:
        """Makes sure that the server answers and has the model.

        Raises:
            JudgeUnavailable: it does not; the message is one line that ends with the remedy.
        """
        if "version" not in self._get("/api/version"):
            raise self._not_ollama("/api/version has no version")
        listed = self._get("/api/tags").get("models")
        if not isinstance(listed, list):
            raise self._not_ollama("/api/tags has no list of models")
        names = {str(item.get(key)) for item in listed if isinstance(item, dict) for key in ("name", "model")}
        # Ollama itself takes Llama3 for llama3.
        if full_name(self.model).casefold() not in {name.casefold() for name in names}:
            where = _without_password(self.url)
            raise JudgeUnavailable(
                f"the Ollama server at {where} has no model {self.model}: get it with `ollama pull {self.model}`"
            )

    def score(self, entry: Mapping[str, Any]) -> Judgement:
        """Judges the `model_response` of one entry; an empty one scores 0 without a call.

        A failed request is not an exception but a judgement without a score: the other entries go on.
        """
        prompt = judge_prompt(entry)
        key = judgement_key(self.model, prompt)
        if not entry["model_response"].strip():
            return Judgement(score=0, reason=EMPTY_RESPONSE, key=key, answered=True)
        pieces: list[str] = []
        try:
            self._ask(prompt, pieces)
        except _NoAnswerError as failure:
            return Judgement(score=None, raw="".join(pieces), reason=str(failure), key=key, answered=False)
        raw = "".join(pieces)
        score, reason = parse_score(raw)
        return Judgement(score=score, raw=raw, reason=reason, key=key, answered=True)

    def _ask(self, prompt: str, pieces: list[str]) -> None:
        """Leaves the answer in `pieces`, retrying what may pass; an answer that was read whole is never asked again."""
        for attempt in range(1, _RETRIES + 2):
            pieces.clear()
            try:
                return self._ask_once(prompt, pieces)
            except _NoAnswerError as failure:
                if not failure.may_pass or attempt > _RETRIES:
                    raise
            time.sleep(self._pause * attempt)
        raise AssertionError("the last attempt returns or raises")

    def _ask_once(self, prompt: str, pieces: list[str]) -> None:
        payload = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "options": dict(OPTIONS)}
        deadline = time.monotonic() + self._total_timeout
        with (
            _network_failures(self._timeout),
            self._session.post(
                f"{self.url}/api/chat", json=payload, stream=True, timeout=self._timeout, allow_redirects=False
            ) as response,
        ):
            if response.status_code != 200:
                status = response.status_code
                raise _NoAnswerError(_http_reason(response), may_pass=status >= 500 or status in _WORTH_RETRYING)
            for line in response.iter_lines():
                if line.strip() and _take(line, pieces):
                    return
                if time.monotonic() > deadline:
                    raise _NoAnswerError(f"no whole answer within {self._total_timeout:g} s")
        raise _NoAnswerError("the stream ended without done:true")

    def _get(self, path: str) -> dict[str, Any]:
        try:
            with _network_failures(_CHECK_TIMEOUT_S):
                response = self._session.get(f"{self.url}{path}", timeout=_CHECK_TIMEOUT_S, allow_redirects=False)
                if response.status_code != 200:
                    raise self._not_ollama(f"{path}: {_http_reason(response)}")
                content = response.content
        except _NoAnswerError as failure:
            where = _without_password(self.url)
            raise JudgeUnavailable(
                f"no Ollama server answers at {where} ({failure}): start one with `ollama serve`, "
                "or give its address with --judge_url"
            ) from failure
        value = _json_object(content)
        if value is None:
            raise self._not_ollama(f"{path} is not a JSON object")
        return value

    def _not_ollama(self, what: str) -> JudgeUnavailable:
        where = _without_password(self.url)
        return JudgeUnavailable(
            f"{where} does not answer as an Ollama server does ({what}): start one with `ollama serve`, "
            "or give its address with --judge_url"
        )


def checked_url(url: str) -> str:
    """The address without a trailing slash or `/api/chat`.

    Raises:
        UserError: it is not of the form http(s)://host[:port][/path].
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        usable = bool(host.encode("idna")) and (parts.port is None or parts.port > 0)
    except ValueError:  # UnicodeError, of a host that no name server takes, is one
        usable = False
    if not usable or parts.scheme not in ("http", "https") or parts.query or parts.fragment or url.split() != [url]:
        raise UserError(f"--judge_url: got {url!r}, expected http://HOST:PORT such as {DEFAULT_URL}")
    return url.rstrip("/").removesuffix("/api/chat").rstrip("/")


class _NoAnswerError(Exception):
    """No whole answer was read. The message is the reason in one line."""

    def __init__(self, reason: str, *, may_pass: bool = True) -> None:
        super().__init__(_one_line(reason))
        self.may_pass = may_pass


def _take(line: bytes, pieces: list[str]) -> bool:
    """Adds the text of one line of a stream to `pieces`; whether the line was the last one."""
    value = _json_object(line)
    if value is None:
        raise _NoAnswerError(f"a line of the stream is not a JSON object: {line[:_SHOWN_CHARACTERS]!r}")
    if "error" in value:
        raise _NoAnswerError(f"the server reported an error: {value['error']}")
    message = value.get("message") or {}
    content = message.get("content") or "" if isinstance(message, dict) else None
    if not isinstance(content, str):
        raise _NoAnswerError(f"a line of the stream has no text in message.content: {line[:_SHOWN_CHARACTERS]!r}")
    # Half of a surrogate pair can stand in JSON, but not in the UTF-8 file that the text goes to.
    pieces.append(content.encode(errors="replace").decode())
    return value.get("done") is True


def _json_object(content: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _http_reason(response: requests.Response) -> str:
    """`HTTP 404: model 'x' not found`: the status, and the server's own words where it has some."""
    said = (_json_object(response.content) or {}).get("error") or response.headers.get("Location") or response.reason
    return f"HTTP {response.status_code}: {_one_line(str(said))}"


@contextlib.contextmanager
def _network_failures(timeout: float) -> Iterator[None]:
    """Turns every exception of the network into a _NoAnswerError."""
    try:
        yield
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise _NoAnswerError(_network_reason(error, timeout)) from error


def _network_reason(error: BaseException, timeout: float) -> str:
    """The innermost cause: requests and urllib3 wrap it up to four times, with addresses of objects in the text."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    if any(isinstance(link, (TimeoutError, urllib3.exceptions.ReadTimeoutError)) for link in chain):
        return f"timed out: nothing came for {timeout:g} s"
    cause = chain[-1]
    return (isinstance(cause, OSError) and cause.strerror) or str(cause) or type(cause).__name__


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _one_line(text: str) -> str:
    line = " ".join(text.encode(errors="replace").decode().split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"
