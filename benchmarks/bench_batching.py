"""Making a batch of encoded examples: padded rows, a pack, a pack with its beginnings shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks import common
from fastft.batches.batch import Batcher

BATCHERS = {
    "padded": Batcher(packed=False),
    "packed": Batcher(share_prefix=False),
    "shared": Batcher(share_prefix=True),
}


@pytest.mark.parametrize("examples", [8, 64, 256])
@pytest.mark.parametrize("batching", list(BATCHERS))
def bench_batching(benchmark: Callable[..., Any], batching: str, examples: int) -> None:
    """A batch of so many examples, on the host."""
    encoded = common.encoded_records(common.records_in_order(examples))
    indices = np.arange(len(encoded))
    batch = benchmark(BATCHERS[batching], encoded, indices)
    benchmark.extra_info.update(tokens_computed=batch.tokens.numel(), tokens_padded=batch.tokens_padded)
