"""README's blocks on data and questions of one's own, run as they stand.

The shell is real; `fastft` in it hands its arguments to this process, which has imported everything already.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastft.cli import main

README = Path(__file__).parents[1] / "README.md"
BLOCKS = dict(re.findall(r"<!-- runs: (\w+) -->\n```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL))
HANDS_ON = """#!{python} -S
import json, socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect({path!r})
asked.sendall(json.dumps(sys.argv[1:]).encode())
asked.shutdown(socket.SHUT_WR)
sys.exit(int(asked.recv(16)))
"""


def run_as_it_stands(script: str, folder: Path) -> tuple[int, list[list[str]]]:
    """Runs a script in bash, its commands of fastft in this process: the shell's exit status, and those commands."""
    fastft, path = folder / "bin" / "fastft", str(folder / "socket")
    fastft.parent.mkdir()
    fastft.write_text(HANDS_ON.format(python=sys.executable, path=path))
    fastft.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fastft.parent}{os.pathsep}{os.environ['PATH']}"}
    asked: list[list[str]] = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        server.settimeout(0.05)
        shell = subprocess.Popen(["bash", "-ec", script], cwd=folder, env=environment)
        while shell.poll() is None:
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            with client, client.makefile("rb") as said:
                client.settimeout(None)
                asked.append(json.loads(said.read()))
                client.sendall(str(main(asked[-1])).encode())
    return shell.returncode, asked


@pytest.mark.parametrize("name", ["json", "columns", "chat", "splits", "ask", "lora", "take"])
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    status, asked = run_as_it_stands(BLOCKS[name], tmp_path)
    assert status == 0
    assert len(asked) >= 2
    assert len(BLOCKS[name].splitlines()) <= 10
    run, *others = sorted((tmp_path / "out").iterdir())
    assert [other.name for other in others] == {"ask": ["untuned"], "lora": ["mine", "top"]}.get(name, [])
    assert (run / "model" / "model.safetensors").is_file()
    if name == "lora":
        assert (tmp_path / "out/mine/model/adapter_model.safetensors").is_file()
        assert (tmp_path / "for-peft/adapter_config.json").is_file()
        assert (tmp_path / "for-transformers/model.safetensors").is_file()
    if name == "take":
        assert (tmp_path / "for-ollama" / "Modelfile").read_text().startswith("FROM ")
        assert (tmp_path / "for-transformers" / "README.md").is_file()
    if name == "splits":
        questions = [entry["instruction"] for entry in json.loads((run / "responses.json").read_text())]
        assert questions == [f"test {n} plus 1?" for n in range(1, 5)]


def test_a_command_that_fails_ends_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, asked = run_as_it_stands("fastft inspect --data nowhere.json\nfastft --version", tmp_path)
    assert status == 2
    assert len(asked) == 1
