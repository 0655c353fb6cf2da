"""Two hosts train what one process trains: through a hostfile, torchrun's rendezvous, variables set by hand, and SLURM.

The hosts are network namespaces of this machine (`hosts.sh`), a rank on each.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path

import pytest
from filelock import FileLock
from launching import Launcher
from runs import (
    LAUNCH,
    PATIENCE_S,
    Trained,
    arguments,
    assert_one_curve,
    assert_same_run,
    settings,
    wait_for_lines,
    wait_until,
    write_records,
)
from started import catches_sigterm, started

import fastft

HOSTS_SH = Path(__file__).parents[1] / "support" / "hosts.sh"
FIRST, SECOND = "fastft1", "fastft2"
BIN = Path(sys.executable).parent
TRAIN = LAUNCH / "train.py"
TRAIN_PY = "launch/train.py"
CURVE = {"steps": 8, "eval_every": 4}
STOPPED = {"steps": 80, "save_every": 5, "eval_every": 20, "samples": 0, "lr": 1e-3, "schedule": "cosine"}
STATES_ON_THE_WAY = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
"""Of a SLURM job that is not at its end."""


def missing(packages: dict[str, str]) -> str:
    """Why two hosts cannot be had here; empty where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux, and root: hosts are network namespaces"
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], check=False, capture_output=True).returncode:
        return "needs the right to make namespaces, which this root has not"
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    if absent := [tool for tool in packages if shutil.which(tool, path=path) is None]:
        names = " ".join(dict.fromkeys(packages[tool] for tool in absent))
        return f"needs {', '.join(absent)}: apt-get install -y --no-install-recommends {names}"
    return ""


TOOLS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
SLURM_TOOLS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "sbatch": "slurm-client"}


def hosts_sh(*words: str, cwd: Path | None = None) -> str:
    """What a call of `hosts.sh` prints."""
    command = [str(HOSTS_SH), *words]
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


@pytest.fixture
def hosts() -> Iterator[None]:
    """The two hosts, of which a machine has one pair."""
    if reason := missing(TOOLS):
        pytest.skip(reason)
    with FileLock(Path(tempfile.gettempdir()) / "fastft-hosts.lock"):
        try:
            # Daemons would keep the pipes of a captured output open.
            subprocess.run([HOSTS_SH, "up"], check=True, timeout=PATIENCE_S)
            yield
        finally:
            subprocess.run([HOSTS_SH, "down"], check=True, timeout=PATIENCE_S)


@pytest.fixture
def slurm(hosts: None) -> None:
    """SLURM on the two hosts."""
    if reason := missing(SLURM_TOOLS):
        pytest.skip(reason)
    subprocess.run([HOSTS_SH, "slurm"], check=True, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("hosts") / "records.json")


@pytest.fixture(scope="module")
def alone(data: Path) -> Trained:
    """The curve of one process."""
    run = data.with_name("alone")
    fastft.train(fastft.TrainOptions(**{**settings(data, run, **CURVE, threads=None), "data": str(data)}))
    return Trained(run)


@pytest.fixture(scope="module")
def unbroken(data: Path) -> Path:
    """A longer run of two ranks under ZeRO-2, which nobody disturbs."""
    run = data.with_name("unbroken")
    warm = Launcher(run.parent)
    try:
        ended = warm.run_ranks(["train", *arguments(settings(data, run, "zero2", **STOPPED))], 2)
    finally:
        warm.close()
    assert [one.exit for one in ended] == [0, 0], ended[0].said
    return run


def ranks() -> dict[str, dict[int, int]]:
    """The ranks that run on each host, with their process ids: `{host: {rank: pid}}`."""
    found: dict[str, dict[int, int]] = {FIRST: {}, SECOND: {}}
    for host, on_host in found.items():
        listed = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=True, timeout=60)
        for pid in map(int, listed.stdout.split()):
            with contextlib.suppress(OSError):  # it has ended
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
                environ = dict(entry.split("=", 1) for entry in entries if "=" in entry)
                rank = environ.get("RANK", environ.get("SLURM_PROCID"))
                if (
                    rank is not None
                    and Path(words[0]).name.startswith("python")
                    and any(word.endswith(TRAIN_PY) for word in words)
                ):
                    on_host[int(rank)] = pid
    return found


def on(host: str, *command: str | Path) -> list[str | Path]:
    return [HOSTS_SH, "on", host, *command]


ONE_ON_EACH = {FIRST: [0], SECOND: [1]}


def trained_on_both(commands: list[list[str | Path]], folder: Path, environ: Sequence[dict[str, str]] = ()) -> str:
    """Runs a command line, or one for each host, to their good end, with a rank on each host; what they said."""
    took_part: dict[str, list[int]] = {}
    with ExitStack() as stack:
        running = [
            stack.enter_context(started(command, log=folder / f"log-{number}", cwd=folder, environ=variables))
            for number, (command, variables) in enumerate(zip_longest(commands, environ))
        ]

        def seen() -> bool:
            took_part.update({host: [*there] for host, there in ranks().items() if there})
            return took_part == ONE_ON_EACH or any(one.process.poll() is not None for one in running)

        wait_until(seen, every_s=0.1)
        statuses = [one.ended() for one in running]
        said = " ".join(one.said for one in running)
    assert statuses == [0] * len(running), said[-8000:]
    assert took_part == ONE_ON_EACH
    assert "on each of 2 ranks in fp32" in said
    return said


