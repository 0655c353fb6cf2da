"""`adapter_config.json`, by which PEFT says what an adapter is: which layers have one, of what rank and scale.

What is read here is PEFT 0.21's LoRA on transformers' GPT-2. What says of an adapter that it computes anything else is
refused, and so is what is not known: an option of a later PEFT may change what an adapter means.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastft.common import files
from fastft.common.errors import UserError
from fastft.common.kinds import kind_of
from fastft.model.lora_spec import TARGETS
from fastft.model.names import ADAPTER_CONFIG

_ALL_LINEAR = "all-linear"
_DEFAULT_TARGETS = ("c_attn",)
"""PEFT's own for GPT-2."""
_IDLE = frozenset({
    "auto_mapping", "inference_mode", "lora_dropout", "task_type", "peft_version", "fan_in_fan_out", "megatron_core",
    "qalora_group_size", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
})  # fmt: skip
"""What changes nothing of what a saved adapter computes: how it began, and how it was trained. That fan_in_fan_out
fits the layers PEFT sees to itself."""
_READ = frozenset({
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora",
    "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "bias", "init_lora_weights", "revision",
})  # fmt: skip
_HARMLESS_BEGINNINGS: tuple[object, ...] = (None, True, False, "gaussian", "eva", "orthogonal")
"""The others (pissa, olora, corda, loftq, lora_ga, ...) change the base's weights too."""
_OTHER_MODULES = ("wte", "wpe", "ln_f", "lm_head")


