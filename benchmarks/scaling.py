"""How a step grows with the examples in a pack: time per example, and attention's time by itself.

Attention's work is the number of pairs of tokens that see each other. In a packed batch that grows as the number of
examples does, while T x T grows as its square: the plot has both as lines through the smallest pack's time, and the
exponent of a fit says which one the time follows.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import common

if TYPE_CHECKING:
    from fastft.batches.batch import Batch

EXAMPLES = (8, 16, 32, 64, 128, 256)


def visible_pairs(batch: Batch) -> int:
    """Pairs (query, key) that see each other: each key is seen by the queries from itself to `visible_until`."""
    import torch

    until = batch.visible_until.to(torch.int64)
    return int((until - torch.arange(len(until), device=until.device)).sum())


def attention_seconds(batch: Batch, n_head: int, width: int, dtype: str, device: str) -> float:
    """Seconds of one layer's attention, forward and backward; of a GPU, by its own clock."""
    import torch

    from fastft.model import ops

    torch.manual_seed(0)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    shape = (batch.tokens.numel(), n_head, width // n_head)
    q, k, v = (torch.randn(shape, dtype=kind, device=device, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, dtype=kind, device=device)

    def both_ways() -> None:
        torch.autograd.grad(ops.attention(q, k, v, batch, "auto"), (q, k, v), grad)

    return common.seconds_of(both_ways, device)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent a of the best fit y = c x^a."""
    return statistics.linear_regression([math.log(each) for each in x], [math.log(each) for each in y]).slope


def measure(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """All sizes in turn, round by round, in this process."""
    import numpy as np

    from benchmarks.engines import Stopwatch, new_engine, train_step

    engine = new_engine(options.size, dtype=options.dtype, device=device)
    config = engine.model.config
    encoded = common.encoded_records(common.records_in_order(max(options.examples)), config.n_ctx)
    batcher = common.batcher_of(engine)
    steps: dict[int, list[float]] = {n: [] for n in options.examples}
    attention: dict[int, list[float]] = {n: [] for n in options.examples}
    on_host = {n: batcher(encoded, np.arange(n)) for n in options.examples}
    batches = {n: batch.to(device) for n, batch in on_host.items()}
    for turn in range(options.rounds + 1):  # the first round warms up
        for n in options.examples:
            for _ in range(common.WARMUP if turn == 0 else 1):
                with Stopwatch() as watch:
                    train_step(engine, [batcher(encoded, np.arange(n))])
                seconds = attention_seconds(batches[n], config.n_head, config.n_embd, options.dtype, device)
            if turn:
                steps[n].append(watch.seconds)
                attention[n].append(seconds)
    return {
        "machine": common.machine(),
        "layers": config.n_layer,
        "packs": [
            {
                "examples": n,
                "tokens": batches[n].tokens.numel(),
                "visible_pairs": visible_pairs(on_host[n]),
                "step_seconds": common.spread(steps[n]),
                "attention_seconds": common.spread(attention[n]),
            }
            for n in options.examples
        ],
    }


def add_growth(result: dict[str, Any]) -> None:
    """What the times grow with: exponents over all packs."""
    packs = result["packs"]
    attention = [pack["attention_seconds"]["median"] for pack in packs]
    result["attention_exponent_of_pairs"] = slope([pack["visible_pairs"] for pack in packs], attention)
    result["attention_exponent_of_tokens_squared"] = slope([pack["tokens"] ** 2 for pack in packs], attention)
    result["step_exponent_of_examples"] = slope(
        [pack["examples"] for pack in packs], [pack["step_seconds"]["median"] for pack in packs]
    )


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    body = []
    for pack in result["packs"]:
        step, attention = pack["step_seconds"]["median"], pack["attention_seconds"]["median"]
        body.append(
            (
                f"{pack['examples']}",
                f"{pack['tokens']:,}",
                f"{pack['visible_pairs']:,}",
                f"{step / pack['examples'] * 1e3:.2f}",
                f"{attention * 1e3:.2f}",
                f"{attention / pack['visible_pairs'] * 1e9:.1f}",
                f"{attention / pack['tokens'] ** 2 * 1e9:.2f}",
                f"{attention * result['layers'] / step:.1%}",
            )
        )
    columns = (
        "examples", "tokens", "visible pairs", "step, ms/example", "attention, ms/layer", "ns/pair", "ns/T^2",
        "attention's part of the step",
    )  # fmt: skip
    notes = (
        f"step ~ examples^{result['step_exponent_of_examples']:.2f} (below 1: an example gets cheaper)",
        f"attention ~ pairs^{result['attention_exponent_of_pairs']:.2f}, "
        f"(T^2)^{result['attention_exponent_of_tokens_squared']:.2f}",
        common.in_words(result["machine"]),
    )
    title = f"Examples in one pack: {result['size']}, {result['dtype']}, data: {result['data']}"
    common.print_table(title, columns, body, notes)


def draw(result: dict[str, Any], folder: Any) -> None:
    """Draws time per example, and attention's time beside lines in proportion to visible pairs and to T^2."""
    packs = result["packs"]
    examples = [pack["examples"] for pack in packs]
    figure, (left, right) = common.new_figure(2)
    left.plot(examples, [pack["step_seconds"]["median"] / pack["examples"] * 1e3 for pack in packs], "o-")
    left.set(xlabel="examples in the pack", ylabel="ms per example, whole step", xscale="log", ylim=(0, None))
    left.set_xticks(examples, [str(n) for n in examples])
    left.minorticks_off()
    times = [pack["attention_seconds"]["median"] * 1e3 for pack in packs]
    tokens = [pack["tokens"] for pack in packs]
    right.loglog(tokens, times, "o-", label="attention, one layer, forward and backward")
    for label, sizes in (
        ("in proportion to the pairs that see each other", [pack["visible_pairs"] for pack in packs]),
        ("in proportion to T x T", [pack["tokens"] ** 2 for pack in packs]),
    ):
        right.loglog(tokens, [times[0] * size / sizes[0] for size in sizes], "--", label=label)
    right.set(xlabel="T, tokens in the pack", ylabel="ms")
    right.legend(fontsize="small")
    figure.suptitle(
        f"{result['size']}, {result['dtype']}, {result['data']}; {common.in_words(result['machine'])}",
        fontsize="medium",
    )
    common.save_figure(figure, folder, "scaling")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures in a process of its own; prints, writes and draws."""
    given = ("--size", options.size, "--dtype", options.dtype, "--rounds", options.rounds, "--device", options.device)
    worker = ("--worker", *given, "--examples", *options.examples)
    result = {
        "size": options.size,
        "dtype": options.dtype,
        "data": common.data_name(),
        "rounds": options.rounds,
        **common.run_worker("benchmarks.scaling", *worker, threads=options.threads),
    }
    add_growth(result)
    show(result)
    common.write_result(options.results, "scaling", result)
    draw(result, options.results)
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--examples", type=int, nargs="+", default=list(EXAMPLES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help="measure here and say it as JSON")
    options = parser.parse_args(argv)
    if len(set(options.examples)) < 2 or min(options.examples) < 1:
        parser.error(
            f"--examples: got {options.examples}, expected two different sizes or more, to see what time grows with"
        )
    if not options.worker:
        run(options)
        return
    common.begin(options.threads)
    common.say(measure(options, common.chosen_device(options.device)))


if __name__ == "__main__":
    main()
