"""Ranks on the CPU that train a few steps over DeepSpeed's ZeRO, and count what travels and what lies in memory.

    python tests/support/scaling_ranks.py            # measures the cases of docs/scaling.md into
    docs/scaling_measured.json

Traffic: the functions of torch.distributed are wrapped, and the bytes of the tensors that they are given are added up.
Memory: torch's profiler sees each block that the CPU allocator gives and takes, so that peaks between two marks are
exact. A block that a thread of gloo frees it does not see: the wrapped functions wait until gloo has let go.
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import _EventType

from fastft.batches.batch import Batch, Batcher, pack
from fastft.common import files
from fastft.engines.engine import Engine
from fastft.engines.zero import ZeroEngine
from fastft.engines.zero_config import read_zero_config
from fastft.model import ops
from fastft.model.gpt2 import GPT2, SIZES, GPT2Config
from fastft.model.lora_spec import LoRA
from fastft.model.part import Part
from fastft.ranks.world import World
from fastft.run.config import TrainOptions
from fastft.scaling.page import MEASURED
from fastft.scaling.predict import training_set

LINEAR = torch.nn.functional.linear
"""Torch's own. Stage 3 puts DeepSpeed's in its place, for the rest of the process."""
SETTLED = 2
"""The step that is measured: in the first one DeepSpeed records the modules' order, and the moments are made."""
KINDS = {
    "all_reduce": "all_reduce",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
}
OTHERS = (
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "all_to_all_single",
    "all_reduce_coalesced",
    "gather",
    "scatter",
)
SMALL = 64
"""Bytes up to which a collective is one of the small control sums: norms, flags."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run.

    Attributes:
        model: a size by name, or the fields of a `GPT2Config`.
        stage, offload, dtype, checkpointing: as in `fastft.scaling.Setup`.
        part: what is trained, as `Part.as_json` says it; None for all.
        packs: of each rank in a step.
        examples: in each pack: of the sample data, or made up where the vocabulary is smaller than the tokenizer's.
        zero: further settings of `zero_optimization`.
        memory: whether memory is measured, which takes longer.
    """

    model: str | dict[str, Any] = "pico"
    stage: int = 0
    offload: bool = False
    dtype: str = "fp32"
    checkpointing: bool = False
    part: dict[str, Any] | None = None
    packs: int = 1
    examples: int = 4
    zero: dict[str, Any] = field(default_factory=dict)
    memory: bool = False

    @property
    def config(self) -> GPT2Config:
        """The model's."""
        return SIZES[self.model] if isinstance(self.model, str) else GPT2Config(**self.model)


SMALL_MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 64, "n_ctx": 256, "vocab_size": 2048}
"""Few weights for its activations."""
WIDE_MODEL = {"n_layer": 6, "n_head": 4, "n_embd": 128, "n_ctx": 256, "vocab_size": 512}
"""Many weights for its activations, most of them in blocks."""
SMALL_BUCKETS = {
    "reduce_bucket_size": 100_000,
    "allgather_bucket_size": 100_000,
    "stage3_param_persistence_threshold": 1000,
}
GIVES_BACK = {
    **SMALL_BUCKETS,
    "reduce_bucket_size": 300_000,
    "stage3_prefetch_bucket_size": 40_000,
    "stage3_max_reuse_distance": 300_000,
}
"""Stage 3 gathers the first blocks again for the backward pass."""
LIMITS: list[dict[str, int]] = [
    {},
    {"stage3_max_live_parameters": 1},
    {"stage3_max_reuse_distance": 1},
    {"stage3_max_reuse_distance": 1, "stage3_max_live_parameters": 300_000},
]
"""Of which the last alone makes stage 3 give weights back before the loss."""


def part(lora: LoRA | None = None, train_only: str | None = None, new_rows: tuple[int, int] | None = None) -> Any:
    """A `Part` of any base, as JSON has it."""
    return json.loads(json.dumps(Part(lora=lora, train_only=train_only, new_rows=new_rows, base_sha256="").as_json()))


ADAPTERS = part(LoRA(r=8, alpha=16.0))
NEW_ROWS = part(LoRA(r=8, alpha=16.0), new_rows=(2036, 12))
SOME_DORA = part(LoRA(r=4, alpha=8.0, dora=True, targets=("c_attn", "mlp.c_proj"), layers=(1, 3)))
UPPER_HALF = part(train_only="h.2-3,ln_f")


def case(stage: int, **other: Any) -> Case:
    """One with small buckets, in which memory is measured."""
    zero = SMALL_BUCKETS if stage else {}
    return Case(**{"model": SMALL_MODEL, "examples": 12, "zero": zero, "memory": True, **other, "stage": stage})


