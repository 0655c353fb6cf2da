"""A long shared prompt: one optimizer step over a pack of examples, its prompt computed once or for every example.

Every example has the same prompt and an answer of its own; the prompt is masked. Without sharing the pack would hold
`examples x (prompt + answer)` tokens, too many for the memory of most machines, so that it is cut into packs of at most
`--pack_tokens` tokens, as a training run cuts it: the same products, and one update.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from benchmarks import common

if TYPE_CHECKING:
    from fastft.data.encode import EncodedSet

SHARING = ("true", "false")


def made_examples(examples: int, prompt: int, answer: int) -> EncodedSet:
    """Random ids: one prompt of `prompt` ids for all, and an answer of `answer` ids each, its end-of-text included."""
    import numpy as np

    from fastft.data.encode import EncodedSet
    from fastft.data.tokenizer import END_OF_TEXT

    random = np.random.default_rng(0)
    ids = np.empty((examples, prompt + answer), dtype=np.int32)
    ids[:, :prompt] = random.integers(0, END_OF_TEXT, prompt)
    ids[:, prompt:] = random.integers(0, END_OF_TEXT, (examples, answer))
    ids[:, -1] = END_OF_TEXT
    return EncodedSet.of_suffixes(
        ids=ids.reshape(-1),
        offsets=np.arange(examples + 1, dtype=np.int64) * (prompt + answer),
        first_target=np.full(examples, prompt, dtype=np.int64),
        rows=np.arange(examples, dtype=np.int64),
    )


def measure(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Times steps with or without sharing, in this process."""
    import numpy as np

    from benchmarks.engines import Stopwatch, new_engine, train_step

    share = options.share == "true"
    encoded = made_examples(options.examples, options.prompt, options.answer)
    own = max(1, options.pack_tokens // (options.prompt + options.answer - 1))
    packs = np.array_split(np.arange(options.examples), 1 if share else -(-options.examples // own))
    engine = new_engine(options.size, dtype=options.dtype, device=device)
    batcher = common.batcher_of(engine, share_prefix=share)
    for _ in range(common.WARMUP):
        # One pack of the step has all its shapes; at a rate of 0 the weights stay what they are, so that the first
        # timed losses are those of the same weights.
        train_step(engine, [batcher(encoded, packs[0])], rate=0.0)
    seconds, losses = [], []
    for _ in range(options.steps):
        with Stopwatch() as watch:
            batches = [batcher(encoded, pack) for pack in packs]
            losses.append(train_step(engine, batches))
        seconds.append(watch.seconds)
        tokens = sum(batch.tokens.numel() for batch in batches)
    return {
        "seconds": seconds,
        "examples_per_second": options.examples / common.spread(seconds)["median"],
        "packs": len(packs),
        "tokens_computed": tokens,
        "losses": losses,
        "peak_bytes": common.peak_bytes(device),
        "machine": common.machine(),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures both in turn; prints, writes and draws."""
    names = ("size", "dtype", "examples", "prompt", "answer", "pack_tokens", "steps", "device")
    shared = [part for name in names for part in (f"--{name}", getattr(options, name))]
    workers = {share: ("benchmarks.sharing", ["--share", share, *shared]) for share in SHARING}
    results = common.in_turn(workers, rounds=options.rounds, threads=options.threads)
    speeds = {share: [turn["examples_per_second"] for turn in turns] for share, turns in results.items()}
    result = {
        **{name: getattr(options, name) for name in names},
        "rounds": options.rounds,
        "machine": results["true"][0]["machine"],
        "shared_to_not": common.ratios(speeds["true"], speeds["false"]),
        "shared": _figures(results["true"]),
        "not_shared": _figures(results["false"]),
    }
    show(result)
    common.write_result(options.results, "sharing", result)
    draw(result, options.results)
    return result


def _figures(turns: list[dict[str, Any]]) -> dict[str, Any]:
    keep = ("packs", "tokens_computed", "losses", "peak_bytes")
    each = common.spread(turn["examples_per_second"] for turn in turns)
    return {"examples_per_second": each, **{key: turns[0][key] for key in keep}}


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    body = [
        (
            name,
            common.shown(each["examples_per_second"], 3),
            f"{each['tokens_computed']:,}",
            str(each["packs"]),
            common.mebibytes(each["peak_bytes"]),
            f"{each['losses'][0]:.5f}",
        )
        for name, each in (("shared", result["shared"]), ("not shared", result["not_shared"]))
    ]
    title = (
        f"{result['examples']} answers of {result['answer']} tokens to one prompt of {result['prompt']}: "
        f"{result['size']}, {result['dtype']}"
    )
    columns = ("prompt", "examples/s", "tokens computed", "packs", "peak MiB", "loss")
    notes = (f"shared to not shared: {common.shown(result['shared_to_not'])}", common.in_words(result["machine"]))
    common.print_table(title, columns, body, notes)


def draw(result: dict[str, Any], folder: Any) -> None:
    """Draws the two speeds."""
    figure, axes = common.new_figure(height=2.2)
    medians = [result[key]["examples_per_second"]["median"] for key in ("shared", "not_shared")]
    bars = axes.barh(["prompt shared", "not shared"], medians, color=["tab:orange", "tab:blue"])
    axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("examples/s")
    axes.set_title(f"{result['size']}, {result['dtype']}: {common.shown(result['shared_to_not'])}x", fontsize="medium")
    common.save_figure(figure, folder, "sharing")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=900, help="tokens of the prompt")
    parser.add_argument("--answer", type=int, default=60, help="tokens of each answer, its end-of-text included")
    parser.add_argument("--pack_tokens", type=int, default=16384, help="the most tokens of a pack without sharing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help=f"timed steps; {common.WARMUP} of one pack warm up")
    parser.add_argument("--share", choices=SHARING, help="measure this one here and say it as JSON")
    options = parser.parse_args(argv)
    if options.share is None:
        run(options)
        return
    common.begin(options.threads)
    common.say(measure(options, common.chosen_device(options.device)))


if __name__ == "__main__":
    main()
