from __future__ import annotations

import errno
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastft_kernels.cpu import library
from safetensors.torch import load_file

from fastft.batches.batch import Batch, padded_batch
from fastft.common.errors import UserError
from fastft.common.files import identity
from fastft.engines.engine import Engine
from fastft.model.gpt2 import GPT2, GPT2Config
from fastft.model.names import DType
from fastft.run.config import TrainOptions
from fastft.training import checkpoint
from fastft.training.checkpoint import (
    Progress,
    load_best,
    load_checkpoint,
    newest_whole,
    prune,
    save_best,
    save_checkpoint,
)

SHAPE = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_ctx=16, vocab_size=64)


def engine(dtype: DType = "fp32", *, seed: int = 0) -> Engine:
    torch.manual_seed(seed)
    return Engine(GPT2(SHAPE), TrainOptions(device="cpu", dtype=dtype, lr=1e-2))


def batch(seed: int) -> Batch:
    ids = np.random.default_rng(seed).integers(0, SHAPE.vocab_size, (2, 9)).astype(np.int32)
    return padded_batch(list(ids), [3, 5])


def do_steps(engine: Engine, *seeds: int) -> None:
    for seed in seeds:
        loss, _ = engine.accumulate(batch(seed), batch(seed).count)
        assert engine.update(1e-2, loss)().applied


def overflow(engine: Engine) -> None:
    """A step whose gradient is infinite."""
    loss, _ = engine.accumulate(batch(0), batch(0).count)
    for gradient in engine.gradients():
        gradient.fill_(float("inf"))
    assert not engine.update(1e-2, loss)().applied


def state(engine: Engine) -> dict[str, Any]:
    """Every bit that a step depends on."""
    weights = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    moments = {
        (name, key): value.clone()
        for name, p in engine.model.named_parameters()
        for key, value in engine.optimizer.state[p].items()
    }
    return {**weights, **moments, "scaler": engine.scaler.state_dict(), "random": torch.get_rng_state()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, torch.Tensor) else bool(x == y)

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16", "fp16"])
def test_an_engine_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path, dtype: DType) -> None:
    saved = engine(dtype)
    do_steps(saved, 1, 2)
    overflow(saved)
    do_steps(saved, 3)
    torch.rand(5)
    progress = Progress(
        step=4,
        skipped=1,
        tokens_seen=64,
        best_val_loss=0.1 + 0.2,
        best_step=2,
        evaluations_since_best=1,
        data_fingerprint="f",
    )
    save_checkpoint(tmp_path, saved, progress, keep=1)
    at_save = state(saved)

    loaded = engine(dtype, seed=99)
    assert not same(state(loaded), at_save)
    assert load_checkpoint(tmp_path / "step-4", loaded) == progress
    assert same(state(loaded), at_save)
    assert (loaded.scaler.get_scale() == 2.0**15) == (dtype == "fp16")
    do_steps(saved, 4, 5)
    do_steps(loaded, 4, 5)
    assert not same(state(loaded), at_save)
    assert same(state(loaded), state(saved))


