"""Predicted memory and traffic, held against what ranks on this machine measure, and against sums done by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastft_kernels import attention_torch, linear_cross_entropy_torch, tiles
from fastft_kernels.linear_cross_entropy import LOGIT_CHUNK_BYTES
from rich.console import Console
from scaling_ranks import (
    ADAPTERS,
    CASES,
    CASES_OF_PARTS,
    CASES_OF_THREE,
    SMALL_MODEL,
    UPPER_HALF,
    Case,
    case,
    entries,
)
from torch import Tensor

from fastft import scaling
from fastft.batches.batch import Batch, Batcher, pack, padded_batch
from fastft.data.tokenizer import VOCAB_SIZE
from fastft.engines.optim import adamw
from fastft.model import ops
from fastft.model.gpt2 import GPT2, GPT2Config, config_for, number_of_parameters
from fastft.model.lora_spec import LoRA
from fastft.model.part import Part, numbers_of
from fastft.model.precision import BF16Copies
from fastft.run.config import TrainOptions
from fastft.scaling import Buckets, Setup, Sizes
from fastft.scaling import setup as scaling_setup
from fastft.scaling.activations import activations
from fastft.scaling.advice import predicted
from fastft.scaling.fetches import fetches
from fastft.scaling.measured import Entry, config_of, memory_compared, setup_of, traffic_compared
from fastft.scaling.page import MEASURED, PAGE, page
from fastft.scaling.predict import training_set
from fastft.scaling.setup import layout
from fastft.training.train import train

LAUNCH = Path(__file__).parents[2] / "launch"
GIB = 1 << 30
PEAK, BETWEEN_STEPS, SAVED = 0.05, 1e-3, 0.02
"""How far a prediction of bytes may be off: a phase's fullest moment, what stays, what a forward pass saves."""


def assert_predicted(entry: Entry) -> None:
    """The traffic to the byte, and the memory of each phase."""
    for one in traffic_compared(entry):
        assert one.measured == one.predicted, (entry, one)
    for one in memory_compared(entry) if entry["memory"] else []:
        limit = BETWEEN_STEPS if one.name == "between steps" else PEAK
        assert abs(one.error) <= limit, (entry, one, f"{one.error:+.2%}")


# What ranks measure


def test_ranks_send_and_hold_what_is_predicted() -> None:
    """A few cases anew; `make test-long` has all of the page's."""
    cases = [
        *(case(stage, packs=2) for stage in range(4)),
        case(1, dtype="bf16"),
        case(3, dtype="bf16", offload=True),
        case(2, packs=2, dtype="bf16", part=ADAPTERS),
        case(3, packs=2, part=UPPER_HALF),
    ]
    for entry in entries(cases, 2):
        assert_predicted(entry)


@pytest.mark.long
@pytest.mark.parametrize(("cases", "ranks"), [(CASES, 2), (CASES_OF_PARTS, 2), (CASES_OF_THREE, 3)])
def test_all_cases_of_the_page(cases: list[Case], ranks: int) -> None:
    for entry in entries(cases, ranks):
        assert_predicted(entry)


def measured_entries(**wanted: Any) -> list[dict[str, Any]]:
    """Those of the page that are as wanted."""
    found = json.loads(MEASURED.read_text())["entries"]
    chosen = [entry for entry in found if all(entry[key] == value for key, value in wanted.items())]
    assert chosen
    return chosen


def test_the_measured_figures_of_the_page_are_predicted() -> None:
    for ranks in (2, 3):
        for dtype in ("fp32", "bf16"):
            assert {entry["stage"] for entry in measured_entries(ranks=ranks, dtype=dtype)} == {0, 1, 2, 3}
    for entry in measured_entries():
        assert_predicted(entry)


def test_another_stages_traffic_is_not_taken_for_it() -> None:
    """The bytes tell the stages apart: with several packs each one's traffic is its own."""
    for part in (None, ADAPTERS):
        plain, *parted = measured_entries(
            ranks=2, packs=2, dtype="fp32", offload=False, checkpointing=False, model=SMALL_MODEL, part=part
        )
        for entry in (plain, *parted):
            for stage in range(4):
                setup = replace(setup_of(entry), stage=stage, buckets=setup_of(parted[0]).buckets)
                fits = all(one.measured == one.predicted for one in traffic_compared(entry, setup))
                assert fits == (entry["stage"] == stage), (entry["stage"], stage)


