"""Several ranks train what one process trains, whatever DeepSpeed parts among them, and whatever befalls a rank.

Ranks are CPU processes that meet over gloo, forked from a warm process (`warm_launcher.py`).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Ended, Launcher
from runs import (
    Trained,
    arguments,
    assert_one_curve,
    assert_same_run,
    farthest,
    metrics,
    relative,
    settings,
    wait_for_lines,
    wait_until,
    write_records,
)

import fastft
from fastft.common.files import identity
from fastft.model.weights import load_weights
from fastft.training.checkpoint import load_tensors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks of a warm process")

STAGES = ("plain", "zero0", "zero1", "zero2", "zero3")
OFFLOADS = ("zero2_offload", "zero3_offload")
ALL = (*STAGES, *OFFLOADS)
KINDS = ("loss", "gradient")


def long_only(*values: Any) -> Any:
    """A case that `make test-long` runs."""
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `records.json`: 51 training examples, supervised unequally."""
    folder = tmp_path_factory.mktemp("ranks")
    write_records(folder / "records.json")
    return folder


Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def command(folder: Path) -> Command:
    def command(run: Path, zero: str = "plain", **options: Any) -> list[str]:
        return ["train", *arguments(settings(folder / "records.json", run, zero, **options))]

    return command


def all_ended(ended: list[Ended], status: int = 0) -> None:
    assert [one.exit for one in ended] == [status] * len(ended), "\n---\n".join(one.said for one in ended)


# One curve


@pytest.fixture(scope="module")
def one_process(folder: Path, launcher: Launcher, command: Command) -> Callable[..., Trained]:
    """A run of one process, made once for each choice of options."""
    made: dict[tuple[Any, ...], Trained] = {}

    def one_process(**options: Any) -> Trained:
        key = tuple(sorted(options.items()))
        if key not in made:
            run = folder / f"one-{len(made)}"
            all_ended(launcher.run_ranks(command(run, **options), 1))
            made[key] = Trained(run)
            losses = made[key].lines("loss")
            assert len(losses) == options.get("steps", 20)
            assert len({line["tokens_supervised"] for line in losses}) > len(losses) / 2
            assert losses[6]["tokens_real"] < losses[5]["tokens_real"] / 2  # the incomplete last step of an epoch
        return made[key]

    return one_process


