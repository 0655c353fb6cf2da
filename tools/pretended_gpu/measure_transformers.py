"""What the host needs for a training step of transformers' GPT-2, with clipping, and what it asks the GPU for.

    python -m tools.pretended_gpu run FOLDER -m tools.pretended_gpu.measure_transformers --size gpt2 --examples 8

The step is that of benchmarks/peers/hf.py with the gradient clipped, as fastft's is.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.peers import hf, shared
from fastft.model.gpt2 import config_for
from fastft.scaling.predict import training_set
from tools.pretended_gpu import measuring
from tools.pretended_gpu.measuring import Parts

STEPS_BEFORE = 4


def measure(options: argparse.Namespace, examples: int, *, compiled: bool) -> dict[str, Any]:
    """Steps of the same examples: the parts of one."""
    model: torch.nn.Module = hf.new_model(config_for(options.size))
    model.cuda().train()
    called = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=shared.RATE, weight_decay=shared.WEIGHT_DECAY, fused=True)
    encoded = training_set(options.data)
    chosen = [(encoded[i].tolist(), int(encoded.first_target[i])) for i in range(examples)]

    def forward_backward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        batch = {name: tensor.to("cuda") for name, tensor in batch.items()}
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss: torch.Tensor = called(**batch, use_cache=False).loss
        loss.backward()
        return loss

    def update() -> None:
        if options.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()

    def step(parts: Parts) -> None:
        batch = parts.run("batch", lambda: hf.collate(options.kind, chosen))
        loss = parts.run("forward and backward", lambda: forward_backward(batch))
        parts.run("update", update)
        parts.run("reading the result", loss.item)

    for _ in range(STEPS_BEFORE):
        step(Parts())
    parts = Parts()
    for _ in range(options.steps):
        step(parts)
    return {"examples": examples, "compiled": compiled, "parts": parts.summary()}


def main() -> None:
    """The command line."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--size", default="gpt2")
    parser.add_argument("--examples", type=int, nargs="+", default=[8, 64], help="of a step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--kind", default=hf.KINDS[0], choices=hf.KINDS)
    parser.add_argument("--clip", type=float, default=1.0, help="the gradient's greatest norm; 0 does not clip")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="both, if not given")
    options = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN is not pretended: attention is torch's own flash kernel
    ways = [False, True] if options.compile is None else [options.compile]
    results, lines = [], []
    for examples in options.examples:
        for compiled in ways:
            results.append(measure(options, examples, compiled=compiled))
            way = "compiled" if compiled else "eager"
            title = f"transformers, {options.size}, {options.kind}, {way}, {examples} examples, clip {options.clip:g}:"
            lines += measuring.in_lines(title, results[-1]["parts"])
    measuring.say_and_write(results, lines, options.json)


if __name__ == "__main__":
    main()