def test_weights_that_were_not_frozen_would_be_noticed() -> None:
    for entry in measured_entries(part=ADAPTERS):
        whole = replace(setup_of(entry), part=None)
        assert all(one.error > 0.3 for one in memory_compared(entry, whole) if one.name == "between steps")
        sent = [one for one in traffic_compared(entry, whole) if one.measured and one.name != "control"]
        assert sum(one.predicted for one in sent) > 1.3 * sum(one.measured for one in sent)


def test_masters_that_were_no_copy_would_be_noticed() -> None:
    """In fp32 stages 1 to 3 have a copy of the weights to update, which the paper has not."""
    wanted = {"ranks": 2, "dtype": "fp32", "offload": False, "checkpointing": False, "model": SMALL_MODEL, "part": None}
    for entry in measured_entries(**wanted):
        (stays,) = (one for one in memory_compared(entry) if one.name == "between steps")
        copy = 4 * number_of_parameters(config_of(entry)) // entry["ranks"] if entry["stage"] else 0
        assert stays.measured == pytest.approx(stays.predicted, rel=BETWEEN_STEPS)
        assert not copy or abs((stays.predicted - copy) / stays.measured - 1) > 0.1


def test_the_page_is_what_the_command_makes() -> None:
    assert PAGE.read_text() == page(), "run: python -m fastft.scaling --markdown"


# Activations