@pytest.mark.parametrize("steps", [8, long_only(20)])
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_two_ranks_train_what_one_process_does(
    launcher: Launcher, command: Command, one_process: Callable[..., Trained], tmp_path: Path, zero: str, steps: int
) -> None:
    """8 steps are an epoch, whose last step is not whole, and the first one of another."""
    run, options = tmp_path / "run", {"model": "nano", "steps": steps, "eval_every": steps // 2}
    all_ended(launcher.run_ranks(command(run, zero, **options), 2))
    assert_one_curve(Trained(run), one_process(**options))


@pytest.mark.long
@pytest.mark.parametrize(
    ("zero", "ranks", "options"),
    [
        *[(zero, 2, {"accumulate": 4}) for zero in STAGES],
        *[(zero, 2, {"accumulate": accumulate}) for zero in OFFLOADS for accumulate in (1, 4)],
        *[(zero, 1, {"accumulate": accumulate}) for zero in (*STAGES[2:], *OFFLOADS) for accumulate in (1, 4)],
        *[(zero, 3, {}) for zero in ALL],
        *[(zero, 2, {"tie_head": False}) for zero in STAGES],
        *[(zero, 2, {"activation_checkpointing": True}) for zero in ALL],
        *[(zero, 2, {"batching": "padded"}) for zero in STAGES],
        *[(zero, 2, {"share_prefix": False, "pack_tokens": 256}) for zero in STAGES],
        *[(zero, 3, {"batch_size": 2, "steps": 20}) for zero in STAGES],  # a rank without an example in each step
    ],
)
def test_any_number_of_ranks_and_any_stage(
    launcher: Launcher, command: Command, folder: Path, tmp_path: Path, zero: str, ranks: int, options: dict[str, Any]
) -> None:
    expected = folder / f"expected-{abs(hash(json.dumps(options, sort_keys=True)))}"
    if not (expected / "model").is_dir():
        single = {name: value for name, value in options.items() if name != "accumulate"}
        all_ended(launcher.run_ranks(command(expected, model="nano", **single), 1))
    run = tmp_path / "run"
    all_ended(launcher.run_ranks(command(run, zero, model="nano", **options), ranks))
    assert_one_curve(Trained(run), Trained(expected))


@pytest.mark.parametrize("zero", [long_only("plain"), "zero3"])
def test_a_rank_without_an_example_goes_along(launcher: Launcher, command: Command, tmp_path: Path, zero: str) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    options = {"batch_size": 2, "steps": 6, "eval_every": 3}
    all_ended(launcher.run_ranks(command(one, **options), 1))
    all_ended(launcher.run_ranks(command(three, zero, **options), 3))
    assert_one_curve(Trained(three), Trained(one))


@pytest.mark.parametrize(
    ("fault", "zero"),
    [("averaged_over_ranks", "zero2"), ("mean_of_means", "plain"), ("first_ranks_examples_twice", "plain")],
)
def test_the_limits_reject_the_usual_mistakes(
    launcher: Launcher, command: Command, tmp_path: Path, fault: str, zero: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    all_ended(launcher.run_ranks(command(one, steps=8), 1))
    all_ended(launcher.run_ranks(command(two, zero, steps=8), 2, fault=fault))
    with pytest.raises(AssertionError):
        assert_one_curve(Trained(two), Trained(one))


@pytest.mark.parametrize("zero", [*map(long_only, ("plain", "zero1", "zero2")), "zero3"])
def test_bf16_over_ranks_stays_near(launcher: Launcher, command: Command, tmp_path: Path, zero: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = {"steps": 8, "dtype": "bf16", "accumulate": 2, "lr": 1e-3}
    all_ended(launcher.run_ranks(command(one, **{**options, "dtype": "fp32"}), 1))
    all_ended(launcher.run_ranks(command(two, zero, **options), 2))
    got, expected = Trained(two).figures("loss"), Trained(one).figures("loss")
    assert 0 < farthest(got, expected) < 1e-3
    assert expected[0] - expected[-1] > 0.1  # a run that learnt nothing would be farther away
    assert fastft.load(two / "model").wte.weight.dtype == torch.float32


@pytest.mark.parametrize("zero", ["zero2", *map(long_only, ("zero1", "zero3", *OFFLOADS))])
def test_a_run_in_bf16_begins_with_the_weights_that_it_was_given(
    launcher: Launcher, command: Command, tmp_path: Path, zero: str
) -> None:
    """DeepSpeed makes its masters of weights that are rounded."""
    for run, how, ranks in ((tmp_path / "one", "plain", 1), (tmp_path / "two", zero, 2)):
        options = {"steps": 0, "dtype": "bf16", "eval_every": 0, "samples": 0}
        all_ended(launcher.run_ranks(command(run, how, **options), ranks))
    one, two = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_the_ledger_of_two_ranks_is_that_of_one(launcher: Launcher, command: Command, tmp_path: Path) -> None:
    runs = {ranks: tmp_path / str(ranks) for ranks in (1, 2)}
    for ranks, run in runs.items():
        all_ended(launcher.run_ranks(command(run, steps=8, ledger=True, accumulate=2), ranks))
    one, two = ([json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()] for run in runs.values())
    for line, expected in zip(two, one, strict=True):
        assert line["step"] == expected["step"]
        losses, expected_losses = (dict(zip(x["rows"], x["losses"], strict=True)) for x in (line, expected))
        assert losses == pytest.approx(expected_losses, rel=1e-4)


def test_a_ledger_that_cannot_be_written_ends_all_ranks_alike(
    launcher: Launcher, command: Command, tmp_path: Path
) -> None:
    ended = launcher.run_ranks(command(tmp_path / "run", steps=8, ledger=True), 2, fault="ledger_cannot_be_written")
    assert [one.exit for one in ended] == [2, 2], [one.said for one in ended]
    assert "cannot write ledger.jsonl" in ended[0].said
    assert "lost another rank" not in ended[1].said


@pytest.mark.parametrize("zero", ["plain", long_only("zero3")])
def test_bf16_recomputes_what_it_computed_on_ranks_too(
    launcher: Launcher, command: Command, tmp_path: Path, zero: str
) -> None:
    """A recomputation that saw other weights than the pass before would change the curve, or end it."""
    options = {"steps": 4, "dtype": "bf16", "lr": 1e-3, "samples": 0}
    kept, recomputed = tmp_path / "kept", tmp_path / "recomputed"
    all_ended(launcher.run_ranks(command(kept, zero, **options), 2))
    all_ended(launcher.run_ranks(command(recomputed, zero, **options, activation_checkpointing=True), 2))
    assert Trained(recomputed).figures("loss") == Trained(kept).figures("loss")


def test_a_whole_checkpoint_of_fp16_is_for_any_engine(launcher: Launcher, command: Command, tmp_path: Path) -> None:
    """The loss scale goes with it: from ZeRO to the plain engine, and back."""
    run = tmp_path / "run"
    options = {"dtype": "fp16", "samples": 0, "eval_every": 0}
    scales = []
    for steps, ranks, zero in ((3, 2, "zero2"), (6, 1, "plain"), (9, 2, "zero1")):
        all_ended(launcher.run_ranks(command(run, zero, **options, steps=steps, resume=steps > 3), ranks))
        scales.append(json.loads((run / f"checkpoints/step-{steps}/state.json").read_text())["scaler"]["scale"])
    assert all(scale > 1 for scale in scales)
    losses = Trained(run).figures("loss")
    assert len(losses) == 9
    assert losses[-1] < losses[0]


def test_the_folder_of_a_zero_3_run_loads_in_transformers(launcher: Launcher, command: Command, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run = tmp_path / "run"
    all_ended(launcher.run_ranks(command(run, "zero3", lr=1e-2, steps=6, eval_every=0), 2))
    ours = Trained(run).logits()
    model = transformers.GPT2LMHeadModel.from_pretrained(run / "model").eval()
    with torch.no_grad():
        theirs = model(torch.arange(100, 164).view(2, 32)).logits.flatten(0, 1)
    assert relative(theirs, ours) < 1e-6
    # What was trained is what was exported: the last checkpoint's weights, which differ from the first ones.
    saved = fastft.GPT2(fastft.load(run / "model").config)
    load_weights(dict(saved.named_parameters()), run / "checkpoints/step-6/model.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(saved.parameters(), fastft.load(run / "model").parameters(), strict=True)
    )


# Resumed


def test_a_chain_of_ranks_and_stages_is_one_curve(launcher: Launcher, command: Command, tmp_path: Path) -> None:
    """1 -> 2 -> 3 -> 1 ranks, stages 0 to 3 and back, each resumed from the state that the one before left."""
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    all_ended(launcher.run_ranks(command(unbroken, eval_every=4), 1))
    for steps, ranks, zero in ((4, 1, "plain"), (8, 2, "zero2"), (12, 3, "zero3"), (16, 1, "zero1"), (20, 1, "plain")):
        all_ended(launcher.run_ranks(command(run, zero, steps=steps, eval_every=4, resume=steps > 4), ranks))
    assert_one_curve(Trained(run), Trained(unbroken))


@pytest.mark.parametrize("zero", [*map(long_only, STAGES[:-1]), "zero3"])
def test_an_epoch_in_two_halves_ends_with_the_same_bits(
    launcher: Launcher, command: Command, tmp_path: Path, zero: str
) -> None:
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    options = {"steps": 21, "eval_every": 4, "lr": 1e-3, "schedule": "cosine", "samples": 0}
    all_ended(launcher.run_ranks(command(unbroken, zero, **options), 2))
    pids = launcher.start_ranks(command(run, zero, **options), 2)
    wait_for_lines(run, 3)
    os.kill(pids[1], signal.SIGTERM)  # one rank alone is told: all stop after the same step
    ended = launcher.wait_ranks()
    all_ended(ended)
    assert "stopped by SIGTERM at step" in ended[0].said
    assert not (run / "model").exists()
    all_ended(launcher.run_ranks(command(run, zero, **options, resume=True), 2))
    assert_same_run(run, unbroken)


def test_a_whole_checkpoint_on_demand(launcher: Launcher, command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "save").touch()
    all_ended(launcher.run_ranks(command(run, "zero2", steps=4, save_every=3, whole_every=2, keep=9), 2))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-1", "step-2", "shards-3", "step-4"}
    assert not (run / "save").exists()


def test_shards_of_other_ranks_are_passed_over_and_kept(launcher: Launcher, command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = {"steps": 8, "whole_every": 3, "save_every": 5}
    pids = launcher.start_ranks(command(run, "zero2", **options), 2)
    wait_until(lambda: (run / "checkpoints/shards-5").is_dir())
    os.kill(pids[0], signal.SIGKILL)
    launcher.wait_ranks()
    ended = launcher.run_ranks(command(run, "zero3", **options, resume=True), 1)
    all_ended(ended)
    said = " ".join(ended[0].said.split())
    assert "shards-5 is passed over: it is in shards, of 2 ranks with ZeRO stage 2 in fp32, and this run has 1" in said
    assert "resuming at step 3 of 8" in said


def test_shards_hold_nothing_that_is_executed(launcher: Launcher, command: Command, tmp_path: Path) -> None:
    """A pickle that would call something is refused, though its checksum is right."""
    run = tmp_path / "run"
    all_ended(launcher.run_ranks(command(run, "zero2", steps=4, save_every=3), 2))
    shards = run / "checkpoints/shards-3"
    victim = next(shards.glob("zero/*optim_states.pt"))
    torch.save({"optimizer_state_dict": _Executes()}, victim)
    manifest = json.loads((shards / "DONE").read_text())
    manifest[f"zero/{victim.name}"] = identity(victim)
    (shards / "DONE").write_text(json.dumps(manifest))
    shutil.rmtree(run / "checkpoints/step-4")
    ended = launcher.run_ranks(command(run, "zero2", steps=4, save_every=3, resume=True), 2)
    all_ended(ended, 2)
    assert "cannot read the shard" in ended[0].said
    assert not (tmp_path / "executed").exists()


class _Executes:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


# Faults


FAULTY = {"steps": 12, "save_every": 2, "eval_every": 4, "lr": 1e-3, "samples": 0}
FULL = {**FAULTY, "steps": 8}
"""A disk is full at one save, which is not a matter of when."""


def kill_ranks_at_random(
    launcher: Launcher, command: Command, unbroken: Path, run: Path, zero: str, *, kills: int, seed: int
) -> None:
    """Kills one rank of two `kills` times; the other notices, and the run is resumed each time."""
    rng = random.Random(seed)
    all_ended(launcher.run_ranks(command(unbroken, zero, **FAULTY), 2))
    lines = len(metrics(unbroken))
    for position, line in enumerate(sorted(rng.choices(range(1, lines), k=kills))):
        pids = launcher.start_ranks(command(run, zero, **FAULTY, resume=position > 0), 2)
        wait_for_lines(run, line)
        time.sleep(rng.uniform(0, 0.1))
        victim = rng.randrange(2)
        os.kill(pids[victim], signal.SIGKILL)
        ended = launcher.wait_ranks()
        other = ended[1 - victim]
        if ended[victim].exit == 0:
            continue  # it had come to its end already
        assert ended[victim].exit == -signal.SIGKILL
        assert other.exit in (0, 1, -signal.SIGTERM), other.said
        assert "Traceback" not in other.said, other.said
    all_ended(launcher.run_ranks(command(run, zero, **FAULTY, resume=True), 2))
    assert_same_run(run, unbroken)


@pytest.mark.parametrize("zero", [long_only("plain"), "zero2", long_only("zero3")])
def test_a_rank_killed_at_random_moments(launcher: Launcher, command: Command, tmp_path: Path, zero: str) -> None:
    kill_ranks_at_random(launcher, command, tmp_path / "unbroken", tmp_path / "run", zero, kills=2, seed=len(zero))


@pytest.mark.long
@pytest.mark.parametrize("zero", ALL)
def test_a_rank_killed_at_ten_random_moments(launcher: Launcher, command: Command, tmp_path: Path, zero: str) -> None:
    kill_ranks_at_random(launcher, command, tmp_path / "unbroken", tmp_path / "run", zero, kills=10, seed=len(zero))


def test_a_full_disk_on_one_rank_stops_all_and_costs_no_older_checkpoint(
    launcher: Launcher, command: Command, tmp_path: Path
) -> None:
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    all_ended(launcher.run_ranks(command(unbroken, "zero2", **FULL), 2))
    all_ended(launcher.run_ranks(command(run, "zero2", **{**FULL, "steps": 4}), 2))
    ended = launcher.run_ranks(command(run, "zero2", **FULL, resume=True), 2, fault="rank_1_cannot_write_shards")
    all_ended(ended, 2)
    assert "error: rank 1: cannot write a shard of the checkpoint: " in ended[0].said
    assert "free space and go on with --resume" in ended[0].said
    assert "Traceback" not in ended[0].said + ended[1].said
    assert {path.name for path in (run / "checkpoints").glob("*-*")} == {"shards-2", "step-4"}
    all_ended(launcher.run_ranks(command(run, "zero2", **FULL, resume=True), 2))
    assert_same_run(run, unbroken)


def test_no_room_for_the_whole_state_leaves_the_shards(launcher: Launcher, command: Command, tmp_path: Path) -> None:
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    all_ended(launcher.run_ranks(command(unbroken, "zero3", **FULL), 2))
    ended = launcher.run_ranks(command(run, "zero3", **FULL), 2, fault="rank_0_cannot_write_whole")
    all_ended(ended, 2)
    assert "optimizer.safetensors" in ended[0].said
    assert {path.name for path in (run / "checkpoints").glob("*-*")} == {"shards-4", "shards-6"}
    all_ended(launcher.run_ranks(command(run, "zero3", **FULL, resume=True), 2))
    assert_same_run(run, unbroken)


@pytest.mark.parametrize(
    ("zero", "what"),
    [("zero2", "loss"), ("zero3", "gradient"), *(long_only(*both) for both in itertools.product(ALL, KINDS))],
)
def test_what_is_not_finite_on_one_rank_is_skipped_on_all(
    launcher: Launcher, command: Command, tmp_path: Path, zero: str, what: str
) -> None:
    run = tmp_path / "run"
    fault = f"{what}_not_finite_on_rank_1"
    ended = launcher.run_ranks(command(run, zero, steps=6, eval_every=0, keep=9, save_every=1), 2, fault=fault)
    all_ended(ended)
    skipped = [line for line in metrics(run) if line.get("skipped")]
    assert [line["step"] for line in skipped] == [4]
    assert len(skipped[0]["rows"]) == (1 if what == "loss" else 8)
    assert f"step 4 has loss {'inf' if what == 'loss' else ''}" in ended[0].said
    assert "its update is skipped (row" in ended[0].said
    assert not math.isfinite(skipped[0][{"loss": "loss", "gradient": "grad_norm"}[what]] or math.inf)
    losses = [line["loss"] for line in metrics(run) if "loss" in line and line["step"] != 4]
    assert all(map(math.isfinite, losses))
    states = [json.loads((run / "checkpoints" / f"step-{step}/state.json").read_text()) for step in (6,)]
    assert states[0]["skipped"] == 1

    # The update that was left out moved neither weights nor moments: the next ones are those of a run without it.
    moments = load_tensors(run / "checkpoints/step-6/optimizer.safetensors")
    assert moments["wte.weight/step"] == 5
    assert all(torch.isfinite(value).all() for value in moments.values())


def test_too_many_skipped_steps_stop_all_ranks(launcher: Launcher, command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = command(run, "zero2", steps=6, max_skipped=0, eval_every=0)
    ended = launcher.run_ranks(arguments, 2, fault="loss_not_finite_on_rank_1")
    all_ended(ended, 1)
    assert "step 4 has loss inf" in ended[0].said
    assert "--max_skipped allows 0" in ended[0].said
    assert "error" not in ended[1].said
    assert (run / "checkpoints/step-4/DONE").is_file()


@pytest.mark.parametrize("zero", ["zero2", long_only("plain"), long_only("zero1"), long_only("zero3")])
def test_in_fp16_a_step_that_no_scale_helps_is_skipped_and_stops_the_run(
    launcher: Launcher, command: Command, tmp_path: Path, zero: str
) -> None:
    """The scale falls to 1 first, which counts for nothing; then each step counts, as DeepSpeed's own error would not
    let it."""
    run = tmp_path / "run"
    arguments = command(run, zero, dtype="fp16", steps=60, max_skipped=2, eval_every=0, samples=0)
    ended = launcher.run_ranks(arguments, 2, fault="gradient_never_finite")
    all_ended(ended, 1)
    assert "Traceback" not in ended[0].said + ended[1].said
    assert "skipped step 3, --max_skipped allows 2" in " ".join(ended[0].said.split())
    lines = Trained(run).lines("loss")
    assert all(line["skipped"] for line in lines)
    rescaled = [line["rescaled"] for line in lines]
    assert rescaled == [True] * (len(rescaled) - 3) + [False] * 3
    assert 16 <= len(rescaled) - 3 < 40  # from 2 ** 16 to 1
    state = json.loads((run / f"checkpoints/step-{len(lines)}/state.json").read_text())
    assert (state["skipped"], state["scaler"]["scale"]) == (3, 1)


@pytest.mark.parametrize("zero", ["zero2", long_only("plain"), long_only("zero3")])
def test_in_fp16_a_loss_that_is_not_finite_counts_at_any_scale(
    launcher: Launcher, command: Command, tmp_path: Path, zero: str
) -> None:
    run = tmp_path / "run"
    arguments = command(run, zero, dtype="fp16", steps=6, max_skipped=0, eval_every=0, samples=0)
    ended = launcher.run_ranks(arguments, 2, fault="loss_not_finite_on_rank_1")
    all_ended(ended, 1)
    assert "step 4 has loss inf" in ended[0].said
    assert "--max_skipped allows 0" in " ".join(ended[0].said.split())
    assert (run / "checkpoints/step-4/DONE").is_file()


def test_a_rank_that_hangs_ends_the_run_with_every_stack(launcher: Launcher, command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = launcher.run_ranks(command(run, "zero2", hang_timeout=3, eval_every=0), 2, fault="rank_1_sleeps")
    all_ended(ended, 1)
    for rank, one in enumerate(ended):
        stack = (run / f"hangs/rank-{rank}.txt").read_text()
        for said in (one.said, stack):
            assert f"rank {rank} has not got on for 3 s; it was in: step 4, batch 1 of 1" in said
    assert "in hang" in (run / "hangs/rank-1.txt").read_text()
    assert "the run hangs; the stacks are in" in ended[0].said
    all_ended(launcher.run_ranks(command(run, "zero2", steps=5, eval_every=0, resume=True), 2))


def test_a_rank_that_does_not_run_is_named(launcher: Launcher, command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pids = launcher.start_ranks(command(run, hang_timeout=3, steps=2000, eval_every=0), 2)
    wait_for_lines(run, 3)
    os.kill(pids[1], signal.SIGSTOP)
    wait_until(lambda: (run / "hangs/rank-0.txt").is_file())
    time.sleep(4)
    os.kill(pids[1], signal.SIGCONT)
    ended = launcher.wait_ranks()
    assert ended[0].exit == 1
    assert "error: the run hangs; nothing from rank 1: stopped, or gone with its machine" in ended[0].said


def test_a_straggler_is_named(launcher: Launcher, command: Command, tmp_path: Path) -> None:
    ended = launcher.run_ranks(command(tmp_path / "run", steps=8, eval_every=0), 2, fault="rank_1_is_slow")
    all_ended(ended)
    assert "for the same matrix products" in ended[0].said
    assert "warning: step 6: rank 1 takes" in " ".join(ended[0].said.split())
    assert "rank 0 takes" not in ended[0].said
