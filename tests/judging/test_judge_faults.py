"""Every fault once in one run, every fault for good, and kills: scores are right or listed, answers asked for once."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import Launcher
from ollama_stub import DIGEST, FAULTS, WAITED_FOR, Action, OllamaStub, says

from fastft.scores.score import ScoreOptions, score

IMPATIENT = {"judge_timeout": 0.3, "judge_load_timeout": 10.0, "judge_total_timeout": 0.6, "judge_pause": 0.001}
PATIENT = {"judge_timeout": 30.0, "judge_load_timeout": 30.0, "judge_total_timeout": 30.0, "judge_pause": 0.001}
AT_ONCE = [name for name in FAULTS if name not in WAITED_FOR]


def write(run: Path, names: list[str]) -> None:
    """A response for each name, which its prompt holds."""
    entries = [
        {"instruction": f"Question <{name}>", "input": "", "output": "yes", "model_response": "no"} for name in names
    ]
    (run / "responses.json").write_text(json.dumps(entries), encoding="utf-8")


def name_in(prompt: str) -> str:
    found = re.search(r"Question <(.*?)>", prompt)
    assert found is not None
    return found[1]


def asked(stub: OllamaStub) -> Counter[str]:
    return Counter(map(name_in, stub.prompts()))


def given(scores: dict[str, Any]) -> list[int | None]:
    return [judgement["score"] for judgement in scores["judgements"]]


def scored(run: Path, stub: OllamaStub, **options: Any) -> dict[str, Any]:
    return score(ScoreOptions(run=run, judge_url=stub.url, **{**PATIENT, **options}))


@pytest.mark.parametrize("parallel", [1, 4])
def test_every_fault_once_and_every_score_is_right(tmp_path: Path, parallel: int) -> None:
    """Each question meets its own fault, is asked again, and gets its own answer."""
    assert len(AT_ONCE) >= 25
    stub = check_each_once(tmp_path, AT_ONCE, parallel, PATIENT)
    assert asked(stub) == dict.fromkeys(AT_ONCE, 2)


def test_every_wait_once_and_every_score_is_right(tmp_path: Path) -> None:
    """On a busy machine a sound answer may come too late as well: it is then asked for again, and is right."""
    stub = check_each_once(tmp_path, sorted(WAITED_FOR), 1, IMPATIENT)
    assert min(asked(stub).values()) >= 2


def check_each_once(run: Path, names: list[str], parallel: int, patience: dict[str, float]) -> OllamaStub:
    write(run, names)
    seen: Counter[str] = Counter()

    def route(prompt: str) -> Action:
        name = name_in(prompt)
        seen[name] += 1
        return FAULTS[name] if seen[name] == 1 else says(str(names.index(name)))

    with OllamaStub() as stub:
        stub.route = route
        scores = scored(run, stub, judge_parallel=parallel, **patience)
        assert given(scores) == list(range(len(names)))
        assert (scores["summary"]["n_scored"], scores["summary"]["unanswered_rows"]) == (len(names), [])
        before = asked(stub)
        assert given(scored(run, stub)) == given(scores)
        assert asked(stub) == before
    return stub


def test_every_fault_for_good_is_listed_and_the_rest_is_right(tmp_path: Path) -> None:
    """A sound question stands between any two, so that the server is not given up."""
    names = [name for fault in AT_ONCE for name in (fault, f"sound {fault}")]
    write(tmp_path, names)
    with OllamaStub() as stub:
        stub.route = lambda prompt: FAULTS.get(name_in(prompt), says("77"))
        scores = scored(tmp_path, stub, judge_retries=1, **PATIENT)
        assert given(scores) == [None, 77] * len(AT_ONCE)
        assert scores["summary"]["unanswered_rows"] == list(range(1, len(names), 2))
        assert scores["summary"]["no_judge"] is None
        assert asked(stub) == {name: 2 if name in FAULTS else 1 for name in names}
        for judgement in scores["judgements"][::2]:
            assert judgement["reason"]
            assert "\n" not in judgement["reason"]
            assert not judgement["answered"]
        before = asked(stub)
        stub.route = lambda _: says("55")
        assert given(scored(tmp_path, stub)) == [55, 77] * len(AT_ONCE)
        assert asked(stub) - before == dict.fromkeys(AT_ONCE, 1)


# Kills: fastft's own command line, in forks of a warm process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the launcher counts changes of the disk."""
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def launcher(folder: Path) -> Iterator[Launcher]:
    launcher = Launcher(folder)
    yield launcher
    launcher.close()


