"""A training step as a multiple of its bare matrix products, measured in turn in the same process.

The products are those of the step, in their shapes and numbers: for each linear layer the forward product, the
gradient of its input and the gradient of its weight, with T computed tokens; in the pruned last block R rows in query,
projection and MLP; the head with R rows. Each layer has weights and gradients of its own, as in the step, so that they
come from memory and not from a cache. Nothing is allocated. Attention's own products are not among them. On a GPU they
are timed by its own clock: what the host needs to ask for them is the step's affair.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks import common

if TYPE_CHECKING:
    import torch

    from fastft.model.gpt2 import GPT2Config


class BareProducts:
    """The matrix products of steps of up to `most_tokens` tokens and `most_rows` loss rows."""

    def __init__(
        self, config: GPT2Config, most_tokens: int, most_rows: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        import torch

        C, V = config.n_embd, config.vocab_size
        widest = max(most_tokens * 4 * C, most_rows * V)
        self._x, self._y, self._dx = (
            torch.full((n,), 0.01, dtype=dtype, device=device) for n in (most_tokens * 4 * C, widest, widest)
        )

        def pair(n_out: int, n_in: int) -> tuple[torch.Tensor, torch.Tensor]:
            weight = torch.empty(n_out, n_in, dtype=dtype, device=device).normal_(0, 0.02)
            return weight, torch.zeros_like(weight)

        shapes = {"attn": (3 * C, C), "proj": (C, C), "fc": (4 * C, C), "out": (C, 4 * C)}
        self._blocks = [{name: pair(*shape) for name, shape in shapes.items()} for _ in range(config.n_layer)]
        self._head = pair(V, C)
        self._mm: Callable[..., Any] = torch.mm
        self.flops = 0

    def __call__(self, tokens: int, rows: int) -> int:
        """Computes the products of a step; returns how many floating-point operations they are."""
        self.flops = 0
        *full, last = self._blocks
        for block in full:
            for weight, grad in block.values():
                self._linear(weight, grad, tokens)
        C = self._head[0].shape[1]
        weight, grad = last["attn"]
        self._linear(weight[C:], grad[C:], tokens)  # keys and values: every token
        self._linear(weight[:C], grad[:C], rows)
        for name in ("proj", "fc", "out"):
            self._linear(*last[name], rows)
        self._linear(*self._head, rows)
        return self.flops

    def _linear(self, weight: torch.Tensor, grad: torch.Tensor, n: int) -> None:
        n_out, n_in = weight.shape
        x, y, dx = (
            flat[: n * width].view(n, width) for flat, width in ((self._x, n_in), (self._y, n_out), (self._dx, n_in))
        )
        self._mm(x, weight.t(), out=y)
        self._mm(y, weight, out=dx)
        self._mm(y.t(), x, out=grad)
        self.flops += 6 * n * n_out * n_in


def measure(size: str, dtype: str, steps: int, device: str) -> dict[str, Any]:
    """Step, bare products, step, bare products, ... in this process."""
    import torch

    from benchmarks.engines import Stopwatch, Timed, new_engine, train_step
    from fastft.model.gpt2 import config_for

    n = common.BATCH_SIZE
    encoded = common.encoded_records(common.records_in_order(n * (steps + common.WARMUP)), config_for(size).n_ctx)
    engine = new_engine(size, dtype=dtype, device=device)
    batcher = common.batcher_of(engine)
    batches = [batcher(encoded, range(i * n, i * n + n)) for i in range(steps + common.WARMUP)]  # type: ignore[arg-type] # indices
    products = BareProducts(
        engine.model.config,
        max(batch.tokens.numel() for batch in batches),
        max(batch.rows.numel() for batch in batches),
        {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype],
        device,
    )
    step_seconds, bare_seconds, flops = [], [], []
    for index in range(len(batches)):
        with Stopwatch() as watch:
            batch = batcher(encoded, range(index * n, index * n + n))  # type: ignore[arg-type] # indices
            train_step(engine, [batch])
        step_seconds.append(watch.seconds)
        T, R = batch.tokens.numel(), batch.rows.numel()
        bare_seconds.append(common.seconds_of(lambda T=T, R=R: products(T, R), device))  # type: ignore[misc] # bound now
        flops.append(products.flops)
    steps_timed, bare_timed = Timed(step_seconds), Timed(bare_seconds)
    timed_flops = flops[common.WARMUP :]
    return {
        "step_seconds": steps_timed.median,
        "bare_seconds": bare_timed.median,
        "step_to_bare": common.ratios(steps_timed.timed, bare_timed.timed),
        "bare_gigaflops": common.spread(f / s / 1e9 for f, s in zip(timed_flops, bare_timed.timed, strict=True)),
        "machine": common.machine(),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures each dtype in a process of its own; prints and writes the table."""
    shared = ("--size", options.size, "--steps", options.steps, "--device", options.device)
    workers = {dtype: ("benchmarks.bare", ("--dtype", dtype, *shared)) for dtype in options.dtypes}
    dtypes = {name: turns[0] for name, turns in common.in_turn(workers, rounds=1, threads=options.threads).items()}
    *_, machine = [each.pop("machine") for each in dtypes.values()]
    result = {
        "size": options.size,
        "data": common.data_name(),
        "batch_size": common.BATCH_SIZE,
        "steps": options.steps,
        "machine": machine,
        "dtypes": dtypes,
    }
    body = [
        (
            name,
            f"{each['step_seconds'] * 1e3:.0f}",
            f"{each['bare_seconds'] * 1e3:.0f}",
            common.shown(each["step_to_bare"]),
            common.shown(each["bare_gigaflops"], 0),
        )
        for name, each in dtypes.items()
    ]
    title = f"The step beside its bare matrix products: {options.size}, batch {common.BATCH_SIZE}, {result['data']}"
    columns = ("dtype", "step, ms", "products, ms", "step / products", "products, GFLOP/s")
    common.print_table(title, columns, body, (common.in_words(machine),))
    common.write_result(options.results, "bare", result)
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=15, help=f"timed steps; {common.WARMUP} more warm up")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=("bf16", "fp32"))
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="measure this one here and say it as JSON")
    options = parser.parse_args(argv)
    if options.dtype is None:
        run(options)
        return
    common.begin(options.threads)
    device = common.chosen_device(options.device)
    common.say(measure(options.size, options.dtype, options.steps, device))


if __name__ == "__main__":
    main()