def _wide(stage: int, **other: Any) -> Case:
    return case(stage, **{"model": WIDE_MODEL, "examples": 3, "zero": GIVES_BACK if stage else {}, **other})


def _named(name: str, stage: int, packs: int, reduce: int, **other: Any) -> Case:
    zero = {"reduce_bucket_size": reduce, "allgather_bucket_size": reduce} if stage else {}
    return case(stage, model=name, examples=8, packs=packs, zero=zero, **other)


CASES = [
    *(case(stage, packs=packs) for stage in range(4) for packs in (1, 2)),
    *(case(stage, packs=packs, dtype="bf16") for stage in range(4) for packs in (1, 2)),
    *(case(stage, packs=packs, dtype=dtype, offload=True) for stage in (2, 3) for dtype in ("fp32", "bf16")
      for packs in (1, 2)),
    *(case(stage, packs=2, checkpointing=True) for stage in range(4)),
    *(_wide(stage, packs=packs) for stage in range(4) for packs in (1, 2)),
    _wide(3, zero={**GIVES_BACK, "stage3_max_reuse_distance": 0}),
    *(_wide(3, zero={**SMALL_BUCKETS, "reduce_bucket_size": 300_000, **limits}) for limits in LIMITS),
    *(_named("pico", stage, 2, 300_000) for stage in range(4)),
    *(_named("nano", stage, 1, 3_000_000) for stage in range(4)),
]  # fmt: skip
"""On 2 ranks."""
CASES_OF_PARTS = [
    *(case(stage, packs=2, dtype=dtype, part=ADAPTERS) for stage in range(4) for dtype in ("fp32", "bf16")),
    *(case(stage, dtype="bf16", offload=True, part=ADAPTERS) for stage in (2, 3)),
    *(case(stage, packs=2, checkpointing=True, part=ADAPTERS) for stage in (0, 3)),
    *(case(stage, packs=2, part=some) for some in (NEW_ROWS, SOME_DORA, UPPER_HALF) for stage in range(4)),
    *(_wide(stage, packs=2, part=ADAPTERS) for stage in (2, 3)),
    *(_named("nano", stage, 1, 3_000_000, part=ADAPTERS) for stage in (0, 3)),
]  # fmt: skip
"""Of which a part is trained, on 2 ranks."""
CASES_OF_THREE = [
    *(case(stage, packs=2, dtype=dtype) for stage in range(4) for dtype in ("fp32", "bf16")),
    *(case(stage, dtype="bf16", offload=True) for stage in (2, 3)),
    *(_named("pico", stage, 1, 300_000) for stage in range(4)),
]
"""On 3 ranks, which divide few tensors evenly."""


@dataclass(frozen=True)
class Measured:
    """What one rank saw.

    Attributes:
        traffic: bytes of the whole tensors of one optimizer step's collectives, by kind.
        phases: bytes in tensors at the fullest moment of each phase of `fastft.scaling.Memory`.
        sizes: tokens, rows and pairs of each of the rank's packs.
    """

    traffic: dict[str, int]
    phases: dict[str, int]
    sizes: list[dict[str, int]]


def run_ranks(cases: list[Case], ranks: int, *, timeout: float = 1800) -> list[list[Measured]]:
    """Runs the cases one after the other on `ranks` processes of one thread; for each case, each rank's figures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1", "LOCAL_SIZE": str(ranks), "DS_LOG_LEVEL": "error",
    }  # fmt: skip
    asked = json.dumps([asdict(case) for case in cases])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank"],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(asked)
            process.stdin.close()
            process.stdin = None
        answers = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, answers, strict=True):
        if process.returncode:
            raise RuntimeError(errors[-4000:])
    by_rank = [json.loads(out.splitlines()[-1]) for out, _ in answers]
    return [[Measured(**by_rank[rank][case]) for rank in range(ranks)] for case in range(len(cases))]


class Wire:
    """The collectives of torch, wrapped: what they are given is added up by kind, but for those of `World.sum`."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        for name in (*KINDS, *OTHERS):
            setattr(dist, name, self._wrapped(name, getattr(dist, name)))
        World.sum = self._uncounted(World.sum)

    def _uncounted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            before = Counter(self.counts)
            result = function(*args)
            self.counts = before
            return result

        return call

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if name in OTHERS:
                raise RuntimeError(f"torch.distributed.{name} was called, which the measurement does not know")
            size = max(x.numel() * x.element_size() for x in tensors)  # of the whole: an all-gather's result
            self.counts["control" if size <= SMALL else KINDS[name]] += size
            held = [_holders(x) for x in tensors]
            work = function(*args, **kwargs)
            if work is None:
                _let_go(tensors, held)
                return None
            work.wait()
            del work
            _let_go(tensors, held)
            return _Done()

        return call


