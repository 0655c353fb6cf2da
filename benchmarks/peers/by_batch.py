"""fastft beside transformers by batch size: at each the faster of padded rows and of its own padding-free collator."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import common
from benchmarks.peers.compare import OURS, PEERS, check_losses, peaks, speeds

CASES = ("gpt2:1", "gpt2:8", "gpt2:32", "gpt2:128", "gpt2-medium:8", "gpt2-medium:32")
"""Of gpt2; of another size batches of 1, 8 and 32."""
MANY = 32
"""Examples from which on one step is timed in each round."""
_OTHERS = ("hf", "hf-flat")


def measure(size: str, batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """All peers in turn at one size and batch: examples a second, and the ratio to the fastest of each round."""
    # Many examples make a step long, and as steady as several of few.
    steps = options.steps if batch_size < MANY else 1
    shared = ("--size", size, "--batch_size", batch_size, "--steps", steps, "--device", options.device)
    workers = {name: (f"benchmarks.peers.{PEERS[name][0]}", (*PEERS[name][1], *shared)) for name in (OURS, *_OTHERS)}
    results = common.in_turn(workers, rounds=options.rounds, threads=options.threads)
    check_losses(results)
    fastest = [max(each) for each in zip(*(speeds(results[name]) for name in _OTHERS), strict=True)]
    leanest = [min(each) for each in zip(*(peaks(results[name]) for name in _OTHERS), strict=True)]
    return {
        "size": size,
        "batch_size": batch_size,
        "examples_per_second": {name: common.spread(speeds(turns)) for name, turns in results.items()},
        "peak_bytes": {name: common.spread(peaks(turns)) for name, turns in results.items()},
        "speed_to_the_fastest": common.ratios(speeds(results[OURS]), fastest),
        "memory_to_the_leanest": common.ratios(peaks(results[OURS]), leanest),
        "machine": results[OURS][0]["machine"],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures each case; prints and writes the table."""
    cases = []
    for case in options.cases:
        size, _, batch_size = case.partition(":")
        cases.append(measure(size, int(batch_size), options))
    *_, machine = [case.pop("machine") for case in cases]
    result = {
        "data": common.data_name(),
        "rounds": options.rounds,
        "steps": options.steps,
        "machine": machine,
        "cases": cases,
    }
    body = [
        (
            case["size"],
            str(case["batch_size"]),
            *(common.shown(case["examples_per_second"][name]) for name in (OURS, *_OTHERS)),
            common.shown(case["speed_to_the_fastest"]),
            common.shown(case["memory_to_the_leanest"]),
        )
        for case in cases
    ]
    columns = (
        "size", "batch", "fastft, examples/s", "transformers, padded", "transformers, padding-free",
        "speed to the faster", "memory to the leaner",
    )  # fmt: skip
    timed = f"{options.steps} timed steps each, from {MANY} examples on one"
    rounds = f"bf16, {options.rounds} rounds in turn, {timed}; median (least to most)"
    common.print_table(f"By batch size, data: {result['data']}", columns, body, (common.in_words(machine), rounds))
    common.write_result(options.results, "by_batch", result)
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        help=f"timed steps of a run, of {MANY} examples and more one; {common.WARMUP} more warm up",
    )
    parser.add_argument("--cases", nargs="+", metavar="SIZE:BATCH", help=f"with --size gpt2 {' '.join(CASES)}")
    options = parser.parse_args(argv)
    if options.cases is None:
        options.cases = CASES if options.size == "gpt2" else [f"{options.size}:{batch}" for batch in (1, 8, 32)]
    run(options)


if __name__ == "__main__":
    main()
