"""A training step as a multiple of its floor: its bare matrix products and one pass over the optimizer's memory, each
measured in turn with it in the same process.

The products are those of the step, in their shapes and numbers: for each linear layer the forward product, the
gradient of its input and the gradient of its weight, with T computed tokens; in the pruned last block R rows in query,
projection and MLP; the head with R rows. Each layer has weights and gradients of its own, as in the step, so that they
come from memory and not from a cache. Nothing is allocated. Attention's own products are not among them. On a GPU they
are timed by its own clock: what the host needs to ask for them is the step's affair.

The pass moves what AdamW's update cannot do without: of each weight, weight, moments and gradient read, and weight,
moments and, in bf16, the narrow copy written, at the rate at which this machine reads and writes memory in place. So no
step with these products on this machine is below the floor, and the ratio to it says what is left to save.
"""

from __future__ import annotations

import argparse
import statistics
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


class OnePass:
    """Reading and writing as many bytes in place as AdamW's update of `n` weights moves: `BYTES` of each."""

    BYTES = 28
    """Read: a weight and two moments, in float32, and the gradient; written: the first three and the copy. In bf16
    gradient and copy have 2 bytes each, in float32 the gradient has 4 and there is no copy."""
    _LARGEST = 1 << 28
    """Elements of the memory that is passed over, several times where a model's is larger."""

    def __init__(self, n: int, device: str = "cpu") -> None:
        import torch

        elements = n * self.BYTES // 8
        self._passes = [min(self._LARGEST, elements - at) for at in range(0, elements, self._LARGEST)]
        self._memory = torch.ones(self._passes[0], device=device)

    def __call__(self) -> None:
        """Moves them."""
        for elements in self._passes:
            self._memory[:elements].mul_(1.0)


def measure(size: str, dtype: str, steps: int, device: str, batch_size: int = common.BATCH_SIZE) -> dict[str, Any]:
    """Step, bare products, pass, step, bare products, ... in this process."""
    import torch

    from benchmarks.engines import Stopwatch, Timed, new_engine, train_step
    from fastft.model.gpt2 import config_for
    from fastft.model.part import trained

    n = batch_size
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
    one_pass = OnePass(sum(weight.numel() for weight in trained(engine.model).values()), device)
    step_seconds, bare_seconds, pass_seconds, flops = [], [], [], []
    for index in range(len(batches)):
        with Stopwatch() as watch:
            batch = batcher(encoded, range(index * n, index * n + n))  # type: ignore[arg-type] # indices
            train_step(engine, [batch])
        step_seconds.append(watch.seconds)
        T, R = batch.tokens.numel(), batch.rows.numel()
        bare_seconds.append(common.seconds_of(lambda T=T, R=R: products(T, R), device))  # type: ignore[misc] # bound now
        pass_seconds.append(common.seconds_of(one_pass, device))
        flops.append(products.flops)
    steps_timed, bare_timed, passes_timed = Timed(step_seconds), Timed(bare_seconds), Timed(pass_seconds)
    floors = [a + b for a, b in zip(bare_timed.timed, passes_timed.timed, strict=True)]
    timed_flops = flops[common.WARMUP :]
    return {
        "step_seconds": steps_timed.median,
        "bare_seconds": bare_timed.median,
        "pass_seconds": passes_timed.median,
        "step_to_bare": [a / b for a, b in zip(steps_timed.timed, bare_timed.timed, strict=True)],
        "step_to_floor": [a / b for a, b in zip(steps_timed.timed, floors, strict=True)],
        "bare_gigaflops": [f / s / 1e9 for f, s in zip(timed_flops, bare_timed.timed, strict=True)],
        "peak_bytes": common.peak_bytes(device),
        "machine": common.machine(),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures each dtype in processes of its own, in turn; prints and writes the table."""
    shared: tuple[object, ...] = ("--size", options.size, "--steps", options.steps, "--device", options.device)
    shared = (*shared, "--batch_size", options.batch_size)
    workers = {dtype: ("benchmarks.bare", ("--dtype", dtype, *shared)) for dtype in options.dtypes}
    rounds = common.in_turn(workers, rounds=options.rounds, threads=options.threads)
    machine = rounds[options.dtypes[0]][0]["machine"]
    dtypes = {name: _together(turns) for name, turns in rounds.items()}
    result = {
        "size": options.size,
        "data": common.data_name(),
        "batch_size": options.batch_size,
        "steps": options.steps,
        "rounds": options.rounds,
        "machine": machine,
        "dtypes": dtypes,
    }
    body = [
        (
            name,
            *(f"{each[key] * 1e3:.0f}" for key in ("step_seconds", "bare_seconds", "pass_seconds")),
            common.shown(each["step_to_bare"]),
            common.shown(each["step_to_floor"]),
            common.shown(each["bare_gigaflops"], 0),
        )
        for name, each in dtypes.items()
    ]
    title = f"The step beside its floor: {options.size}, batch {options.batch_size}, {result['data']}"
    columns = ("dtype", "step, ms", "products, ms", "pass, ms", "step / products", "step / floor", "products, GFLOP/s")
    common.print_table(title, columns, body, (common.in_words(machine),))
    common.write_result(options.results, "bare", result)
    return result


def _together(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rounds of a dtype found: medians of their seconds, and their ratios as one set."""
    seconds = ("step_seconds", "bare_seconds", "pass_seconds")
    spreads = ("step_to_bare", "step_to_floor", "bare_gigaflops")
    return {
        **{key: statistics.median(turn[key] for turn in turns) for key in seconds},
        **{key: common.spread(value for turn in turns for value in turn[key]) for key in spreads},
        "floors_by_round": [statistics.median(turn["step_to_floor"]) for turn in turns],
        "peak_bytes": max((turn["peak_bytes"] for turn in turns if turn["peak_bytes"]), default=None),
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=15, help=f"timed steps; {common.WARMUP} more warm up")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each dtype, in turn")
    parser.add_argument("--batch_size", type=int, default=common.BATCH_SIZE, help="examples a step")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=("bf16", "fp32"))
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="measure this one here and say it as JSON")
    options = parser.parse_args(argv)
    if options.dtype is None:
        run(options)
        return
    common.begin(options.threads)
    device = common.chosen_device(options.device)
    common.say(measure(options.size, options.dtype, options.steps, device, options.batch_size))


if __name__ == "__main__":
    main()
