"""The ablation: one saving after another, from padded rows to packed, shared and pruned ones in bf16.

Each row is a process of its own, all of them in turn, round by round. A row differs from the one above it by what its
name says. Its loss and gradient are held against the reference (padded, float32, no saving at all) on the examples of
its own first step: the largest max|a - b| / max|b| of any weight's gradient.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import common


@dataclass(frozen=True, slots=True)
class Row:
    """What a row of the table computes; by default nothing is saved."""

    impl: str = "auto"
    bucketed: bool = False
    packed: bool = False
    rows_only: bool = False
    share_prefix: bool = False
    pruned: bool = False
    bf16: bool = False


ROWS = {
    "reference": Row(impl="reference"),
    "padded": Row(),
    "bucketed": Row(bucketed=True),
    "packed": Row(packed=True),
    "supervised rows only": Row(packed=True, rows_only=True),
    "prefix shared": Row(packed=True, rows_only=True, share_prefix=True),
    "last block pruned": Row(packed=True, rows_only=True, share_prefix=True, pruned=True),
    "bf16": Row(packed=True, rows_only=True, share_prefix=True, pruned=True, bf16=True),
}
"""`padded` has fused attention on `[B, W]`; `reference` computes attention and logits step by step."""

BASE = "padded"
TOKENS = ("padded", "real", "computed", "supervised")


def measure(row: Row, size: str, steps: int, device: str) -> dict[str, Any]:
    """Times a row's steps in this process, and then computes its difference from the reference."""
    from benchmarks.engines import Stopwatch, Timed, new_engine, train_step
    from fastft.batches.plan import make_plan
    from fastft.model.gpt2 import config_for

    encoded = common.encoded_records(common.training_records(), config_for(size).n_ctx)
    plan = make_plan(encoded, batch_size=common.BATCH_SIZE, steps=steps + common.WARMUP, bucketed=row.bucketed)
    engine = new_engine(size, dtype="bf16" if row.bf16 else "fp32", device=device, model=model_of(row), impl=row.impl)
    batcher = common.batcher_of(engine, packed=row.packed, share_prefix=row.share_prefix)
    seconds, tokens, losses = [], [], []
    for index in range(plan.total_steps):
        examples = plan.step(index).examples
        with Stopwatch() as watch:
            batch = batcher(encoded, examples)
            losses.append(train_step(engine, [batch]))
        seconds.append(watch.seconds)
        tokens.append((batch.tokens_padded, batch.tokens_real, batch.tokens.numel(), batch.count))
    timed = Timed(seconds)
    means = [statistics.mean(column) for column in zip(*tokens[common.WARMUP :], strict=True)]
    peak = common.peak_bytes(device)  # before the reference is computed
    del engine
    return {
        "row": asdict(row),
        "seconds": seconds,
        "examples_per_second": common.BATCH_SIZE / timed.median,
        "tokens_per_second": {name: mean / timed.median for name, mean in zip(TOKENS, means, strict=True)},
        "peak_bytes": peak,
        "losses": losses,
        "difference": difference_of(row, size, device, encoded, plan.step(0).examples),
        "machine": common.machine(),
    }


def model_of(row: Row) -> type[Any]:
    """The forward pass that has the row's savings and no others."""
    from benchmarks.engines import AllLogits, AllTokens
    from fastft.model.gpt2 import GPT2

    if row.pruned or row.impl == "reference":
        return GPT2
    return AllTokens if row.rows_only else AllLogits


def difference_of(row: Row, size: str, device: str, encoded: Any, examples: Any) -> dict[str, float]:
    """Relative differences of loss and gradient from the reference, at the initial weights."""
    from benchmarks.engines import gradients, largest_difference, new_engine

    reference = new_engine(size, dtype="fp32", device=device, impl="reference")
    batch = common.batcher_of(reference, packed=False)(encoded, examples)
    right_loss = float(reference.accumulate(batch, batch.count)[0])
    right = {name: gradient.clone() for name, gradient in gradients(reference).items()}
    del reference
    engine = new_engine(size, dtype="bf16" if row.bf16 else "fp32", device=device, model=model_of(row), impl=row.impl)
    batch = common.batcher_of(engine, packed=row.packed, share_prefix=row.share_prefix)(encoded, examples)
    loss = float(engine.accumulate(batch, batch.count)[0])
    return {
        "loss": abs(loss - right_loss) / max(abs(right_loss), 1e-30),
        "gradient": largest_difference(gradients(engine), right),
    }


