"""Which rank a process is, what ranks tell each other, and how one that has gone away is noticed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forks import Ended, free_port, in_fork, in_forks, launched, on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.common.errors import FastftError, LostRank, TrainingError, UserError
from fastft.ranks.world import ALONE, World, group_of_one, joined, noticing_lost_ranks, world_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks of this process")

CPU = torch.device("cpu")


def of_torchrun(node: int, nodes: int, local_rank: int, local_size: int) -> dict[str, str]:
    """What torchrun tells a process; of its variables those that could mislead."""
    rank, size = node * local_size + local_rank, nodes * local_size
    return {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(local_size),
        "GROUP_RANK": str(node), "GROUP_WORLD_SIZE": str(nodes), "ROLE_RANK": str(rank), "ROLE_WORLD_SIZE": str(size),
        "ROLE_NAME": "default", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip


def of_deepspeed(node: int, nodes: int, local_rank: int, local_size: int) -> dict[str, str]:
    """What deepspeed's launcher tells a process."""
    rank, size = node * local_size + local_rank, nodes * local_size
    return {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank), "LOCAL_SIZE": str(local_size),
        "CROSS_RANK": str(node), "CROSS_SIZE": str(nodes), "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip


def of_job(nodes: int, local_size: int) -> dict[str, str]:
    """What SLURM tells every process of a job: a batch script, a shell, and the tasks of its steps."""
    return {
        "SLURM_JOB_ID": "38749", "SLURM_JOBID": "38749", "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NNODES": str(nodes), "SLURM_NTASKS": str(nodes * local_size), "SLURM_NPROCS": str(nodes * local_size),
        "SLURM_TASKS_PER_NODE": f"{local_size}(x{nodes})", "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
        "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_GTIDS": "0",
    }  # fmt: skip


def of_srun(node: int, nodes: int, local_rank: int, local_size: int) -> dict[str, str]:
    """What srun tells a step's task."""
    size = nodes * local_size
    return {
        **of_job(nodes, local_size),
        "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_TASKS_PER_NODE": f"{local_size}(x{nodes})",
        "SLURM_STEP_NODELIST": "node1" if nodes == 1 else f"node[1-{nodes}]", "SLURM_NODEID": str(node),
        "SLURM_PROCID": str(node * local_size + local_rank), "SLURM_LOCALID": str(local_rank),
    }  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([of_torchrun, of_deepspeed, of_srun]), st.integers(1, 5), st.integers(1, 9), st.data())
def test_launchers_tell_a_process_which_it_is(
    launcher: Callable[[int, int, int, int], dict[str, str]], nodes: int, local_size: int, data: st.DataObject
) -> None:
    node, local_rank = data.draw(st.integers(0, nodes - 1)), data.draw(st.integers(0, local_size - 1))
    got = world_of({"HOME": "/", **launcher(node, nodes, local_rank, local_size)})
    assert got == World(node * local_size + local_rank, nodes * local_size, local_rank, local_size)
    assert got.is_first == (node == local_rank == 0)


