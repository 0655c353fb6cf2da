"""Training a part of a model: one curve on any ranks and stages, resumed bit for bit, and no checkpoint for another.

Ranks are forks of a warm process, as in `test_ranks.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Ended, Launcher
from runs import arguments, farthest, metrics, relative, settings, write_records

import fastft
from fastft.common.errors import UserError
from fastft.model.part import Part, saved
from fastft.training.checkpoint import MODEL, MOMENTS, load_tensors
from fastft.training.models import initial_model, result

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks of a warm process")

PART = {"lora_r": 4, "lora_dora": True, "template": "chatml", "lr": 1e-2, "steps": 8}
"""Adapters whose magnitudes are learned too, and the rows of the template's two new tokens."""
LIMIT = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("part")
    write_records(folder / "records.json")
    return folder


@pytest.fixture(scope="module")
def base(folder: Path, launcher: Launcher) -> Path:
    """What runs start from: a run of no steps."""
    run = folder / "base"
    launcher.run_ranks(["train", *arguments(settings(folder / "records.json", run, steps=0))], 1)
    return run


Train = Callable[..., list[Ended]]


@pytest.fixture(scope="module")
def train(folder: Path, launcher: Launcher, base: Path) -> Train:
    def train(run: Path, zero: str = "plain", ranks: int = 1, *, status: int = 0, **options: Any) -> list[Ended]:
        given = {**PART, "weights": base, "samples": 1, "eval_every": 4, **options}
        values = {name: value for name, value in given.items() if value is not None}
        ended = launcher.run_ranks(["train", *arguments(settings(folder / "records.json", run, zero, **values))], ranks)
        assert [one.exit for one in ended] == [status] * ranks, "\n---\n".join(one.said for one in ended)
        return ended

    return train


@pytest.fixture(scope="module")
def alone(folder: Path, train: Train) -> Path:
    """One process's run."""
    run = folder / "alone"
    train(run)
    return run


def held(run: Path, step: int = 8) -> dict[str, torch.Tensor]:
    return load_tensors(run / f"checkpoints/step-{step}" / MODEL)


def figures(run: Path, key: str) -> list[float]:
    return [line[key] for line in metrics(run) if key in line]