class _Done:
    """What an asynchronous collective returns that is through already."""

    def wait(self) -> None:
        """Waits for nothing."""


def _holders(x: Tensor) -> tuple[int, int]:
    """How many hold a tensor, and the memory under it."""
    return x._use_count(), torch._C._storage_Use_Count(x.untyped_storage()._cdata)


def _let_go(tensors: list[Tensor], held: list[tuple[int, int]]) -> None:
    """Waits until nobody else holds the tensors than before: gloo's thread gives them back a little later."""
    until = time.monotonic() + 20
    while any(_holders(x) > n for x, n in zip(tensors, held, strict=True)) and time.monotonic() < until:
        time.sleep(2e-4)


class Blocks:
    """All blocks that the CPU allocator gave and took for tensors, between marks."""

    def __init__(self) -> None:
        self._profile = torch.autograd.profiler.profile(profile_memory=True)
        self._times: list[int] = []
        self._bytes: list[int] = []
        self._marks: dict[str, tuple[int, int]] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The block of code that is seen."""
        with self._profile:
            yield
        moves, waiting = [], [(event, False) for event in self._profile.kineto_results.experimental_event_tree()]
        while waiting:
            event, in_gloo = waiting.pop()
            kind, fields = event.typed
            in_gloo = in_gloo or event.name.startswith(("c10d::", "gloo:"))
            waiting += [(child, in_gloo) for child in event.children]
            if kind == _EventType.Allocation:
                if fields.alloc_size < 0 or not in_gloo:  # gloo's own copies are none of ours, and freed by its threads
                    moves.append((event.start_time_ns, fields.ptr, fields.alloc_size))
            elif event.name.startswith("mark "):
                self._marks[event.name] = (event.start_time_ns, event.end_time_ns)
        self._add_up(sorted(moves))

    def _add_up(self, moves: list[tuple[int, int, int]]) -> None:
        live: dict[int, int] = {}
        total = 0
        for at, pointer, size in moves:
            total -= live.pop(pointer, 0)  # freed, or freed unseen and given again
            if size > 0:
                live[pointer] = size
                total += size
            self._times.append(at)
            self._bytes.append(total)

    @staticmethod
    def mark(name: str) -> Any:
        """A block of code by name. What nobody holds any more is given back before it."""
        gc.collect()
        return torch.profiler.record_function(f"mark {name}")

    def start(self, name: str) -> int:
        """Bytes at the beginning of a mark."""
        at = bisect.bisect_left(self._times, self._marks[f"mark {name}"][0])
        return self._bytes[at - 1] if at else 0

    def peak(self, name: str, *, until: str | None = None) -> int:
        """The most bytes within a mark, or up to the beginning of another one."""
        begin, end = self._marks[f"mark {name}"]
        end = end if until is None else self._marks[f"mark {until}"][0]
        first, last = (bisect.bisect_left(self._times, at) for at in (begin, end))
        return max([self.start(name), *self._bytes[first:last]])


def measure(case: Case, wire: Wire) -> Measured:
    """Trains `SETTLED + 1` steps as the case says."""
    torch.nn.functional.linear = LINEAR
    blocks = Blocks()
    if not case.memory:
        batches = _batches(case)
        return _measured(case, wire, None, _train(case, batches, wire, None), batches)
    batches = _batches(case)
    gc.collect()
    with blocks.recorded():
        traffic = _train(case, batches, wire, blocks)
        gc.collect()
    return _measured(case, wire, blocks, traffic, batches)


def _measured(case: Case, wire: Wire, blocks: Blocks | None, traffic: dict[str, int], batches: list[Batch]) -> Measured:
    sizes = [_sizes(batch) for batch in batches]
    if blocks is None:
        return Measured(traffic, {}, sizes)
    packs = range(case.packs)
    phases = {
        "between steps": blocks.start("pass 0"),
        "loss": max(blocks.peak(f"pass {pack}", until=f"backward {pack}") for pack in packs),
        "backward": max(blocks.peak(f"backward {pack}") for pack in packs),
        "update": blocks.peak("update"),
    }
    return Measured(traffic, phases, sizes)


def _sizes(batch: Batch) -> dict[str, int]:
    assert isinstance(batch.tiles, tuple)
    assert isinstance(batch.row_tiles, tuple)
    return {
        "tokens": batch.tokens.numel(),
        "rows": batch.rows.numel(),
        "pairs": sum(group.mask.numel() for group in batch.tiles),
        "row_pairs": sum(group.mask.numel() for group in batch.row_tiles),
        "largest_group": max(group.mask.numel() for group in (*batch.tiles, *batch.row_tiles)),
    }


def _batches(case: Case) -> list[Batch]:
    """This rank's packs."""
    config, rank, ranks = case.config, dist.get_rank(), dist.get_world_size()
    planner = ops.planner("cpu")
    if config.vocab_size == GPT2Config(n_layer=1, n_head=1, n_embd=1).vocab_size:
        encoded = training_set("sample")
        batcher = Batcher(planner=planner)
        firsts = [(number * ranks + rank) * case.examples for number in range(case.packs)]
        return [batcher(encoded, np.arange(first, first + case.examples)) for first in firsts]
    random = np.random.default_rng(0)  # on every rank the same sizes: the largest pack's
    shared = random.integers(0, config.vocab_size, 30)

    def example() -> Any:
        own = random.integers(0, config.vocab_size, int(random.integers(20, 60)))
        return np.concatenate([shared, own]).astype(np.int32)

    return [
        pack([example() for _ in range(case.examples)], [40] * case.examples, planner=planner)
        for _ in range(case.packs)
    ]


