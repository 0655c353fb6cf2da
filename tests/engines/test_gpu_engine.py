"""`GpuEngine` on a CPU, where the same work runs uncaptured: against `Engine`, and against torch's own optimizer."""

import copy
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import on_ranks
from small_records import made_records
from torch import Tensor

from fastft.batches.batch import Batch, padded_batch
from fastft.common import files
from fastft.common.errors import TrainingError, UserError
from fastft.engines.engine import AnyEngine, Engine, Update
from fastft.engines.flat import FlatWeights
from fastft.engines.gpu_engine import GpuEngine
from fastft.gpu.cuda_graphs import Graphs
from fastft.model import part as parts
from fastft.model.gpt2 import GPT2, GPT2Config
from fastft.model.lora_spec import LoRA
from fastft.model.part import Part, of_base, saved, train_only
from fastft.model.weights import save_weights
from fastft.ranks.world import World
from fastft.run.config import TrainOptions
from fastft.run.data import load_data
from fastft.run.folder import Run
from fastft.run.metrics_file import read_metrics
from fastft.training.models import initial_model
from fastft.training.train import Trainer

SHAPE = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=64, vocab_size=97)
LIMITS = {"fp64": 1e-7, "fp32": 2e-5, "bf16": 2e-2}  # fp64: the rate is a float32 number on the device
RATE = 1e-3


def options(**changed: Any) -> TrainOptions:
    return TrainOptions(**{"device": "cpu", "dtype": "fp64", "lr": RATE, "model": "pico", **changed})


def model(**changed: Any) -> GPT2:
    torch.manual_seed(0)
    return GPT2(replace(SHAPE, **changed))


def batches(step: int, packs: int = 1) -> list[Batch]:
    ids = np.random.default_rng(step).integers(0, SHAPE.vocab_size, (4, 11)).astype(np.int32)
    starts = np.arange(len(ids)) % 7 + 1
    cut = zip(np.split(ids, packs), np.split(starts, packs), strict=True)
    return [padded_batch(list(part), first.tolist()) for part, first in cut]


def trained_step(engine: AnyEngine, packs: list[Batch], rate: float = RATE) -> Update:
    count = sum(batch.count for batch in packs)
    losses = [engine.accumulate(batch, count, last=batch is packs[-1])[0].double() for batch in packs]
    return engine.update(rate, torch.stack(losses).sum())()


def curve(engine: AnyEngine, *, steps: int = 8, packs: int = 1) -> list[tuple[float, float]]:
    updates = [trained_step(engine, batches(step, packs)) for step in range(steps)]
    assert all(update.applied for update in updates)
    return [(update.loss, update.grad_norm) for update in updates]


def weights_of(engine: AnyEngine) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


def difference(got: Any, expected: Any) -> float:
    got, expected = np.asarray(got, dtype=float), np.asarray(expected, dtype=float)
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("tie_head", [True, False])
@pytest.mark.parametrize("dtype", LIMITS)
def test_follows_the_plain_engine(dtype: str, tie_head: bool, decay_all: bool) -> None:
    chosen = options(dtype=dtype, decay_all=decay_all, clip=0.5)
    start = model(tie_head=tie_head)
    ours, plain = GpuEngine(copy.deepcopy(start), chosen), Engine(start, chosen)
    assert difference(curve(ours), curve(plain)) < LIMITS[dtype]
    if dtype != "bf16":  # whose gradients of nothing but rounding, such as the key bias's, AdamW makes into full steps
        for name, weight in weights_of(ours).items():
            assert (weight - weights_of(plain)[name]).abs().max() < 10 * LIMITS[dtype], name
    assert difference(ours.evaluate(batches(0)[0]).item(), plain.evaluate(batches(0)[0]).item()) < LIMITS[dtype]


PARTS = [
    Part(lora=LoRA(r=3, alpha=6.0, dora=True), train_only=None, new_rows=(90, 3), base_sha256=""),
    Part(lora=LoRA(r=3, alpha=6.0, layers=(1,)), train_only=None, new_rows=None, base_sha256=""),
    Part(lora=None, train_only="h.1,ln_f", new_rows=None, base_sha256=""),
]


