"""README's blocks on data and questions of one's own, run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = dict(re.findall(r"<!-- runs: (\w+) -->\n```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL))


@pytest.mark.parametrize("name", ["json", "columns", "chat", "splits", "ask"])
def test_it_runs(tmp_path: Path, name: str) -> None:
    fastft = tmp_path / "bin" / "fastft"
    fastft.parent.mkdir()
    fastft.write_text(f'#!/bin/sh\nexec {sys.executable} -m fastft "$@"\n')
    fastft.chmod(0o755)
    places = [str(README.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "PATH": f"{fastft.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(places),
    }  # fmt: skip
    script = f"set -e\n{BLOCKS[name]}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(BLOCKS[name].splitlines()) <= 10
    run, *others = sorted((tmp_path / "out").iterdir())
    assert [other.name for other in others] == (["untuned"] if name == "ask" else [])
    assert (run / "model" / "model.safetensors").is_file()
    if name == "splits":
        asked = [entry["instruction"] for entry in json.loads((run / "responses.json").read_text())]
        assert asked == [f"test {n} plus 1?" for n in range(1, 5)]
