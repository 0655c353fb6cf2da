"""The launchers that users start: `deepspeed`, `torchrun` and plain `python`, on one machine. `test_hosts.py` has two.

The ranks are processes of their own, which import everything anew; `test_ranks.py` forks them from a warm process.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from launching import Launcher
from runs import (
    LAUNCH,
    Trained,
    arguments,
    assert_one_curve,
    assert_same_run,
    settings,
    wait_for_lines,
    wait_until,
    write_records,
)
from started import Started, catches_sigterm, started
from warm_launcher import free_port

import fastft
from fastft.common.console import console, say
from fastft.run.config import TrainOptions

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="looks at processes in /proc")

BIN = Path(sys.executable).parent
TRAIN = LAUNCH / "train.py"
SMALL = {"steps": 4, "eval_every": 0, "samples": 0}
STOPPED = {"steps": 80, "save_every": 5, "eval_every": 20, "samples": 0, "lr": 1e-3, "schedule": "cosine"}

OPTIONS_OF_DEEPSPEED = ("num_gpus", "master_port")
SHOWN = (
    "has lost another rank (", "has not got on for", "it was in: ", "error: the run hangs", "nothing from rank",
    "times as long as the fastest for", "the same matrix products", "building its batches",
    "cannot write a shard of the checkpoint: ", "free space and go on with --resume", "its update is skipped (",
    "cannot meet the other",
)  # fmt: skip
FIRST_RANK_IS_LATE = "import os, time\nif os.environ.get('RANK') == '0': time.sleep(3)\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_records(tmp_path / "records.json")


def torchrun(*command: str | Path) -> list[str | Path]:
    return [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), *command]


def deepspeed(*command: str | Path) -> list[str | Path]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install deepspeed")
    return [BIN / "deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), *command]


LAUNCHERS = {"torchrun": torchrun, "deepspeed": deepspeed}


def completes(argv: list[str | Path], log: Path) -> Started:
    """Runs a command line to its end, which is a good one."""
    with started(argv, log=log) as running:
        status = running.ended()
        assert status == 0, running.said[-4000:]
        assert not running.left()
    return running


def assert_curve_of_one_process(run: Path, data: Path, zero: str = "plain", **options: Any) -> None:
    """Trains the same here, in this process alone."""
    alone = run.with_name("alone")
    values = settings(data, alone, **options, threads=None)
    fastft.train(fastft.TrainOptions(**{**values, "data": str(data)}))
    assert_one_curve(Trained(run), Trained(alone))


def test_deepspeed_trains_what_one_process_does(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = completes(deepspeed(TRAIN, *arguments(settings(data, run, "zero2", **SMALL))), tmp_path / "log")
    assert "on each of 2 ranks in fp32, ZeRO stage 2" in ended.said
    assert_curve_of_one_process(run, data, **SMALL)


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "zero", "says"),
    [
        (torchrun(TRAIN), "plain", "on each of 2 ranks in fp32;"),
        (torchrun("-m", "fastft", "train"), "zero3", "on each of 2 ranks in fp32, ZeRO stage 3"),
        ([sys.executable, TRAIN], "zero2", "on cpu in fp32, ZeRO stage 2"),
    ],
    ids=["torchrun", "torchrun -m fastft", "python"],
)
def test_other_launchers_train_what_one_process_does(
    launcher: list[str | Path], zero: str, says: str, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = {"steps": 8, "eval_every": 4}
    ended = completes([*launcher, *arguments(settings(data, run, zero, **options))], tmp_path / "log")
    assert says in ended.said
    assert_curve_of_one_process(run, data, **options)


# Stopped


def unbroken(data: Path, folder: Path, zero: str) -> Path:
    """A run of two ranks that nobody disturbs."""
    run = folder / "unbroken"
    warm = Launcher(folder)
    try:
        ended = warm.run_ranks(["train", *arguments(settings(data, run, zero, **STOPPED))], 2)
    finally:
        warm.close()
    assert [one.exit for one in ended] == [0, 0], ended[0].said
    return run


def stop(running: Started, name: str) -> None:
    """SIGTERM to the launcher. `deepspeed` on one machine passes none on: its group is told, as Ctrl-C or `timeout`
    tells a shell's whole job."""
    if name == "deepspeed":
        os.killpg(running.process.pid, signal.SIGTERM)
    else:
        running.process.send_signal(signal.SIGTERM)


@pytest.mark.long
@pytest.mark.parametrize(("name", "zero"), [("torchrun", "plain"), ("deepspeed", "zero2")])
def test_sigterm_to_the_launcher_saves_on_all_ranks(name: str, zero: str, data: Path, tmp_path: Path) -> None:
    """Also where nobody reads any more what the ranks say: a launcher that is told to end ends before they do."""
    run = tmp_path / "run"
    options = arguments(settings(data, run, zero, **STOPPED))
    with started(LAUNCHERS[name](TRAIN, *options), log=None) as running:
        wait_for_lines(run, 3)
        running.stop_reading()
        stop(running, name)
        assert running.ended() != 0  # launchers count every signal as a failure
        running.wait_until_none_is_left()
    assert not (run / "model").exists()
    (whole,) = (run / "checkpoints").glob("step-*")
    if zero != "plain":
        assert (run / "checkpoints" / whole.name.replace("step", "shards") / "DONE").is_file()
    ended = completes(LAUNCHERS[name](TRAIN, *options, "--resume"), tmp_path / "log")
    assert f"resuming at step {whole.name.removeprefix('step-')} of {STOPPED['steps']}" in ended.said
    assert_same_run(run, unbroken(data, tmp_path, zero))


