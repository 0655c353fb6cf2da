"""Training: one curve however a step is cut, and what happens to steps that go wrong."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastft
from fastft.answers.generation import generate
from fastft.answers.options import GenerateOptions
from fastft.cli import parse
from fastft.common.errors import TrainingError, UserError
from fastft.engines.engine import Engine
from fastft.engines.optim import adamw, learning_rate
from fastft.model.gpt2 import GPT2, config_for
from fastft.model.precision import choose_dtype
from fastft.run.config import TrainOptions, changed_settings, from_yaml, to_yaml
from fastft.run.data import load_data
from fastft.run.folder import Run
from fastft.run.metrics_file import read_metrics
from fastft.training.train import Trainer, train


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 records whose answers have from 1 to 12 words: supervised counts differ."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    records = [
        {"instruction": f"Count to {words[i % 12]}, try {i}.", "input": "", "output": " ".join(words[: i % 12 + 1])}
        for i in range(60)
    ]
    path = tmp_path_factory.mktemp("data") / "counting.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def options(data_file: Path, tmp_path: Path) -> TrainOptions:
    return TrainOptions(
        data=str(data_file),
        model="pico",
        out=tmp_path / "run",
        device="cpu",
        dtype="fp32",
        batch_size=8,
        samples=0,
        keep_best=False,
    )


def step(trainer: Trainer, index: int) -> dict[str, Any]:
    """A step's line for the metrics."""
    steps = trainer.steps
    return steps.line(steps.update(steps.forward_backward(steps.build(index))))


def losses(options: TrainOptions, steps: int = 20) -> list[float]:
    """The losses of a run's first steps, without files."""
    torch.manual_seed(options.seed)
    model = GPT2(config_for(options.model, tie_head=options.tie_head))
    trainer = Trainer(Run(options.out), replace(options, steps=steps), load_data(options), Engine(model, options))
    return [step(trainer, index)["loss"] for index in range(steps)]


Known = Callable[[TrainOptions], list[float]]


@pytest.fixture(scope="module")
def known_losses() -> Known:
    """`losses` of runs that nothing is planted in, each computed once for all tests: files have no part in them."""
    known: dict[str, list[float]] = {}

    def known_losses(options: TrainOptions) -> list[float]:
        key = repr(replace(options, out=Path("any")))
        if key not in known:
            known[key] = losses(options)
        return known[key]

    return known_losses


def difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def metrics(options: TrainOptions) -> list[dict[str, Any]]:
    return list(read_metrics(Run(options.out).metrics))


