"""fastft beside its peers: each in a process of its own, in turn, round by round, ratios by pairs of a round.

These machines change their speed from hour to hour; a round's runs lie minutes apart, so their ratio is what counts.
A ratio is fastft's median over a round's timed steps to the peer's of the same round; the table has the median round,
the least and the most. Peers that see the same examples must report the same first loss, or the comparison stops.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import common

PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fastft": ("ours", ("--dtype", "bf16")),
    "fastft-fp32": ("ours", ("--dtype", "fp32")),
    "book": ("book", ("--kind", "plain")),
    "book-fast": ("book", ("--kind", "fast")),
    "hf": ("hf", ("--kind", "padded")),
    "hf-masked": ("hf", ("--kind", "masked")),
    "hf-flat": ("hf", ("--kind", "flat")),
    "hf-compiled": ("hf", ("--kind", "padded", "--compile")),
    "fastft-lora": ("ours", ("--dtype", "bf16", "--lora")),
    "fastft-lora-fp32": ("ours", ("--dtype", "fp32", "--lora")),
    "peft": ("hf", ("--kind", "padded", "--lora")),
    "peft-flat": ("hf", ("--kind", "flat", "--lora")),
    "peft-narrow": ("hf", ("--kind", "padded", "--lora", "--narrow")),
    "peft-narrow-flat": ("hf", ("--kind", "flat", "--lora", "--narrow")),
    "peft-fp32": ("hf", ("--kind", "padded", "--lora", "--dtype", "fp32")),
    "peft-fp32-flat": ("hf", ("--kind", "flat", "--lora", "--dtype", "fp32")),
    "trl": ("trl_sft", ("--kind", "padded")),
    "trl-flat": ("trl_sft", ("--kind", "flat")),
    "trl-packed": ("trl_sft", ("--kind", "packed")),
    "trainer": ("trainer", ("--kind", "fastft")),
    "trainer-padded": ("trainer", ("--kind", "padded")),
    "trainer-flat": ("trainer", ("--kind", "flat")),
    "smollm2": ("trainer", ("--kind", "fastft", "--smollm2")),
    "smollm2-padded": ("trainer", ("--kind", "padded", "--smollm2")),
    "smollm2-flat": ("trainer", ("--kind", "flat", "--smollm2")),
}
"""Name to module and options."""

DEFAULT = ("fastft", "fastft-fp32", "book", "hf", "hf-flat", "trl", "trl-flat", "trl-packed")
_TO_GPT2 = ("fastft", "hf", "hf-flat", "trainer-flat", "trl", "trl-flat")
DROP_IN = ("trainer", *_TO_GPT2, "smollm2", "smollm2-padded", "smollm2-flat")
"""What the stock Trainer over fastft is compared with (`--peers drop-in`)."""
LORA = (
    "fastft-lora", "fastft", "peft", "peft-flat", "peft-narrow", "peft-narrow-flat",
    "fastft-lora-fp32", "fastft-fp32", "peft-fp32", "peft-fp32-flat",
)  # fmt: skip
"""What adapters are compared with (`--peers lora`): training of all weights, and PEFT."""

OTHER_EXAMPLES = ("trl-packed",)
"""Their steps hold other examples than those of the rest."""

SAME_LOSS = 1e-3
"""Relative difference of two first losses that bf16 explains; other examples differ by five times as much."""

_NO_LOSS = 1e-9
"""All losses are 0 where kernels compute nothing (tools/pretended_gpu)."""

OURS = "fastft"


def check_losses(results: dict[str, list[dict[str, Any]]]) -> None:
    """Sees to it that all peers compute the same.

    Raises:
        ValueError: two peers with the same examples report different first losses.
    """
    first = {name: turns[0]["losses"][0] for name, turns in results.items() if name not in OTHER_EXAMPLES}
    for smollm2 in (False, True):
        same = {name: loss for name, loss in first.items() if name.startswith("smollm2") == smollm2}
        if same and not math.isclose(min(same.values()), max(same.values()), rel_tol=SAME_LOSS, abs_tol=_NO_LOSS):
            raise ValueError(f"first losses differ, so the peers do not compute the same: {same}")


def speeds(turns: Sequence[dict[str, Any]]) -> list[float]:
    """Examples a second of each round: the median of its timed steps."""
    return [statistics.median(turn["examples_per_second"]) for turn in turns]


def peaks(turns: Sequence[dict[str, Any]]) -> list[float]:
    """Peak bytes of each round."""
    return [turn["peak_bytes"] or float("nan") for turn in turns]


def summarise(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of each peer, and fastft's ratios to it: speed, and memory."""
    ours = results.get(OURS)
    return {
        name: {
            "called": turns[0]["name"],
            "versions": turns[0]["versions"],
            "examples_per_second": common.spread(speeds(turns)),
            "peak_bytes": common.spread(peaks(turns)),
            "losses": turns[0]["losses"],
            "speed_of_fastft": common.ratios(speeds(ours), speeds(turns)) if ours else None,
            "memory_of_fastft": common.ratios(peaks(ours), peaks(turns)) if ours else None,
        }
        for name, turns in results.items()
    }