def _train(case: Case, batches: list[Batch], wire: Wire, blocks: Blocks | None) -> dict[str, int]:
    """The traffic of the measured step; its phases are marked."""
    engine = _engine(case)
    before = Counter[str]()
    for step in range(SETTLED + 1):
        if step == SETTLED:
            before = wire.counts.copy()
        marks = Blocks.mark if blocks is not None and step == SETTLED else _unmarked
        for number, batch in enumerate(batches):
            with _backward_marked(engine, lambda n=number, m=marks: m(f"backward {n}")), marks(f"pass {number}"):
                loss = engine.accumulate(batch, 1000, last=number == len(batches) - 1)[0]
        with marks("update"):
            engine.update(5e-5, loss)()
    return dict(wire.counts - before)


def _unmarked(name: str) -> Any:
    return contextlib.nullcontext()


@contextmanager
def _backward_marked(engine: Any, mark: Callable[[], Any]) -> Iterator[None]:
    """Marks what an engine calls for its backward pass."""
    home = torch.autograd if isinstance(engine, Engine) else engine.zero
    backward = home.backward

    def marked(*args: Any, **kwargs: Any) -> None:
        with mark():
            backward(*args, **kwargs)

    home.backward = marked
    try:
        yield
    finally:
        home.backward = backward


def _engine(case: Case) -> Engine | ZeroEngine:
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size())
    torch.manual_seed(0)
    model = GPT2(case.config, checkpoint_activations=case.checkpointing)
    if case.part is not None:
        Part.of_json(case.part).take(model)
    options = TrainOptions(data="sample", model="pico", device="cpu", dtype=case.dtype, impl="cpu")
    if case.stage == 0:
        return Engine(model, options, world)
    zero: dict[str, Any] = {"stage": case.stage, "overlap_comm": True, "contiguous_gradients": True, **case.zero}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if case.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zero.json"
        path.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
        config = read_zero_config(path, options, world.size)
    return ZeroEngine(model, options, world, config, options.dtype)


def _rank() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    cases = [Case(**case) for case in json.load(sys.stdin)]
    wire = Wire()
    dist.init_process_group("gloo")
    import deepspeed  # noqa: F401 # before the objects that there are are set aside

    gc.freeze()  # what is there by now need not be looked at in each collection
    measured = [asdict(measure(case, wire)) for case in cases]
    print("\n" + json.dumps(measured))
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # DeepSpeed's groups are torn down with the process


def entries(cases: list[Case], ranks: int) -> list[dict[str, Any]]:
    """What the cases measured, as `fastft.scaling.measured.Entry`: of the rank that had the most."""
    return [_entry(case, ranks, measured) for case, measured in zip(cases, run_ranks(cases, ranks), strict=True)]


def _entry(case: Case, ranks: int, measured: list[Measured]) -> dict[str, Any]:
    assert all(one.traffic == measured[0].traffic for one in measured)
    phases = measured[0].phases
    return {
        **{key: value for key, value in asdict(case).items() if key not in ("examples", "memory")},
        "ranks": ranks,
        "compiled": ops.why_no_compiled() is None,
        "sizes": max(measured[0].sizes, key=lambda sizes: sizes["tokens"]),
        "traffic": measured[0].traffic,
        "memory": {phase: max(one.phases[phase] for one in measured) for phase in phases},
    }


def _write() -> None:
    """Measures the cases of docs/scaling.md."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed"))
    found = [*entries(CASES, 2), *entries(CASES_OF_PARTS, 2), *entries(CASES_OF_THREE, 3)]
    files.write_text(MEASURED, as_text(versions, found))


def as_text(versions: str, found: list[dict[str, Any]]) -> str:
    """JSON with a line for each entry."""
    lines = ",\n".join(json.dumps(entry) for entry in found)
    return f'{{"versions": {json.dumps(versions)}, "entries": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    if sys.argv[1:] == ["--rank"]:
        _rank()
    else:
        _write()