NOT_ONE_OF_SEVERAL = {
    "no launcher": {"HOME": "/", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
    "a SLURM batch script of four tasks": of_job(2, 2),
    "a shell that salloc has started as a step of its own": {
        **of_job(2, 2), "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1",
    },
    "a script that is told the number of its step": {**of_job(2, 2), "SLURM_STEP_ID": "4294967291"},
    "a step of one task in a job of four": {**of_srun(0, 1, 0, 1), "SLURM_NTASKS": "4"},
    "torchrun with one process": of_torchrun(0, 1, 0, 1),
    "RANK and WORLD_SIZE of a single process, set by hand": {"RANK": "0", "WORLD_SIZE": "1"},
}  # fmt: skip


@pytest.mark.parametrize("environ", NOT_ONE_OF_SEVERAL.values(), ids=NOT_ONE_OF_SEVERAL)
def test_a_process_that_is_not_one_of_several_is_alone(environ: dict[str, str]) -> None:
    assert world_of(environ) == ALONE == World(0, 1, 0, 1)


def test_what_torchrun_says_goes_before_what_srun_says_of_torchrun_itself() -> None:
    assert world_of({**of_srun(1, 2, 0, 1), **of_torchrun(1, 2, 3, 4)}) == World(7, 8, 3, 4)
    # A single process within a step of several has been told so.
    assert world_of({**of_srun(1, 2, 0, 1), **of_torchrun(0, 1, 0, 1)}) == ALONE


def test_without_what_is_local_one_machine_is_meant() -> None:
    assert world_of({"RANK": "2", "WORLD_SIZE": "3"}) == World(2, 3, 2, 3)


def without(environ: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key != name}


CONTRADICTIONS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "a rank of no world": ({"RANK": "0"}, ("WORLD_SIZE=None", "a whole number", "unset")),
    "a world without a rank": ({"WORLD_SIZE": "2"}, ("RANK=None", "a whole number", "torchrun", "unset")),
    "a rank in words": ({"RANK": "first", "WORLD_SIZE": "2"}, ("RANK=first", "a whole number", "unset")),
    "an empty rank": ({"RANK": "", "WORLD_SIZE": "2"}, ("RANK=,", "a whole number", "unset")),
    "a rank below 0": ({"RANK": "-1", "WORLD_SIZE": "2"}, ("RANK=-1", "a whole number", "unset")),
    "a rank with a fraction": ({"RANK": "1.0", "WORLD_SIZE": "2"}, ("RANK=1.0", "a whole number", "unset")),
    "the rank after the last": ({"RANK": "2", "WORLD_SIZE": "2"}, ("RANK=2", "WORLD_SIZE=2", "from 0 to 1", "unset")),
    "a world of none": ({"RANK": "0", "WORLD_SIZE": "0"}, ("RANK=0", "WORLD_SIZE=0", "expected", "unset")),
    "a local rank in words": ({**of_torchrun(0, 1, 0, 2), "LOCAL_RANK": "x"}, ("LOCAL_RANK=x", "a whole number")),
    "a local size in words": ({**of_torchrun(0, 1, 0, 2), "LOCAL_WORLD_SIZE": "x"}, ("LOCAL_WORLD_SIZE=x", "number")),
    "deepspeed's local size in words": ({**of_deepspeed(0, 1, 0, 2), "LOCAL_SIZE": "x"}, ("LOCAL_SIZE=x", "number")),
    "a task after the last": ({**of_srun(0, 1, 1, 2), "SLURM_PROCID": "2"}, ("got", "2", "from 0 to 1")),
    "a task of unknown place": (without(of_srun(0, 1, 1, 2), "SLURM_LOCALID"), ("SLURM_LOCALID=None", "a whole")),
    "a step of a number in words": ({**of_srun(0, 1, 1, 2), "SLURM_STEP_NUM_TASKS": "2(x1)"}, ("TASKS=2(x1)",)),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_named(name: str) -> None:
    environ, words = CONTRADICTIONS[name]
    with pytest.raises(UserError) as caught:
        world_of(environ)
    message = str(caught.value)
    assert message.startswith("got ")
    assert "expected" in message
    assert [word for word in words if word not in message] == [], message


NAMES = sorted({*of_torchrun(0, 1, 0, 2), *of_deepspeed(0, 1, 0, 2), *of_srun(0, 1, 0, 2)})


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), st.integers(-2, 9).map(str) | st.text(max_size=3)))
def test_whatever_the_variables_say_a_world_is_whole_or_refused(environ: dict[str, str]) -> None:
    with contextlib.suppress(UserError):
        world = world_of(environ)
        assert 0 <= world.rank < world.size


