"""One request over HTTP: its body, within time and size, or the reason why no whole answer was read.

Every request has a connection of its own: one that a server has closed while it was idle would look like a failure.
It runs on a thread that is left behind when the time is over, since a socket's own timeout starts anew with each byte:
a server that drips one a second would hold a client for ever, also in the middle of its headers.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3

from fastft.common.errors import UserError

T = TypeVar("T")
_Opener = Callable[[], contextlib.AbstractContextManager[requests.Response]]

_WORTH_RETRYING = {408, 425, 429}  # of the statuses below 500: too slow, too early, too many
_MOST_BYTES = 1 << 20
_MOST_ERROR_BYTES = 1 << 16
_PIECE_BYTES = 4096
_LONGEST_PAUSE_S = 30.0
_SHOWN_CHARACTERS = 200
_ERROR = ("error", "errors", "title", "message", "detail", "msg")
_DEEPEST_ERROR, _MOST_ERRORS = 4, 3
_LOOPBACK = ("localhost", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long to wait for a server, in seconds, and how often to try."""

    silence: float = 120.0
    """Without a byte. A busy server makes clients wait for their first one without a word."""
    loading: float = 600.0
    """The same while a model is being loaded (the warm-up) or pulled."""
    checking: float = 5.0
    """The same where the server answers out of its head: version, models."""
    whole: float = 600.0
    """For one whole answer."""
    retries: int = 4
    pause: float = 0.5
    """Before the first retry; it doubles with each further one, up to 30 s, give or take half of it."""

    def before_retry(self, attempt: int, asked_for: float | None = None) -> float:
        """Seconds to wait after attempt `attempt` (from 0) has failed; a server may ask for more, up to 30 s."""
        # The jitter keeps clients that failed together from coming back together.
        pause = min(_LONGEST_PAUSE_S, self.pause * 2.0**attempt) * random.uniform(0.5, 1.5)
        return max(pause, min(asked_for or 0.0, _LONGEST_PAUSE_S))