class TestOneCurve:
    """20 steps at a rate of 5e-5, with unequal supervised counts and an incomplete last step in each epoch of 7."""

    @pytest.mark.parametrize(("dtype", "limit", "cuts"), [("fp32", 1e-6, (8,)), ("fp64", 1e-12, (2, 4, 8))])
    def test_accumulation(
        self, options: TrainOptions, known_losses: Known, dtype: Any, limit: float, cuts: tuple[int, ...]
    ) -> None:
        options = replace(options, dtype=dtype)
        expected = known_losses(options)
        for accumulate in cuts:
            assert difference(losses(replace(options, accumulate=accumulate)), expected) < limit

    def test_the_limit_rejects_a_mean_of_means(
        self, options: TrainOptions, known_losses: Known, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The usual mistake: each micro-batch divided by its own count, then averaged."""
        expected = known_losses(options)
        right = Engine.accumulate

        def mean_of_means(self: Engine, batch: Any, count: int, **_: bool) -> tuple[torch.Tensor, torch.Tensor]:
            del count
            return right(self, batch, 4 * batch.count)

        monkeypatch.setattr(Engine, "accumulate", mean_of_means)
        assert difference(losses(replace(options, accumulate=4)), expected) > 1e-3

    @pytest.mark.parametrize("mask_prompt", [True, False])
    def test_saving_path_follows_the_reference(
        self, options: TrainOptions, known_losses: Known, mask_prompt: bool
    ) -> None:
        options = replace(options, mask_prompt=mask_prompt)
        assert difference(known_losses(options), losses(replace(options, impl="reference"))) < 1e-6

    def test_bf16_stays_near(self, options: TrainOptions, known_losses: Known) -> None:
        got = difference(losses(replace(options, dtype="bf16")), known_losses(options))
        assert 0 < got < 1e-2

    def test_fp16_with_loss_scaling_stays_near(self, options: TrainOptions, known_losses: Known) -> None:
        got = difference(losses(replace(options, dtype="fp16")), known_losses(options))
        assert 0 < got < 1e-2


class TestNonFinite:
    def _poisoned(self, options: TrainOptions) -> Trainer:
        torch.manual_seed(0)
        model = GPT2(config_for("pico"))
        with torch.no_grad():
            model.ln_f.bias[0] = math.nan
        return Trainer(Run(options.out), options, load_data(options), Engine(model, options))

    def test_update_is_skipped_and_the_rows_are_named(
        self, options: TrainOptions, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trainer = self._poisoned(options)
        before = [p.detach().clone() for p in trainer.job.engine.model.parameters()]
        line = step(trainer, 0)
        assert line["skipped"] is True
        assert trainer.job.progress.skipped == 1
        assert not trainer.job.engine.optimizer.state
        for old, new in zip(before, trainer.job.engine.model.parameters(), strict=True):
            assert torch.equal(old.nan_to_num(), new.nan_to_num())
        said = " ".join(capsys.readouterr().err.split())
        assert f"rows {min(trainer.job.prepared.train_set.rows[trainer.job.prepared.plan.step(0).examples])}" in said

    def test_the_run_stops_after_the_limit_with_a_checkpoint(self, options: TrainOptions) -> None:
        trainer = self._poisoned(replace(options, max_skipped=2, eval_every=0))
        with pytest.raises(TrainingError, match=r"skipped step 3, --max_skipped allows 2.*A checkpoint is saved"):
            trainer.run_all()
        assert list(trainer.job.run.checkpoints.glob("step-*/DONE"))

    def test_a_bad_gradient_alone_is_enough(self, options: TrainOptions) -> None:
        trainer = self._poisoned(options)
        with torch.no_grad():
            trainer.job.engine.model.ln_f.bias.zero_()
        weight = trainer.job.engine.model.wpe.weight
        weight.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
        line = step(trainer, 0)
        assert math.isfinite(line["loss"])
        assert line["skipped"] is True
        assert trainer.job.progress.skipped == 1

    def test_fp16_finds_its_scale_without_being_counted(self, options: TrainOptions) -> None:
        options = replace(options, dtype="fp16")
        trainer = Trainer(Run(options.out), options, load_data(options), Engine(GPT2(config_for("pico")), options))
        trainer.job.engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
        line = step(trainer, 0)
        assert line["skipped"] is True
        assert trainer.job.progress.skipped == 0
        assert trainer.job.engine.scaler.get_scale() < 2.0**60


class TestRun:
    def test_leaves_a_whole_folder(self, options: TrainOptions) -> None:
        outcome = train(replace(options, steps=9, eval_every=4, samples=1, keep_best=True))
        assert outcome.progress.step == 9
        run = outcome.run
        lines = metrics(options)
        steps = [line for line in lines if "loss" in line]
        assert [line["step"] for line in steps] == list(range(1, 10))
        keys = {
            "step", "loss", "lr", "grad_norm", "seconds", "tokens_padded", "tokens_real", "tokens_computed",
            "tokens_supervised", "memory_bytes", "examples",
        }  # fmt: skip
        assert all(keys <= line.keys() for line in steps)
        evaluations = [line for line in lines if "val_loss" in line]
        assert [line["step"] for line in evaluations] == [0, 4, 8, 9]
        assert all("loss" not in line and "seconds" not in line for line in evaluations)
        assert [line["step"] for line in lines if "sample" in line] == [4, 8, 9]
        assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]
        assert {path.name for path in run.checkpoints.iterdir()} == {"step-7", "step-9", "best-4", "best-8", "best-9"}
        assert (run.model / "model.safetensors").is_file()
        assert from_yaml(run.config) == replace(options, steps=9, eval_every=4, samples=1, keep_best=True)

    def test_token_accounting(self, options: TrainOptions) -> None:
        outcome = train(replace(options, epochs=1, eval_every=0))
        lines = [line for line in metrics(options) if "loss" in line]
        data = load_data(options)
        encoded = data.encode("train", options, config_for("pico"))
        assert sum(line["tokens_real"] for line in lines) == encoded.lengths.sum()
        assert sum(line["tokens_supervised"] for line in lines) == encoded.supervised.sum()
        assert sum(line["tokens_computed"] for line in lines) == outcome.progress.tokens_seen
        assert all(line["tokens_padded"] >= line["tokens_real"] > line["tokens_supervised"] for line in lines)

    def test_early_stopping_exports_the_best_weights(self, options: TrainOptions) -> None:
        """At an absurd rate the first evaluation is the best one."""
        options = replace(options, lr=5.0, clip=0.0, eval_every=1, patience=3, steps=50, keep_best=True)
        outcome = train(options)
        assert outcome.progress.step == outcome.progress.best_step + 3 < 50
        best = outcome.run.checkpoints / f"best-{outcome.progress.best_step}"
        from safetensors.torch import load_file

        exported = load_file(outcome.run.model / "model.safetensors")
        kept = load_file(best / "model.safetensors")
        assert any(torch.equal(exported[name], kept["wte.weight"]) for name in exported if name.endswith("wte.weight"))

    def test_a_run_that_never_beats_its_start_exports_the_start(
        self, options: TrainOptions, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = replace(options, lr=50.0, clip=0.0, eval_every=1, patience=2, steps=50, keep_best=True)
        outcome = train(options)
        assert (outcome.progress.best_step, outcome.progress.step) == (0, 2)
        torch.manual_seed(options.seed)
        start = GPT2(config_for("pico"))
        assert torch.equal(fastft.load(outcome.run.model).wte.weight, start.wte.weight)
        assert "exporting the weights it started from" in " ".join(capsys.readouterr().err.split())

    @pytest.mark.parametrize("fails", ["evaluate", RuntimeError, UserError])
    def test_no_evaluation_or_sample_costs_a_checkpoint(
        self, options: TrainOptions, monkeypatch: pytest.MonkeyPatch, capsys: Any, fails: Any
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise fails("an id without a text")

        options = replace(options, steps=4, eval_every=2, save_every=2, samples=1, keep_best=True)
        expected = train(replace(options, out=options.out.with_name("expected"))).run
        with monkeypatch.context() as patch:
            if fails == "evaluate":
                patch.setattr(Engine, "evaluate", _failing_at(Engine.evaluate, 1 + 1))
                with pytest.raises(RuntimeError, match="without a text"):
                    train(options)
                assert (options.out / "checkpoints/step-2/DONE").is_file()
            else:
                patch.setattr("fastft.training.evaluation.greedy", fail)
                assert train(options).progress.step == 4
                said = " ".join(capsys.readouterr().err.split())
                for step in (2, 4):
                    assert f"no samples at step {step} ({fails.__name__}: an id without a text); training goes" in said
        if fails == "evaluate":
            train(replace(options, resume=True))
            ours, theirs = (
                [{**line, "seconds": 0, "eval_seconds": 0, "memory_bytes": 0} for line in read_metrics(run.metrics)]
                for run in (Run(options.out), expected)
            )
            assert ours == theirs
        weights = [(run.model / "model.safetensors").read_bytes() for run in (Run(options.out), expected)]
        assert weights[0] == weights[1]

    def test_evaluation_obeys_pack_tokens(self, options: TrainOptions, capsys: pytest.CaptureFixture[str]) -> None:
        options = replace(options, pack_tokens=130, share_prefix=False, dry_run=True)
        engine = Engine(GPT2(config_for("pico")), options)
        trainer = Trainer(Run(options.out), options, load_data(options), engine)
        prepared = trainer.job.prepared
        batches = prepared.evaluation.batches()
        computed = [prepared.batcher(prepared.val_set, batch).tokens.numel() for batch in batches]
        assert len(batches) > 1 < max(map(len, batches))
        assert all(tokens <= 130 for tokens, batch in zip(computed, batches, strict=True) if len(batch) > 1)
        assert sorted(index for batch in batches for index in batch) == list(range(len(prepared.val_set)))
        trainer.dry_run()
        assert f"largest evaluation batch: {max(computed)} tokens" in " ".join(capsys.readouterr().err.split())
        wide = Trainer(Run(options.out), replace(options, pack_tokens=16384), load_data(options), engine)
        assert len(wide.job.prepared.evaluation.batches()) == 1
        losses = [one.job.prepared.evaluation.losses(engine.evaluate, 0)["val_loss"] for one in (trainer, wide)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def test_dry_run_writes_nothing(self, options: TrainOptions, capsys: pytest.CaptureFixture[str]) -> None:
        train(replace(options, dry_run=True))
        said = " ".join(capsys.readouterr().err.split())
        encoded = load_data(options).encode("train", options, config_for("pico"))
        assert f"{2 * encoded.lengths.sum():,} real" in said
        assert f"{2 * encoded.supervised.sum():,} supervised" in said
        assert "training will take about" in said
        assert not options.out.exists()

    def test_the_run_of_a_small_model_learns(self, options: TrainOptions) -> None:
        train(replace(options, lr=3e-3, epochs=10, eval_every=0))
        lines = [line for line in metrics(options) if "loss" in line]
        assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]

    def test_samples_stand_beside_their_references(
        self, options: TrainOptions, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train(replace(options, steps=1, samples=1, eval_every=0))
        said = capsys.readouterr().err
        (line,) = [line["sample"] for line in metrics(options) if "sample" in line]
        shown = re.search(r"  sample: (.*)\n    answer:    (.*)\n    reference: (.*)\n", said)
        assert shown is not None
        assert shown[1].split() == f"{line['instruction']} {line['input']}".split()
        assert shown[3] == " ".join(line["output"].split())
        whole = " ".join(line["model_response"].split())
        assert shown[2] == whole or (len(shown[2]) == 160 and whole.startswith(shown[2].rstrip("…")))
        assert re.search(
            r"training 1/1 loss \d+\.\d{3}, lr [\d.e-]+, epoch 1, [\d,]+ tokens/s, [\d.]+ examples/s, \d+\.\d GiB\n",
            said,
        )

    def test_overwrite_removes_only_what_a_run_writes(self, options: TrainOptions) -> None:
        train(replace(options, steps=2, eval_every=0))
        mine = options.out / "notes.txt"
        mine.write_text("keep me")
        train(replace(options, steps=1, eval_every=0, overwrite=True))
        assert mine.read_text() == "keep me"
        assert [line["step"] for line in metrics(options) if "loss" in line] == [1]


def _failing_at(evaluate: Any, call: int) -> Any:
    """The engine's evaluation, which fails at its `call`th batch."""
    calls = 0

    def failing(self: Engine, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise RuntimeError("an id without a text")
        result: torch.Tensor = evaluate(self, batch)
        return result

    return failing


class TestOneData:
    """What a run keeps of its data, so that what comes after training is about the same data."""

    def test_a_run_can_be_used_from_another_folder(
        self, options: TrainOptions, data_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(data_file.parent)
        train(replace(options, data=data_file.name, steps=1, eval_every=0))
        monkeypatch.chdir(tmp_path)
        assert len(generate(GenerateOptions(run=str(options.out), max_new_tokens=2, limit=2))) == 2
        train(replace(options, data=str(data_file), steps=2, eval_every=0, resume=True))

    def test_other_records_are_refused(self, options: TrainOptions, data_file: Path, tmp_path: Path) -> None:
        mine = tmp_path / "mine.json"
        records = json.loads(data_file.read_text())
        mine.write_text(json.dumps(records))
        train(replace(options, data=str(mine), steps=1, eval_every=0))
        mine.write_text(json.dumps(records[30:] + records[:30]))
        with pytest.raises(UserError, match="its test split may hold training records"):
            generate(GenerateOptions(run=options.out))

    @pytest.mark.parametrize("part", ["train", "val", "test"])
    def test_a_change_in_any_split_is_noticed_and_never_forgiven(
        self, options: TrainOptions, data_file: Path, tmp_path: Path, part: str
    ) -> None:
        mine = tmp_path / "mine.json"
        records = json.loads(data_file.read_text())
        mine.write_text(json.dumps(records))
        options = replace(options, data=str(mine), steps=1, eval_every=0)
        train(options)
        row = getattr(load_data(options).sources[0].parts, part)[0]
        records[row]["output"] += " changed"
        mine.write_text(json.dumps(records))
        for _ in range(2):
            with pytest.raises(UserError, match="its records or their order have changed"):
                train(replace(options, steps=2, resume=True))
            with pytest.raises(UserError, match="its records or their order have changed"):
                generate(GenerateOptions(run=options.out))
        (options.out / "data.json").unlink()
        with pytest.raises(UserError, match="examples are not those of"):
            train(replace(options, steps=2, resume=True))
        with pytest.raises(UserError, match="does not say what"):
            generate(GenerateOptions(run=options.out))

    def test_moved_folders_and_renamed_data_are_found_by_what_they_hold(
        self, options: TrainOptions, data_file: Path, tmp_path: Path
    ) -> None:
        start = GPT2(config_for("pico"))
        fastft.model.weights.save_hf(start, fastft.common.files.make_folder(tmp_path / "start"))
        old = tmp_path / "old.json"
        old.write_bytes(data_file.read_bytes())
        train(replace(options, data=str(old), steps=1, eval_every=0, weights=str(tmp_path / "start")))
        moved = options.out.rename(tmp_path / "moved")
        data = old.rename(tmp_path / "new.json")
        (tmp_path / "start").rename(tmp_path / "gone")
        assert len(generate(GenerateOptions(run=moved, data=str(data), max_new_tokens=2, limit=1))) == 1
        with pytest.raises(UserError, match=r"old\.json"):
            generate(GenerateOptions(run=moved))
        argv = ["--resume", "--out", str(moved), "--data", str(data), "--steps", "2"]
        assert train(parse("train", argv)).progress.step == 2
        assert len(generate(GenerateOptions(run=moved, max_new_tokens=2, limit=1))) == 1

    def test_a_finished_run_without_checkpoints_is_not_begun_again(self, options: TrainOptions) -> None:
        train(replace(options, steps=1, eval_every=0))
        shutil.rmtree(options.out / "checkpoints")
        before = (options.out / "model/model.safetensors").read_bytes()
        with pytest.raises(UserError, match="holds a finished run"):
            train(replace(options, steps=1, eval_every=0, resume=True))
        assert (options.out / "model/model.safetensors").read_bytes() == before

    def test_a_run_does_not_go_back(self, options: TrainOptions) -> None:
        train(replace(options, steps=3, eval_every=0))
        with pytest.raises(UserError, match="has 3 steps behind it, and the run is to have 2"):
            train(replace(options, steps=2, eval_every=0, resume=True))

    def test_every_row_that_something_happened_to_is_listed(
        self, options: TrainOptions, data_file: Path, tmp_path: Path
    ) -> None:
        mine = tmp_path / "mine.json"
        records = json.loads(data_file.read_text())
        mine.write_text(json.dumps([*records, *[{"instruction": "x"}] * 25]))
        train(replace(options, data=str(mine), steps=1, skip_bad_records=True, max_length=50, too_long="truncate"))
        seen = json.loads((options.out / "data.json").read_text())
        assert [bad["row"] for bad in seen["left_out"]] == list(range(61, 86))
        assert seen["records"] == 60
        assert (
            len(seen["train"]["truncated"])
            == (load_data(options).encode("train", options, config_for("pico")).lengths > 50).sum()
        )

    def test_another_split_has_its_own_file(self, options: TrainOptions) -> None:
        train(replace(options, steps=1, eval_every=0))
        test = generate(GenerateOptions(run=options.out, max_new_tokens=2))
        val = generate(GenerateOptions(run=options.out, max_new_tokens=2, split="val"))
        assert json.loads((options.out / "responses.json").read_text()) == test
        assert json.loads((options.out / "responses.val.json").read_text()) == val
        assert test != val


def test_ledger(options: TrainOptions) -> None:
    train(replace(options, epochs=2, eval_every=0, ledger=True, accumulate=2))
    train_set = load_data(options).encode("train", options, config_for("pico"))
    supervised = dict(zip(train_set.rows.tolist(), train_set.supervised.tolist(), strict=True))
    lines = list(read_metrics(options.out / "ledger.jsonl"))
    steps = [line for line in metrics(options) if "loss" in line]
    for line, step in zip(lines, steps, strict=True):
        total = sum(loss * supervised[row] for row, loss in zip(line["rows"], line["losses"], strict=True))
        assert total / step["tokens_supervised"] == pytest.approx(step["loss"], rel=1e-5)
    for epoch in (1, 2):
        rows = [row for line in lines if line["epoch"] == epoch for row in line["rows"]]
        assert sorted(rows) == train_set.rows.tolist()


@pytest.mark.parametrize("batching", ["padded", "bucketed", "packed"])
def test_batching(options: TrainOptions, known_losses: Known, batching: Any) -> None:
    """Padded and packed steps hold the same examples and follow one curve; bucketed ones hold others."""
    expected = known_losses(replace(options, batching="padded", impl="reference"))
    got = losses(replace(options, batching=batching))
    assert (difference(got, expected) < 1e-6) == (batching != "bucketed")


def test_packs_share_beginnings_and_change_nothing(options: TrainOptions, known_losses: Known) -> None:
    expected = known_losses(options)
    assert difference(losses(replace(options, share_prefix=False)), expected) < 1e-6
    assert difference(losses(replace(options, pack_tokens=100)), expected) < 1e-6
    for share, padded in ((True, False), (False, False), (True, True)):
        out = options.out.with_name(f"run-{share}-{padded}")
        batching: Any = "padded" if padded else "packed"
        train(replace(options, out=out, steps=3, eval_every=0, share_prefix=share, batching=batching))
        (line, *_) = [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
        if padded:
            assert line["tokens_computed"] == line["tokens_padded"] > line["tokens_real"]
        elif share:
            assert line["tokens_computed"] < line["tokens_real"] - 6 * 24  # the template once for 8 examples
        else:
            assert line["tokens_computed"] == line["tokens_real"]


def test_the_resolved_dtype_is_kept(options: TrainOptions) -> None:
    train(replace(options, dtype="auto", steps=1, eval_every=0))
    saved = from_yaml(options.out / "config.yaml").dtype
    assert saved == choose_dtype("auto", torch.device("cpu"))
    outcome = train(replace(options, dtype="auto", steps=2, eval_every=0, resume=True))
    assert outcome.progress.step == 2


class TestOptimizer:
    def test_decay_groups(self) -> None:
        model = GPT2(config_for("pico"))
        names = {parameter: name for name, parameter in model.named_parameters()}
        decayed, plain = adamw(model, lr=1e-3, weight_decay=0.1, decay_all=False).param_groups
        assert decayed["weight_decay"] == 0.1
        assert plain["weight_decay"] == 0.0
        assert {names[p].split(".", 2)[-1] for p in decayed["params"]} == {
            "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
        }  # fmt: skip
        (everything,) = adamw(model, lr=1e-3, weight_decay=0.1, decay_all=True).param_groups
        assert len(everything["params"]) == len(decayed["params"]) + len(plain["params"])

    def test_untied_head_decays(self) -> None:
        model = GPT2(config_for("pico", tie_head=False))
        decayed = adamw(model, lr=1e-3, weight_decay=0.1, decay_all=False).param_groups[0]["params"]
        assert any(parameter is model.lm_head.weight for parameter in decayed)

    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [
            ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
            ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
            ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
        ],
    )
    def test_schedules(self, schedule: Any, expected: list[float]) -> None:
        rates = [learning_rate(s, peak=1.0, schedule=schedule, warmup=4, total_steps=8) for s in range(8)]
        assert rates == pytest.approx(expected, abs=1e-6)

    def test_clipping_bounds_the_update(self, options: TrainOptions) -> None:
        data = load_data(options)
        norms = []
        for clip in (0.0, 0.01):
            torch.manual_seed(0)
            engine = Engine(GPT2(config_for("pico")), replace(options, clip=clip))
            seen: list[float] = []
            engine.optimizer.register_step_pre_hook(
                lambda optimizer, *_, seen=seen: seen.append(
                    optimizer.scale  # which the update multiplies gradients by
                    * math.sqrt(sum(float(p.grad.square().sum()) for g in optimizer.param_groups for p in g["params"]))
                )
            )
            trainer = Trainer(Run(options.out), options, data, engine)
            step(trainer, 0)
            norms += seen
        assert norms[0] > 0.1
        assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_options_from_python(tmp_path: Path) -> None:
    assert TrainOptions(out=str(tmp_path)).out == tmp_path
    with pytest.raises(UserError, match="got --dtype bf17, expected auto, bf16, fp16, fp32 or fp64"):
        TrainOptions(dtype="bf17")
    assert fastft.recipe_options("book", model="gpt2").tie_head is False


def test_dtype_choice() -> None:
    assert choose_dtype("fp32", torch.device("cpu")) == "fp32"
    assert choose_dtype("auto", torch.device("cpu")) in ("bf16", "fp32")
    assert choose_dtype("auto", torch.device("mps")) == "fp32"


def test_config_round_trip(options: TrainOptions, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(replace(options, resume=True)))
    assert from_yaml(path) == options
    assert path.read_text().startswith("# fastft ")
    assert f"torch {torch.__version__}" in path.read_text()


def test_settings_that_a_resumed_run_may_change(options: TrainOptions) -> None:
    assert not changed_settings(options, replace(options, steps=99, device="auto", keep=5))
    assert changed_settings(options, replace(options, lr=1.0)) == ["lr: 5e-05 then, 1.0 now"]
    falling = replace(options, schedule="cosine")
    assert changed_settings(falling, replace(falling, steps=99)) == ["steps: None then, 99 now"]


@pytest.mark.parametrize(("impl", "tie_head"), [("cpu", True), ("cpu", False), ("auto", True)])
def test_the_torch_path_is_not_compiled_and_says_so_beforehand(
    options: TrainOptions, impl: Any, tie_head: bool
) -> None:
    with pytest.raises(UserError, match="got --compile true with the torch path"):
        train(replace(options, compile=True, impl=impl, tie_head=tie_head))
    assert not options.out.exists()


@pytest.mark.long
@pytest.mark.parametrize("tie_head", [True, False])
def test_the_reference_is_compiled_to_the_same_curve(options: TrainOptions, tie_head: bool) -> None:
    options = replace(options, impl="reference", tie_head=tie_head)
    assert difference(losses(replace(options, compile=True), 5), losses(options, 5)) < 1e-5


@pytest.mark.parametrize("name", ["data.json", "responses.json", "ab.json", "ledger.jsonl"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_data_under_a_name_that_a_run_writes_is_refused_and_stays(
    options: TrainOptions, name: str, overwrite: bool
) -> None:
    mine = options.out / name
    mine.parent.mkdir()
    content = Path(options.data).read_bytes()
    mine.write_bytes(content)
    with pytest.raises(UserError, match="lies under a name that a run writes"):
        train(replace(options, data=str(mine), overwrite=overwrite))
    with pytest.raises(UserError, match="lies under a name that a run writes"):
        train(replace(options, data=str(mine), dry_run=True))
    assert mine.read_bytes() == content


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "model/config.json", "responses.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_under_a_runs_names_are_refused_and_stay(
    options: TrainOptions, name: str, overwrite: bool
) -> None:
    theirs = options.out / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("lr: 1\n")
    with pytest.raises(UserError, match="no run of fastft's has written it"):
        train(replace(options, overwrite=overwrite))
    assert theirs.read_text() == "lr: 1\n"


def test_an_out_that_is_no_folder_is_refused(options: TrainOptions) -> None:
    for make in (options.out.touch, lambda: options.out.symlink_to("nowhere")):
        make()
        with pytest.raises(UserError, match="is there and is no folder"):
            train(replace(options, dry_run=True))
        options.out.unlink()