def test_alone_nothing_travels() -> None:
    assert not dist.is_initialized()
    assert ALONE.sum([1, 0.25]) == [1, 0.25]
    assert ALONE.gather("mine") == ["mine"]
    with ALONE.together():
        pass
    with pytest.raises(UserError, match="mine") as caught, ALONE.together():
        raise UserError("mine")
    assert caught.value.common


def results(ended: list[Ended]) -> list[object]:
    """What the ranks gave, all of which ended well."""
    assert [one for one in ended if one.exit or isinstance(one.gave, Exception)] == []
    return [one.gave for one in ended]


def test_sums_are_the_same_bits_on_all_ranks() -> None:
    """In float64, in which 1/3 + 2/3 + ... and 2 ** 40 + 1 are something else than in float32."""
    parts = [[0.1 * 3**rank, 2.0**40 + rank, -float(rank)] for rank in range(3)]

    def act(world: World) -> object:
        return [one.hex() for one in world.sum(parts[world.rank])]

    first, *others = results(on_ranks(3, act))
    assert others == [first, first]
    got = [float.fromhex(one) for one in first]
    exact = [sum(column) for column in zip(*parts, strict=True)]
    assert got == pytest.approx(exact, rel=1e-15)
    in_float32 = torch.tensor(parts, dtype=torch.float32).sum(0).tolist()
    assert in_float32 != pytest.approx(exact, rel=1e-15)


def test_gathered_values_are_in_the_order_of_the_ranks() -> None:
    def act(world: World) -> object:
        time.sleep(0.05 * (world.size - world.rank))  # the last one comes first
        return world.gather({"rank": world.rank, "text": "x" * 10**world.rank}), world.gather(None)

    values = [{"rank": rank, "text": "x" * 10**rank} for rank in range(3)]
    assert results(on_ranks(3, act)) == [(values, [None] * 3)] * 3