def hostfile(folder: Path) -> Path:
    """launch/hostfile with these hosts' names, and beside it what `deepspeed` passes on of the environment."""
    text = (LAUNCH / "hostfile").read_text().replace("node", "fastft").replace("slots=8", "slots=1")
    (folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    (folder / "hostfile").write_text(text)
    return folder / "hostfile"


def deepspeed(folder: Path, *words: str | Path) -> list[str | Path]:
    return on(FIRST, BIN / "deepspeed", "--hostfile", hostfile(folder), TRAIN, *words)


# One curve


@pytest.mark.long
def test_deepspeed_with_a_hostfile(hosts: None, data: Path, alone: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = trained_on_both([deepspeed(tmp_path, *arguments(settings(data, run, "zero2", **CURVE)))], tmp_path)
    assert "ZeRO stage 2" in said
    assert_one_curve(Trained(run), alone)


@pytest.mark.long
def test_torchruns_rendezvous(hosts: None, data: Path, alone: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchrun = [
        BIN / "torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"{FIRST}:29512", "--rdzv-id", "curve", TRAIN, *arguments(settings(data, run, **CURVE)),
    ]  # fmt: skip
    trained_on_both([on(host, *torchrun) for host in (FIRST, SECOND)], tmp_path)
    assert_one_curve(Trained(run), alone)


@pytest.mark.long
def test_ranks_started_by_hand(hosts: None, data: Path, alone: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    python = [sys.executable, TRAIN, *arguments(settings(data, run, "zero3", **CURVE))]
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": FIRST, "MASTER_PORT": "29515"}
    environ = [{**shared, "RANK": str(rank)} for rank in (0, 1)]
    said = trained_on_both([on(host, *python) for host in (FIRST, SECOND)], tmp_path, environ)
    assert "ZeRO stage 3" in said
    assert_one_curve(Trained(run), alone)


@pytest.mark.long
def test_srun(slurm: None, data: Path, alone: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    srun = on(FIRST, "srun", "--nodes", "2", sys.executable, TRAIN, *arguments(settings(data, run, "zero2", **CURVE)))
    trained_on_both([srun], tmp_path)
    assert_one_curve(Trained(run), alone)


# Stopped


@pytest.mark.long
def test_sigterm_to_deepspeed_saves_on_both_hosts(hosts: None, data: Path, unbroken: Path, tmp_path: Path) -> None:
    """It ends pdsh and ssh, through which the ranks print, before it has the ranks told."""
    run = tmp_path / "run"
    options = arguments(settings(data, run, "zero2", **STOPPED))
    with started(deepspeed(tmp_path, *options), log=tmp_path / "log", cwd=tmp_path) as running:
        wait_for_lines(run, 3)
        running.process.send_signal(signal.SIGTERM)
        assert running.ended() == 1
        wait_until(lambda: ranks() == {FIRST: {}, SECOND: {}}, every_s=0.1)
    assert not (run / "model").exists()
    (whole,) = (run / "checkpoints").glob("step-*")
    assert (run / "checkpoints" / whole.name.replace("step", "shards") / "DONE").is_file()
    said = trained_on_both([deepspeed(tmp_path, *options, "--resume")], tmp_path)
    assert f"resuming at step {whole.name.removeprefix('step-')} of {STOPPED['steps']}" in said
    assert_same_run(run, unbroken)


@pytest.mark.long
def test_a_slurm_job_goes_back_into_the_queue_until_it_is_done(
    slurm: None, data: Path, unbroken: Path, tmp_path: Path
) -> None:
    """Stopped while it imports, in its second life while it trains; the third comes to the end."""
    run, log = tmp_path / "run", tmp_path / "log"
    options = settings(data, run, "zero2", **STOPPED)
    del options["out"]
    job = hosts_sh(
        "on", FIRST, "env", f"PYTHON={sys.executable}", "OMP_NUM_THREADS=1", "DS_ACCELERATOR=cpu",
        "sbatch", "--parsable", f"--output={log}", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1",
        "--time=30", "launch/fastft.sbatch", str(run), *arguments(options),
        cwd=LAUNCH.parent,
    )  # fmt: skip

    def shown(name: str) -> str:
        return re.search(rf"\b{name}=(\S*)", hosts_sh("on", FIRST, "scontrol", "show", "job", job))[1]

    def stop() -> None:
        hosts_sh("on", FIRST, "scancel", "--signal=TERM", job)

    wait_until(lambda: all(any(map(catches_sigterm, there.values())) for there in ranks().values()), every_s=0.1)
    stop()
    wait_until(lambda: shown("Restarts") == "1", every_s=0.5)
    assert not (run / "config.yaml").exists()
    wait_for_lines(run, 3)
    stop()
    wait_until(lambda: shown("JobState") not in STATES_ON_THE_WAY, every_s=0.5)
    said = " ".join(log.read_text().split())
    assert (shown("JobState"), shown("Restarts"), shown("ExitCode")) == ("COMPLETED", "2", "0:0"), said[-8000:]
    assert "Traceback" not in said
    assert len(re.findall(r"stopped by SIGTERM at step \d+, saved", said)) == 1
    assert_same_run(run, unbroken)
