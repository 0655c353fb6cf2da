"""The ranks of a run: which one this process is, and the few figures that ranks tell each other.

Gradients and weights travel in the engines. What is here is small and lies in host memory: sums, errors, votes.
A run of one process is a world of size 1, in which nothing travels.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from fastft.common.errors import FastftError, LostRank, UserError

T = TypeVar("T")

_DEFAULT_PORT = 29500
_SLURM_PORTS = (20000, 30000)
_LOST = re.compile(
    r"Connection (closed|reset|refused|timed out)|connection was closed|Broken pipe|Socket|Timed out waiting"
    r"|caused pair closure|No route to host|Network is unreachable"
    r"|NCCL (communicator|error)|remote process exited|unhandled system error",
    re.IGNORECASE,
)


_STACK = re.compile(r"^(Exception raised from|frame #)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class World:
    """This process among those that train together.

    Attributes:
        rank: of this process, from 0.
        size: how many processes there are.
        local_rank: of this process on its machine, from 0.
        local_size: how many there are on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the run's files and speaks for all."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of `values` over all ranks, in float64; all ranks get the same bits."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    def gather(self, value: T) -> list[T]:
        """Each rank's `value`, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value] # each place is filled

    def differing(self, value: object) -> str | None:
        """The first rank whose `value` is not the first rank's, in words; None where all are alike."""
        values = self.gather(value)
        return next((f"rank {rank}" for rank, one in enumerate(values) if one != values[0]), None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where a user's mistake on any rank ends the block on all: no rank waits for one that has given up.

        Raises:
            FastftError: the error of the lowest rank that has one; where others have none, its message names the rank.
        """
        error: FastftError | None = None
        try:
            yield
        except FastftError as raised:
            error = raised
        errors = self.gather(error)
        at = next((rank for rank, one in enumerate(errors) if one is not None), None)
        if at is None:
            return
        first = errors[at]
        assert first is not None
        if not all(one is not None for one in errors):
            first = type(first)(f"rank {at}: {first}")
        first.common = True
        raise first from error


ALONE = World()
"""A run of one process."""


def world_of(environ: Mapping[str, str]) -> World:
    """What torchrun, deepspeed or srun says of this process; a world of one where none of them started it.

    Raises:
        UserError: the variables contradict each other.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
        local_rank = _number(environ, "LOCAL_RANK", 0 if size == 1 else rank)
        local_size = _number(environ, "LOCAL_WORLD_SIZE", _number(environ, "LOCAL_SIZE", size))
    elif _is_slurm_task(environ):
        rank, size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
        local_rank = _number(environ, "SLURM_LOCALID")
        nodes = _number(environ, "SLURM_STEP_NUM_NODES", 1)
        local_size = -(-size // max(1, nodes))
    else:
        return ALONE
    if not 0 <= rank < size:
        raise UserError(
            f"got RANK={rank} and WORLD_SIZE={size}, expected a rank from 0 to {max(0, size - 1)}, as torchrun, "
            "deepspeed and srun set it; unset them to train on one process"
        )
    return World(rank, size, local_rank, local_size)


@contextmanager
def joined(device: torch.device, *, timeout_s: float) -> Iterator[World]:
    """Joins the other ranks for the length of a block. A process group that the caller has made already is taken.

    Args:
        device: of this rank's model: NCCL carries tensors on CUDA, gloo those on the host.
        timeout_s: how long a rank waits for the others before it gives up.

    Raises:
        UserError: the other ranks could not be met.
        LostRank: another rank went away in the block.
    """
    if dist.is_initialized():
        given = world_of(os.environ)
        yield World(dist.get_rank(), dist.get_world_size(), given.local_rank, given.local_size)
        return
    world = world_of(os.environ)
    if world.size == 1:
        yield world
        return
    _meet(world, device, timeout_s)
    try:
        with noticing_lost_ranks(world):
            yield world
    finally:
        # Not waiting for ranks that may be gone; at the end of a run, all have met before.
        dist.destroy_process_group()


@contextmanager
def noticing_lost_ranks(world: World) -> Iterator[None]:
    """Turns what torch says when a rank has gone away into one line."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        # NCCL says in its last line what it is; below that stands torch's own stack.
        reason = " ".join(_STACK.split(str(error))[0].split())[:400]
        raise LostRank(
            f"rank {world.rank} has lost another rank ({reason}); its own message says why; go on with --resume"
        ) from error


def group_of_one() -> None:
    """A process group of this process alone, for code that asks for one."""
    if not dist.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined] # exported at run time alone
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def _meet(world: World, device: torch.device, timeout_s: float) -> None:
    if device.type == "mps":
        raise UserError(
            f"got {world.size} ranks on mps, for which torch has no way to talk; use --device cpu or one rank"
        )
    address = os.environ.get("MASTER_ADDR") or _first_slurm_host(os.environ)
    port = _number(os.environ, "MASTER_PORT", _slurm_port(os.environ))
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            rank=world.rank,
            world_size=world.size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"rank {world.rank} cannot meet the other {world.size - 1} ranks at {address}:{port} ({reason}); check "
            "that all were started, MASTER_ADDR and MASTER_PORT, and on several hosts GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME"
        ) from error


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdecimal():
        raise UserError(
            f"got {name}={value}, expected a whole number: RANK, WORLD_SIZE and LOCAL_RANK are set together by "
            "torchrun, deepspeed or srun; unset them to train on one process"
        )
    return int(value)


def _is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of a step's tasks: in a batch script or a shell of salloc it did not."""
    return "SLURM_STEP_ID" in environ and environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "SLURM_PROCID" in environ


def _first_slurm_host(environ: Mapping[str, str]) -> str:
    """The first of a list such as `gpu[01-04,07],login1`; this machine where there is none."""
    nodes = environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


def _slurm_port(environ: Mapping[str, str]) -> int:
    """A port that the tasks of one job agree on, and that those of another on the same host seldom take."""
    job = environ.get("SLURM_JOB_ID", "")
    low, high = _SLURM_PORTS
    return low + int(job) % (high - low) if job.isdecimal() else _DEFAULT_PORT
