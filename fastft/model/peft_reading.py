"""An adapter in PEFT's layout, read: ours, or any that PEFT has made of LoRA on transformers' GPT-2.

    base_model.model.transformer.h.N.attn.c_attn.lora_A.weight                [r, I], as in a linear layer, whatever the
                                                .lora_B.weight                [O, r]  base's layer is
                                                .lora_B.bias                  [O], with `lora_bias`
                                                .lora_magnitude_vector        [O], with `use_dora`
                                                .base_layer.bias              [O], with `bias`: in place of the base's
    base_model.model.transformer.wte.token_adapter.trainable_tokens_delta     [n, C], rows in place of the base's
    base_model.model.transformer.ln_f.weight                                  with `modules_to_save`, or of a vocabulary
                                                                              made larger: in place of the base's
    base_model.model.transformer.wte.token_adapter.base_layer.weight          the same, with rows by themselves

Letters: I inputs and O outputs of a layer, r rank, C width, V vocab, n rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastft.common.errors import UserError
from fastft.model.gpt2 import GPT2
from fastft.model.lora import merged_weight
from fastft.model.lora_spec import TARGETS
from fastft.model.names import ADAPTER, ADAPTER_CONFIG
from fastft.model.peft_config import AdapterConfig, config_beside
from fastft.model.tensor_files import DTYPES, metadata_of, opened_safetensors

BASE_SHA256 = "base_sha256"
"""Under what an adapter of ours says which weights it was trained on: `fastft.model.part.sha256_of` of them."""
PREFIX, TRANSFORMER = "base_model.model.", "transformer."
ROWS = "token_adapter.trainable_tokens_delta"
_MATRIX = "|".join(map(re.escape, TARGETS))
_OF_ADAPTER = re.compile(rf"(h\.\d+\.(?:{_MATRIX}))\.(lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector)")
_WHOLE = re.compile(rf"(?:wte|wpe|lm_head)\.weight|(?:ln_f|h\.\d+\.(?:ln_1|ln_2|{_MATRIX}))\.(?:weight|bias)")
_EMBEDDING, _HEAD = "wte.weight", "lm_head.weight"
TABLES = (_EMBEDDING, _HEAD)


@dataclass(frozen=True, slots=True)
class AdaptedMatrix:
    """One matrix's adapter.

    Attributes:
        A: `[r, I]`; B: `[O, r]`.
        scaling: what their product counts.
        magnitude: `[O]`, of DoRA; bias: `[O]`, which counts `scaling` too.
    """

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter changes of its base.

    Attributes:
        folder: where it lies.
        config: what its `adapter_config.json` says.
        base_sha256: which weights it was trained on; None where it does not say.
        matrices: adapters by the matrices' names, such as `h.0.attn.c_attn`.
        weights: in place of the base's, whole, by name, as a linear layer has them.
        rows: in place of the base's: by the name of the table `[V, C]`, which ones, and they, `[n, C]`.
        module_prefix: what transformers puts before the names that PEFT matches.
    """

    folder: Path
    config: AdapterConfig
    base_sha256: str | None
    matrices: dict[str, AdaptedMatrix] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    module_prefix: str = TRANSFORMER

    @property
    def unties(self) -> bool:
        """Whether head and embedding become two, if they were one in the base."""
        return _HEAD in self.rows or any(name in self.weights for name in TABLES)

    def vocabulary(self, V: int) -> int:
        """The rows of embedding and head, where the base has `V`.

        Raises:
            UserError: they would have different ones.
        """
        whole = {len(self.weights[name]) for name in TABLES if name in self.weights}
        if self.unties and whole and not all(name in self.weights for name in TABLES):
            whole.add(V)  # the other one is the base's
        if len(whole) > 1:
            raise UserError(
                f"{self.folder}: got embedding and head with {' and '.join(map(str, sorted(whole)))} rows, expected as "
                "many; save it again with PEFT, `save_pretrained(FOLDER, save_embedding_layers=True)`"
            )
        V = whole.pop() if whole else V
        needed = max((max(rows) + 1 for rows, _ in self.rows.values()), default=0)
        if whole_tables := [name for name in TABLES if name in self.weights]:
            if needed > V:
                raise UserError(f"{self.folder}: got row {needed - 1} of {whole_tables[0]}, which has {V} rows")
            return V
        self._check_no_gap(V, needed)
        return max(V, needed)

    def _check_no_gap(self, V: int, needed: int) -> None:
        for name, (rows, _) in self.rows.items():
            if missing := sorted(set(range(V, needed)) - set(rows)):
                raise UserError(
                    f"{self.folder} has no row {missing[0]} of {name}, expected all from {V} to {needed - 1}, which "
                    "the base has not; save it again with PEFT, `save_pretrained(FOLDER, save_embedding_layers=True)`"
                )

    @torch.no_grad()
    def merge_into(self, model: GPT2) -> None:
        """Puts it into its base, in place: in float64, each weight rounded once.

        Args:
            model: the base, with rows and a head as this needs them; whole tables are in it.

        Raises:
            UserError: it is of another shape, or does not hold what its configuration says.
        """
        places = dict(model.named_parameters())
        self._check(model)
        for name, values in self.weights.items():
            self._place(places, name, values.shape).copy_(values)
        for name, (rows, values) in self.rows.items():
            place = self._place(places, name, (model.config.vocab_size, values.shape[1]))
            place[torch.tensor(rows)] = values.to(place.dtype)
        for name, one in self.matrices.items():
            outputs, inputs = len(one.B), one.A.shape[1]
            weight = self._place(places, f"{name}.weight", (outputs, inputs))
            weight.copy_(merged_weight(weight, one.A, one.B, one.scaling, one.magnitude))
            if one.bias is not None:
                bias = self._place(places, f"{name}.bias", (outputs,))
                bias.copy_(bias.double() + one.scaling * one.bias.double())

    def _place(self, places: dict[str, torch.nn.Parameter], name: str, shape: tuple[int, ...]) -> Tensor:
        place = places.get(name)
        got = None if place is None else tuple(place.shape)
        if place is None or got != tuple(shape):
            has = "none" if got is None else str(list(got))
            raise UserError(
                f"{self.folder} is for another model: it changes {name} {list(shape)}, and the base has {has}; "
                f"expected the base that it was trained on ({self.config.base or 'which it does not name'})"
            )
        return place

    def _check(self, model: GPT2) -> None:
        names = [f"h.{layer}.{name}" for layer in range(model.config.n_layer) for name in TARGETS]
        said = {name for name in names if self.config.targets(self.module_prefix + name)}
        if missing := sorted(said - self.matrices.keys()):
            raise UserError(
                f"{self.folder}: {ADAPTER_CONFIG} says that {missing[0]} has an adapter, and {ADAPTER} holds none; "
                "fetch both files again"
            )
        if unsaid := sorted(self.matrices.keys() - said):
            raise UserError(
                f"{self.folder}: {ADAPTER} holds an adapter of {unsaid[0]}, which {ADAPTER_CONFIG} does not name, or "
                "the base does not have; fetch both files again, and name the base that it was trained on"
            )


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter.

    Raises:
        UserError: it is a whole model too.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    if whole := sorted(path.name for path in folder.glob("model*.safetensors")):
        raise UserError(
            f"{folder} holds {whole[0]} and {ADAPTER_CONFIG}, a model and an adapter; put each into a folder by itself"
        )
    return True


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder.

    Raises:
        UserError: there is none that fastft can put into a GPT-2; the reason is given.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"no adapter in {folder}: expected {ADAPTER_CONFIG} and {ADAPTER}, as PEFT writes them")
    config, path = config_beside(folder), folder / ADAPTER
    if not path.is_file():
        found = ", ".join(sorted(one.name for one in folder.iterdir() if one.suffix in (".bin", ".pt", ".pth")))
        raise UserError(
            f"{folder} holds no {ADAPTER}{f' but {found}' if found else ''}; only safetensors is read, as no pickle is "
            "ever executed: save it again with PEFT, `model.save_pretrained(FOLDER)`"
        )
    with opened_safetensors([path]) as stored:
        if odd := [name for name, one in stored.items() if one.dtype not in DTYPES]:
            raise UserError(f"{path}: got {odd[0]} in {stored[odd[0]].dtype}, expected {', '.join(DTYPES)}")
        named = {name.removeprefix(PREFIX).removeprefix(TRANSFORMER): one.read() for name, one in stored.items()}
        prefix = TRANSFORMER if any(name.startswith(PREFIX + TRANSFORMER) for name in stored) else ""
        if len(named) < len(stored):
            raise UserError(f"{path} holds one tensor under two names; save it again with PEFT")
    adapter = Adapter(folder, config, metadata_of(path).get(BASE_SHA256), module_prefix=prefix)
    _sort_into(adapter, named)
    return adapter


