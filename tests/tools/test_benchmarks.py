"""That the benchmarks run and say what their readers take from them. Nothing here is timed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import ablation, bare, common, scaling, sharing
from benchmarks.engines import AllLogits, AllTokens, gradients, largest_difference, new_engine
from benchmarks.peers import by_batch, compare, shared
from fastft.batches.batch import Batcher, pack
from fastft.model.gpt2 import config_for

SMALL = ["--size", "pico", "--device", "cpu", "--threads", str(torch.get_num_threads())]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run here, with their options as their command line would have them: starting torch takes seconds."""
    monkeypatch.delenv("FASTFT_BOOK_DATA", raising=False)

    def run_worker(module: str, *options: object, threads: int) -> dict[str, Any]:
        said: list[dict[str, Any]] = []
        with monkeypatch.context() as patch:
            patch.setattr(common, "say", lambda result: said.append(json.loads(json.dumps(result))))
            patch.setattr(common, "begin", lambda _: None)
            importlib.import_module(module).main([*map(str, options), "--threads", str(threads)])
        return said[-1]

    monkeypatch.setattr(common, "run_worker", run_worker)


def result_of(folder: Path, name: str) -> dict[str, Any]:
    """A result, which must bear no path and no host's name."""
    text = (folder / f"{name}.json").read_text()
    assert str(Path.home()) not in text
    assert str(common.ROOT) not in text
    result = json.loads(text)
    assert set(result["machine"]) == {"cpu", "flags", "cores", "gpu", "torch", "python"}
    return result