def test_the_first_rank_that_differs_is_named() -> None:
    def act(world: World) -> object:
        return [world.differing(value) for value in ("alike", world.rank // 2, world.rank)]

    assert results(on_ranks(3, act)) == [[None, "rank 2", "rank 1"]] * 3
    assert ALONE.differing("mine") is None


def outcome(world: World, mistakes: dict[int, FastftError]) -> tuple[str, str, bool, int, bool] | None:
    """The error that `together` raises on this rank: its class, message, whether it is common, its exit status, and
    whether it came from this rank's own."""
    mine = mistakes.get(world.rank)
    try:
        with world.together():
            if mine is not None:
                raise mine
    except FastftError as error:
        return type(error).__name__, str(error), error.common, error.exit_status, error.__cause__ is mine
    return None


def test_a_mistake_on_any_rank_ends_the_block_on_all() -> None:
    """One rank's is named; where several have one, the lowest rank's; where all have, it is said as it is."""
    everywhere = {rank: UserError(f"no file on {rank}") for rank in range(3)}

    def act(world: World) -> object:
        return [
            outcome(world, {}),
            outcome(world, {1: UserError("no file")}),
            outcome(world, {2: TrainingError("not finite"), 1: UserError("no file")}),
            outcome(world, {0: TrainingError("not finite")}),
            outcome(world, everywhere),
            outcome(world, {}),
        ]

    expected = [
        None,
        ("UserError", "rank 1: no file", True, 2, True),
        ("UserError", "rank 1: no file", True, 2, True),
        ("TrainingError", "rank 0: not finite", True, 1, True),
        ("UserError", "no file on 0", True, 2, True),
        None,
    ]
    assert results(on_ranks(3, act)) == [expected] * 3


def test_blocks_within_blocks_name_the_rank_once() -> None:
    def act(world: World) -> object:
        try:
            with world.together(), world.together():
                if world.rank == 1:
                    raise UserError("no file")
        except UserError as error:
            return str(error)
        return None

    assert results(on_ranks(2, act)) == ["rank 1: no file"] * 2


# What torch says when a rank has gone away. Of gloo: by trying, with a rank killed, stopped or hanging, in torch 2.13;
# of NCCL: as users report it, in the issues that are named.
LOST = {
    "gloo: a rank is killed while it sends": (
        "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:22752: "
        "Connection reset by peer. This is typically caused by a remote worker hanging or bugs in the application. "
        "Check the logs of the remote worker before reporting an error. GLHF! 🏖️"
    ),
    "gloo: a rank has ended": (
        "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
        "[127.0.0.1]:7849. This is typically caused by a remote worker crashing."
    ),
    "gloo: a rank hangs (facebookresearch/detectron2#5121)": (
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:136] Timed out waiting 1800000ms for send "
        "operation to complete"
    ),
    "gloo: after a rank was given up": "Application timeout caused pair closure",
    "gloo: a machine is off": "[../gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:4871: Connection timed out",
    "gloo: no way to a machine": "[../gloo/transport/tcp/pair.cc:799] connect [10.0.0.2]:60137: No route to host",
    "gloo: a rank has ended, written to": "[../gloo/transport/tcp/pair.cc:394] writev [10.0.0.2]:4871: Broken pipe",
    "gloo: a rank cannot be reached (ray-project/ray#37461)": (
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:799] connect [127.0.1.1]:60137: Connection refused"
    ),
    "NCCL before torch 2.1 (zai-org/GLM-130B#132)": (
        "NCCL communicator was aborted on rank 2.  Original reason for failure was: [Rank 2] Watchdog caught "
        "collective operation timeout: WorkNCCL(SeqNum=10, OpType=BROADCAST, Timeout(ms)=1800000) ran for 1805457 "
        "milliseconds before timing out."
    ),
    "NCCL: a rank has ended (tatsu-lab/stanford_alpaca#207)": (
        "NCCL error: remote process exited or there was a network error, NCCL version 2.14.3\nncclRemoteError: A call "
        "failed possibly due to a network error or a remote process exiting prematurely.\nLast error:\nNET/IB : Got "
        "completion from peer 11.214.147.122<39138> with error 12, opcode 0, len 0, vendor err 129"
    ),
    "NCCL: the network": (
        "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1269, unhandled system error, NCCL version "
        "2.14.3"
    ),
    "NCCL before torch 2.1, internal (NVIDIA/nccl#1514)": (
        "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1275, internal error, NCCL version 2.14.3\n"
        "ncclInternalError: Internal check failed.\nLast error:\nNet : Connection closed by remote peer user<50260>"
    ),
    "a long one": "Connection closed by peer " + "x" * 2000,
}  # fmt: skip

LOST_BY_CLASS = {
    "the first rank has ended": dist.DistNetworkError(
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"
    ),
    "a rank does not come": dist.DistStoreError("wait timeout after 60000ms, keys: /default_pg/0//cpu//0/rank_1"),
    "NCCL (NVIDIA/nccl#2076)": dist.DistBackendError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a "
        "network error, NCCL version 2.21.5\nncclRemoteError: A call failed possibly due to a network error or a "
        "remote process exiting prematurely.\nLast error:\nsocketProgressOpt: Call to recv failed"
    ),
}


@pytest.mark.parametrize(
    "error", [*map(RuntimeError, LOST.values()), *LOST_BY_CLASS.values()], ids=[*LOST, *LOST_BY_CLASS]
)
def test_a_lost_rank_is_told_in_one_line(error: RuntimeError) -> None:
    with pytest.raises(LostRank) as caught, noticing_lost_ranks(World(1, 4)):
        raise error
    message = str(caught.value)
    assert message.startswith("rank 1 has lost another rank (")
    assert " ".join(str(error).partition("\n")[0][:100].split()) in " ".join(message.split())
    assert "--resume" in message
    assert "\n" not in message
    assert len(message) < 500
    assert caught.value.__cause__ is error
    assert caught.value.exit_status == 1
    assert not caught.value.common  # each rank says whom it misses


