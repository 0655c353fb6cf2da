"""One operation, forward and backward, by one implementation: what the kernels' suites measure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastft.kernel_checks import GPU_SIZES, inputs_of
from fastft.kernel_speeds import CASE, PEERS, forward_backward, peak_bytes

OURS = "triton"


def implementations(name: str) -> list[str]:
    """`triton`, and the peers of an operation."""
    return [OURS, *PEERS[name]]


def measure(benchmark: Any, name: str, impl: str) -> None:
    """Times forward and backward in bf16, and notes the memory that they add."""
    case = CASE[name]
    inputs = inputs_of(case, GPU_SIZES, torch.bfloat16, torch.device("cuda"))
    if impl == OURS:
        once = forward_backward(lambda x: case.run(x, OURS), inputs)
    else:
        try:
            once = forward_backward(PEERS[name][impl](GPU_SIZES), inputs)
        except ImportError as error:
            pytest.skip(f"{impl}: {error}")
    benchmark.extra_info.update(impl=impl, peak_bytes=peak_bytes(once), gpu=torch.cuda.get_device_name())
    benchmark.pedantic(once, rounds=20, warmup_rounds=5)