def assert_one_curve(run: Path, expected: Path) -> None:
    for key in ("loss", "grad_norm", "val_loss"):
        assert farthest(figures(run, key), figures(expected, key)) < LIMIT, key
    ours, theirs = held(run), held(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert relative(ours[name], tensor) < 20 * LIMIT, name  # of what eight steps of AdamW at 1e-2 have moved


def assert_same(run: Path, expected: Path) -> None:
    for file in (MODEL, MOMENTS):
        ours, theirs = (load_tensors(one / "checkpoints/step-8" / file) for one in (run, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert figures(run, "loss") == figures(expected, "loss")


def test_adapters_learn_and_are_all_that_is_held(alone: Path, base: Path) -> None:
    losses = figures(alone, "loss")
    assert losses[-1] < losses[0] - 0.1
    names = set(held(alone))
    assert {name.rpartition(".")[2] for name in names} == {"lora_A", "lora_B", "lora_magnitude_vector", "wte"}
    assert {name for name in names if "lora_" not in name} == {"new_rows.wte"}
    assert len(names) == 2 * 4 * 3 + 1
    assert {name.rpartition("/")[0] for name in load_tensors(alone / "checkpoints/step-8" / MOMENTS)} == names
    size = (alone / "checkpoints/step-8" / MODEL).stat().st_size
    assert size < 0.02 * (base / "model/model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("zero", "ranks", "options"),
    [
        ("zero2", 2, {}),
        ("zero3", 2, {"activation_checkpointing": True}),
        # Without new rows nothing below the lowest block that learns asks for a gradient.
        ("zero3", 2, {"template": "alpaca"}),
        pytest.param("zero3", 2, {"template": "alpaca", "lora_layers": "1"}, marks=pytest.mark.long),
        pytest.param("zero2", 2, {"template": "alpaca", "lora_layers": "1", "accumulate": 4}, marks=pytest.mark.long),
        *(
            pytest.param(zero, ranks, {"accumulate": accumulate, **options}, marks=pytest.mark.long)
            for zero in ("plain", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
            for ranks in (1, 2)
            for accumulate in (1, 4)
            for options in ({}, {"activation_checkpointing": True})
        ),
    ],
)
def test_ranks_and_stages_are_one_curve(
    train: Train, alone: Path, tmp_path: Path, zero: str, ranks: int, options: dict[str, Any]
) -> None:
    train(tmp_path / "run", zero, ranks, **options)
    changed = {name: options[name] for name in ("template", "lora_layers") if name in options}
    if changed:
        train(tmp_path / "alone", **changed)
    assert_one_curve(tmp_path / "run", tmp_path / "alone" if changed else alone)


@pytest.mark.parametrize(
    ("zero", "ranks"),
    [("plain", 1), ("zero2", 2), *(pytest.param(f"zero{n}", 2, marks=pytest.mark.long) for n in (1, 3))],
)
def test_stopped_and_resumed_it_is_the_same(train: Train, tmp_path: Path, zero: str, ranks: int) -> None:
    train(tmp_path / "whole", zero, ranks, save_every=4, whole_every=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for later in (tmp_path / "resumed/checkpoints").glob("*-8"):
        shutil.rmtree(later)
    shutil.rmtree(tmp_path / "resumed/model")
    train(tmp_path / "resumed", zero, ranks, save_every=4, whole_every=4, resume=True)
    assert_same(tmp_path / "resumed", tmp_path / "whole")


def test_checkpoints_in_shards_hold_no_base(train: Train, base: Path, tmp_path: Path) -> None:
    """And a run goes on from them, on stage 3 too."""
    train(tmp_path / "whole", "zero3", 2, save_every=4, keep=9)
    shards = tmp_path / "whole/checkpoints/shards-4"
    written = sum(file.stat().st_size for file in shards.rglob("*") if file.is_file())
    assert written < 0.2 * (base / "model/model.safetensors").stat().st_size
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step-8")
    shutil.rmtree(tmp_path / "resumed/model")
    train(tmp_path / "resumed", "zero3", 2, save_every=4, keep=9, resume=True)
    assert_same(tmp_path / "resumed", tmp_path / "whole")


def test_a_checkpoint_of_another_part_or_base_is_refused(
    train: Train, alone: Path, base: Path, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    (said,) = train(run, resume=True, lora_r=5, status=2)
    assert "lora_r: 4 then, 5 now" in said.said
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("lora_r: 4", "lora_r: null"))
    full = dict.fromkeys(("lora_r",)) | {"lora_dora": False}
    config = (run / "config.yaml").read_text().replace("lora_dora: true", "lora_dora: false")
    (run / "config.yaml").write_text(config)
    (said,) = train(run, resume=True, status=2, **full)
    assert "holds adapters (rank 4), and this run trains all weights" in said.said

    # The same shape, other weights: what was learned beside the others would be nothing beside these.
    other = tmp_path / "base"
    shutil.copytree(base, other)
    file = other / "model/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    run = tmp_path / "other"
    shutil.copytree(alone, run)
    state = json.loads((run / "checkpoints/step-8/state.json").read_text())
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(base), str(other)))
    (said,) = train(run, resume=True, weights=other, status=2)
    assert f"expected {state['part']['base_sha256']}" in said.said


def test_a_part_of_random_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    options = settings(folder / "records.json", tmp_path / "run", lora_r=2)
    with pytest.raises(UserError, match="random weights"):
        fastft.train(fastft.TrainOptions(**options))
    assert not (tmp_path / "run").exists()


def test_train_only_trains_what_it_names(train: Train, base: Path, tmp_path: Path) -> None:
    """In bf16, where the rest is rounded in memory: what is written has it as the base has."""
    run = tmp_path / "run"
    train(run, lora_r=None, lora_dora=False, template="alpaca", train_only="h.1,ln_f", dtype="bf16")
    ours, theirs = (dict(fastft.load(one / "model").named_parameters()) for one in (run, base))
    moved = {name for name, weight in ours.items() if not torch.equal(weight, theirs[name])}
    assert moved == set(held(run)) == {name for name in ours if name.startswith(("h.1.", "ln_f."))}


def test_a_base_that_changed_meanwhile_is_in_no_result(base: Path, folder: Path, tmp_path: Path) -> None:
    """Of a model whose other weights stay, the file is read again in the end."""
    other = tmp_path / "base"
    shutil.copytree(base, other)
    given = settings(folder / "records.json", tmp_path / "run", weights=str(other), train_only="ln_f")
    options = fastft.TrainOptions(**given)
    model = initial_model(options)
    weights = {name: weight.detach() for name, weight in saved(model).items()}
    result(options, model, weights)
    file = other / "model/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="has changed while the run"):
        result(options, model, weights)


def test_no_run_removes_the_weights_it_starts_from(base: Path, folder: Path, tmp_path: Path) -> None:
    """Nor the base of its base: the model was gone before it was read again."""
    below, above = shutil.copytree(base, tmp_path / "below"), shutil.copytree(base, tmp_path / "above")
    options = fastft.TrainOptions(**settings(folder / "records.json", below, weights=str(below), overwrite=True))
    before = sorted(below.rglob("*"))
    with pytest.raises(UserError, match=r"would remove .*below/model/model.safetensors"):
        fastft.train(options)
    state = above / "checkpoints/step-0/state.json"
    part = Part(lora=None, train_only="ln_f", new_rows=None, base_sha256="").as_json()
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"part": part}))
    for name in (MODEL, "DONE"):
        state.with_name(name).touch()
    (above / "config.yaml").write_text((above / "config.yaml").read_text() + f"\nweights: {below}\n")
    with pytest.raises(UserError, match=r"would remove .*below/model/model.safetensors"):
        fastft.train(replace(options, weights=str(state.parent)))
    assert sorted(below.rglob("*")) == before