def test_what_nccl_says_last_is_told_without_torchs_stack() -> None:
    error = dist.DistBackendError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, invalid usage (run with NCCL_DEBUG=WARN "
        "for details), NCCL version 2.27.5\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
        "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000\nException raised from "
        "create at NCCLUtils.cpp:93 (most recent call first):\nframe #0: c10::Error::Error + 0x96 (0x7f15b276c1b6)"
    )
    with pytest.raises(LostRank) as caught, noticing_lost_ranks(World(1, 4)):
        raise error
    assert "Last error: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000)" in str(caught.value)


OTHERS = {
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x32 and 64x32)"),
    "dtypes": RuntimeError("expected scalar type Half but found Float"),
    "a graph used twice": RuntimeError("Trying to backward through the graph a second time"),
    "a GPU's fault": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "a GPU's memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "a host's memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    "a file that torch cannot write": RuntimeError(
        "[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"
    ),
    "ranks that do not say the same": RuntimeError(
        "[enforce fail at gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 1000 vs 4. Received data "
        "size doesn't match expected size. Is there a distributed collective mismatch in your code?"
    ),
    "shared memory": RuntimeError("unable to open shared memory object </torch_1> in read-write mode"),
    "too deep": RecursionError("maximum recursion depth exceeded"),
    "not there": NotImplementedError("Could not run 'aten::foo' with arguments from the 'CPU' backend"),
    "of another class": ValueError("Connection closed by peer"),
    "a user's mistake": UserError("no file"),
}


@pytest.mark.parametrize("error", OTHERS.values(), ids=OTHERS)
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, noticing_lost_ranks(World(1, 4)):
        raise error
    assert caught.value is error


def test_a_rank_that_ends_is_noticed_by_the_others() -> None:
    """Whatever it was doing: the others wait for it in a sum, or in a block that a bug has left."""

    def gone(world: World) -> object:
        if world.rank == 1:
            os._exit(9)
        return world.sum([1.0])

    def bug(world: World) -> object:
        with world.together():
            if world.rank == 1:
                raise ZeroDivisionError
        return "not ended"

    for act, exit_status in ((gone, 9), (bug, 0)):
        first, second = on_ranks(2, act)
        assert isinstance(first.gave, LostRank), first
        assert str(first.gave).startswith("rank 0 has lost another rank (")
        assert second.exit == exit_status
        assert second.gave is None or isinstance(second.gave, ZeroDivisionError)


def test_a_rank_that_hangs_is_given_up(tmp_path: Path) -> None:
    given_up = tmp_path / "given up"

    def act(world: World) -> object:
        while world.rank == 1 and not given_up.exists():
            time.sleep(0.01)
        try:
            return world.sum([1.0])
        finally:
            given_up.touch()

    first, second = on_ranks(2, act, timeout_s=1)
    assert isinstance(first.gave, LostRank), first
    assert "Timed out" in str(first.gave)
    assert isinstance(second.gave, LostRank), second