class AdapterConfig:
    """What an `adapter_config.json` says, checked.

    Attributes:
        path: of the file.
        base: the name or path of the model that the adapter is for; None where it is not said.
        uses_dora: whether each adapter has a magnitude.
        has_bias: whether each adapter has a bias (`lora_bias`).
        ties: whether PEFT was asked to keep embedding and head one where one of them is saved whole.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            UserError: it cannot be read, or describes what fastft does not compute.
        """
        said = files.read_json(path, what="the adapter's configuration")
        if not isinstance(said, dict):
            raise UserError(f"{path}: got {kind_of(said)}, expected an object")
        self.path, self._said = path, said
        self._check_kind()
        self.base: str | None = self._get("base_model_name_or_path", (str, type(None)), "a name or path") or None
        self.uses_dora: bool = self._get("use_dora", (bool,), "true or false", False)
        self.has_bias: bool = self._get("lora_bias", (bool,), "true or false", False)
        self.ties: bool = self._get("ensure_weight_tying", (bool,), "true or false", False)
        if self.uses_dora and self.has_bias:
            self.refuse("says use_dora and lora_bias", "one of them, as PEFT has it")
        self._uses_rslora: bool = self._get("use_rslora", (bool,), "true or false", False)
        self._r, self._alpha = self._whole("r", said.get("r", 8)), self._number("lora_alpha", said.get("lora_alpha", 8))
        self._targets = self._names("target_modules") or _DEFAULT_TARGETS
        self._excluded = self._names("exclude_modules") or ()
        self._kept = _listed(self._names("modules_to_save") or ())
        self._patterns = _listed(self._names("layers_pattern") or ())
        layers = said.get("layers_to_transform")
        self._layers = [layers] if type(layers) is int else list(layers or [])
        self._ranks = self._pattern("rank_pattern", self._whole)
        self._alphas = self._pattern("alpha_pattern", self._number)
        if odd := [name for name in _OTHER_MODULES if self.targets(name) or self.targets(f"transformer.{name}")]:
            self.refuse(f"has an adapter of {odd[0]}", "adapters of the blocks' c_attn, c_proj and c_fc")

    def refuse(self, got: str, expected: str) -> NoReturn:
        """Raises the one error of what is not computed here, with the way out."""
        raise UserError(
            f"{self.path.parent} {got}, expected {expected}; merge it with PEFT's `merge_and_unload` and save that "
            "model, which fastft reads"
        )

    def targets(self, module: str) -> bool:
        """Whether a module has an adapter, by its whole name in transformers, such as `transformer.h.0.attn.c_attn`."""
        try:
            return self._targets_module(module)
        except re.error as error:
            raise UserError(
                f"{self.path}: got a pattern that is none ({error}), expected one of Python's re"
            ) from error

    def rank(self, module: str) -> int:
        """Of the adapter of a module."""
        found: int = _by_pattern(self._ranks, module, self._r)
        return found

    def scaling(self, module: str) -> float:
        """What the product of a module's adapter counts."""
        alpha, r = _by_pattern(self._alphas, module, self._alpha), self.rank(module)
        return float(alpha / (math.sqrt(r) if self._uses_rslora else r))

    def rows(self, table: str) -> list[int]:
        """The rows of `wte` or `lm_head` that are saved by themselves, in their order; those of a head that was tied
        are the embedding's. None where that is not said."""
        said = self._said.get("trainable_token_indices")
        if said is None:
            return []
        if isinstance(said, list):
            said = {"wte": said}
        if not isinstance(said, dict) or not all(_are_rows(rows) for rows in said.values()):
            raise self._wrong("trainable_token_indices", "lists of rows")
        by_name = {name.rpartition(".")[2]: rows for name, rows in said.items()}
        if odd := [name for name in by_name if name not in ("wte", "lm_head")]:
            self.refuse(f"trains rows of {odd[0]}", "rows of wte or lm_head")
        return list(by_name.get(table, by_name.get("wte", [])))

    def _check_kind(self) -> None:
        said = self._said
        if said.get("peft_type") != "LORA":
            self.refuse(f"is an adapter of the kind {json.dumps(said.get('peft_type'))}", "LORA")
        if said.get("init_lora_weights") not in _HARMLESS_BEGINNINGS:
            began = said["init_lora_weights"]
            self.refuse(
                f"began by init_lora_weights = {json.dumps(began)}, which changes the base's weights too",
                "an adapter that leaves the base as it is",
            )
        if said.get("bias") not in (None, "none", "all", "lora_only"):
            raise self._wrong("bias", "none, all or lora_only")
        if said.get("revision") not in (None, "main"):
            self.refuse(f"is for revision {said['revision']} of its base", "the base's main one")
        for name in sorted(said.keys() - _READ - _IDLE):
            if said[name] not in (None, False, {}, [], ""):
                self.refuse(f"says {name} = {json.dumps(said[name])[:60]}", "plain LoRA, rsLoRA or DoRA")

    def _targets_module(self, module: str) -> bool:
        if self._excluded and _named(module, self._excluded):
            return False
        if any(re.match(rf"(^|.*\.){kept}($|\..*)", module) for kept in self._kept):
            return False
        if self._targets == _ALL_LINEAR:
            return module.endswith(TARGETS)
        if isinstance(self._targets, str) or module in self._targets:
            return _named(module, self._targets)
        return _named(module, self._targets) and (not self._layers or self._layer_of(module) in self._layers)

    def _layer_of(self, module: str) -> int | None:
        """The number of the block that a module is in, as PEFT finds it."""
        patterns = [rf"(?:^|.*?\.){one}\.(?P<idx>\d+)\." for one in self._patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        found = next((match for one in patterns if (match := re.match(one, module))), None)
        return None if found is None else int(found["idx"])

    def _get(self, name: str, kinds: tuple[type, ...], expected: str, usual: Any = None) -> Any:
        value = self._said.get(name, usual)
        if not isinstance(value, kinds):
            raise self._wrong(name, expected)
        return value

    def _names(self, name: str) -> str | tuple[str, ...] | None:
        """A pattern, or names."""
        value = self._said.get(name)
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self._wrong(name, "names, or a pattern")
        return tuple(value)

    def _pattern(self, name: str, checked: Callable[[str, Any], Any]) -> dict[str, Any]:
        value = self._said.get(name) or {}
        if not isinstance(value, dict):
            raise self._wrong(name, "patterns with values")
        return {pattern: checked(name, one) for pattern, one in value.items()}

    def _whole(self, name: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            raise self._wrong(name, "a whole number above 0", value)
        return value

    def _number(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._wrong(name, "a number", value)
        return float(value)

    def _wrong(self, name: str, expected: str, value: Any = ...) -> UserError:
        got = self._said.get(name) if value is ... else value
        return UserError(f"{self.path}: got {name} = {json.dumps(got)[:60]}, expected {expected}")


def config_beside(folder: Path) -> AdapterConfig:
    """The configuration of the adapter in a folder.

    Raises:
        UserError: it is none that fastft reads.
    """
    return AdapterConfig(folder / ADAPTER_CONFIG)


def _named(module: str, names: str | Sequence[str]) -> bool:
    """Whether a pattern, or one of several names or ends of names, is a module's."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == one or module.endswith(f".{one}") for one in names)


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _by_pattern(values: Mapping[str, Any], module: str, usual: Any) -> Any:
    found = (value for pattern, value in values.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, usual)


def _are_rows(value: object) -> bool:
    return isinstance(value, list) and all(type(row) is int and row >= 0 for row in value)
