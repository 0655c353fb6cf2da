"""The command of docs/lm-eval.md, run as it stands there, on a model that knows half of the questions."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fastft.answers.generation import generate
from fastft.answers.options import GenerateOptions
from fastft.run.config import TrainOptions
from fastft.scores.score import ScoreOptions, score
from fastft.training.train import train

ROOT = Path(__file__).parents[2]
QUESTIONS = ROOT / "docs/lm-eval/questions.jsonl"
LM_EVAL = shutil.which("lm_eval")


def documented_command() -> list[str]:
    """The words of the page's command, without the assignments before it."""
    (block,) = [one for one in re.findall(r"```\n(.*?)```", (ROOT / "docs/lm-eval.md").read_text(), re.DOTALL)
                if "lm_eval run" in one]  # fmt: skip
    words = shlex.split(block.replace("\\\n", " ").partition("\n")[2])
    assert words[:2] == ["HF_HUB_OFFLINE=1", "lm_eval"]
    return words[1:]


def test_the_documented_command_names_the_tasks_beside_its_page() -> None:
    command = documented_command()
    tasks = command[command.index("--tasks") + 1].split(",")
    folder = ROOT / command[command.index("--include_path") + 1]
    assert sorted(tasks) == sorted(path.stem for path in folder.glob("*.yaml"))
    assert "pretrained=out/demo/model" in command


@pytest.mark.long
@pytest.mark.skipif(LM_EVAL is None, reason="lm_eval is not on the PATH: it is installed in an environment of its own")
def test_lm_eval_finds_what_fastft_finds(tmp_path: Path) -> None:
    """Exact matches are the same, and the likeliest choices but for one question: fastft counts the end-of-text too."""
    lines = QUESTIONS.read_text().splitlines()
    known = tmp_path / "known.jsonl"
    known.write_text("\n".join(lines[::2]))
    run = tmp_path / "run"
    train(TrainOptions(
        data=str(known), split=[1, 0, 0], test_data=str(QUESTIONS), model="pico", weights="none", out=run, steps=150,
        batch_size=9, lr=5e-3, eval_every=0, samples=0, keep_best=False, dtype="fp32", device="cpu",
    ))  # fmt: skip
    generate(GenerateOptions(run=run, max_new_tokens=32, device="cpu"))
    ours = score(ScoreOptions(run=run, judge="none"))["summary"]
    command = [word.replace("out/demo/model", str(run / "model")) for word in documented_command()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(LM_EVAL), *command[1:], "--output_path", str(tmp_path / "found")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "found").rglob("results*.json")
    theirs = json.loads(found.read_text())["results"]
    right = theirs["fastft_answers"]["exact_match,response"]
    assert 0.3 < right < 0.7  # it knows the half that it was taught
    assert right == pytest.approx(ours["exact_match"] / 100)
    likeliest = ours["choices_by_likelihood"]["total"]["accuracy"] / 100
    assert likeliest >= 0.5
    assert abs(theirs["fastft_choices"]["acc,none"] - likeliest) < 1.5 / len(lines)