@pytest.mark.parametrize("part", PARTS, ids=["dora", "one layer", "train_only"])
@pytest.mark.parametrize("dtype", LIMITS)
def test_follows_the_plain_engine_where_a_part_is_trained(dtype: str, part: Part) -> None:
    chosen = options(dtype=dtype, clip=0.5)
    start = model()
    part.take(start, torch.Generator().manual_seed(0))
    stays = {name: weight.detach().clone() for name, weight in of_base(start).items()}
    ours, plain = GpuEngine(copy.deepcopy(start), chosen), Engine(copy.deepcopy(start), chosen)
    # Few gradients of few weights: what is left of a curve's length is less than in full training.
    assert difference(curve(ours, packs=2), curve(plain, packs=2)) < LIMITS[dtype]
    for engine in (ours, plain):
        held = engine.whole_weights()
        assert held is not None
        assert held.keys() == parts.trained(start).keys()
        assert {weight.dtype for weight in held.values()} == {torch.float64 if dtype == "fp64" else torch.float32}
        moved = [name for name, weight in held.items() if not torch.equal(weight, dict(start.named_parameters())[name])]
        assert len(moved) == len(held)
        for name, weight in of_base(engine.model).items():
            if not (part.new_rows and name == "wte.weight"):  # the trained rows are written into it
                assert torch.equal(weight, stays[name].to(weight.dtype)), name
    narrow = {weight.dtype for name, weight in of_base(ours.model).items() if "c_proj.weight" in name}
    assert narrow == ({torch.bfloat16} if dtype == "bf16" else {weight.dtype for weight in held.values()})
    assert ours.flat.weights.numel() < sum(weight.numel() for weight in held.values()) + 64 * len(held)


def test_the_limit_rejects_moments_that_are_forgotten() -> None:
    engine, found = GpuEngine(model(), options(dtype="fp32")), []
    for step in range(8):
        found.append(trained_step(engine, batches(step)).loss)
        engine.flat.exp_avg.zero_()
    expected = [loss for loss, _ in curve(GpuEngine(model(), options(dtype="fp32")))]
    assert difference(found, expected) > 10 * LIMITS["fp32"]


@pytest.mark.parametrize("packs", [2, 4])
def test_the_curve_does_not_depend_on_the_packs(packs: int) -> None:
    whole = curve(GpuEngine(model(), options()))
    assert difference(curve(GpuEngine(model(), options()), packs=packs), whole) < 1e-7  # weights are float32


def test_the_limit_rejects_gradients_of_the_last_pack_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = curve(GpuEngine(model(), options()))
    right = FlatWeights.take
    monkeypatch.setattr(FlatWeights, "take", lambda *args, **_: right(*args, add=False))
    assert difference(curve(GpuEngine(model(), options()), packs=2), whole) > 1e-3


@pytest.mark.parametrize("engine_class", [Engine, GpuEngine])
@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
@pytest.mark.parametrize("how", ["abandoned", "error"])
def test_nothing_of_a_step_that_was_given_up_is_in_the_next(how: str, dtype: str, engine_class: Any) -> None:
    engine, other = (engine_class(model(), options(dtype=dtype)) for _ in range(2))
    given_up, broken = batches(7, 2)
    engine.accumulate(given_up, 16, last=False)
    if how == "abandoned":
        engine.abandon()
    else:
        broken.targets[0] = SHAPE.vocab_size + 5  # an id that the model does not have
        with pytest.raises((RuntimeError, IndexError)):
            engine.accumulate(broken, 16)
    assert curve(engine, steps=2, packs=2) == curve(other, steps=2, packs=2)


def test_without_giving_it_up_its_gradients_would_be_in_the_next() -> None:
    engine, other = GpuEngine(model(), options()), GpuEngine(model(), options())
    engine.accumulate(batches(7, 2)[0], 16, last=False)
    assert difference(curve(engine, steps=2), curve(other, steps=2)) > 1e-3