class NoAnswerError(Exception):
    """No whole answer was read.

    Args:
        reason: becomes the message, in one line.
        may_pass: whether another try may go better.
        status: HTTP's, where the answer was an error.
        retry_after: seconds that the server asked to wait.
    """

    def __init__(
        self, reason: str, *, may_pass: bool = True, status: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(one_line(reason))
        self.reason = reason
        """The whole of it, to be searched and not shown."""
        self.may_pass = may_pass
        self.status = status
        self.retry_after = retry_after
        self.partial = ""
        """What was read of the answer."""


class Wire:
    """Requests to one server.

    Args:
        url: its address, which the paths of requests are appended to.
        patience: how long to wait.
        key: an API key, sent as a bearer token and never shown.
        proxies: whether the environment's proxies are asked, as a server beyond this network needs.
    """

    def __init__(self, url: str, patience: Patience, *, key: str | None = None, proxies: bool = False) -> None:
        self.url = url
        self.patience = patience
        self._key = key
        self._proxies = proxies and not _is_loopback(url)

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path, asked for once.

        Raises:
            NoAnswerError: there is none.
        """
        content = self._exchange("GET", path, None, self.patience.checking, b"".join)
        return _object_or_fail(content, path)

    def post(
        self, path: str, payload: Mapping[str, Any], *, silence: float, whole: float | None = None
    ) -> dict[str, Any]:
        """The JSON object that answers a POST; it may take `whole` seconds, or as long as an answer."""
        return _object_or_fail(self._exchange("POST", path, payload, silence, b"".join, whole=whole), path)

    def post_lines(
        self,
        path: str,
        payload: Mapping[str, Any],
        take: Callable[[dict[str, Any]], bool],
        *,
        silence: float,
        whole: float | None = None,
    ) -> None:
        """POSTs, and hands the JSON object of each line of the answer to `take` until it returns True.

        Raises:
            NoAnswerError: it never did. `take` may raise it too.
        """

        def read(pieces: Iterator[bytes]) -> None:
            for line in _lines(pieces):
                value = json_object(line)
                if value is None:
                    raise NoAnswerError(f"a line of the stream is not a JSON object: {line[:_SHOWN_CHARACTERS]!r}")
                if take(value):
                    return
            raise NoAnswerError("the stream ended without done:true")

        self._exchange("POST", path, payload, silence, read, whole=whole)

    def retried(self, ask: Callable[[], T]) -> T:
        """What `ask` returns, tried again after each failure that may pass.

        Raises:
            NoAnswerError: the last try's.
        """
        for attempt in range(self.patience.retries):
            try:
                return ask()
            except NoAnswerError as failure:
                if not failure.may_pass:
                    raise
                time.sleep(self.patience.before_retry(attempt, failure.retry_after))
        return ask()

    def without_key(self, text: str) -> str:
        """The text without the API key, which a server may quote."""
        return text.replace(self._key, "***") if self._key else text

    def _exchange(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | None,
        silence: float,
        read: Callable[[Iterator[bytes]], T],
        *,
        whole: float | None = None,
    ) -> T:
        exchange = _Exchange(silence, read)
        limit = self.patience.whole if whole is None else whole
        try:
            return exchange.within(limit, lambda: self._open(method, self.url + path, payload, silence))
        except NoAnswerError as failure:
            failure.args = (self.without_key(str(failure)),)
            raise

    @contextlib.contextmanager
    def _open(
        self, method: str, url: str, payload: Mapping[str, Any] | None, silence: float
    ) -> Iterator[requests.Response]:
        with requests.Session() as session:
            # Neither a proxy (an Ollama server is mostly this machine) nor .netrc, which would replace the key.
            session.trust_env = False
            if self._proxies:
                session.proxies = dict(requests.utils.get_environ_proxies(url))
                session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            with session.request(
                method, url, json=payload, headers=headers, stream=True, timeout=silence, allow_redirects=False
            ) as response:
                yield response


class _Exchange(Generic[T]):
    """A request under way on its own thread."""

    def __init__(self, silence: float, read: Callable[[Iterator[bytes]], T]) -> None:
        self._silence = silence
        self._read = read
        self._response: requests.Response | None = None
        self._abandoned = False

    def within(self, limit: float, open_response: _Opener) -> T:
        """What `read` makes of the body.

        Raises:
            NoAnswerError: there is none, or it is not whole after `limit` seconds.
        """
        outcome: queue.SimpleQueue[Callable[[], T]] = queue.SimpleQueue()
        threading.Thread(target=lambda: outcome.put(self._outcome(open_response)), daemon=True).start()
        try:
            result = outcome.get(timeout=limit)
        except queue.Empty:
            raise NoAnswerError(f"no whole answer within {limit:g} s") from None
        finally:
            self._abandon()
        return result()

    def _outcome(self, open_response: _Opener) -> Callable[[], T]:
        """A function that returns what was read, or raises what went wrong."""
        try:
            with _network_failures(self._silence), open_response() as response:
                self._response = response
                if response.status_code != 200:
                    raise _http_error(response, self._pieces(_MOST_ERROR_BYTES, "error"))
                value = self._read(self._pieces(_MOST_BYTES, "answer"))
        except BaseException as error:  # raised again where somebody waits for it
            return _raiser(error)
        return lambda: value

    def _pieces(self, most: int, what: str) -> Iterator[bytes]:
        assert self._response is not None
        seen = 0
        for piece in self._response.iter_content(_PIECE_BYTES):
            seen += len(piece)
            if seen > most:
                raise NoAnswerError(f"the {what} is larger than {most >> 10} KiB")
            if self._abandoned:
                return
            yield piece

    def _abandon(self) -> None:
        """Wakes a thread that still waits for bytes; without that the server would go on working for nobody."""
        self._abandoned = True
        shutdown = getattr(self._response and self._response.raw, "shutdown", None)  # since urllib3 2.3
        if shutdown is not None:
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                shutdown()


def _raiser(error: BaseException) -> Callable[[], Any]:
    def reraise() -> Any:
        raise error

    return reraise


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The lines of a body that are not blank, each as soon as it is whole; the last one may lack its end."""
    rest: list[bytes] = []
    for piece in pieces:
        first, *others = piece.split(b"\n")
        rest.append(first)
        if others:
            whole = [b"".join(rest), *others[:-1]]
            rest = [others[-1]]
            yield from (line for line in whole if line.strip())
    if (last := b"".join(rest)).strip():
        yield last


def checked_url(url: str, example: str) -> str:
    """The address without a trailing slash.

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
        raise UserError(f"--judge_url: got {without_password(url)!r}, expected http://HOST:PORT such as {example}")
    return url.rstrip("/")


def without_password(url: str) -> str:
    """The address as it may be shown and written."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.rpartition("@")[2]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def json_object(content: bytes) -> dict[str, Any] | None:
    """The JSON object that `content` is, or None where it is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sound(text: str) -> str:
    """The text with `?` for halves of surrogate pairs, which JSON can hold and a UTF-8 file cannot."""
    return text.encode(errors="replace").decode()


def one_line(text: str) -> str:
    """The text in one line of bounded length, with what would act on a terminal escaped."""
    line = " ".join(sound(text).split())
    line = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"


def error_text(value: Any) -> str:
    """The words of an error, in whichever of the forms that servers give it; empty where there are none.

    Text under `error` (Ollama), `message`, `detail`; an object under `error` with a `message` and perhaps the `param`
    that it is about (OpenAI); a list under `detail` of what is wrong (`msg`) with what (`loc`), as FastAPI has it.
    """
    return _words(value, depth=0)


def _words(value: Any, depth: int) -> str:
    if isinstance(value, str) or depth > _DEEPEST_ERROR:
        return value if isinstance(value, str) else str(value)
    if isinstance(value, list):
        return "; ".join(filter(None, (_words(item, depth + 1) for item in value[:_MOST_ERRORS])))
    if not isinstance(value, dict):
        return ""
    place = value.get("loc")
    about = [".".join(map(str, place))] if isinstance(place, list) else []
    said = ": ".join(dict.fromkeys([*about, *filter(None, (_words(value.get(name), depth + 1) for name in _ERROR))]))
    param = value.get("param")
    return f"{said} ({param})" if said and isinstance(param, str) and param not in said else said


def _object_or_fail(content: bytes, path: str) -> dict[str, Any]:
    value = json_object(content)
    if value is None:
        raise NoAnswerError(f"{path} is not a JSON object: {content[:_SHOWN_CHARACTERS]!r}")
    return value


def _http_error(response: requests.Response, pieces: Iterator[bytes]) -> NoAnswerError:
    """`HTTP 404: model 'x' not found`: the status, and the server's own words where it has some."""
    content = b""
    with contextlib.suppress(requests.RequestException, NoAnswerError):
        content = b"".join(pieces)
    words = _error_in(content) or response.headers.get("Location") or response.reason
    status = response.status_code
    return NoAnswerError(
        f"HTTP {status}: {words}",
        may_pass=status >= 500 or status in _WORTH_RETRYING,
        status=status,
        retry_after=_seconds(response.headers.get("Retry-After")),
    )


def _error_in(content: bytes) -> str:
    """The words of an error's body, JSON or plain; empty where it is a page, or nothing."""
    try:
        return error_text(json.loads(content))
    except (ValueError, RecursionError):
        text = content.decode(errors="replace").strip()
        return "" if text.startswith("<") else text


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.strip().isdecimal() else None


@contextlib.contextmanager
def _network_failures(silence: float) -> Iterator[None]:
    """Turns every exception of the network into a NoAnswerError."""
    try:
        yield
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise NoAnswerError(_network_reason(error, silence)) from error


def _network_reason(error: BaseException, silence: float) -> str:
    """The innermost cause: requests and urllib3 wrap it up to four times, with addresses of objects in the text."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    if any(isinstance(link, (TimeoutError, urllib3.exceptions.ReadTimeoutError)) for link in chain):
        return f"timed out: nothing came for {silence:g} s"
    cause = chain[-1]
    return (isinstance(cause, OSError) and cause.strerror) or str(cause) or type(cause).__name__


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in _LOOPBACK or host.startswith("127.")