def saved_bytes(model: GPT2, batch: Batch, dtype: str, impl: str) -> int:
    """Of the tensors that autograd saves in a forward pass and keeps, each storage once, without weights and the
    batch."""
    call: Any = BF16Copies(model) if dtype == "bf16" else model
    computes: GPT2 = call.computes if dtype == "bf16" else model
    ours = {x.untyped_storage().data_ptr() for x in [*computes.parameters(), *vars_of(batch)]}
    saved: list[weakref.ref[Tensor]] = []

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in ours:
            saved.append(weakref.ref(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = call(batch, impl=impl)
    kept = [x.untyped_storage() for one in saved if (x := one()) is not None]
    del result
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())


def vars_of(batch: Batch) -> list[Tensor]:
    return [value for name in batch.__slots__ if isinstance(value := getattr(batch, name), Tensor)]


def random_batch(vocab: int, *, packed: bool = True, examples: int = 16, impl: str = "cpu") -> Batch:
    random = np.random.default_rng(0)
    shared = random.integers(0, vocab, 30)
    ids = [
        np.concatenate([shared, random.integers(0, vocab, int(random.integers(20, 60)))]).astype(np.int32)
        for _ in range(examples)
    ]
    if packed:
        return pack(ids, [40] * examples, planner=ops.planner(impl))
    return padded_batch(ids, [40] * examples)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("way", ["packed", "long", "untied", "checkpointed", "padded", "reference"])
def test_saved_activations_are_as_counted(dtype: str, way: str) -> None:
    vocab = VOCAB_SIZE if way == "padded" else 512  # padding is end-of-text
    config = GPT2Config(n_layer=3, n_head=4, n_embd=128, n_ctx=256, vocab_size=vocab, tie_head=way != "untied")
    batch = random_batch(512, packed=way != "padded", examples=60 if way == "long" else 16)
    impl = "reference" if way == "reference" else "cpu"
    setup = Setup(dtype=dtype, impl=impl, compiled=COMPILED, activation_checkpointing=way == "checkpointed")
    model = GPT2(config, checkpoint_activations=way == "checkpointed")
    counted = activations(config, Sizes.of(batch), setup).all
    assert counted == pytest.approx(saved_bytes(model, batch, dtype, impl), rel=SAVED)


COMPILED = ops.why_no_compiled() is None
PARTS = {
    "adapters": Part(lora=LoRA(r=8, alpha=16.0), train_only=None, new_rows=None, base_sha256=""),
    "one target": Part(lora=LoRA(r=8, alpha=8.0, targets=("c_attn",)), train_only=None, new_rows=None, base_sha256=""),
    "one layer": Part(
        lora=LoRA(r=8, alpha=8.0, targets=("c_fc", "attn.c_proj"), layers=(1,)), train_only=None, new_rows=None,
        base_sha256="",
    ),
    "DoRA": Part(lora=LoRA(r=8, alpha=16.0, dora=True), train_only=None, new_rows=None, base_sha256=""),
    "new rows": Part(lora=LoRA(r=8, alpha=16.0), train_only=None, new_rows=(500, 12), base_sha256=""),
    "upper blocks": Part(lora=None, train_only="h.1-2.mlp,ln_f", new_rows=None, base_sha256=""),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_saved_activations_of_a_part_are_as_counted(name: str) -> None:
    config = GPT2Config(n_layer=3, n_head=4, n_embd=128, n_ctx=256, vocab_size=512)
    batch, part = random_batch(512), PARTS[name]
    other = PARTS["DoRA" if name == "one target" else "one target"]
    for dtype, again in (("fp32", False), ("bf16", False), ("fp32", True)):
        setup = Setup(dtype=dtype, compiled=COMPILED, activation_checkpointing=again, part=part)
        model = GPT2(config, checkpoint_activations=again)
        part.take(model)
        measured = saved_bytes(model, batch, dtype, "cpu")
        counted, of_another = (activations(config, Sizes.of(batch), replace(setup, part=one)).all
                               for one in (part, other))  # fmt: skip
        assert counted == pytest.approx(measured, rel=SAVED)
        assert again or of_another != pytest.approx(measured, rel=SAVED)


def test_the_other_dtypes_activations_would_be_noticed() -> None:
    config = GPT2Config(n_layer=3, n_head=4, n_embd=128, n_ctx=256, vocab_size=512)
    batch = random_batch(512)
    measured = saved_bytes(GPT2(config), batch, "fp32", "cpu")
    assert activations(config, Sizes.of(batch), Setup(dtype="bf16")).all < (1 - 10 * SAVED) * measured


@pytest.mark.long
def test_the_triton_kernels_activations_are_as_counted() -> None:
    """In Triton's interpreter, which is chosen when the kernels are imported: in a process of its own."""
    code = (
        "from tests.scaling.test_scaling import *\n"
        "config = GPT2Config(n_layer=3, n_head=4, n_embd=64, n_ctx=256, vocab_size=512)\n"
        "batch = random_batch(512, examples=6, impl='triton')\n"
        "for dtype in ('fp32', 'bf16'):\n"
        "    setup = Setup(dtype=dtype, impl='triton')\n"
        "    counted = activations(config, Sizes.of(batch), setup).all\n"
        "    assert counted == pytest.approx(saved_bytes(GPT2(config), batch, dtype, 'triton'), rel=SAVED)\n"
        "    for part in PARTS.values():\n"
        "        model = GPT2(config)\n"
        "        part.take(model)\n"
        "        counted = activations(config, Sizes.of(batch), Setup(dtype=dtype, impl='triton', part=part)).all\n"
        "        assert counted == pytest.approx(saved_bytes(model, batch, dtype, 'triton'), rel=SAVED), part\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600, env=environment)


# Sums done by hand


def test_ring_algorithms() -> None:
    """An all-reduce is a reduce-scatter and an all-gather; each moves all but a rank's own part."""
    assert scaling.Traffic(ranks=4, all_reduce=400).wire == 600
    assert scaling.Traffic(ranks=4, reduce_scatter=400).wire == scaling.Traffic(ranks=4, all_gather=400).wire == 300
    assert scaling.Traffic(ranks=1, all_reduce=400).wire == 0
    assert scaling.traffic(config_for("nano"), Setup(stage=2)).handed == 0


def test_elements_sent_by_stage() -> None:
    """2 Ψ, 3 Ψ, (2 p + 1) Ψ and 2 p Ψ, where the paper has 2 Ψ, 2 Ψ, 2 Ψ and 3 Ψ (arXiv:1910.02054, section 7)."""
    config = config_for("gpt2-medium")
    whole = number_of_parameters(config)
    for packs in (1, 4):
        for stage, times in enumerate((2, 3, 2 * packs + 1, 2 * packs)):
            setup = Setup(stage=stage, ranks=64, packs=packs, dtype="fp32")
            sent = scaling.traffic(config, setup).wire / 4 * 64 / 63
            assert sent == pytest.approx(times * whole, rel=0.002)


def test_model_states_of_the_paper() -> None:
    """2 Ψ of bf16 weights and 12 Ψ / N of masters and moments, in stage 1; and 4 Ψ / N of gradients in float32."""
    config = config_for("gpt2-medium")
    whole, ranks = number_of_parameters(config), 16
    first, second, third = (
        scaling.memory(config, Sizes.given(64, 64), Setup(stage=stage, ranks=ranks, dtype="bf16"))
        for stage in (1, 2, 3)
    )
    for one in (first, second, third):
        assert one.moments == pytest.approx(12 * whole / ranks, rel=0.001)
    assert first.parameters == second.parameters == pytest.approx(2 * whole, rel=0.001)
    assert first.gradients >= 6 * whole > 10 * second.gradients
    buffers = 2 * Buckets().reduce
    assert third.phases["between steps"] == pytest.approx(buffers + 18 * whole / ranks, rel=0.01)


def test_adapters_by_hand() -> None:
    """r (in + out) of each of four matrices, and 16 bytes of each in mixed precision; 2 of what is frozen."""
    config, part = config_for("gpt2-xl"), PARTS["adapters"]
    C, L, r, whole = 1600, 48, 8, number_of_parameters(config)
    trained = L * r * (4 * C + 2 * C + 5 * C + 5 * C)
    tensors = layout(config, part=part)
    assert (tensors.trained, tensors.frozen, tensors.all) == (trained, whole, whole + trained)
    assert numbers_of(config, part) == (trained, whole + trained)
    sizes = Sizes.given(64, 64)
    for setup in Setup(ranks=8, dtype="bf16", impl="triton", cuda=True, part=part).variants():
        one, sent = scaling.memory(config, sizes, setup), scaling.traffic(config, setup)
        # Plain: the two moments; over DeepSpeed the masters with them, parted.
        assert one.moments + one.host_moments == (8 * trained if setup.stage == 0 else 12 * trained // 8)
        if setup.stage < 3:
            norms_and_positions = 2 * (2 * L * 2 * C + 2 * C + 1024 * C)  # which stage 0 has in float32
            weights = 2 * whole + (6 * trained + norms_and_positions if setup.stage == 0 else 2 * trained)
            assert one.parameters == weights
            assert sent.all_reduce + sent.reduce_scatter == (4 if setup.stage == 0 else 2) * trained
        else:
            assert sent.reduce_scatter == 2 * trained
            assert sent.all_gather >= 2 * (whole + trained)
            assert scaling.memory(config, sizes, replace(setup, ranks=64)).phases["between steps"] < 2 * whole


def test_offload_moves_and_loses_nothing() -> None:
    config, sizes = config_for("gpt2-medium"), Sizes.given(64, 64)
    for stage in (2, 3):
        setup = Setup(stage=stage, ranks=8, dtype="bf16", cuda=True)
        here, there = (scaling.memory(config, sizes, replace(setup, offload=offload)) for offload in (False, True))
        assert here.host == 0
        assert there.host_moments == here.moments
        assert there.peak < here.peak
        assert there.peak + there.host >= here.peak


def test_more_ranks_need_no_more_memory() -> None:
    config, sizes = config_for("gpt2-medium"), Sizes.given(2048, 1024)
    for setup in Setup(dtype="bf16", impl="triton", cuda=True).variants()[1:]:
        peaks = [scaling.memory(config, sizes, replace(setup, ranks=ranks)).peak for ranks in (2, 4, 16, 64, 256)]
        assert peaks == sorted(peaks, reverse=True), setup


def test_stage_3_keeps_what_it_uses_again() -> None:
    """All of gpt2-medium until its backward pass; of gpt2-xl the last blocks; and with no distance none."""
    medium, large = (layout(config_for(name)) for name in ("gpt2-medium", "gpt2-xl"))
    parted = sum(size for size in medium.each() if size > Buckets().persistence)
    assert fetches(medium, Buckets(), False).loss == parted
    assert sum(fetches(medium, Buckets(), False).gathered) == parted
    assert fetches(large, Buckets(), False).loss < sum(size for size in large.each() if size > Buckets().persistence)
    none = fetches(medium, Buckets(max_reuse=1, prefetch=0), False)
    blocks = sum(one.elements for block in medium.blocks for one in block if one.elements > Buckets().persistence)
    assert sum(none.gathered) == parted + blocks - blocks // medium.layers  # the last block is used again at once
    assert none.loss == parted - blocks + blocks // medium.layers


def test_groups_are_adamws() -> None:
    part = Part(lora=LoRA(r=2, alpha=4.0, dora=True), train_only=None, new_rows=(50000, 257), base_sha256="")
    for decay_all, some in ((False, None), (True, None), (False, part)):
        model = GPT2(config_for("pico"))
        if some is not None:
            some.take(model)
        groups = adamw(model, lr=1.0, weight_decay=0.1, decay_all=decay_all).param_groups
        sizes = tuple(tuple(parameter.numel() for parameter in group["params"]) for group in groups)
        assert layout(config_for("pico"), decay_all, some).groups == sizes


def test_constants_are_the_kernels() -> None:
    assert scaling_setup.KEPT_PAIRS == attention_torch.KEPT_PAIRS
    assert scaling_setup.LARGEST_GROUP == tiles.LARGEST_GROUP
    assert scaling_setup.LOGIT_CHUNK_BYTES == LOGIT_CHUNK_BYTES
    assert scaling_setup.CACHED_BYTES == linear_cross_entropy_torch.CACHED_BYTES


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("zero*.json")), ids=lambda file: file.stem)
def test_auto_is_what_fastft_fills_in(file: Path) -> None:
    from fastft.engines.zero_config import read_zero_config, settings_for_deepspeed

    options = TrainOptions(data="sample", model="pico")
    config = read_zero_config(file, options, 2)
    filled = settings_for_deepspeed(config, options, "fp32", 2)["zero_optimization"]
    assert Buckets.of(config.settings["zero_optimization"]) == Buckets.of(filled)


# Advice


def advised(device_bytes: int | None, host_bytes: int = 1 << 50, **setup: Any) -> str | None:
    sizes = Sizes.given(4096, 2048)
    rows = predicted(config_for("gpt2-xl"), sizes, Setup(**{"ranks": 8, "dtype": "bf16", "cuda": True, **setup}))
    chosen = scaling.recommend(rows, device_bytes, host_bytes)
    return chosen.setup.name if chosen else None


def test_the_least_stage_that_fits_is_recommended() -> None:
    """The less memory, the higher the stage, and offload after all that do without; each has its size."""
    ladder = [advised(gib * GIB) for gib in range(8, 48, 2)]
    order = [None, "3 + offload", "2 + offload", "3", "2", "1", "0"]
    assert ladder == sorted(ladder, key=order.index)
    assert set(ladder) == set(order)


def test_margin_is_left_free() -> None:
    rows = predicted(config_for("gpt2-medium"), Sizes.given(2048, 1024), Setup(ranks=2, dtype="bf16", cuda=True))
    exactly = rows[0].memory.peak
    assert scaling.recommend(rows, exactly, GIB) is not rows[0]
    assert scaling.recommend(rows, exactly, GIB, margin=0) is rows[0]
    assert scaling.recommend(rows, int(exactly / (1 - scaling.MARGIN)) + 1, GIB) is rows[0]


def test_offload_needs_room_on_the_host() -> None:
    assert advised(18 * GIB) == "2 + offload"
    assert advised(18 * GIB, host_bytes=GIB) is None


def test_a_cpu_is_told_that_it_cannot_offload() -> None:
    assert advised(None, host_bytes=1 << 50, cuda=False) == "0"
    assert advised(None, host_bytes=GIB, cuda=False) is None
    shown = Console(width=200, record=True)
    with shown.capture() as captured:
        shown.print(scaling.table(config_for("nano"), Sizes.given(512, 100), Setup(ranks=2), None))
    printed = captured.get()
    assert "PREDICTED" in printed
    assert "nowhere to offload to" in " ".join(printed.split())
    assert "+ offload" not in printed
    assert "0 (this run)" in printed


def test_a_dry_run_counts_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Moments of adapters alone, and the stages' memory beside that of a whole model."""
    options = TrainOptions(data="sample", model="pico", dtype="fp32", out=tmp_path / "run", dry_run=True)
    words = []
    given: dict[str, int]
    for given in ({}, {"lora_r": 4}):
        train(replace(options, **given))
        captured = capsys.readouterr()
        words.append(" ".join((captured.out + captured.err).split()))
    trained, all_of_them = numbers_of(config_for("pico"), Part(
        lora=LoRA(r=4, alpha=8.0), train_only=None, new_rows=None, base_sha256="",
    ))  # fmt: skip
    assert f"{trained:,} of {all_of_them:,} parameters on cpu" in words[1]
    assert f"adapters (rank 4), {trained:,} of {all_of_them:,} parameters trained" in words[1]
    assert "0.00 GiB for AdamW's moments" in words[1]
    assert "0.01 GiB for AdamW's moments" in words[0]
    assert not (tmp_path / "run").exists()


def test_a_gpus_table_has_all_stages() -> None:
    batch = Batcher()(training_set("sample"), np.arange(8))
    setup = Setup(stage=2, ranks=4, dtype="bf16", impl="triton", cuda=True, packs=2)
    shown = Console(width=200)
    with shown.capture() as captured:
        shown.print(scaling.table(config_for("gpt2"), Sizes.of(batch), setup, 80 * GIB, local_ranks=4))
    printed = captured.get()
    for row in ("2 (this run)", "3 + offload", "plain data parallelism fits into 80 GiB a device"):
        assert row in " ".join(printed.split())
