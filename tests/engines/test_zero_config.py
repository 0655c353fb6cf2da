"""DeepSpeed's file: it agrees with the options or is refused, and DeepSpeed takes what is made of it."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.common.errors import UserError
from fastft.engines import choose
from fastft.engines.choose import make_engine
from fastft.engines.optim import BETAS, EPSILON
from fastft.engines.zero_config import AUTO, STAGES, ZeroConfig, read_zero_config, settings_for_deepspeed
from fastft.model.names import DType
from fastft.ranks.world import ALONE
from fastft.run.config import TrainOptions
from fastft.training.models import initial_model

LAUNCH = Path(__file__).parents[2] / "launch"
FILES = sorted(LAUNCH.glob("*.json"))
SHIPPED = {path.stem: json.loads(path.read_text()) for path in FILES}
DEFAULTS = TrainOptions()

of_every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def read(raw: object, options: TrainOptions = DEFAULTS, ranks: int = 1) -> ZeroConfig:
    """What is read of a file with this content, or text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zero.json"
        path.write_text(raw if isinstance(raw, str) else json.dumps(raw), encoding="utf-8")
        return read_zero_config(path, options, ranks)


def refusal(raw: object, options: TrainOptions = DEFAULTS, ranks: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        read(raw, options, ranks)
    message = str(caught.value)
    assert "zero.json" in message
    assert "\n" not in message
    return message


def changed(change: Callable[[dict[str, Any]], object], name: str = "zero2") -> dict[str, Any]:
    """A shipped file with a change."""
    raw = copy.deepcopy(SHIPPED[name])
    change(raw)
    return raw


def section(name: str, **values: Any) -> dict[str, Any]:
    """A shipped file with some values of a section."""
    return changed(lambda raw: raw.setdefault(name, {}).update(values))


def params(**values: Any) -> dict[str, Any]:
    """A shipped file with some of the optimizer's values."""
    return changed(lambda raw: raw["optimizer"]["params"].update(values))


def leaves(value: object) -> list[object]:
    """All values of nested objects and lists."""
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in leaves(one)]
    return [leaf for one in value for leaf in leaves(one)] if isinstance(value, list) else [value]


def test_the_files_are_those_of_the_stages_and_of_offload() -> None:
    assert set(SHIPPED) == {"zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"}


@of_every_file
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shipped_files_agree_with_the_defaults(path: Path, ranks: int) -> None:
    config = read_zero_config(path, DEFAULTS, ranks)
    assert config.stage == int(path.stem.removeprefix("zero")[0])
    assert config.offloads == ("offload" in path.stem)
    assert config.dtype is None  # --dtype decides
    assert config.unused == []
    assert config.settings == SHIPPED[path.stem]


@of_every_file
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_auto_is_filled_in_with_what_the_options_say(path: Path, dtype: DType) -> None:
    options = TrainOptions(batch_size=16, accumulate=2, clip=0.5, dtype=dtype)
    config = read_zero_config(path, options, 4)
    settings = settings_for_deepspeed(config, options, dtype, 4)
    assert AUTO not in leaves(settings)
    assert (settings["bf16"]["enabled"], settings["fp16"]["enabled"]) == (dtype == "bf16", dtype == "fp16")
    assert settings["gradient_clipping"] == 0.5
    # DeepSpeed counts batches of equal size; the plan says where a step ends.
    assert settings["train_batch_size"] == 4
    assert settings["train_micro_batch_size_per_gpu"] == settings["gradient_accumulation_steps"] == 1
    assert "optimizer" not in settings  # fastft makes its own
    assert config.settings == SHIPPED[path.stem]  # which is not changed


def test_what_else_a_file_says_is_passed_on() -> None:
    raw = section("zero_optimization", reduce_bucket_size=1234, sub_group_size=99, allgather_bucket_size=AUTO)
    raw |= {"wall_clock_breakdown": True, "steps_per_print": 5, "fp16": {"enabled": AUTO, "initial_scale_power": 3}}
    got = settings_for_deepspeed(read(raw), DEFAULTS, "fp16", 1)
    assert got["zero_optimization"]["reduce_bucket_size"] == 1234
    assert got["zero_optimization"]["sub_group_size"] == 99
    assert got["zero_optimization"]["allgather_bucket_size"] == 50_000_000
    assert got["zero_optimization"]["stage"] == 2
    assert got["wall_clock_breakdown"] is True
    assert got["steps_per_print"] == 5
    assert got["fp16"] == {"enabled": True, "initial_scale_power": 3}
    assert settings_for_deepspeed(read(SHIPPED["zero2"]), DEFAULTS, "fp32", 1)["steps_per_print"] > 10**9  # never