@pytest.mark.usefixtures("in_process")
class TestRunners:
    def test_ablation(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        ablation.main([*SMALL, "--rounds", "1", "--steps", "1", "--results", str(tmp_path)])
        rows = result_of(tmp_path, "ablation")["rows"]
        assert list(rows) == list(ablation.ROWS)
        for name, row in rows.items():
            tokens = row["tokens_per_second"]
            assert set(tokens) == set(ablation.TOKENS)
            assert tokens["padded"] >= tokens["real"] > tokens["supervised"]
            assert row["difference"]["loss"] < (1e-2 if name == "bf16" else 1e-6)
            assert row["difference"]["gradient"] < (0.1 if name == "bf16" else 1e-4)
        shares = rows["prefix shared"]["tokens_per_second"]
        assert shares["computed"] < shares["real"]
        assert "last block pruned" in capsys.readouterr().out
        assert (tmp_path / "ablation.png").stat().st_size > 1000

    def test_bare(self, tmp_path: Path) -> None:
        bare.main([*SMALL, "--steps", "1", "--dtypes", "fp32", "--batch_size", "2", "--results", str(tmp_path)])
        result = result_of(tmp_path, "bare")
        each = result["dtypes"]["fp32"]
        assert result["batch_size"] == 2
        assert each["bare_seconds"] > 0
        floor = each["bare_seconds"] + each["pass_seconds"]
        assert each["step_to_floor"]["median"] == pytest.approx(each["step_seconds"] / floor)
        assert each["step_to_bare"]["median"] > each["step_to_floor"]["median"]

    def test_sharing(self, tmp_path: Path) -> None:
        pack_of_two = ["--examples", "4", "--prompt", "40", "--answer", "8", "--pack_tokens", "100"]
        sharing.main([*SMALL, *pack_of_two, "--dtype", "fp32", "--rounds", "1", "--results", str(tmp_path)])
        result = result_of(tmp_path, "sharing")
        assert (result["shared"]["packs"], result["not_shared"]["packs"]) == (1, 2)
        assert (result["shared"]["tokens_computed"], result["not_shared"]["tokens_computed"]) == (40 + 4 * 7, 4 * 47)
        assert result["shared"]["losses"][0] == pytest.approx(result["not_shared"]["losses"][0], rel=1e-6)
        assert (tmp_path / "sharing.png").is_file()

    def test_scaling(self, tmp_path: Path) -> None:
        scaling.main([*SMALL, "--dtype", "fp32", "--examples", "2", "4", "--rounds", "1", "--results", str(tmp_path)])
        result = result_of(tmp_path, "scaling")
        assert [p["examples"] for p in result["packs"]] == [2, 4]
        assert {"attention_exponent_of_pairs", "step_exponent_of_examples"} <= set(result)
        assert (tmp_path / "scaling.png").is_file()

    def test_peers(self, tmp_path: Path) -> None:
        pytest.importorskip("llms_from_scratch")
        pytest.importorskip("accelerate")
        peers = ["fastft", "fastft-fp32", "book", "hf", "hf-masked", "hf-flat", "trainer", "trainer-flat"]
        compare.main([*SMALL, "--rounds", "1", "--steps", "2", "--peers", *peers, "--results", str(tmp_path)])
        result = result_of(tmp_path, "peers")
        assert list(result["peers"]) == peers
        assert len(result["headline"]) == 6
        losses = {name: peer["losses"] for name, peer in result["peers"].items()}
        assert len(losses["book"]) == common.WARMUP + 2
        # Clipping, weight decay and the untied head make later steps differ; the first one is the same arithmetic.
        assert losses["fastft-fp32"][0] == pytest.approx(losses["book"][0], rel=1e-6)
        assert (tmp_path / "peers.png").is_file()

    def test_by_batch(self, tmp_path: Path) -> None:
        by_batch.main([*SMALL, "--rounds", "1", "--steps", "1", "--cases", "pico:2", "--results", str(tmp_path)])
        (case,) = result_of(tmp_path, "by_batch")["cases"]
        speeds = {name: each["median"] for name, each in case["examples_per_second"].items()}
        assert case["speed_to_the_fastest"]["median"] == speeds.pop("fastft") / max(speeds.values())


def test_a_worker_in_a_process_of_its_own() -> None:
    options = ("--size", "pico", "--steps", 1, "--dtype", "fp32", "--device", "cpu")
    result = common.run_worker("benchmarks.peers.ours", *options, threads=1)
    assert {"name", "examples_per_second", "peak_bytes", "losses", "versions", "machine"} <= set(result)
    assert len(result["losses"]) == common.WARMUP + 1
    with pytest.raises(RuntimeError, match="--steps"):
        common.run_worker("benchmarks.peers.ours", "--steps", "none", threads=1)


def test_the_drop_in_is_compared_with_the_fastest_of_each() -> None:
    rates = {"trainer": 9.0, "fastft": 10.0, "fastft-fp32": 20.0, "hf": 4.0, "trainer-flat": 6.0, "trl": 3.0}
    rates |= {"smollm2": 3.0, "smollm2-padded": 1.0, "smollm2-flat": 2.0}
    said = compare.drop_in({name: [{"examples_per_second": [rate]}] for name, rate in rates.items()})
    assert [ratio["median"] for ratio in said.values()] == [0.9, 1.5, 3.0, 1.5]


def test_other_examples_are_noticed() -> None:
    other_model = {"smollm2": [{"losses": [10.9]}]}
    compare.check_losses({"fastft": [{"losses": [10.76]}], **other_model})
    turns = {name: [{"losses": [loss]}] for name, loss in (("fastft", 10.76), ("book", 10.81))}
    with pytest.raises(ValueError, match="do not compute the same"):
        compare.check_losses(turns)


@pytest.mark.parametrize("model", [AllLogits, AllTokens])
def test_composed_models_compute_what_gpt2_does(model: type) -> None:
    """And a gradient of something else is told by `largest_difference`."""
    encoded = sharing.made_examples(3, 20, 6)
    batch = Batcher()(encoded, np.arange(3))
    found = []
    for kind in (None, model):
        engine = new_engine("pico", dtype="fp32", device="cpu", **({"model": kind} if kind else {}))
        engine.accumulate(batch, batch.count)
        found.append(gradients(engine))
    assert largest_difference(found[1], found[0]) < 1e-5
    assert largest_difference({}, found[0]) == 1
    assert largest_difference({name: g * 1.01 for name, g in found[1].items()}, found[0]) > 5e-3


def test_visible_pairs() -> None:
    ids = [np.array([*range(10), 20 + i, 30, 50256], dtype=np.int32) for i in range(2)]
    # One beginning of 10 that all 14 tokens see from where they stand, and two ends of two tokens.
    assert scaling.visible_pairs(pack(ids, [10, 10])) == 10 * 11 // 2 + 4 * 10 + 2 * 3


def test_a_pass_moves_the_bytes_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a model's are more than the memory that is passed over."""
    monkeypatch.setattr(bare.OnePass, "_LARGEST", 100)
    n = 1000
    one_pass = bare.OnePass(n)
    assert 2 * 4 * sum(one_pass._passes) == n * bare.OnePass.BYTES
    assert one_pass._memory.numel() == 100
    one_pass()


def test_bare_products_count_as_the_step_does() -> None:
    """Six operations for each weight and token that meet; the last block's query, projection and MLP meet rows."""
    config = config_for("pico")
    C, V = config.n_embd, config.vocab_size
    T, R = 11, 3
    full, last = 12 * C * C * T, 2 * C * C * T + 10 * C * C * R
    assert bare.BareProducts(config, 16, 4, torch.float32)(T, R) == 6 * (full + last + V * C * R)


def test_initial_weights_are_the_same_every_time() -> None:
    config = config_for("pico")
    a, b = (shared.initial_weight("h.0.mlp.c_proj.weight", config) for _ in range(2))
    assert torch.equal(a, b)
    assert a.std().item() == pytest.approx(0.02 / 2, rel=0.05)  # pico has two layers: sqrt(2 L) = 2


class Benchmark:
    """pytest-benchmark's fixture, as far as the suites use it: it calls once."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def __call__(self, function: Any, *args: Any) -> Any:
        return function(*args)

    def pedantic(self, function: Any, **_: Any) -> Any:
        return function()


def test_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_batching, bench_plan, bench_train_step

    monkeypatch.delenv("FASTFT_BOOK_DATA", raising=False)
    for batching in bench_train_step.BATCHINGS:
        bench_train_step.bench_train_step(Benchmark(), "pico", "cpu", batching, "fp32")
        bench_batching.bench_batching(Benchmark(), batching, 8)
    encoded = sharing.made_examples(130, 30, 6)
    for bucketed in (False, True):
        bench_plan.bench_plan_epoch(Benchmark(), encoded, bucketed)
    bench_plan.bench_plan_one_step(Benchmark(), encoded)
    bench_plan.bench_plan_resume(Benchmark(), encoded)
