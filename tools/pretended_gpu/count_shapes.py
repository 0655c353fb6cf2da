"""How many sizes of batches a run has: how many CUDA graphs it would capture, or shapes a compiler would see.

    python -m tools.pretended_gpu.count_shapes --examples 8 16 32 64

It needs no GPU, pretended or not. Two batches are of one size if one graph serves both (`fastft.gpu.staging`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch

from fastft.data.encode import EncodedSet
from fastft.gpu import staging
from fastft.model import ops
from fastft.scaling.predict import training_set
from tools.pretended_gpu import measuring

COMMONEST = 8


def count(encoded: EncodedSet, examples: int, epochs: int) -> dict[str, Any]:
    """The sizes of the batches of some epochs, each in an order of its own."""
    batcher = ops.batcher("triton", torch.device("cuda"), is_narrow=True)
    stage = staging.Staging(torch.device("cpu"))
    generator = np.random.default_rng(0)
    sizes: Counter[Hashable] = Counter()
    tokens, seconds = set(), 0.0
    for _ in range(epochs):
        order = generator.permutation(len(encoded))
        for begin in range(0, len(order) - examples + 1, examples):
            began = time.perf_counter()
            batch = batcher(encoded, order[begin : begin + examples])
            seconds += time.perf_counter() - began
            sizes[stage.put(batch).sizes] += 1
            tokens.add(len(batch.tokens))
    steps = sizes.total()
    return {
        "examples": examples,
        "steps": steps,
        "sizes": len(sizes),
        "commonest_cover": round(sum(number for _, number in sizes.most_common(COMMONEST)) / steps, 3),
        "tokens": [min(tokens), max(tokens)],
        "ms_a_batch": round(1e3 * seconds / steps, 3),
    }


def main() -> None:
    """The command line."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--examples", type=int, nargs="+", default=[8, 16, 32, 64], help="of a batch")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    encoded = training_set(options.data)
    results = [count(encoded, examples, options.epochs) for examples in options.examples]
    lines = [
        f"{each['examples']} examples: {each['sizes']} sizes in {each['steps']} steps, the {COMMONEST} commonest are "
        f"{each['commonest_cover']:.0%} of them; {each['tokens'][0]} to {each['tokens'][1]} tokens; "
        f"{each['ms_a_batch']:.2f} ms a batch"
        for each in results
    ]
    measuring.say_and_write(results, lines, options.json)


if __name__ == "__main__":
    main()