def test_a_step_in_bf16_is_left_out_as_in_every_arithmetic() -> None:
    raw = section("bf16", check_grad_overflow=False)
    assert settings_for_deepspeed(read(raw), DEFAULTS, "bf16", 1)["bf16"]["check_grad_overflow"] is True


def test_gradients_are_summed_in_float32_unless_a_file_says_otherwise() -> None:
    def kind(raw: object) -> object:
        return settings_for_deepspeed(read(raw), DEFAULTS, "bf16", 1)["data_types"]

    assert kind(SHIPPED["zero2"]) == {"grad_accum_dtype": "fp32"}
    assert kind(section("data_types", grad_accum_dtype="bf16")) == {"grad_accum_dtype": "bf16"}


@pytest.fixture
def deepspeeds_own(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any], int], Any]:
    """DeepSpeed's class, which asks how many ranks there are."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("DS_LOG_LEVEL", "error")
    config = pytest.importorskip("deepspeed.runtime.config", reason="DeepSpeed is installed on Linux alone")

    def own(settings: dict[str, Any], ranks: int) -> Any:
        monkeypatch.setattr(config.dist, "get_rank", lambda: 0)
        monkeypatch.setattr(config.dist, "get_world_size", lambda: ranks)
        return config.DeepSpeedConfig(settings)

    return own


@of_every_file
def test_deepspeed_accepts_what_is_made_of_a_file(
    path: Path, deepspeeds_own: Callable[[dict[str, Any], int], Any]
) -> None:
    options = TrainOptions(clip=0.25)
    dtypes: list[DType] = ["fp32", "bf16", "fp16"]
    for ranks in (1, 2, 4):
        config = read_zero_config(path, options, ranks)
        for dtype in dtypes:
            got = deepspeeds_own(settings_for_deepspeed(config, options, dtype, ranks), ranks)
            assert got.zero_config.stage == config.stage
            assert (got.bfloat16_config.enabled, got.float16_config.enabled) == (dtype == "bf16", dtype == "fp16")
            assert got.gradient_clipping == 0.25
            assert got.gradient_accumulation_steps == 1
            assert got.grad_accum_dtype == "fp32"
            assert got.optimizer_name is None
            offloaded = [got.zero_config.offload_optimizer, got.zero_config.offload_param]
            assert any(one is not None for one in offloaded) == config.offloads
            # Not DeepSpeed's own, which it takes for "auto" without a word.
            assert got.zero_config.reduce_bucket_size == got.zero_config.prefetch_bucket_size == 50_000_000


def test_deepspeed_refuses_what_is_unknown_to_it_or_does_not_fit(
    deepspeeds_own: Callable[[dict[str, Any], int], Any],
) -> None:
    """So that its accepting the others means something."""
    good = settings_for_deepspeed(read(SHIPPED["zero2"], ranks=2), DEFAULTS, "fp32", 2)
    deepspeeds_own(good, 2)
    for wrong in (
        {**good, "zero_optimization": {**good["zero_optimization"], "reduce_buckets": 1}},
        {**good, "zero_optimization": {**good["zero_optimization"], "reduce_bucket_size": "many"}},
        {**good, "bf16": {"enabled": "maybe"}},
    ):
        with pytest.raises(ValueError, match="validation error"):
            deepspeeds_own(wrong, 2)
    with pytest.raises(AssertionError, match="train_batch_size"):
        deepspeeds_own(good, 4)


DISAGREEING: dict[str, tuple[dict[str, Any], dict[str, Any], int, tuple[str, ...]]] = {
    "batch": ({**SHIPPED["zero1"], "train_batch_size": 16}, {}, 1, ("train_batch_size 16", "--batch_size 8")),
    "micro batch of one rank": (
        {**SHIPPED["zero1"], "train_micro_batch_size_per_gpu": 4}, {}, 1,
        ("train_micro_batch_size_per_gpu 4", "--batch_size 8", "1 ranks", "--accumulate 1", " 8,"),
    ),
    "micro batch of two ranks, accumulated": (
        {**SHIPPED["zero1"], "train_micro_batch_size_per_gpu": 8}, {"batch_size": 32, "accumulate": 4}, 2,
        ("train_micro_batch_size_per_gpu 8", "--batch_size 32", "2 ranks", "--accumulate 4", " 4,"),
    ),
    "micro batch that is no whole number": (
        {**SHIPPED["zero1"], "train_micro_batch_size_per_gpu": 2}, {}, 3, ("_per_gpu 2", "--batch_size 8", "2.66667"),
    ),
    "accumulation": (
        {**SHIPPED["zero1"], "gradient_accumulation_steps": 2}, {"accumulate": 4}, 1,
        ("gradient_accumulation_steps 2", "--accumulate 4"),
    ),
    "clipping": ({**SHIPPED["zero1"], "gradient_clipping": 0.0}, {}, 1, ("gradient_clipping 0.0", "--clip 1.0")),
    "no clipping here": (
        {**SHIPPED["zero1"], "gradient_clipping": 1.0}, {"clip": 0.0}, 1, ("gradient_clipping 1.0", "--clip 0.0"),
    ),
    "rate": (params(lr=1e-4), {}, 1, ("optimizer.params.lr 0.0001", "5e-05")),
    "rate here": (params(lr=5e-5), {"lr": 1e-3}, 1, ("optimizer.params.lr 5e-05", "0.001")),
    "decay": (params(weight_decay=0.01), {}, 1, ("optimizer.params.weight_decay 0.01", "0.1")),
    "betas": (params(betas=[0.9, 0.95]), {}, 1, ("optimizer.params.betas [0.9, 0.95]", "[0.9, 0.999]")),
    "epsilon": (params(eps=1e-6), {}, 1, ("optimizer.params.eps 1e-06", "1e-08")),
    "an unknown setting of the optimizer": (params(amsgrad=True), {}, 1, ("optimizer.params.amsgrad", "AdamW")),
    "optimizer": (section("optimizer", type="Lamb"), {}, 1, ("optimizer Lamb", "AdamW here")),
    "bf16 against fp32": (section("bf16", enabled=True), {"dtype": "fp32"}, 1, ("bf16 enabled", "--dtype fp32")),
    "bf16 against fp16": (section("bf16", enabled=True), {"dtype": "fp16"}, 1, ("bf16 enabled", "--dtype fp16")),
    "fp16 against bf16": (section("fp16", enabled=True), {"dtype": "bf16"}, 1, ("fp16 enabled", "--dtype bf16")),
    "fp16 against fp64": (section("fp16", enabled=True), {"dtype": "fp64"}, 1, ("fp16 enabled", "--dtype fp64")),
    "bf16 off": (section("bf16", enabled=False), {"dtype": "bf16"}, 1, ("bf16 switched off", "--dtype bf16")),
    "fp16 off": (section("fp16", enabled=False), {"dtype": "fp16"}, 1, ("fp16 switched off", "--dtype fp16")),
}  # fmt: skip


@pytest.mark.parametrize("name", DISAGREEING)
def test_what_disagrees_is_refused_with_both_values(name: str) -> None:
    raw, options, ranks, words = DISAGREEING[name]
    message = refusal(raw, TrainOptions(**options), ranks)
    assert [word for word in words if word not in message] == [], message
    assert "there" in message
    assert "auto" in message  # the remedy


def test_all_that_disagrees_is_named_at_once() -> None:
    raw = params(lr=1.0, eps=1.0)
    message = refusal({**raw, "train_batch_size": 3, "gradient_clipping": 9})
    found = [word for word in ("lr 1.0", "eps 1.0", "batch_size 3", "clipping 9", "weight_decay") if word in message]
    assert found == ["lr 1.0", "eps 1.0", "batch_size 3", "clipping 9"]


def stated(options: TrainOptions, ranks: int) -> dict[str, Any]:
    """A file that says what the options say."""
    micro = options.batch_size / (options.accumulate * ranks)
    return {
        "train_batch_size": options.batch_size,
        "train_micro_batch_size_per_gpu": int(micro) if micro == int(micro) else AUTO,
        "gradient_accumulation_steps": options.accumulate,
        "gradient_clipping": options.clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": options.lr, "weight_decay": options.weight_decay, "betas": list(BETAS), "eps": EPSILON,
            },
        },
        "zero_optimization": {"stage": 1},
    }  # fmt: skip


POSITIVE = st.floats(1e-9, 1e3)
OPTIONS = st.builds(
    TrainOptions,
    batch_size=st.integers(1, 512),
    accumulate=st.integers(1, 8),
    clip=POSITIVE | st.just(0.0),
    lr=POSITIVE,
    weight_decay=POSITIVE | st.just(0.0),
)
PLACES = [
    ("train_batch_size",), ("train_micro_batch_size_per_gpu",), ("gradient_accumulation_steps",),
    ("gradient_clipping",), *(("optimizer", "params", name) for name in ("lr", "weight_decay", "eps")),
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(OPTIONS, st.integers(1, 8), st.sampled_from(PLACES), st.floats(1e-3, 1.0))
def test_a_file_that_says_the_same_is_taken_and_one_that_does_not_is_not(
    options: TrainOptions, ranks: int, place: tuple[str, ...], more: float
) -> None:
    raw = stated(options, ranks)
    assert read(raw, options, ranks).stage == 1

    *folders, name = place
    holder = raw
    for one in folders:
        holder = holder[one]
    there = holder[name]
    holder[name] = 1_000_000 if there == AUTO else there + (more if isinstance(there, float) else 1)
    message = refusal(raw, options, ranks)
    assert f"{'.'.join(place)} {holder[name]} there" in message
    if folders:
        assert f"{there} here" in message


@pytest.mark.parametrize(
    ("bf16", "fp16", "dtype", "expected"),
    [
        ({"enabled": True}, {"enabled": False}, "auto", "bf16"),
        ({"enabled": True}, {"enabled": "auto"}, "bf16", "bf16"),
        ({"enabled": False}, {"enabled": True}, "auto", "fp16"),
        ({"enabled": "auto"}, {"enabled": True}, "fp16", "fp16"),
        ({"enabled": False}, {"enabled": False}, "fp32", None),
        ({"enabled": "auto"}, {"enabled": "auto"}, "fp16", None),
        ({}, {}, "bf16", None),
        (None, None, "bf16", None),
    ],
)
def test_the_arithmetic_that_a_file_asks_for(bf16: Any, fp16: Any, dtype: str, expected: str | None) -> None:
    raw = {"zero_optimization": {"stage": 1}, "bf16": bf16, "fp16": fp16}
    raw = {name: value for name, value in raw.items() if value is not None}
    assert read(raw, TrainOptions(dtype=dtype)).dtype == expected


@pytest.mark.parametrize("enabled", ["true", 1, None, [], {}])
def test_an_arithmetic_is_switched_on_or_off_or_left_open(enabled: Any) -> None:
    message = refusal({"zero_optimization": {"stage": 1}, "bf16": {"enabled": enabled}})
    assert f"got {json.dumps(enabled)} as bf16.enabled, expected true, false or auto" in message


@pytest.mark.parametrize("name", ["bf16", "fp16", "optimizer", "data_types"])
@pytest.mark.parametrize("value", [True, "AdamW", [1], None])
def test_sections_that_are_none_are_refused(name: str, value: Any) -> None:
    message = refusal({"zero_optimization": {"stage": 1}, name: value})
    assert f"got {json.dumps(value)} as {name}, expected an object" in message


def test_what_auto_takes_is_held_against_what_a_file_switches_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read({"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}, "fp16": {"enabled": AUTO}})
    for dtype in ("fp32", "fp16"):
        config.check_dtype(dtype)
    with pytest.raises(UserError, match="bf16 switched off there, which --dtype auto takes"):
        config.check_dtype("bf16")

    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}}))
    options = TrainOptions(model="pico", device="cpu", deepspeed_config=path)
    monkeypatch.setattr(choose, "choose_dtype", lambda *_: "bf16")  # a machine that does it fast
    with pytest.raises(UserError, match="bf16 switched off there"):
        make_engine(initial_model(options), options, ALONE)


def test_two_arithmetics_are_refused() -> None:
    raw = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "fp16": {"enabled": True}}
    assert "got bf16 and fp16 enabled, expected at most one" in refusal(raw)


NOT_DEEPSPEEDS = {
    "scheduler": "--schedule and --warmup",
    "amp": "--dtype",
    "torch_autocast": "--dtype",
    "data_efficiency": "plan",
    "curriculum_learning": "plan",
    "compression_training": "reference",
    "progressive_layer_drop": "reference",
    "checkpoint": "fastft writes",
    "gradient_allreduce_op": "one sum",
    "managed_gradient_accumulation": "plan",
    "activation_checkpointing": "--activation_checkpointing",
    "sequence_parallel_size": "whole examples",
    "tensor_parallel": "whole matrices",
    "expert_parallel": "no experts",
    "bfloat16": "bf16",
}


@pytest.mark.parametrize("name", NOT_DEEPSPEEDS)
@pytest.mark.parametrize("stage", STAGES)
def test_sections_that_are_not_deepspeeds_affair_are_refused(name: str, stage: int) -> None:
    message = refusal({"zero_optimization": {"stage": stage}, name: {"enabled": False}})
    assert f"a section {name}" in message
    assert NOT_DEEPSPEEDS[name] in message
    assert "remove it" in message


UNREADABLE: dict[str, tuple[object, tuple[str, ...]]] = {
    "not JSON": ("{,", ("not JSON", "line 1")),
    "empty": ("", ("not JSON",)),
    "a list": ([{"zero_optimization": {"stage": 1}}], ("got an array", "expected an object")),
    "a number": (3, ("got a number", "expected an object")),
    "no stage": ({"zero_optimization": {"overlap_comm": True}}, ("zero_optimization", '"stage": 0, 1, 2 or 3')),
    "nothing of ZeRO": ({}, ("got null as zero_optimization", '"stage": 0, 1, 2 or 3', "launch/")),
    "a stage alone": ({"zero_optimization": 2}, ("got 2 as zero_optimization", '"stage": 0, 1, 2 or 3')),
    "a stage that is not there": ({"zero_optimization": {"stage": 4}}, ('{"stage": 4}', "0, 1, 2 or 3")),
    "a stage that is equal to 1": ({"zero_optimization": {"stage": True}}, ('{"stage": true}', "0, 1, 2 or 3")),
    "a stage with a fraction": ({"zero_optimization": {"stage": 2.0}}, ('{"stage": 2.0}', "0, 1, 2 or 3")),
    "nested too deeply": ("[" * 100_000, ("not JSON",)),
    "a name given twice": (
        '{"zero_optimization": {"stage": 1}, "gradient_clipping": 0, "gradient_clipping": 1.0}',
        ("gradient_clipping is given more than once",),
    ),
    "a stage in words": ({"zero_optimization": {"stage": "two"}}, ('{"stage": "two"}', "0, 1, 2 or 3")),
    "a stage left open": ({"zero_optimization": {"stage": "auto"}}, ('{"stage": "auto"}', "0, 1, 2 or 3")),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_say_nothing_are_refused(name: str) -> None:
    raw, words = UNREADABLE[name]
    message = refusal(raw)
    assert [word for word in words if word not in message] == [], message


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            read_zero_config(path, DEFAULTS, 1)
        return str(caught.value)

    missing = message(tmp_path / "zero9.json")
    assert f"--deepspeed_config {tmp_path / 'zero9.json'} is not there" in missing
    assert "launch/zero0.json to zero3.json" in missing
    assert message(tmp_path).startswith(f"cannot read --deepspeed_config {tmp_path}: ")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xff"}')
    assert "is not JSON" in message(tmp_path / "latin.json")


def test_what_stage_0_does_not_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {**SHIPPED["zero0"], "flops_profiler": {"enabled": True}, "aio": {"thread_count": 1}}
    assert read(raw).unused == ["aio", "flops_profiler"]
    assert read({**raw, "zero_optimization": {"stage": 1}}).unused == []

    path = tmp_path / "zero.json"
    options = TrainOptions(model="pico", device="cpu", deepspeed_config=path)
    told: list[str] = []
    monkeypatch.setattr("fastft.engines.choose.warn", told.append)
    for content in (raw, SHIPPED["zero0"]):
        path.write_text(json.dumps(content))
        make_engine(initial_model(options), options, ALONE)
    assert told == [f"{path}: stage 0 trains without DeepSpeed, and does not read aio, flops_profiler"]
