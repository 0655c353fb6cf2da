"""`--dry_run`: what a run would do, and the memory that it will take, with nothing trained and nothing written."""

from __future__ import annotations

import time

import torch

from fastft import scaling
from fastft.batches.batch import Batch
from fastft.batches.plan import Step
from fastft.common.console import say, show
from fastft.common.memory import peak_memory
from fastft.engines.moments import BYTES_OF_A_WEIGHT
from fastft.engines.zero import ZeroEngine
from fastft.model import ops
from fastft.model.part import numbers_of
from fastft.training.job import Job
from fastft.training.steps import Built, Steps
from fastft.training.token_mean import TokenMean

_GIB = 1 << 30
_STEPS_COUNTED = 200


def dry_run(job: Job, steps: Steps) -> None:
    """Runs the largest batch once and prints the plan and the memory that training will take."""
    job.say_hello()
    _say_tokens(job)
    largest = job.prepared.plan.largest_step()
    began = time.perf_counter()
    batches = steps.batches_of(largest)
    losses = steps.forward_backward(Built(largest, batches, 0.0)).of_batches
    float(losses[-1])  # waits for a GPU
    seconds = time.perf_counter() - began
    _evaluate_largest(job)
    peak = peak_memory(job.engine.device)
    _say_largest(job, largest, seconds)
    _say_memory(job, peak)
    _say_costs(job, max(batches, key=lambda batch: batch.tokens.numel()), packs=len(batches))
    say("dry run: nothing is trained, nothing is written")


def _say_tokens(job: Job) -> None:
    plan, prepared = job.prepared.plan, job.prepared
    steps = [plan.step(index) for index in range(min(plan.total_steps, _STEPS_COUNTED))]
    batches = [prepared.batcher(prepared.train_set, pack) for step in steps for pack in step.packs]
    tokens = {
        "padded": sum(batch.tokens_padded for batch in batches),
        "real": sum(batch.tokens_real for batch in batches),
        "computed": sum(batch.tokens.numel() for batch in batches),
        "supervised": sum(step.count for step in steps),
    }
    counts = ", ".join(f"{count:,} {name}" for name, count in tokens.items())
    say(f"tokens in {len(steps)} of {plan.total_steps} steps: {counts}")


def _evaluate_largest(job: Job) -> None:
    evaluation = job.prepared.evaluation
    if isinstance(evaluation, TokenMean) and len(job.prepared.val_set):
        validated = evaluation.largest_batch()
        float(job.engine.evaluate(validated))
        say(f"largest evaluation batch: {validated.tokens.numel():,} tokens computed")


def _say_largest(job: Job, largest: Step, seconds: float) -> None:
    rows = job.prepared.data.places.said(job.prepared.train_set.rows[largest.examples].tolist())
    say(f"largest step: {len(largest.examples)} examples ({rows}), {seconds:.2f} s forward and backward")


def _say_memory(job: Job, peak: int) -> None:
    if job.engine.holds_moments:
        say(f"memory: {peak / _GIB:.2f} GiB at that batch (measured on the first rank)")
        return
    model = job.engine.model
    trains, _ = numbers_of(model.config, model.part)
    moments = BYTES_OF_A_WEIGHT * trains
    say(
        f"memory: {peak / _GIB:.2f} GiB at that batch (measured) and {moments / _GIB:.2f} GiB for AdamW's "
        f"moments (computed): training will take about {(peak + moments) / _GIB:.2f} GiB"
    )


def _say_costs(job: Job, largest: Batch, *, packs: int) -> None:
    """What each ZeRO stage would take of each rank, and send, for this run's largest pack."""
    engine, config = job.engine, job.engine.model.config
    zero = engine.config if isinstance(engine, ZeroEngine) else None
    setup = scaling.Setup(
        stage=0 if zero is None else zero.stage,
        offload=zero is not None and zero.offloads,
        ranks=job.world.size,
        packs=packs,
        dtype=engine.dtype,
        impl=engine.impl,
        cuda=engine.device.type == "cuda",
        compiled=engine.device.type == "cpu" and ops.why_no_compiled() is None,
        activation_checkpointing=job.options.activation_checkpointing,
        decay_all=job.options.decay_all,
        part=engine.model.part,
        buckets=scaling.Buckets() if zero is None else scaling.Buckets.of(zero.settings["zero_optimization"]),
    )
    device_bytes = torch.cuda.get_device_properties(engine.device).total_memory if setup.cuda else None
    sizes, local_ranks = scaling.Sizes.of(largest), job.world.local_size
    show(scaling.table(config, sizes, setup, device_bytes, local_ranks=local_ranks))