def test_going_on_by_other_code_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a machine without a compiler: bits may differ."""
    monkeypatch.setattr(library, "why_not", lambda: None)
    saved = engine()
    save_checkpoint(tmp_path, saved, Progress(step=1), keep=1)
    load_checkpoint(tmp_path / "step-1", saved)
    assert "bits may differ" not in capsys.readouterr().err
    monkeypatch.setattr(library, "why_not", lambda: "there is no C compiler")
    load_checkpoint(tmp_path / "step-1", saved)
    said = " ".join(capsys.readouterr().err.split())
    assert "computed by compiled code, and here it goes on by torch (there is no C compiler)" in said
    assert "bits may differ" in said


def test_a_checkpoint_without_loss_scale_suits_a_run_with_one(tmp_path: Path) -> None:
    """`--dtype auto` is fp32 on one machine and fp16 on another."""
    saved, loaded = engine("fp32"), engine("fp16")
    do_steps(saved, 1)
    save_checkpoint(tmp_path, saved, Progress(step=1), keep=1)
    load_checkpoint(tmp_path / "step-1", loaded)
    assert loaded.scaler.get_scale() == 2.0**16


def test_nothing_is_pickled(tmp_path: Path) -> None:
    saved = engine("fp16")
    do_steps(saved, 1)
    save_checkpoint(tmp_path, saved, Progress(step=1, best_val_loss=2.0), keep=1)
    save_best(tmp_path, saved, Progress(step=1, best_val_loss=2.0, best_step=1))
    assert names(tmp_path / "step-1") == {
        "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "DONE",
    }  # fmt: skip
    assert names(tmp_path / "best-1") == {"model.safetensors", "state.json", "DONE"}
    for path in tmp_path.glob("*/*"):
        if path.suffix == ".safetensors":
            assert load_file(path)
        else:
            assert json.loads(path.read_text())


def test_the_newest_are_kept_and_the_best_beside_them(tmp_path: Path) -> None:
    saved = engine()
    for step in (1, 2, 9, 10, 11):  # by number, not by name
        if step in (1, 2):
            save_best(tmp_path, saved, Progress(step=step, best_step=step))
        save_checkpoint(tmp_path, saved, Progress(step=step, best_step=min(step, 2)), keep=2)
    assert names(tmp_path) == {"best-2", "step-10", "step-11"}
    assert newest_whole(tmp_path) == tmp_path / "step-11"
    assert newest_whole(tmp_path / "none") is None


def test_a_torn_checkpoint_pushes_no_whole_one_out(tmp_path: Path) -> None:
    """A run that goes on from an older checkpoint keeps what it saves, though the torn one bears a higher number."""
    saved = engine()
    for step in (20, 24):
        save_checkpoint(tmp_path, saved, Progress(step=step, best_step=step), keep=2)
        save_best(tmp_path, saved, Progress(step=step, best_step=step))
    (tmp_path / "step-24/DONE").unlink()
    assert newest_whole(tmp_path) == tmp_path / "step-20"
    save_checkpoint(tmp_path, saved, Progress(step=21, best_step=20), keep=1)
    save_best(tmp_path, saved, Progress(step=21, best_step=21))
    assert names(tmp_path) == {"step-21", "best-20", "best-21"}
    save_checkpoint(tmp_path, saved, Progress(step=22, best_step=21), keep=1)
    assert names(tmp_path) == {"step-22", "best-21"}


def test_a_whole_checkpoint_of_the_same_step_is_left_alone_and_a_torn_one_replaced(tmp_path: Path) -> None:
    saved = engine()
    save_checkpoint(tmp_path, saved, Progress(step=3), keep=1)
    before = (tmp_path / "step-3/model.safetensors").stat()
    save_checkpoint(tmp_path, saved, Progress(step=3), keep=1)
    assert (tmp_path / "step-3/model.safetensors").stat() == before
    (tmp_path / "step-3/rng.safetensors").unlink()
    save_checkpoint(tmp_path, saved, Progress(step=3), keep=1)
    assert newest_whole(tmp_path) == tmp_path / "step-3"


def test_what_is_half_removed_does_not_look_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = engine()
    save_checkpoint(tmp_path, saved, Progress(step=1), keep=1)
    real_rmtree = checkpoint.shutil.rmtree

    def die(path: Path, **_: Any) -> None:
        if path.name == "step-1":
            raise KeyboardInterrupt
        real_rmtree(path, ignore_errors=True)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, saved, Progress(step=2), keep=1)
    assert names(tmp_path) == {"step-1", "step-2"}
    assert newest_whole(tmp_path) == tmp_path / "step-2"
    monkeypatch.undo()
    real_rmtree(tmp_path / "step-2")
    with pytest.raises(UserError, match=r"no whole checkpoint in .*step-1.*--overwrite"):
        newest_whole(tmp_path)


def test_shards_alone_are_for_those_who_wrote_them(tmp_path: Path) -> None:
    shards = tmp_path / "shards-4"
    shards.mkdir()
    (shards / "rng.safetensors").write_bytes(b"")
    (shards / "state.json").write_text(json.dumps({"ranks": 2, "stage": 1, "dtype": "fp32"}))
    (shards / "DONE").write_text(json.dumps({path.name: identity(path) for path in shards.iterdir()}))
    with pytest.raises(UserError, match=r"shards-4 are in shards\); go on as they were written, .* a file named save"):
        newest_whole(tmp_path, engine())
    assert shards.is_dir()


def test_any_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped bit anywhere in DONE, flipped bits and cuts in every other file, a missing file."""
    said: list[str] = []
    monkeypatch.setattr(checkpoint, "warn", said.append)
    saved = engine()
    do_steps(saved, 1)
    save_checkpoint(tmp_path, saved, Progress(step=1), keep=2)
    save_checkpoint(tmp_path, saved, Progress(step=2), keep=2)
    assert newest_whole(tmp_path) == tmp_path / "step-2"
    rng = random.Random(0)
    for path in sorted((tmp_path / "step-2").iterdir()):
        whole = path.read_bytes()
        positions = range(len(whole)) if path.name == "DONE" else rng.sample(range(len(whole)), 20)
        torn = [whole[:i] + bytes([whole[i] ^ 1 << rng.randrange(8)]) + whole[i + 1 :] for i in positions]
        for content in [*torn, whole[:-2], whole[: len(whole) // 2], b"", whole + b"\n}"]:
            path.write_bytes(content)
            said.clear()
            assert newest_whole(tmp_path) == tmp_path / "step-1", (path.name, content[:20])
            assert len(said) == 1
            assert "step-2 is passed over" in said[0]
        path.unlink()
        assert newest_whole(tmp_path) == tmp_path / "step-1"
        path.write_bytes(whole)
    assert newest_whole(tmp_path) == tmp_path / "step-2"


def test_the_best_weights_are_put_back(tmp_path: Path) -> None:
    saved = engine()
    assert not load_best(tmp_path, saved, Progress(step=7))
    assert not load_best(tmp_path, saved, Progress(step=7, best_step=7))
    do_steps(saved, 1)
    best = state(saved)
    save_best(tmp_path, saved, Progress(step=7, best_step=7))
    do_steps(saved, 2)
    assert load_best(tmp_path, saved, Progress(step=8, best_step=7))
    assert all(torch.equal(p, best[name]) for name, p in saved.model.named_parameters())


def test_the_best_weights_are_those_that_the_progress_names(tmp_path: Path) -> None:
    """A killed run has left a later best behind; the one that goes on is not that far, and may end before."""
    saved = engine()
    do_steps(saved, 1)
    named = state(saved)
    save_best(tmp_path, saved, Progress(step=4, best_step=4))
    save_checkpoint(tmp_path, saved, Progress(step=4, best_step=4), keep=1)
    do_steps(saved, 2)
    save_best(tmp_path, saved, Progress(step=9, best_step=9))
    assert names(tmp_path) == {"step-4", "best-4", "best-9"}  # the checkpoint names best-4
    progress = load_checkpoint(tmp_path / "step-4", saved)
    prune(tmp_path, progress, keep=1)
    assert names(tmp_path) == {"step-4", "best-4"}
    do_steps(saved, 3)
    assert load_best(tmp_path, saved, progress)
    assert all(torch.equal(p, named[name]) for name, p in saved.model.named_parameters())
    save_checkpoint(tmp_path, saved, Progress(step=12, best_step=12), keep=1)
    assert names(tmp_path) == {"step-12"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"best_step": 3}'])
def test_a_state_that_cannot_be_read_names_nothing(tmp_path: Path, text: str) -> None:
    saved = engine()
    save_best(tmp_path, saved, Progress(step=3, best_step=3))
    save_checkpoint(tmp_path, saved, Progress(step=4, best_step=3), keep=1)
    (tmp_path / "step-4/state.json").write_text(text)
    prune(tmp_path, Progress(step=4), keep=1)
    assert ("best-3" in names(tmp_path)) == ("3" in text)


def test_damaged_best_weights_are_passed_over_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(checkpoint, "warn", said.append)
    saved = engine()
    save_best(tmp_path, saved, Progress(step=7, best_step=7))
    os.truncate(tmp_path / "best-7/model.safetensors", 1000)
    assert not load_best(tmp_path, saved, Progress(step=8, best_step=7))
    assert len(said) == 1
    assert "best-7 are passed over: model.safetensors" in said[0]


def test_a_disk_that_is_full_at_any_moment_costs_no_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = engine()
    do_steps(saved, 1)
    calls = fail_at = 0
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save_checkpoint(tmp_path, saved, Progress(step=1), keep=1)
    moments = calls
    assert moments >= 6
    for fail_at in range(1, moments + 1):
        calls = 0
        with pytest.raises(UserError, match="No space left on device"):
            save_checkpoint(tmp_path, saved, Progress(step=1 + fail_at), keep=1)
        # The last call comes after the renaming.
        assert names(tmp_path) == ({"step-1"} if fail_at < moments else {"step-1", f"step-{1 + fail_at}"})
        assert load_checkpoint(tmp_path / "step-1", engine()).step == 1


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_a_file_that_cannot_be_written_whole_is_the_users_to_hear_of(tmp_path: Path, name: str) -> None:
    """The system itself refuses here, the moments' file too, which is not written by Python."""
    resource = pytest.importorskip("resource")
    saved = engine()
    do_steps(saved, 1)
    save_checkpoint(tmp_path, saved, Progress(step=1), keep=1)
    limit = (tmp_path / f"step-1/{name}.safetensors").stat().st_size - 100
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=f"cannot write .*{name}.safetensors.* free space"):
            save_checkpoint(tmp_path, saved, Progress(step=2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == {"step-1"}
    assert newest_whole(tmp_path) == tmp_path / "step-1"


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, engine(), Progress(step=1), keep=1)
    other = Engine(GPT2(replace(SHAPE, n_embd=32)), TrainOptions(device="cpu", dtype="fp32"))
    with pytest.raises(UserError, match=r"wte\.weight"):
        load_checkpoint(tmp_path / "step-1", other)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("model"), "got no model; another version of fastft wrote it"),
        (lambda state: state.pop("scaler"), "got no scaler; another version"),
        (lambda state: state.update(momentum=1), "got an unknown momentum; another version"),
    ],
)
def test_a_state_of_another_version_is_one_line(tmp_path: Path, change: Any, says: str) -> None:
    """A checkpoint that is whole, as its own version wrote it."""
    saved = engine()
    do_steps(saved, 1)
    save_checkpoint(tmp_path, saved, Progress(step=1), keep=2)
    path = tmp_path / "step-1"
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "DONE").read_text())
    (path / "DONE").write_text(json.dumps({**manifest, "state.json": identity(path / "state.json")}))
    assert newest_whole(tmp_path) == path
    before = [p.detach().clone() for p in saved.model.parameters()]
    with pytest.raises(UserError, match=says) as caught:
        load_checkpoint(path, saved)
    assert str(path / "state.json") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, saved.model.parameters(), strict=True))