def reference_weights(clip: float, *, steps: int) -> dict[str, Tensor]:
    """What torch's own AdamW and clipping make of the model, in float64."""
    reference = model().double()
    named = dict(reference.named_parameters())
    matrices = {name for name, p in named.items() if p.ndim > 1 and not name.startswith(("wte", "wpe"))}
    groups = [
        {"params": [named[name] for name in matrices], "weight_decay": 0.1},
        {"params": [named[name] for name in named if name not in matrices], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    for step in range(steps):
        (batch,) = batches(step)
        optimizer.zero_grad()
        (reference(batch)[0] / batch.count).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
        optimizer.step()
    return {name: p.detach() for name, p in named.items()}


def test_the_update_is_torchs_adamw_with_its_clipping() -> None:
    # Only where some steps are clipped and others are not does AdamW show it: the norms are 1.5 to 2.2.
    engine = GpuEngine(model(), options(clip=1.8))
    curve(engine, steps=5)
    ours = torch.cat([weight.flatten() for weight in weights_of(engine).values()])

    def distance(clip: float) -> float:
        theirs = reference_weights(clip, steps=5)
        return float((ours - torch.cat([theirs[name].flatten() for name in weights_of(engine)])).abs().max())

    assert distance(1.8) < 1e-7 < 1e-5 < distance(math.inf)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(where: str) -> None:
    engine = GpuEngine(model(), options())
    curve(engine, steps=2)
    before = copy.deepcopy((weights_of(engine), engine.whole_moments()))
    (batch,) = batches(2)
    loss, _ = engine.accumulate(batch, batch.count)
    if where == "gradient":
        engine.flat.gradients[3] = math.inf
    update = engine.update(RATE, loss * (math.nan if where == "loss" else 1.0))()
    assert not update.applied
    assert not update.rescaled
    assert math.isfinite(update.loss) == (where == "gradient")
    after = (weights_of(engine), engine.whole_moments())
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert trained_step(engine, batches(3)).applied


@pytest.mark.parametrize("engine_class", [Engine, GpuEngine])
def test_the_scale_of_fp16_falls_no_lower_than_1(engine_class: Any) -> None:
    engine = engine_class(model(), options(dtype="fp16"))
    engine.load_loss_scale({"scale": 2.0, "good_steps": 0})
    found = []
    for step in range(3):
        (batch,) = batches(step)
        batch.weights[0] = math.inf
        loss, _ = engine.accumulate(batch, batch.count)
        update = engine.update(RATE, loss)()
        found.append((update.rescaled, update.applied, engine.loss_scale()["scale"]))
    assert not any(applied for _, applied, _ in found)
    assert all(scale >= 1 for *_, scale in found)


def test_fp16_finds_its_scale() -> None:
    engine = GpuEngine(model(), options(dtype="fp16"))
    engine.load_loss_scale({"scale": 2.0**40, "good_steps": 1999})
    update = trained_step(engine, batches(0))
    assert (update.applied, update.rescaled) == (False, True)
    assert engine.loss_scale() == {"scale": 2.0**39, "good_steps": 0}
    engine.load_loss_scale({"scale": 2.0**10, "good_steps": 1999})
    assert trained_step(engine, batches(0)).applied
    assert engine.loss_scale() == {"scale": 2.0**11, "good_steps": 0}


def test_the_loss_scale_changes_no_result() -> None:
    found = []
    for scale in (1.0, 2.0**8):
        engine = GpuEngine(model(), options(dtype="fp16", clip=0.5))
        engine.load_loss_scale({"scale": scale, "good_steps": 0})
        found.append(curve(engine, steps=4))
    assert difference(*found) < 5e-3


def gradient_of_many_targets(engine_class: Any, dtype: str, scale: float = 2.0**16) -> Tensor:
    """That of the head, of a step so large that a target's part of it is about the least number of fp16."""
    engine = engine_class(model(tie_head=False), options(dtype=dtype, impl="cpu"))
    engine.load_loss_scale({"scale": scale, "good_steps": 0})
    (batch,) = batches(0)
    count = 1_000_000
    loss, _ = engine.accumulate(batch, count)
    assert loss.item() * count / batch.count == pytest.approx(math.log(SHAPE.vocab_size), rel=0.1)
    if engine_class is GpuEngine:
        gradient = engine.flat.part(engine.flat.gradients, "lm_head.weight")
    else:
        gradient = engine.model.lm_head.weight.grad
    return gradient.double() / engine.loss_scale().get("scale", 1.0)


@pytest.mark.parametrize("engine_class", [Engine, GpuEngine])
def test_the_loss_scale_is_there_before_the_gradients_of_logits_are_rounded(engine_class: Any) -> None:
    exact = gradient_of_many_targets(engine_class, "fp64")

    def distance(scale: float) -> float:
        return float((gradient_of_many_targets(engine_class, "fp16", scale) - exact).norm() / exact.norm())

    assert distance(2.0**16) < 2e-3 < 2e-2 < distance(1.0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_either_engine_goes_on_from_the_others_state(dtype: str, tmp_path: Path) -> None:
    chosen = options(dtype=dtype)
    for first, second in ((Engine, GpuEngine), (GpuEngine, Engine)):
        begun = first(model(), chosen)
        curve(begun, steps=3)
        save_weights(saved(begun.model), tmp_path / "model.safetensors")
        moments = {name: value.clone() for name, value in (begun.whole_moments() or {}).items()}
        gone_on = second(model(tie_head=True), chosen)
        gone_on.load(tmp_path / "model.safetensors", moments)
        got, expected = (
            [trained_step(engine, batches(step)).loss for step in range(3, 7)] for engine in (gone_on, begun)
        )
        assert difference(got, expected) < LIMITS[dtype]
    forgetful = second(model(), chosen)
    forgetful.load(tmp_path / "model.safetensors", {})
    assert difference([trained_step(forgetful, batches(step)).loss for step in range(3, 7)], expected) > 1e-4


def of_rank(world: World, *, bad: int | None = None, steps: int = 4) -> tuple[list[Update], list[Tensor]]:
    """What a rank with two of a step's four packs sees; in step `bad` the second rank's loss is no number."""
    engine, seen = GpuEngine(model(), options(clip=1.8), world), []
    for step in range(steps):
        packs = batches(step, 4)
        count = sum(batch.count for batch in packs)
        mine = packs[world.rank :: world.size]
        losses = [engine.accumulate(batch, count, last=batch is mine[-1])[0].double() for batch in mine]
        factor = math.nan if step == bad and world.rank == 1 else 1.0
        seen.append(engine.update(RATE, factor * torch.stack(losses).sum())())
    return seen, list(weights_of(engine).values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks")
def test_two_ranks_train_what_one_process_does() -> None:
    first, second = (ended.gave for ended in on_ranks(2, of_rank))
    expected, weights = of_rank(World())
    for seen, found in (first, second):
        assert difference([u.loss for u in seen], [u.loss for u in expected]) < 1e-7
        assert difference([u.grad_norm for u in seen], [u.grad_norm for u in expected]) < 1e-7
        assert max((a - b).abs().max() for a, b in zip(found, weights, strict=True)) < 1e-8
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks")
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all() -> None:
    for ended in on_ranks(2, partial(of_rank, bad=1)):
        seen, _ = ended.gave
        assert [update.applied for update in seen] == [True, False, True, True]
        assert math.isnan(seen[1].loss)


def test_weights_are_parts_of_one_tensor_and_stay_parameters_of_the_model() -> None:
    engine = GpuEngine(model(), options(dtype="bf16"))
    flat = engine.flat
    assert {p.untyped_storage().data_ptr() for p in engine.model.parameters()} == {flat.weights.data_ptr()}
    assert [bucket.begin for bucket in flat.buckets[1:]] == [bucket.end for bucket in flat.buckets[:-1]]
    curve(engine, steps=2)
    for name, tensor in flat.tensors.items():
        weight = weights_of(engine)[name]
        assert tensor.dtype == (torch.float32 if ".ln_" in f".{name}" or name.startswith("wpe.") else torch.bfloat16)
        assert torch.equal(tensor.detach(), weight.to(tensor.dtype)), name
        assert tensor.grad is None, name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recomputed_blocks_find_the_same_weights(dtype: str) -> None:
    start = model()
    expected = curve(GpuEngine(copy.deepcopy(start), options(dtype=dtype)))
    start.checkpoint_activations = True
    assert curve(GpuEngine(start, options(dtype=dtype))) == expected


def test_graphs_where_there_are_none_are_refused() -> None:
    with pytest.raises(UserError, match=r"got --cuda_graphs true on cpu.*expected CUDA"):
        GpuEngine(model(), options(cuda_graphs=True))
    with pytest.raises(UserError, match=r"got --cuda_graphs true on cpu, expected CUDA"):
        Engine(model(), options(cuda_graphs=True))


class _Recorded(Graphs):
    """Graphs that are captured nowhere: what would be is noted."""

    def __init__(self, most: int, refused: tuple[str, ...] = ()) -> None:
        super().__init__(torch.device("cuda"), "training", most=most)
        self.refused = refused

    def _captured(self, work: Any) -> Any:
        work_name = work.__name__
        if work_name in self.refused:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return _Replay(work)


class _Replay:
    def __init__(self, work: Any) -> None:
        self.replay = work


class TestGraphs:
    def _work(self, done: list[str], name: str) -> Any:
        def work() -> None:
            done.append(name)

        work.__name__ = name
        return work

    def test_the_second_time_is_captured_and_each_time_counts_once(self) -> None:
        graphs, done = _Recorded(most=2), []
        for _ in range(4):
            graphs.run("a", self._work(done, "a"))
        assert done == ["a"] * 4
        assert graphs.captured == 1

    def test_beyond_the_limit_work_runs_as_it_is_and_it_is_said_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        graphs, done = _Recorded(most=1), []
        for _ in range(3):
            for name in "ab":
                graphs.run(name, self._work(done, name))
        assert done == ["a", "b"] * 3
        assert graphs.captured == 1
        assert capsys.readouterr().err.count("1 CUDA graphs of training are captured") == 1

    def test_it_says_beforehand_what_is_to_stay_where_it_is(self) -> None:
        graphs, done = _Recorded(most=1), []
        said = []
        for name in "aabba":
            said.append(graphs.captures(name))
            graphs.run(name, self._work(done, name))
        assert said == [False, True, False, False, True]  # of a the second time on; the second b is beyond the limit
        refusing = _Recorded(most=1, refused=("a",))
        for _ in range(2):
            refusing.run("a", self._work(done, "a"))
        assert not refusing.captures("a")

    def test_what_cannot_be_captured_runs_as_it_is_and_it_is_said_once(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        graphs, done = _Recorded(most=4, refused=("a",)), []
        for _ in range(4):
            graphs.run("a", self._work(done, "a"))
        assert done == ["a"] * 4
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("not permitted when stream is capturing") == 1
        assert "more" not in said


# Training with it


@pytest.fixture
def run_options(tmp_path: Path) -> TrainOptions:
    data = tmp_path / "records.json"
    files.write_json(data, made_records(60))
    return options(
        data=str(data), dtype="bf16", out=tmp_path / "run", steps=12, eval_every=5, samples=1, keep_best=True
    )


def trained(chosen: TrainOptions, in_flight: int = 1, **how: Any) -> list[dict[str, Any]]:
    """The lines of the metrics, but for what the clock says."""

    class Engine(GpuEngine):
        pass

    Engine.in_flight = in_flight
    Trainer(Run(chosen.out), chosen, load_data(chosen), Engine(initial_model(chosen), chosen)).run_all(**how)
    of_the_clock = {"seconds", "eval_seconds", "memory_bytes"}
    return [{k: v for k, v in line.items() if k not in of_the_clock} for line in read_metrics(Run(chosen.out).metrics)]


def exported(chosen: TrainOptions) -> bytes:
    return (chosen.out / "model/model.safetensors").read_bytes()


def test_a_step_in_flight_changes_no_bit(run_options: TrainOptions, tmp_path: Path) -> None:
    other = replace(run_options, out=tmp_path / "other")
    assert trained(run_options, 1) == trained(other, 0)
    assert exported(run_options) == exported(other)


def test_a_resumed_run_has_the_same_bits(run_options: TrainOptions, tmp_path: Path) -> None:
    broken = replace(run_options, out=tmp_path / "broken")
    expected = trained(run_options)
    trained(broken, stop_after=7)
    assert trained(replace(broken, resume=True)) == expected
    assert exported(broken) == exported(run_options)


def test_too_many_skipped_steps_stop_the_run_with_a_checkpoint_of_its_last_step(
    run_options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = GpuEngine.update

    def update(self: GpuEngine, lr: float, loss: Tensor) -> Any:
        return right(self, lr, loss * math.nan)

    monkeypatch.setattr(GpuEngine, "update", update)
    with pytest.raises(TrainingError, match=r"step 3 has loss nan.*skipped step"):
        trained(replace(run_options, max_skipped=2, eval_every=0))
    lines = [line for line in read_metrics(Run(run_options.out).metrics) if "loss" in line]
    saved = sorted(path.name for path in Run(run_options.out).checkpoints.glob("step-*"))
    assert saved == [f"step-{lines[-1]['step']}"]
    assert lines[-1]["step"] in (3, 4)  # one was under way when the third one's figures were read


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_captured_steps_have_the_bits_of_those_that_are_not(run_options: TrainOptions, tmp_path: Path) -> None:
    captured, eager = (
        replace(run_options, device="cuda", dtype="auto", out=tmp_path / name, cuda_graphs=graphs)
        for name, graphs in (("captured", None), ("eager", False))
    )
    assert trained(captured) == trained(eager)
    assert exported(captured) == exported(eager)


@pytest.mark.parametrize("engine_class", [Engine, GpuEngine])
@pytest.mark.parametrize("named", ["wpe,ln_f", "h.0.attn.c_attn.bias", "h.1.mlp.c_fc.weight"])
def test_a_part_of_a_matrix_or_nothing_narrow_trains_and_answers_in_bf16(named: str, engine_class: Any) -> None:
    """A layer's weight is trained in float32 where its bias stays in bf16, or there is nothing to make copies of."""
    base = model()
    train_only(base, named)
    base.part = Part(lora=None, train_only=named, new_rows=None, base_sha256="")
    engine = engine_class(base, options(dtype="bf16"))
    curve(engine, steps=2)
    (batch,) = batches(0)
    with engine.answering() as answers, torch.no_grad():
        asked = answers(batch)[0]
    assert difference(asked, engine.evaluate(batch)) < 1e-6
