"""llama.cpp's server in a process of its own (`llama_server.py`)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from ollama_stub import unused_url


@contextmanager
def llama_serving(gguf: Path, n_ctx: int | None = None) -> Iterator[str]:
    """The address of a server with a model, for the length of a block.

    Args:
        gguf: the model's file.
        n_ctx: its context, where keys and values are to be kept in float32.
    """
    url = unused_url()
    script = Path(__file__).with_name("llama_server.py")
    command = [sys.executable, str(script), str(gguf), url.rpartition(":")[2], *([str(n_ctx)] if n_ctx else [])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        _wait_for(server, url)
        yield url
        assert server.stdin is not None
        server.stdin.close()


def _wait_for(server: subprocess.Popen[bytes], url: str) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server has ended"
        try:
            if requests.get(f"{url}/health", timeout=1).ok:
                return
        except requests.RequestException:
            pass
        try:
            server.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("the server did not come up within a minute")
