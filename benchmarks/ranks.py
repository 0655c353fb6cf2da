"""Several ranks beside one process: examples/s of the same optimizer steps, and how evenly the plan loads the ranks.

One process has all threads; each of N ranks has its share of them, or a GPU of its own. On one machine's CPU that
gains nothing, and costs what the ranks tell each other: the benchmark says how much. The runs are `fastft train`
itself, in turn; a step's time is what `metrics.jsonl` says, the first `WARMUP` steps left out.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common

EPOCH_STEPS_SHOWN = 1000


def run(options: argparse.Namespace, folder: Path, name: str, ranks: int, zero: str | None) -> list[float]:
    """Trains some steps; the seconds of each but the first ones."""
    out = folder / name
    arguments = {
        "data": os.environ.get("FASTFT_BOOK_DATA") or "sample", "model": options.size, "weights": "none", "out": out,
        "batch_size": options.examples, "steps": common.WARMUP + options.steps, "dtype": options.dtype,
        "eval_every": 0, "samples": 0, "keep_best": "false", "overwrite": "true", "eval_examples": 1,
        "device": options.device, "pack_tokens": options.pack_tokens,
    }  # fmt: skip
    if zero is not None:
        arguments["deepspeed_config"] = common.ROOT / "launch" / f"{zero}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", str(_free_port()), "-m", "fastft", "train"]
    command += [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, options.threads // ranks))}
    if options.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines if "loss" in line][common.WARMUP :]


def balance(options: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """How evenly the plan loads the ranks: the dearest rank's cost in an epoch to the mean, and in the worst step."""
    import numpy as np

    from fastft.batches.plan import Cost, Packing, make_plan
    from fastft.model.gpt2 import config_for

    config = config_for(options.size)
    encoded = common.encoded_records(common.training_records(), config.n_ctx)
    cost = Cost.of_gpt2(config.n_layer, config.n_embd, config.vocab_size)
    shared = encoded.common_prefix()
    packing = Packing(pack_tokens=options.pack_tokens, shared=shared, ranks=ranks, cost=cost)
    plan = make_plan(encoded, batch_size=options.examples, packing=packing)
    of_steps = []
    for index in range(min(plan.steps_per_epoch, EPOCH_STEPS_SHOWN)):
        packs = plan.step(index).packs
        costs = [float(cost(encoded.lengths[p], shared, encoded.supervised[p]).sum()) for p in packs]
        of_steps.append([sum(costs[rank::ranks]) for rank in range(ranks)])
    loads = np.array(of_steps)
    return {
        "ranks": ranks,
        "epoch": float(loads.sum(0).max() / loads.sum(0).mean()),
        "worst_step": float((loads.max(1) / loads.mean(1)).max()),
        "steps": len(of_steps),
    }


def check_devices(options: argparse.Namespace) -> None:
    """Each rank of a CUDA run has a GPU of its own.

    Raises:
        SystemExit: there are fewer GPUs than ranks.
    """
    import torch

    if options.device == "cuda" and options.ranks > torch.cuda.device_count():
        raise SystemExit(
            f"got --ranks {options.ranks} and {torch.cuda.device_count()} GPUs, expected a GPU for each; "
            "fewer ranks, or --device cpu"
        )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def main() -> None:
    """Measures in turn, prints the tables and writes `ranks.json`."""
    parser = common.arguments(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--examples", type=int, default=128, help="examples in an optimizer step")
    parser.add_argument("--steps", type=int, default=2, help="steps timed in each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pack_tokens", type=int, default=16384)
    parser.add_argument("--zero", nargs="*", default=["none", "zero1", "zero2", "zero3"], help="none: plain torch")
    options = parser.parse_args()
    options.device = common.chosen_device(options.device)
    check_devices(options)
    runs = {"one process": (1, None)}
    for zero in options.zero:
        runs[f"{options.ranks} ranks, {zero}"] = (options.ranks, None if zero == "none" else zero)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            for name, (ranks, zero) in runs.items():
                print(f"round {turn + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
                seconds[name].append(statistics.median(run(options, Path(folder), name, ranks, zero)))
    alone = seconds["one process"]
    relative = {name: common.ratios(alone, times) for name, times in seconds.items() if name != "one process"}
    loads = [balance(options, ranks) for ranks in (2, 3, 4, 8)]
    common.print_table(
        f"{options.examples} examples a step, {options.size}, {options.dtype}, {options.threads} threads in all",
        ["ranks", "examples/s to one process's"],
        [[name, common.shown(ratio)] for name, ratio in relative.items()],
        [common.in_words(common.machine())],
    )
    common.print_table(
        "cost of the dearest rank to the mean, by the plan",
        ["ranks", "over an epoch", "in the worst step"],
        [[str(load["ranks"]), f"{load['epoch']:.4f}", f"{load['worst_step']:.4f}"] for load in loads],
    )
    result = {"machine": common.machine(), "data": common.data_name(), "examples": options.examples,
              "size": options.size, "dtype": options.dtype, "threads": options.threads, "relative": relative,
              "balance": loads}  # fmt: skip
    common.write_result(options.results, "ranks", result)


if __name__ == "__main__":
    main()
