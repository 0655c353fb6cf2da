"""A scripted stand-in for an Ollama server, on the loopback alone, and for an OpenAI-compatible one at the same port.

Each question takes the next action of the script, and the last one repeats; with `route` an action is chosen by what
is asked. `FAULTS` holds every way found in which a server, or the network before it, fails to answer whole; `ODDITIES`
holds answers that look strange and are whole. Nothing waits longer than until the stub is closed, or 10 s.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

DIGEST = "365c0bd3c000a25d28ddbf732fe1c6add414de7275464c4e4d1c3b5fcb5d8ad1"
LONGEST_WAIT_S = 10.0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: OllamaStub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.stub.gets.append(self.path)
        models = [
            {"name": name, "model": name, "size": 1, "digest": digest} for name, digest in self.stub.models.items()
        ]
        answers = {
            "/api/version": {"version": self.stub.version},
            "/api/tags": {"models": models},
            "/v1/models": {"object": "list", "data": [{"id": name, "object": "model"} for name in self.stub.models]},
        }
        if self.stub.get_override is not None:
            self.stub.get_override(self)
        elif self.path in answers:
            self.json(200, answers[self.path])
        else:
            self.json(404, {"error": "not found"})

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stub.headers.append(dict(self.headers))
        if self.path == "/api/show":
            self.show(payload["model"])
        elif self.path == "/api/pull":
            self.stub.pulls.append(payload)
            self.stub.pull(self)
        elif self.path == "/api/chat" and not payload["messages"]:
            self.stub.next_warm_up(payload)(self)
        elif self.path in ("/api/chat", "/v1/chat/completions"):
            self.stub.next_action(payload)(self)
        else:
            self.json(404, {"error": "not found"})

    def show(self, model: str) -> None:
        if model in self.stub.models or f"{model}:latest" in self.stub.models:
            self.json(200, self.stub.shown)
        else:
            self.json(404, {"error": f"model '{model}' not found"})

    def json(self, status: int, value: Any) -> None:
        self.plain(status, json.dumps(value).encode(), "application/json; charset=utf-8")

    def plain(self, status: int, body: bytes, kind: str = "text/plain", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def start_stream(self, kind: str = "application/x-ndjson") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, body: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body))
        self.wfile.flush()

    def reset(self) -> None:
        """Drops the connection with a TCP reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def hang(self) -> None:
        self.stub.closing.wait(LONGEST_WAIT_S)
        self.close_connection = True


Action = Callable[[Handler], None]


def piece(text: str, *, done: bool = False, **more: Any) -> bytes:
    end = {"done_reason": "stop", "total_duration": 1, "prompt_eval_count": 90, "eval_count": 2} if done else {}
    value = {"model": "llama3", "message": {"role": "assistant", "content": text}, "done": done, **end, **more}
    return json.dumps(value).encode() + b"\n"


def lines(*stream: bytes, kind: str = "application/x-ndjson") -> Action:
    """Streams the lines under status 200 and ends the stream as a sound server does."""

    def act(handler: Handler) -> None:
        handler.start_stream(kind)
        for line in stream:
            handler.chunk(line)
        handler.chunk(b"")

    return act


def says(*texts: str, **more: Any) -> Action:
    """A whole answer in pieces; `more` goes into the last line."""
    return lines(*(piece(text) for text in texts), piece("", done=True, **more))


def thinks(trace: str, text: str = "", **more: Any) -> Action:
    """An answer of a reasoning model, its trace in a place of its own; the trace alone filled the room by default."""
    last = piece("", done=True, **{"done_reason": "stop" if text else "length", **more})
    return lines(piece("", message={"role": "assistant", "thinking": trace, "content": ""}), piece(text), last)


def completes(text: Any, message: Mapping[str, Any] | None = None, tokens: int | None = 2, **choice: Any) -> Action:
    """A whole answer of an OpenAI-compatible server; `message` goes into its message, `tokens` is what it counts."""
    usage = {} if tokens is None else {"usage": {"prompt_tokens": 90, "completion_tokens": tokens}}
    value = {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **(message or {})},
                "finish_reason": "stop",
                **choice,
            }
        ],
        **usage,
    }
    return lambda handler: handler.json(200, value)