def _sort_into(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        plain = name.replace(".base_layer.bias", ".bias").replace(".token_adapter.base_layer.weight", ".weight")
        plain = plain.removesuffix(".weight" if "magnitude" in name else "")
        if found := _OF_ADAPTER.fullmatch(plain):
            parts.setdefault(found[1], {})[found[2]] = tensor
        elif name in (f"wte.{ROWS}", f"lm_head.{ROWS}"):
            table = name.partition(".")[0]
            adapter.rows[f"{table}.weight"] = (_rows_of(adapter.config, table, tensor), tensor)
        elif _WHOLE.fullmatch(plain):
            is_conv1d = plain.endswith(".weight") and plain.removesuffix(".weight").endswith(TARGETS)
            adapter.weights[plain] = tensor.t() if is_conv1d else tensor
        else:
            adapter.config.refuse(
                f"holds {name} {list(tensor.shape)}",
                "adapters of a GPT-2's c_attn, c_proj and c_fc, rows of its embedding, and weights in place of its own",
            )
    if adapter.config.ties and len(adapter.weights.keys() & set(TABLES)) == 1:
        # Which of the two PEFT gives it to depends on how the module was named when it was made.
        adapter.config.refuse("keeps an embedding with ensure_weight_tying", "embedding and head each in the file")
    if not adapter.rows and adapter.config.rows("wte"):
        raise UserError(f"{adapter.folder}: {ADAPTER_CONFIG} names rows of wte, and {ADAPTER} holds none")
    for name, found_parts in parts.items():
        adapter.matrices[name] = _matrix(adapter, name, found_parts)


def _rows_of(config: AdapterConfig, table: str, values: Tensor) -> list[int]:
    rows = config.rows(table)
    if values.ndim != 2 or len(rows) != len(values) or len(set(rows)) != len(rows):
        raise UserError(
            f"{config.path}: got trainable_token_indices with {len(rows)} rows of {table}, and {ADAPTER} holds "
            f"{list(values.shape)}; expected as many, each once"
        )
    return rows


def _matrix(adapter: Adapter, name: str, parts: dict[str, Tensor]) -> AdaptedMatrix:
    config, module = adapter.config, adapter.module_prefix + name
    expected = {"lora_A.weight": True, "lora_B.weight": True, "lora_B.bias": config.has_bias,
                "lora_magnitude_vector": config.uses_dora}  # fmt: skip
    if odd := [part for part, is_there in expected.items() if is_there != (part in parts)]:
        lacks = "holds" if odd[0] in parts else "lacks"
        raise UserError(f"{adapter.folder}: {ADAPTER} {lacks} {name}.{odd[0]}, other than {ADAPTER_CONFIG} says")
    A, B = parts["lora_A.weight"], parts["lora_B.weight"]
    magnitude, bias = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
    r = config.rank(module)
    outputs = [one for one in (magnitude, bias) if one is not None]
    if A.ndim != 2 or B.ndim != 2 or not len(A) == B.shape[1] == r or any(one.shape != (len(B),) for one in outputs):
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        raise UserError(f"{adapter.folder}: got {shapes} for {name}, expected lora_A [{r}, I] and lora_B [O, {r}]")
    return AdaptedMatrix(A, B, config.scaling(module), magnitude, bias)