@pytest.fixture
def run(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder))


def kept_names(run: Path, names: list[str]) -> set[str]:
    """The questions whose answer is whole on the disk: each is answered with its own number."""
    journal = run / "judge-replies.jsonl"
    found = set()
    for line in journal.read_text().split("\n") if journal.is_file() else ():
        if line.endswith("}") and '"content"' in line:
            found.add(names[int(json.loads(line)["content"])])
    return found


class Killer:
    """Answers a few questions, then plays one more moment of the protocol, and hangs: the process is killed there."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.reached = threading.Event()
        self.last: Action | None = None
        self.left = 0

    def arm(self) -> None:
        self.reached.clear()
        self.left = self.chance.randint(1, 3)
        self.last = self.chance.choice([None, *map(FAULTS.get, sorted(WAITED_FOR))])

    def __call__(self, prompt: str) -> Action:
        self.left -= 1
        if self.left < -1 or (self.left < 0 and self.last is not None):
            return FAULTS["hangs without a word"]
        if self.left == 0:
            self.reached.set()
        return self.last if self.left == 0 and self.last is not None else says(*name_in(prompt).rjust(9))

    def kill(self, pid: int) -> None:
        assert self.reached.wait(60)
        time.sleep(self.chance.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)


def check_kills(launcher: Launcher, run: Path, seed: int, kills: int) -> None:
    """A run that is killed `kills` times, each time at another moment of one of its questions, and then goes on."""
    names = [str(number) for number in range(4 * kills)]
    write(run, names)
    killer = Killer(random.Random(seed))
    with OllamaStub() as stub:
        stub.route = killer
        argv = ["score", "--run", str(run), "--judge_url", stub.url]
        for _ in range(kills):
            killer.arm()
            known, before = kept_names(run, names), asked(stub)
            killer.kill(launcher.start(argv))
            assert launcher.wait().exit == -signal.SIGKILL
            assert not known & set(asked(stub) - before)
            assert known <= kept_names(run, names)
        known, before = kept_names(run, names), asked(stub)
        killer.left = 1000
        ended = launcher.run(argv)
        assert ended.exit == 0, ended.said
        assert asked(stub) - before == dict.fromkeys(set(names) - known, 1)
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    assert given(scores) == list(range(len(names)))
    assert kept_names(run, names) == set(names)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of a warm process")
def test_kills_at_ten_moments_lose_nothing_and_ask_nothing_twice(launcher: Launcher, run: Path) -> None:
    check_kills(launcher, run, seed=7, kills=10)


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of a warm process")
@pytest.mark.parametrize("seed", range(10))
def test_kills_at_a_hundred_moments(launcher: Launcher, run: Path, seed: int) -> None:
    check_kills(launcher, run, seed=seed, kills=10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of a warm process")
def test_kills_before_each_change_of_the_disk(launcher: Launcher, run: Path) -> None:
    """Among them the journal's own lines and each step of writing scores.json."""
    write(run, ["0", "1", "2"])
    with OllamaStub() as stub:
        stub.route = lambda prompt: says(name_in(prompt))
        argv = ["score", "--run", str(run), "--judge_url", stub.url]
        for change in range(1, 100):
            for name in ("judge-replies.jsonl", "scores.json"):
                (run / name).unlink(missing_ok=True)
            before = asked(stub)
            ended = launcher.run(argv, kill_at=change)
            if ended.exit == 0:
                break
            known = kept_names(run, ["0", "1", "2"])
            assert launcher.run(argv).exit == 0
            scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
            assert given(scores) == [0, 1, 2]
            assert all((asked(stub) - before)[name] == 1 for name in known)
        assert change > 10


def test_a_line_of_the_journal_that_is_torn_is_asked_again_and_the_rest_is_not(tmp_path: Path) -> None:
    names = ["0", "1", "2"]
    write(tmp_path, names)
    with OllamaStub() as stub:
        stub.route = lambda prompt: says(name_in(prompt))
        scored(tmp_path, stub)
        journal = tmp_path / "judge-replies.jsonl"
        journal.write_bytes(journal.read_bytes()[:-20])
        assert given(scored(tmp_path, stub)) == [0, 1, 2]
        assert asked(stub) == {"0": 1, "1": 1, "2": 2}
    assert DIGEST in journal.read_text()