def refuses(*names: str, then: Action, words: str = "Unsupported parameter: '{name}' is not supported.") -> Action:
    """Refuses a request that has one of the parameters, by name; one without any gets the action."""

    def act(handler: Handler) -> None:
        payload = handler.stub.asked[-1]
        sent = [name for name in names if name in payload]
        if sent:
            status(400, {"message": words.format(name=sent[0]), "type": "invalid_request_error"})(handler)
        else:
            then(handler)

    return act


def status(code: int, error: Any, **headers: str) -> Action:
    return lambda handler: handler.plain(code, json.dumps({"error": error}).encode(), "application/json", **headers)


def body(content: bytes, kind: str = "text/html", **headers: str) -> Action:
    return lambda handler: handler.plain(200, content, kind, **headers)


def reset_after(*stream: bytes) -> Action:
    """Streams the lines, then drops the connection with a TCP reset."""

    def act(handler: Handler) -> None:
        handler.start_stream()
        for line in stream:
            handler.chunk(line)
        handler.reset()

    return act


def hang_after(*stream: bytes) -> Action:
    """Streams the lines, then says nothing until the stub is closed."""

    def act(handler: Handler) -> None:
        handler.start_stream()
        for line in stream:
            handler.chunk(line)
        handler.hang()

    return act


def wire(content: bytes, *, then: Action = lambda _: None) -> Action:
    """The bytes as they are, in place of a response, and the connection's end after `then`."""

    def act(handler: Handler) -> None:
        handler.wfile.write(content)
        handler.wfile.flush()
        then(handler)
        handler.close_connection = True

    return act


def drip(content: bytes, every_s: float) -> Action:
    """The bytes one by one, in place of a response."""

    def act(handler: Handler) -> None:
        for byte in content:
            if handler.stub.closing.wait(every_s):
                break
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
        handler.close_connection = True

    return act


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
_UNTIL_CLOSED = _HEAD + b"Connection: close\r\n\r\n"
_8 = piece("8")


def _chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


FAULTS: Mapping[str, Action] = {
    "closed without a word": wire(b""),
    "reset without a word": lambda handler: handler.reset(),
    "reset after the headers": reset_after(),
    "reset in mid-stream": reset_after(_8),
    "reset in the middle of a line": reset_after(_8[:20]),
    "hangs without a word": lambda handler: handler.hang(),
    "hangs after the headers": hang_after(),
    "hangs in mid-stream": hang_after(_8),
    "drips headers for ever": drip(b"HTTP/1.1 200 OK\r\n" + b"X-Slow: 1\r\n" * 1000, 0.02),
    "drips the answer for ever": wire(_CHUNKED, then=drip(_chunk(_8) * 1000, 0.02)),
    "HTTP 500": status(500, "llama runner process has terminated"),
    "HTTP 502 with a page": lambda handler: handler.plain(502, b"<html>Bad Gateway</html>", "text/html"),
    "HTTP 503, queue full": status(503, "server busy, please try again.  maximum pending requests exceeded"),
    "HTTP 504": status(504, "gateway timeout"),
    "HTTP 429": status(429, "slow down", Retry_After="0"),
    "HTTP 408": status(408, "too slow"),
    "an error in the first line": lines(b'{"error": "model failed to load"}\n'),
    "an error in mid-stream": lines(_8, b'{"error": "model runner has\\nunexpectedly stopped"}\n'),
    "the stream ends without done": lines(_8),
    "the stream ends before it starts": lines(),
    "the stream ends within a chunk": wire(_CHUNKED + b"ff\r\n" + _8),
    "the stream ends within a line": lines(_8, piece("5", done=True)[:-20]),
    "done:false, not streamed": lambda handler: handler.json(200, json.loads(piece("85"))),
    "less than its length": wire(_HEAD + b"Content-Length: 4000\r\n\r\n" + _8),
    "an empty body": body(b""),
    "garbage": body(bytes(range(256))),
    "not UTF-8": lines(b'{"message": {"content": "8\xff"}, "done": true}\n'),
    "a page under status 200": body(b"<html>\n<title>It works!</title>\n</html>"),
    "a list for a line": lines(b"[1]\n"),
    "a line nested too deeply": lines(b"[" * 100_000 + b"\n"),
    "a number for the text": lines(b'{"message": {"content": 8}, "done": true}\n'),
    "text for the message": lines(b'{"message": "8", "done": true}\n'),
    "a huge line": lines(*[b"8" * 65536] * 24),
    "a huge answer": lines(*[piece("8" * 4096)] * 400),
    "a chunk without a size": wire(_CHUNKED + b"xyz\r\n" + _8),
    "no HTTP at all": wire(b"220 mail.example.org ESMTP\r\n"),
    "compressed, it says": body(_8, Content_Encoding="gzip"),
}

