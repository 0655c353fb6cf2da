"""Liger-Kernel's kernels, compiled as ours are, where it is installed."""

from __future__ import annotations

from importlib import import_module

import torch

from fastft_kernels.static.cases import VOCAB, learnt
from fastft_kernels.static.gate import Row, compiled


def of_liger(arch: str) -> list[Row]:
    """Liger-Kernel's cross-entropy and layer norm, compiled the same way; `ImportError` where it is not installed."""
    cross_entropy, layer_norm = (import_module(f"liger_kernel.ops.{name}") for name in ("cross_entropy", "layer_norm"))

    # It asks the GPU that is there for the number of warps.
    vars(cross_entropy)["infer_device_arch"] = lambda: "blackwell" if arch == "sm_100" else "ampere_ada"

    def loss() -> None:
        logits = learnt(64, VOCAB, dtype=torch.bfloat16)
        cross_entropy.cross_entropy_forward(logits, torch.arange(64), None, -100, 0.0, 0.0, "mean", None, False)

    def norm() -> None:
        x, dy = (torch.empty(64, 1024, dtype=torch.bfloat16) for _ in range(2))
        weight, bias = torch.empty(1024), torch.empty(1024)
        _, x, mean, rstd, _, _ = layer_norm.layer_norm_forward(x, weight, bias, 1e-5)
        layer_norm.layer_norm_backward(dy, x, weight, bias, mean, rstd)

    rows, failures = compiled(arch, {f"Liger V={VOCAB} bf16": loss, "Liger C=1024 bf16": norm})
    for failure in failures:
        print(failure)
    return rows
