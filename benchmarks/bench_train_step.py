"""One optimizer step: forward, backward and update of eight examples, by batching and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks import common
from benchmarks.engines import new_engine, train_step
from fastft.engines.engine import choose_device, choose_dtype
from fastft.model.gpt2 import config_for

BATCHINGS = {"padded": {"packed": False}, "packed": {"share_prefix": False}, "shared": {}}
"""What each batching asks of `common.batcher_of`."""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("batching", list(BATCHINGS))
def bench_train_step(benchmark: Callable[..., Any], size: str, device: str, batching: str, dtype: str) -> None:
    """A step, its batch made within it."""
    if dtype == "bf16" and choose_dtype("auto", choose_device(device)) != "bf16":  # type: ignore[arg-type]
        pytest.skip("this device has no bf16 instructions")
    encoded = common.encoded_records(common.records_in_order(common.BATCH_SIZE), config_for(size).n_ctx)
    engine = new_engine(size, dtype=dtype, device=device)
    examples = np.arange(len(encoded))
    batcher = common.batcher_of(engine, **BATCHINGS[batching])
    batch = batcher(encoded, examples)
    benchmark.extra_info.update(
        size=size, examples=len(encoded), tokens_computed=batch.tokens.numel(), tokens_supervised=batch.count
    )
    benchmark.pedantic(
        lambda: train_step(engine, [batcher(encoded, examples)]),
        rounds=10,
        warmup_rounds=common.WARMUP,
    )