@pytest.mark.long
def test_a_killed_rank_ends_the_launcher(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = arguments(settings(data, run, **STOPPED))
    with started(torchrun(TRAIN, *options), log=tmp_path / "killed") as running:
        wait_for_lines(run, 20)
        ranks = running.ranks()
        assert set(ranks) == {0, 1}
        ranks[1].kill()
        assert running.ended() == 1
        running.wait_until_none_is_left()
        assert f"Signal 9 (SIGKILL) received by PID {ranks[1].pid}" in running.said
    assert not (run / "model").exists()
    ended = completes(torchrun(TRAIN, *options, "--resume"), tmp_path / "log")
    assert "resuming at step " in ended.said
    assert_same_run(run, unbroken(data, tmp_path, "plain"))


@pytest.mark.long
@pytest.mark.parametrize("moment", ["at once", "torch is loaded", "the run is there"])
def test_sigterm_before_training_ends_nothing(moment: str, data: Path, tmp_path: Path) -> None:
    """A scheduler takes exit status 0 for an end that it may start again from."""
    run = tmp_path / "run"
    command = [sys.executable, TRAIN, *arguments(settings(data, run, **STOPPED)), "--resume"]
    with started(command, log=tmp_path / "log") as running:
        maps = Path(f"/proc/{running.process.pid}/maps")
        reached = {
            "at once": lambda: True,
            "torch is loaded": lambda: "libtorch_cpu" in maps.read_text(),
            "the run is there": (run / "config.yaml").is_file,
        }[moment]
        wait_until(lambda: catches_sigterm(running.process.pid) and reached())
        running.process.send_signal(signal.SIGTERM)
        assert running.ended() == 0, running.said
        assert "Traceback" not in running.said
    assert not (run / "model").exists()


@pytest.mark.long
def test_a_late_sigterm_changes_no_exit_status(data: Path, tmp_path: Path) -> None:
    """Schedulers and launchers send it more than once, also to a rank that has saved and is about to leave."""
    run = tmp_path / "run"
    command = [sys.executable, TRAIN, *arguments(settings(data, run, "zero2", **STOPPED))]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                started(
                    command,
                    log=tmp_path / f"log-{rank}",
                    environ={**shared, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
                )
            )
            for rank in (0, 1)
        ]
        wait_for_lines(run, 3)

        def told_again() -> bool:
            left = [rank for rank in ranks if rank.process.poll() is None]
            for rank in left:
                rank.process.send_signal(signal.SIGTERM)
            return not left

        wait_until(told_again, every_s=0.005)
        assert [rank.ended() for rank in ranks] == [0, 0], [rank.said for rank in ranks]
    assert len(list((run / "checkpoints").glob("step-*/DONE"))) == 1


def test_the_page_on_clusters_names_what_is_there() -> None:
    """Files, fastft's options, and the parts of messages that it shows."""
    root = LAUNCH.parent
    page = (root / "docs" / "clusters.md").read_text()
    for name in re.findall(r"\b((?:launch|tests|docs)/[\w./-]+)", page):
        assert (root / name).is_file(), name
    sources = "".join(path.read_text() for path in (root / "fastft").rglob("*.py"))
    for words in SHOWN:
        assert words in page, words
        assert words in sources, words
    for option in re.findall(r"--([a-z]+_[a-z_]+)", page):
        assert option in {*TrainOptions.__dataclass_fields__, *OPTIONS_OF_DEEPSPEED}, option


def test_what_nobody_reads_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`_file` and not the property, which reads as the stream of the moment, and would be put back as that one."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(console, "_file", stream)
        say("a line that reaches nobody")
        say("another one")


@pytest.mark.long
@pytest.mark.parametrize(("name", "status"), [("torchrun", 1), ("deepspeed", 2)])
def test_a_wrong_option_is_told_once(name: str, status: int, data: Path, tmp_path: Path) -> None:
    """By the first rank, though it is the last to find it and launchers end all when one has failed."""
    (tmp_path / "sitecustomize.py").write_text(FIRST_RANK_IS_LATE)
    environ = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    argv = LAUNCHERS[name](TRAIN, *arguments(settings(data, tmp_path / "run")), "--no_such_option", "1")
    with started(argv, log=tmp_path / "log", environ=environ) as running:
        assert running.ended() == status, running.said
        said = running.said
    assert said.count("error: fastft train: ") == 1, said
    assert re.search(r"exitcode : 2|exits with return code = 2", said), said
