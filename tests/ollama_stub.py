"""A scripted stand-in for an Ollama server: each POST /api/chat takes the next action, and the last one repeats."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: OllamaStub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.stub.gets.append(self.path)
        answers = {
            "/api/version": {"version": "0.9.0"},
            "/api/tags": {"models": [{"name": name, "model": name} for name in self.stub.models]},
        }
        if self.stub.get_override is not None:
            self.stub.get_override(self)
        elif self.path in answers:
            self.json(200, answers[self.path])
        else:
            self.json(404, {"error": "not found"})

    def do_POST(self) -> None:
        assert self.path == "/api/chat"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        action = self.stub.next_action(json.loads(body))
        action(self)

    def json(self, status: int, value: Any) -> None:
        self.plain(status, json.dumps(value).encode())

    def plain(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def start_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, body: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body))
        self.wfile.flush()


Action = Callable[[Handler], None]


def piece(text: str, *, done: bool = False) -> bytes:
    end = {"done_reason": "stop", "total_duration": 1} if done else {}
    return json.dumps({"message": {"role": "assistant", "content": text}, "done": done, **end}).encode() + b"\n"


def lines(*stream: bytes) -> Action:
    """Streams the lines under status 200 and ends the stream as a sound server does."""

    def act(handler: Handler) -> None:
        handler.start_stream()
        for line in stream:
            handler.chunk(line)
        handler.chunk(b"")

    return act


def says(*texts: str) -> Action:
    """A whole answer in pieces."""
    return lines(*(piece(text) for text in texts), piece("", done=True))


def status(code: int, error: str) -> Action:
    return lambda handler: handler.json(code, {"error": error})


def body(content: bytes) -> Action:
    return lambda handler: handler.plain(200, content)


def reset_after(*stream: bytes) -> Action:
    """Streams the lines, then drops the connection with a TCP reset."""

    def act(handler: Handler) -> None:
        handler.start_stream()
        for line in stream:
            handler.chunk(line)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True

    return act


def hang_after(*stream: bytes) -> Action:
    """Streams the lines, then says nothing until the stub is closed."""

    def act(handler: Handler) -> None:
        handler.start_stream()
        for line in stream:
            handler.chunk(line)
        handler.stub.closing.wait(10)
        handler.close_connection = True

    return act


class OllamaStub:
    """`with OllamaStub(says("80"), ...) as stub:` serves at `stub.url`; `stub.asked` holds the payloads."""

    def __init__(self, *actions: Action, models: Iterable[str] = ("llama3:latest",)) -> None:
        self.actions = list(actions)
        self.models = list(models)
        self.get_override: Action | None = None
        self.asked: list[dict[str, Any]] = []
        self.gets: list[str] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"stub": self})
        self._server = _QuietServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def next_action(self, payload: dict[str, Any]) -> Action:
        with self._lock:
            self.asked.append(payload)
            return self.actions[min(len(self.asked), len(self.actions)) - 1]

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
