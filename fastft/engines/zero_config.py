"""DeepSpeed's configuration file, held against fastft's options: what both say must agree, and `auto` is filled in.

A file gives the ZeRO stage, offload, buckets and whatever else of DeepSpeed a user wants. The batch, the accumulation,
the rate, clipping and the arithmetic are fastft's: a file that says something else of them is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.common.errors import UserError
from fastft.common.kinds import kind_of
from fastft.engines.optim import BETAS, EPSILON
from fastft.model.names import DType
from fastft.run.config import TrainOptions

AUTO = "auto"
STAGES = (0, 1, 2, 3)
_OWN_SECTIONS = {
    "scheduler": "--schedule and --warmup say what the rate does",
    "amp": "--dtype says what the arithmetic is",
    "torch_autocast": "--dtype says what the arithmetic is",
    "data_efficiency": "fastft's plan says which examples form a step",
    "curriculum_learning": "fastft's plan says which examples form a step",
    "compression_training": "fastft trains what the reference trains",
    "progressive_layer_drop": "fastft trains what the reference trains",
    "checkpoint": "fastft writes DeepSpeed's files itself, whole and in the background",
    "gradient_allreduce_op": "a step's gradients are one sum over one count, and fastft takes DeepSpeed's mean apart",
    "managed_gradient_accumulation": "fastft's plan says where a step ends",
    "activation_checkpointing": "--activation_checkpointing says whether blocks are run again",
    "sequence_parallel_size": "each rank trains whole examples",
    "tensor_parallel": "each rank computes with whole matrices",
    "expert_parallel": "GPT-2 has no experts",
    "bfloat16": "its name is bf16",
}
_PLAIN_SECTIONS = {
    "zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "bf16", "fp16", "optimizer",
}  # fmt: skip


_OBJECTS = ("bf16", "fp16", "optimizer", "data_types")


@dataclass(frozen=True, slots=True)
class ZeroConfig:
    """A file that agrees with the options.

    Attributes:
        path: of the file.
        stage: 0 parts nothing, 1 the moments, 2 the gradients too, 3 the weights too.
        dtype: the arithmetic that the file asks for; None where it leaves it to `--dtype`.
        settings: the file's sections, `auto` not filled in yet.
    """

    path: Path
    stage: int
    dtype: DType | None
    settings: Mapping[str, Any]

    @property
    def offloads(self) -> bool:
        """Whether moments or weights lie in host memory."""
        zero = self.settings["zero_optimization"]
        devices = [_section(zero, name).get("device", "none") for name in ("offload_optimizer", "offload_param")]
        return any(device != "none" for device in devices)

    def check_dtype(self, dtype: DType) -> None:
        """Holds what `--dtype auto` means here against what the file switches off.

        Raises:
            UserError: the file switches it off.
        """
        if _section(self.settings, dtype).get("enabled") is False:
            raise UserError(
                f"{self.path}: got {dtype} switched off there, which --dtype auto takes on this machine; write auto in "
                "the file, or say another --dtype"
            )

    @property
    def unused(self) -> list[str]:
        """Sections that mean nothing to stage 0, which runs without DeepSpeed: there is nothing to part."""
        return sorted(set(self.settings) - _PLAIN_SECTIONS) if self.stage == 0 else []


def read_zero_config(path: Path, options: TrainOptions, world_size: int) -> ZeroConfig:
    """Reads a DeepSpeed file and holds it against the options.

    Raises:
        UserError: the file is missing or no JSON, names no stage, or says something else than the options.
    """
    raw = _json(path)
    zero = raw.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in STAGES or type(stage) is not int:  # JSON's true is equal to 1
        raise UserError(
            f'{path}: got {json.dumps(zero)} as zero_optimization, expected {{"stage": 0, 1, 2 or 3, ...}}; '
            "launch/ has one file for each stage"
        )
    for name, reason in _OWN_SECTIONS.items():
        if name in raw:
            raise UserError(f"{path}: got a section {name}, which is not left to DeepSpeed: {reason}; remove it")
    for name in _OBJECTS:
        if not isinstance(raw.get(name, {}), dict):
            raise UserError(f"{path}: got {json.dumps(raw[name])} as {name}, expected an object of settings")
    wrong = [*_differences(raw, options, world_size)]
    if wrong:
        raise UserError(f"{path} and the options disagree: {'; '.join(wrong)}; write auto in the file, or change one")
    return ZeroConfig(path, stage, _dtype_of(path, raw, options.dtype), raw)


def settings_for_deepspeed(config: ZeroConfig, options: TrainOptions, dtype: DType, world_size: int) -> dict[str, Any]:
    """The settings that `deepspeed.initialize` is given: the file's, with `auto` filled in.

    DeepSpeed counts batches of equal size, of which fastft has none: it is told of batches of 1, and the plan says
    where a step ends. The optimizer is fastft's, so that its section goes.
    """
    settings = {name: value for name, value in config.settings.items() if name != "optimizer"}
    zero = dict(settings["zero_optimization"])
    zero.update({name: value for name, value in _BUCKETS.items() if zero.get(name, AUTO) == AUTO})
    bf16, fp16 = _section(settings, "bf16"), _section(settings, "fp16")
    return {
        "steps_per_print": 1 << 60,
        **settings,
        "zero_optimization": zero,
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": options.clip,
        # Whether a step is left out for a gradient that is not finite is decided alike in every arithmetic.
        "bf16": {**bf16, "enabled": dtype == "bf16", **({"check_grad_overflow": True} if dtype == "bf16" else {})},
        "fp16": {**fp16, "enabled": dtype == "fp16"},
        # Many batches' gradients summed in 16 bits would lose the small ones.
        "data_types": {"grad_accum_dtype": "fp32", **_section(settings, "data_types")},
        "zero_allow_untested_optimizer": True,  # `fastft.engines.zero_setup` derives from torch's AdamW
        "zero_force_ds_cpu_optimizer": False,  # torch's own runs on a CPU too, and needs no compiler
    }


_BUCKETS = {
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
}
"""What `auto` means for DeepSpeed's buckets, in elements: a tenth of its defaults, which are made for larger models."""


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except FileNotFoundError:
        raise UserError(
            f"--deepspeed_config {path} is not there; launch/zero0.json to zero3.json come with fastft's repository"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read --deepspeed_config {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed_config {path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"--deepspeed_config {path}: got {kind_of(raw)}, expected an object of sections")
    return raw


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each of whose names is given once."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given more than once")
    return values


def _section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = settings.get(name)
    return dict(value) if isinstance(value, dict) else {}


def _differences(raw: Mapping[str, Any], options: TrainOptions, world_size: int) -> Iterator[str]:
    """What a file says of the settings that are fastft's, where it is something else."""
    expected: dict[str, tuple[Any, str]] = {
        "train_batch_size": (options.batch_size, "--batch_size"),
        "gradient_accumulation_steps": (options.accumulate, "--accumulate"),
        "gradient_clipping": (options.clip, "--clip"),
    }
    for name, (value, option) in expected.items():
        if raw.get(name, AUTO) not in (AUTO, value):
            yield f"{name} {raw[name]} there, {option} {value} here"
    micro = raw.get("train_micro_batch_size_per_gpu", AUTO)
    examples = options.batch_size / (options.accumulate * world_size)
    if micro not in (AUTO, examples):
        yield (
            f"train_micro_batch_size_per_gpu {micro} there, --batch_size {options.batch_size} over {world_size} ranks "
            f"and --accumulate {options.accumulate}, {examples:g}, here"
        )
    yield from _optimizer_differences(_section(raw, "optimizer"), options)


def _optimizer_differences(optimizer: Mapping[str, Any], options: TrainOptions) -> Iterator[str]:
    if optimizer and optimizer.get("type") not in ("AdamW", AUTO):
        yield f"optimizer {optimizer.get('type')} there, AdamW here"
    given = _section(optimizer, "params")
    expected = {"lr": options.lr, "weight_decay": options.weight_decay, "betas": list(BETAS), "eps": EPSILON}
    for name, value in given.items():
        if name not in expected:
            yield f"optimizer.params.{name} there, which fastft's AdamW does not know"
        elif value not in (AUTO, expected[name]):
            yield f"optimizer.params.{name} {value} there, {expected[name]} here"


def _dtype_of(path: Path, raw: Mapping[str, Any], dtype: DType) -> DType | None:
    """The arithmetic that the file asks for."""
    wanted: DType | None = None
    for name in ("bf16", "fp16"):
        enabled = _section(raw, name).get("enabled", AUTO)
        if enabled is not True and enabled is not False and enabled != AUTO:
            raise UserError(f"{path}: got {json.dumps(enabled)} as {name}.enabled, expected true, false or auto")
        if enabled is True:
            if wanted is not None:
                raise UserError(f"{path}: got bf16 and fp16 enabled, expected at most one")
            wanted = "bf16" if name == "bf16" else "fp16"
        if enabled is False and dtype == name:
            raise UserError(f"{path}: got {name} switched off there and --dtype {dtype} here; write auto in the file")
    if wanted is not None and dtype not in ("auto", wanted):
        raise UserError(f"{path}: got {wanted} enabled there and --dtype {dtype} here; write auto in the file")
    return wanted