WAITED_FOR = frozenset(name for name in FAULTS if name.startswith(("hangs", "drips")))
"""Those that only a timeout ends."""


def oddities(text: str) -> dict[str, Action]:
    """Whole answers that look strange."""
    answer = piece(text) + piece("", done=True)
    return {
        "in one line": lines(piece(text, done=True)),
        "cut anywhere": lines(answer[:9], answer[9:40], answer[40:-5], answer[-5:]),
        "no end of the last line": lines(answer[:-1]),
        "blank lines between": lines(b"\n \n", answer.replace(b"\n", b"\r\n\r\n")),
        "a length in place of chunks": body(answer, "application/x-ndjson"),
        "until the connection ends": wire(_UNTIL_CLOSED + answer),
        "HTML, it says": lines(answer, kind="text/html"),
        "drips, but ends": drip(_HEAD + b"Content-Length: %d\r\n\r\n" % len(answer) + answer, 0.0002),
        "hangs after done:true": hang_after(answer),
        "more after done:true": lines(answer, piece("99"), b"garbage"),
        "unknown keys": lines(piece(text, thinking="hm", logprobs=None), piece("", done=True, x={"y": [1]})),
        "a thought in a place of its own": lines(
            b'{"message": {"role": "assistant", "thinking": "say 7", "content": ""}, "done": false}\n', answer
        ),
        "no counts": lines(piece(text), b'{"done": true}\n'),
    }


def pull_lines(*stream: Mapping[str, Any], then: Callable[[OllamaStub], object] = lambda _: None) -> Action:
    """A pull's stream; `then` happens to the stub at its end, as when the model is there now."""

    def act(handler: Handler) -> None:
        then(handler.stub)
        lines(*(json.dumps(line).encode() + b"\n" for line in stream))(handler)

    return act


class OllamaStub:
    """`with OllamaStub(says("80"), ...) as stub:` serves at `stub.url`; `stub.asked` holds the payloads."""

    def __init__(self, *actions: Action, models: Iterable[str] | Mapping[str, str] = ("llama3:latest",)) -> None:
        self.actions = list(actions)
        self.models = dict(models) if isinstance(models, Mapping) else dict.fromkeys(models, DIGEST)
        self.version = "0.9.0"
        self.shown: dict[str, Any] = {"capabilities": ["completion"], "model_info": {"llama.context_length": 8192}}
        self.get_override: Action | None = None
        self.route: Callable[[str], Action] | None = None
        """The action for a prompt, in place of the script."""
        self.warm_up: Action = lambda handler: handler.json(200, {"done": True, "done_reason": "load"})
        self.pull: Action = status(500, "no pull was planned")
        self.asked: list[dict[str, Any]] = []
        self.warm_ups: list[dict[str, Any]] = []
        self.pulls: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.gets: list[str] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"stub": self})
        self._server = _QuietServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def next_action(self, payload: dict[str, Any]) -> Action:
        with self._lock:
            self.asked.append(payload)
            number = len(self.asked)
        if self.route is not None:
            return self.route(payload["messages"][0]["content"])
        return self.actions[min(number, len(self.actions)) - 1]

    def next_warm_up(self, payload: dict[str, Any]) -> Action:
        self.warm_ups.append(payload)
        return self.warm_up

    def prompts(self) -> list[str]:
        """What was asked, in order."""
        return [payload["messages"][0]["content"] for payload in self.asked]

    def __enter__(self) -> OllamaStub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops serving: from here on connections are refused."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: Any) -> None:
        """A client that went away is part of the script."""


def unused_url() -> str:
    """An address at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
