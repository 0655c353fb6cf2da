"""The cost of a whole training step on the Triton kernels, counted from its batches, and the time that it is PREDICTED
to take on cards at their peak rates. Nothing here is measured: `fastft doctor` and `make bench-gpu` measure.

    python -m fastft.scaling.predict [--data FILE] [--model gpt2-medium] [--examples 64]
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

import jsonargparse
import numpy as np
from fastft_kernels import AttentionPlan, roofline
from fastft_kernels.roofline import CARDS, Cost
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastft.batches.batch import Batch, Batcher
from fastft.common.console import SafeConsole
from fastft.common.errors import FastftError, UserError
from fastft.common.options import options_parser
from fastft.data.encode import EncodedSet, encode
from fastft.data.prompts import ALPACA
from fastft.data.reading import load_records
from fastft.data.records import split
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.model import ops
from fastft.model.gpt2 import GPT2Config, config_for, number_of_parameters

BF16, FP32 = 2, 4
EFFICIENCY = 0.7
"""Part of the peak rates that well-tuned products of these sizes reach (llm.c reports 58% of an A100's for a whole
step of 355M parameters, its scripts/run_gpt2_350M.sh)."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """The options of `python -m fastft.scaling.predict`."""

    data: str = "sample"
    """A data file, `book` or `sample`."""
    model: str = "gpt2-medium"
    """The model's size."""
    examples: int = 64
    """Examples in the optimizer step."""


def step_costs(config: GPT2Config, batch: Batch) -> dict[str, Cost]:
    """What each kind of work of a step needs: forward and backward of one batch in bf16, and its update.

    Args:
        config: the model's.
        batch: packed, with the plans of `ops.planner("triton")`.

    Raises:
        ValueError: the batch has no such plan.
    """
    tiles, row_tiles = batch.tiles, batch.row_tiles
    if not isinstance(tiles, AttentionPlan) or not isinstance(row_tiles, AttentionPlan):
        raise ValueError('expected a batch with a plan for the kernels: Batcher(planner=ops.planner("triton"))')
    T, R, C, V, L = batch.tokens.numel(), batch.rows.numel(), config.n_embd, config.vocab_size, config.n_layer
    linear = (L - 1) * _both_ways(T, (C, 3 * C), (C, C), (C, 4 * C), (4 * C, C))
    linear += _both_ways(T, (C, 2 * C)) + _both_ways(R, (C, C), (C, C), (C, 4 * C), (4 * C, C))
    norm, norm_of_rows = (_norm(rows, C) for rows in (T, R))
    gelu, gelu_of_rows = (
        roofline.gelu_cost(rows, 4 * C, BF16) + roofline.gelu_cost(rows, 4 * C, BF16, backward=True) for rows in (T, R)
    )
    loss = roofline.linear_cross_entropy_cost(R, C, V, BF16)
    loss += roofline.linear_cross_entropy_cost(R, C, V, BF16, backward=True)
    parameters = number_of_parameters(config)
    tokens, positions = len(batch.tokens.unique()), len(batch.positions.unique())
    embeddings = roofline.rows_cost(T, C, BF16, out=FP32) + roofline.rows_cost(T, C, FP32)
    embeddings += roofline.rows_cost(T, C, BF16, out=FP32, segments=tokens, backward=True)
    embeddings += roofline.rows_cost(T, C, FP32, N=config.n_ctx, segments=positions, backward=True)
    return {
        "matrix products": linear,
        "attention": _attention(tiles, config) * (L - 1) + _attention(row_tiles, config),
        "layer norm and residual": norm * (2 * L - 1) + norm_of_rows * 2,
        "GELU": gelu * (L - 1) + gelu_of_rows,
        "linear cross-entropy": loss,
        "embeddings": embeddings,
        # Of the gradients to float32 block by block, and of the updated weights to bf16.
        "casts": roofline.moved(parameters * (BF16 + FP32), parameters * (FP32 + BF16), launches=L + 3),
        "AdamW": roofline.adamw_cost(parameters, clipped=True),
    }


def _both_ways(rows: int, *shapes: tuple[int, int]) -> Cost:
    return roofline.total(
        [
            roofline.linear_cost(rows, *shape, BF16, backward=back, bias=True)
            for shape in shapes
            for back in (False, True)
        ]
    )


def _norm(rows: int, C: int) -> Cost:
    forward = roofline.layer_norm_cost(rows, C, BF16, stream=FP32, out=BF16)
    return forward + roofline.layer_norm_cost(rows, C, BF16, stream=FP32, out=BF16, backward=True)


def _attention(plan: AttentionPlan, config: GPT2Config) -> Cost:
    shape = (plan.scores, plan.T, plan.R, config.n_head, config.n_embd // config.n_head, BF16)
    tiles = (plan.BM, plan.BN, plan.BQ, plan.BK)
    backward = roofline.attention_cost(*shape, tiles=tiles, backward=True, scores_dkv=plan.scores_dkv, slots=plan.slots)
    return roofline.attention_cost(*shape, tiles=tiles) + backward


def predicted_seconds(costs: Iterable[Cost], card: str, efficiency: float = EFFICIENCY) -> float:
    """PREDICTED time of kernels that run one after another, each bound by memory or by arithmetic."""
    return sum(roofline.predicted_seconds(cost, CARDS[card], efficiency=efficiency) for cost in costs)


def packed_batch(encoded: EncodedSet, examples: int) -> Batch:
    """The first examples as one pack, with the kernels' plans."""
    return Batcher(planner=ops.planner("triton"))(encoded, np.arange(examples))


def training_set(data: str) -> EncodedSet:
    """The training split of a data file, as the chapter encodes it, the prompt masked."""
    records = load_records(data).good
    chosen = [records[index] for index in split(len(records)).train]
    return encode(chosen, ALPACA, gpt2_tokenizer(), max_length=1024, too_long="drop")


def main() -> None:
    """Prints the prediction."""
    parser = options_parser(PredictOptions, prog="python -m fastft.scaling.predict")
    given = parser.parse_args(sys.argv[1:]).as_dict()
    options = PredictOptions(**{name: given[name] for name in ("data", "model", "examples")})
    encoded = training_set(options.data)
    if not 1 <= options.examples <= len(encoded):
        raise UserError(f"got --examples {options.examples}, expected 1 to the {len(encoded)} of the training split")
    batch = packed_batch(encoded, options.examples)
    costs = step_costs(config_for(options.model), batch)
    table = Table(
        "work", "launches", "GB moved", "TFLOP", *(f"{card}, ms" for card in CARDS), box=SIMPLE_HEAD,
        title=f"PREDICTED, not measured: one step of {options.model} in bf16, {options.examples} examples, "
        f"{batch.tokens.numel():,} tokens for {batch.tokens_padded:,} padded ones, {batch.rows.numel():,} loss rows; "
        f"cards at {EFFICIENCY:.0%} of their peak rates",
    )  # fmt: skip
    for name, cost in {**costs, "whole step": roofline.total(list(costs.values()))}.items():
        parts = costs.values() if name == "whole step" else [cost]
        times = (f"{1e3 * predicted_seconds(parts, card):.2f}" for card in CARDS)
        table.add_row(
            name, str(cost.launches), f"{cost.bytes / 1e9:.2f}", f"{(cost.matrix_flops + cost.other_flops) / 1e12:.2f}",
            *times,
        )  # fmt: skip
    SafeConsole(highlight=False, width=140).print(table)


if __name__ == "__main__":
    try:
        main()
    except (FastftError, jsonargparse.ArgumentError) as wrong:
        sys.exit(f"error: {wrong}")