def headline(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """fastft to the book, and to the best of transformers and TRL in each round: the fastest, and the leanest."""
    said: dict[str, Any] = {}
    others = [turns for name, turns in results.items() if name.startswith(("hf", "trl", "trainer-"))]
    if OURS in results and "book" in results:
        said["speed, to the book's step"] = common.ratios(speeds(results[OURS]), speeds(results["book"]))
    if "fastft-fp32" in results and "book" in results:
        said["speed in float32 alone, to the book's step"] = common.ratios(
            speeds(results["fastft-fp32"]), speeds(results["book"])
        )
    if OURS in results and others:
        fastest = [max(each) for each in zip(*map(speeds, others), strict=True)]
        leanest = [min(each) for each in zip(*map(peaks, others), strict=True)]
        said["speed, to the fastest of transformers and TRL"] = common.ratios(speeds(results[OURS]), fastest)
        said["peak memory, to the leanest of transformers and TRL"] = common.ratios(peaks(results[OURS]), leanest)
    return {**said, **drop_in(results), **adapters(results)}


def adapters(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The speed and memory of fastft's adapters to training all weights, and to the fastest and leanest of PEFT."""
    said: dict[str, Any] = {}
    for name, narrow in (("fastft-lora", True), ("fastft-lora-fp32", False)):
        of = "bf16" if narrow else "float32"
        whole = "fastft" if narrow else "fastft-fp32"
        theirs = [turns for peer, turns in results.items() if peer.startswith("peft") and ("fp32" in peer) != narrow]
        if name in results and whole in results:
            said[f"speed of adapters in {of}, to all weights"] = common.ratios(
                speeds(results[name]), speeds(results[whole])
            )
            said[f"peak memory of adapters in {of}, to all weights"] = common.ratios(
                peaks(results[name]), peaks(results[whole])
            )
        if name in results and theirs:
            fastest = [max(each) for each in zip(*map(speeds, theirs), strict=True)]
            leanest = [min(each) for each in zip(*map(peaks, theirs), strict=True)]
            said[f"speed of adapters in {of}, to the fastest of PEFT"] = common.ratios(speeds(results[name]), fastest)
            said[f"peak memory of adapters in {of}, to the leanest of PEFT"] = common.ratios(
                peaks(results[name]), leanest
            )
    return said


def drop_in(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The speed of the stock Trainer over fastft to fastft's own step, and to the fastest of others in each round."""
    said: dict[str, Any] = {}
    for ours, to, others in (
        ("trainer", "fastft's own step", (OURS,)),
        ("trainer", "the fastest of transformers", ("hf", "trainer-")),
        ("trainer", "the fastest of TRL", ("trl",)),
        ("smollm2", "the fastest of its own", ("smollm2-",)),
    ):
        turns = [turns for name, turns in results.items() if name.startswith(others) and name != "fastft-fp32"]
        if ours in results and turns:
            fastest = [max(each) for each in zip(*map(speeds, turns), strict=True)]
            of = "SmolLM2-135M's Trainer" if ours == "smollm2" else "Trainer"
            said[f"speed of {of} over fastft, to {to}"] = common.ratios(speeds(results[ours]), fastest)
    return said


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    body = [
        (
            row["called"],
            common.shown(row["examples_per_second"]),
            common.shown(row["speed_of_fastft"]),
            common.mebibytes(row["peak_bytes"]["median"]),
            common.shown(row["memory_of_fastft"]),
            f"{row['losses'][0]:.4f}",
        )
        for row in result["peers"].values()
    ]
    columns = ("step", "examples/s", "fastft's speed to it", "peak MiB", "fastft's memory to it", "first loss")
    title = f"{result['size']}, batch {result['batch_size']}, prompt masked, data: {result['data']}"
    notes = [f"{name}: {common.shown(ratio)}" for name, ratio in result["headline"].items()]
    rounds = f"{result['rounds']} rounds in turn, {result['steps']} timed steps each; median (least to most)"
    common.print_table(title, columns, body, [*notes, common.in_words(result["machine"]), rounds])


def draw(result: dict[str, Any], folder: Any, name: str) -> None:
    """Draws speed and memory of all peers."""
    rows = list(result["peers"].values())
    figure, axes = common.new_figure(2, height=0.5 * len(rows) + 1.2)
    names = [row["called"] for row in rows]
    colours = ["tab:orange" if name.startswith("fastft") else "tab:blue" for name in names]
    for ax, key, unit, label in (
        (axes[0], "examples_per_second", 1, "examples/s"),
        (axes[1], "peak_bytes", 2**30, "peak memory, GiB"),
    ):
        each = [row[key] for row in rows]
        medians = [e["median"] / unit for e in each]
        errors = [
            [(e["median"] - e["least"]) / unit for e in each],
            [(e["most"] - e["median"]) / unit for e in each],
        ]
        bars = ax.barh(names, medians, xerr=errors, color=colours)
        ax.bar_label(bars, fmt="%.2f", padding=4)
        ax.set_xlabel(label)
        ax.invert_yaxis()
        ax.margins(x=0.15)
    figure.suptitle(
        f"{result['size']}, batch {result['batch_size']}, {result['data']}\n{common.in_words(result['machine'])}"
    )
    common.save_figure(figure, folder, name)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all peers in turn; prints, writes and draws the table."""
    shared = ("--size", options.size, "--steps", options.steps, "--device", options.device)
    workers = {
        name: (f"benchmarks.peers.{PEERS[name][0]}", (*PEERS[name][1], *shared, "--batch_size", options.batch_size))
        for name in options.peers
    }
    results = common.in_turn(workers, rounds=options.rounds, threads=options.threads)
    check_losses(results)
    one = results[options.peers[0]][0]
    result = {
        "size": options.size,
        "data": one["data"],
        "batch_size": options.batch_size,
        "threads": one["threads"],
        "rounds": options.rounds,
        "steps": options.steps,
        "machine": one["machine"],
        "headline": headline(results),
        "peers": summarise(results),
    }
    show(result)
    common.write_result(options.results, options.name, result)
    draw(result, options.results, options.name)
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=7, help=f"timed steps of a run; {common.WARMUP} more warm up")
    parser.add_argument("--batch_size", type=int, default=common.BATCH_SIZE)
    parser.add_argument("--peers", nargs="+", choices=[*PEERS, "drop-in", "lora"], default=list(DEFAULT))
    options = parser.parse_args(argv)
    groups = {"drop-in": DROP_IN, "lora": LORA}
    options.name = options.peers[0] if len(options.peers) == 1 and options.peers[0] in groups else "peers"
    options.peers = [peer for name in options.peers for peer in groups.get(name, (name,))]
    run(options)


if __name__ == "__main__":
    main()