def test_ranks_that_do_not_come_are_named_with_where_they_were_expected() -> None:
    """The first of two finds none, and the second of two has no first."""

    def alone(rank: int) -> object:
        os.environ.update(launched(rank, 2, ports[rank]))
        with joined(CPU, timeout_s=1):
            return "met"

    ports = [free_port(), free_port()]
    for rank, ended in enumerate(in_forks(lambda: alone(0), lambda: alone(1))):
        assert type(ended.gave) is UserError, ended
        message = str(ended.gave)
        assert message.startswith(f"rank {rank} cannot meet the other 1 ranks at 127.0.0.1:{ports[rank]} (")
        assert [word for word in ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME") if word not in message] == []


def test_a_process_group_that_is_there_is_taken_and_left() -> None:
    """A program that trains within ranks of its own keeps them."""
    port = free_port()

    def act(rank: int) -> object:
        os.environ.update(launched(rank, 2, port))
        dist.init_process_group("gloo")
        with joined(CPU, timeout_s=30) as world:
            total = world.sum([1.0])
        return world, total, dist.is_initialized()

    got = results(in_forks(lambda: act(0), lambda: act(1)))
    assert got == [(World(rank, 2, rank, 2), [2.0], True) for rank in range(2)]


def test_ranks_that_have_met_part_after_the_block_however_it_ends() -> None:
    port = free_port()

    def act(rank: int) -> object:
        os.environ.update(launched(rank, 2, port))
        try:
            with joined(CPU, timeout_s=30) as world:
                inside = dist.is_initialized()
                world.gather(None)
                raise ZeroDivisionError
        except ZeroDivisionError:
            return world, inside, dist.is_initialized()

    got = results(in_forks(lambda: act(0), lambda: act(1)))
    assert got == [(World(rank, 2, rank, 2), True, False) for rank in range(2)]


def test_a_process_alone_meets_nobody_unless_code_asks_for_a_group() -> None:
    def act() -> object:
        with joined(CPU, timeout_s=1) as world:
            told = world, dist.is_initialized()
        group_of_one()
        group_of_one()  # once is enough
        return told, dist.get_world_size()

    assert in_fork(act).gave == ((ALONE, False), 1)


def not_met(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> str:
    """What a rank says that cannot meet the others."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(environ))
        patch.setattr(dist, "init_process_group", refuse)
        with pytest.raises(UserError) as caught, joined(CPU, timeout_s=1):
            pass
    return str(caught.value)


def place(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> str:
    """Where a rank tries to meet the others."""
    message = not_met(monkeypatch, environ)
    assert "(refused)" in message
    return message.partition(" ranks at ")[2].partition(" ")[0]


FIRST_HOSTS = {
    "node1": "node1",
    "node1,node2": "node1",
    "node[1-2]": "node1",
    "node[07,09-12]": "node07",
    "gpu[01-04,07],login1": "gpu01",
    "login-1,gpu[01-04]": "login-1",
    "rack[2-3]node[0-15]": "rack2node0",
    "n[3].example.org": "n3.example.org",
}


@pytest.mark.parametrize("hosts", FIRST_HOSTS)
def test_tasks_of_srun_meet_on_the_first_host(hosts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {**of_srun(1, 2, 0, 2), "SLURM_STEP_NODELIST": hosts, "SLURM_JOB_ID": "20001"}
    assert place(monkeypatch, environ) == f"{FIRST_HOSTS[hosts]}:20001"
    assert place(monkeypatch, {**environ, "MASTER_ADDR": "10.0.0.9"}) == "10.0.0.9:20001"


def test_jobs_on_the_same_host_meet_at_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are the same for all tasks of a job; they have to be free for users, and none that systems hand out."""
    ports = []
    for job in ("1", "2", "38749", "4294967294"):
        of_tasks = {
            place(monkeypatch, {**of_srun(0, 1, task, 4), "SLURM_JOB_ID": job}).partition(":")[2] for task in range(4)
        }
        assert len(of_tasks) == 1
        ports.append(int(of_tasks.pop()))
    assert len(set(ports)) == len(ports)
    assert 1024 <= min(ports) <= max(ports) < 32768
    assert place(monkeypatch, {**of_srun(0, 1, 1, 4), "MASTER_PORT": "1234"}) == "node1:1234"
    assert place(monkeypatch, without(of_srun(0, 1, 1, 4), "SLURM_JOB_ID")) == "node1:29500"


def test_others_meet_where_their_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(monkeypatch, of_torchrun(1, 2, 0, 2)) == "10.0.0.1:29500"
    assert place(monkeypatch, of_deepspeed(1, 2, 0, 2)) == "10.0.0.1:29500"
    assert place(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2"}) == "127.0.0.1:29500"
    message = not_met(monkeypatch, {**of_torchrun(1, 2, 0, 2), "MASTER_PORT": "first"})
    assert message.startswith("got MASTER_PORT=first, expected a whole number")