def summarise(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The table's figures out of all rounds' results."""
    base = [turn["examples_per_second"] for turn in results[BASE]] if BASE in results else None
    rows: dict[str, Any] = {}
    for name, turns in results.items():
        each = [turn["examples_per_second"] for turn in turns]
        rows[name] = {
            "examples_per_second": common.spread(each),
            "to_padded": common.ratios(each, base) if base else None,
            "tokens_per_second": {
                kind: statistics.median(turn["tokens_per_second"][kind] for turn in turns) for kind in TOKENS
            },
            "peak_bytes": max((turn["peak_bytes"] for turn in turns if turn["peak_bytes"]), default=None),
            "difference": turns[0]["difference"],
        }
    return rows


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    columns = ("row", "examples/s", f"x {BASE}", *(f"{kind} tok/s" for kind in TOKENS), "peak MiB", "d loss", "d grad")
    body = [
        (
            name,
            f"{row['examples_per_second']['median']:.2f}",
            common.shown(row["to_padded"]),
            *(f"{row['tokens_per_second'][kind]:,.0f}" for kind in TOKENS),
            common.mebibytes(row["peak_bytes"]),
            f"{row['difference']['loss']:.0e}",
            f"{row['difference']['gradient']:.0e}",
        )
        for name, row in result["rows"].items()
    ]
    title = f"{result['size']}, batch {common.BATCH_SIZE}, prompt masked, data: {result['data']}"
    notes = (common.in_words(result["machine"]), f"medians of {result['rounds']} rounds (least to most), rows in turn")
    common.print_table(title, columns, body, notes)


def draw(result: dict[str, Any], folder: Any) -> None:
    """Draws each row's speed as a multiple of the padded row's, with its peak memory."""
    rows = {name: row for name, row in result["rows"].items() if row["to_padded"]}
    figure, (speed, memory) = common.new_figure(2, height=0.5 * len(rows) + 1.2)
    names = list(rows)
    times = [rows[name]["to_padded"] for name in names]
    bars = speed.barh(names, [t["median"] for t in times], color="tab:blue")
    speed.bar_label(bars, [f"{t['median']:.2f}x" for t in times], padding=4)
    speed.set_xlabel(f"examples/s, as a multiple of {BASE}")
    peaks = [(rows[name]["peak_bytes"] or math.nan) / 2**30 for name in names]
    bars = memory.barh(names, peaks, color="tab:gray")
    memory.bar_label(bars, fmt="%.2f", padding=4)
    memory.set_xlabel("peak memory, GiB")
    for axes in (speed, memory):
        axes.invert_yaxis()
        axes.margins(x=0.18)
    figure.suptitle(
        f"{result['size']}, batch {common.BATCH_SIZE}, {result['data']}\n{common.in_words(result['machine'])}"
    )
    common.save_figure(figure, folder, "ablation")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all rows in turn; prints, writes and draws the table."""
    shared = ("--size", options.size, "--steps", options.steps, "--device", options.device)
    workers = {name: ("benchmarks.ablation", ("--row", name, *shared)) for name in options.rows}
    results = common.in_turn(workers, rounds=options.rounds, threads=options.threads)
    result = {
        "size": options.size,
        "data": common.data_name(),
        "batch_size": common.BATCH_SIZE,
        "rounds": options.rounds,
        "steps": options.steps,
        "machine": results[options.rows[0]][0]["machine"],
        "rows": summarise(results),
    }
    show(result)
    common.write_result(options.results, "ablation", result)
    draw(result, options.results)
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help=f"timed steps of a row; {common.WARMUP} more warm up")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--row", choices=list(ROWS), help="measure this one row here and say it as JSON")
    options = parser.parse_args(argv)
    if options.row is None:
        run(options)
        return
    common.begin(options.threads)
    device = common.chosen_device(options.device)
    common.say(measure(ROWS[options.row], options.size, options.steps, device))


if __name__ == "__main__":
    main()
