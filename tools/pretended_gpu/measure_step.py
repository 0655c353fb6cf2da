"""What the host needs for a training step of fastft, and what it asks the GPU for.

    python -m tools.pretended_gpu run FOLDER -m tools.pretended_gpu.measure_step --size gpt2-medium --examples 8 64

Each step is made of the same batches in every round, so that after the first rounds all kernels are compiled and all
graphs captured.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from fastft.engines.choose import make_engine
from fastft.model import ops
from fastft.model.gpt2 import GPT2, config_for
from fastft.model.lora_spec import LoRA
from fastft.model.part import Part
from fastft.ranks.world import ALONE
from fastft.run.config import TrainOptions
from fastft.scaling.predict import training_set
from tools.pretended_gpu import measuring
from tools.pretended_gpu.measuring import Parts

NEW_ROWS = 4
"""Of a vocabulary, that are trained beside adapters."""
ROUNDS_BEFORE = 2
"""A graph is captured when its sizes come for the second time."""


def measure(options: argparse.Namespace, examples: int) -> dict[str, Any]:
    """Steps of that many examples: the parts of one, and the shapes of the batches."""
    asked = TrainOptions(dtype=options.dtype, device="cuda", compile=options.compile, cuda_graphs=options.cuda_graphs)
    model = GPT2(config_for(options.size))
    if options.lora_r is not None:
        lora = LoRA(r=options.lora_r, alpha=2.0 * options.lora_r, dora=True)
        rows = (model.config.vocab_size - NEW_ROWS, NEW_ROWS)
        Part(lora=lora, train_only=None, new_rows=rows, base_sha256="").take(model)
    engine = make_engine(model, asked, ALONE)
    batcher = ops.batcher(engine.impl, engine.device, is_narrow=True)
    encoded = training_set(options.data)
    order = np.random.default_rng(0).permutation(len(encoded))
    chosen = [order[(step * examples + np.arange(examples)) % len(order)] for step in range(options.steps)]

    def step(parts: Parts, indices: np.ndarray) -> tuple[int, int]:
        batch = parts.run("batch", lambda: batcher(encoded, indices))
        loss, _ = parts.run("forward and backward", lambda: engine.accumulate(batch, batch.count))
        result = parts.run("update", lambda: engine.update(asked.lr, loss))
        parts.run("reading the result", result)
        return batch.tokens.numel(), batch.rows.numel()

    for _ in range(ROUNDS_BEFORE):
        for indices in chosen:
            step(Parts(), indices)
    parts = Parts()
    shapes = {step(parts, indices) for indices in chosen}
    return {"examples": examples, "shapes": sorted(shapes), "parts": parts.summary()}


def main() -> None:
    """The command line."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--size", default="gpt2-medium")
    parser.add_argument("--examples", type=int, nargs="+", default=[8, 64], help="of a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument(
        "--lora_r", type=int, help="adapters of this rank, DoRA's, and some rows, in place of all weights"
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda_graphs", action=argparse.BooleanOptionalAction, default=None)
    options = parser.parse_args()
    results = [measure(options, examples) for examples in options.examples]
    lines = []
    for result in results:
        tokens = [T for T, _ in result["shapes"]]
        title = f"{options.size}, {result['examples']} examples, {min(tokens)} to {max(tokens)} tokens:"
        lines += measuring.in_lines(title, result["parts"])
    measuring.say_and_write(results, lines, options.json)


if __name__ == "__main__":
    main()
