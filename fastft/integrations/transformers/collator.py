"""Micro-batches without padding, in which what several examples begin with is there once, for any trainer that takes a
collator: transformers' Trainer, TRL's SFTTrainer, a loop of one's own.

Only tokens without a label are shared, and where an example's own tokens would begin with one that has a label, its
last shared token is repeated before it. So each token is asked for at most one label, by the token before it: a plain
`labels` says all, and whatever a trainer counts in it (targets of a step, over accumulated micro-batches and ranks) is
what it counts in padded batches.

Letters: T tokens of a micro-batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastft.batches.batch import visible_until_of
from fastft.common.errors import UserError
from fastft.data.encode import EncodedSet
from fastft.integrations.transformers.attention import NAME
from fastft.integrations.transformers.dropout import check_dropout
from fastft.integrations.transformers.loss import IGNORE_INDEX
from fastft.integrations.transformers.speedup import base_of, evaluating

Ids = npt.NDArray[np.int64]
LAID_OUT = frozenset(["input_ids", "labels", "attention_mask", "position_ids"])
"""What of an example a pack has, or `_example` refuses; of what else a model reads nothing may be left out."""


def features_of(encoded: EncodedSet) -> list[dict[str, list[int]]]:
    """Encoded records as a trainer's data set: each example's `input_ids` and `labels`, -100 where it has none."""
    made = []
    for index in range(len(encoded)):
        ids = encoded[index].tolist()
        labels = [IGNORE_INDEX] * len(ids)
        for begin, end in encoded.spans_of(index).tolist():
            labels[begin:end] = ids[begin:end]
        made.append({"input_ids": ids, "labels": labels})
    return made


@dataclass(frozen=True, slots=True)
class _Example:
    """`ids` and `labels`, `[n]`; a label belongs to its own token, and the first token's is never asked for."""

    ids: Ids
    labels: Ids

    @property
    def first_label(self) -> int:
        """The first token that is asked for; n where none is."""
        asked = np.flatnonzero(self.labels[1:] != IGNORE_INDEX)
        return int(asked[0]) + 1 if len(asked) else len(self.ids)


class TreeCollator:
    """Examples (`input_ids`, `labels`) -> one row of T tokens: `input_ids`, `labels`, `position_ids` and
    `visible_until`, `[1, T]` each, and `example_lengths` `[examples]`, which comes first, so that a trainer that asks
    how many examples a batch has finds out.

    Args:
        model: the model that will be given them, `accelerate`d or with `attn_implementation="fastft"`; it is tried out.
        share: off, every example's tokens stand by themselves.
        least_shared: shorter equal beginnings are not shared.

    Raises:
        UserError: the model lets neighbours see one another, or hides a shared beginning, or has dropout.
    """

    read: frozenset[str] = frozenset()
    """What the model's forward takes and a pack has no place for."""

    def __init__(self, model: Any, *, share: bool = True, least_shared: int = 8) -> None:
        base = base_of(model)
        if share:
            check_dropout(base)
        self.config = base.config
        self.least_shared = max(1, least_shared) if share else None
        self.read = frozenset(inspect.signature(base.forward).parameters) - LAID_OUT
        self._check_attention()
        check_isolation(base)
        if share:
            check_certainty(base)

    def _check_attention(self) -> None:
        """The model's attention may have been set to another one since, as any of its settings."""
        if self.config._attn_implementation != NAME:
            raise UserError(
                f"got a model with attn_implementation={self.config._attn_implementation!r}, to which examples of a "
                f"pack that share a beginning are not visible as they are; expected {NAME!r}: accelerate(model)"
            )
        self._check_balance()

    def _check_balance(self) -> None:
        """A loss that balances experts counts each token that was routed, and a shared one but once."""
        text = self.config.get_text_config()
        share = getattr(text, "router_aux_loss_coef", 1.0)
        if self.least_shared is not None and getattr(text, "output_router_logits", False) and share:
            raise UserError(
                "got a model with output_router_logits, whose loss balances its experts by tokens, of which a pack has "
                "the shared ones once; expected config.output_router_logits False, or TreeCollator(model, share=False)"
            )

    def _check_nothing_is_lost(self, features: Sequence[Mapping[str, Any]]) -> None:
        for feature in features:
            lost = sorted(name for name in self.read & feature.keys() if feature[name] is not None)
            if lost:
                raise UserError(
                    f"got an example with {', '.join(lost)}, which the model reads and a pack has no place for, "
                    "expected input_ids and labels: dataset.remove_columns(...), or a collator that pads"
                )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One micro-batch.

        Raises:
            UserError: an example without labels or tokens, or that several are packed in already.
        """
        self._check_attention()
        self._check_nothing_is_lost(features)
        examples = [_example(feature) for feature in features]
        examples.sort(key=lambda example: example.ids.astype(">u4").tobytes())  # big-endian bytes compare as ids do
        shared = np.zeros(len(examples), dtype=np.int64)
        if self.least_shared is not None:
            shared[1:] = [_shared(*pair, self.least_shared) for pair in pairwise(examples)]
        return _laid_out(examples, shared)


def _example(feature: Mapping[str, Any]) -> _Example:
    if "labels" not in feature or "input_ids" not in feature:
        raise UserError(
            f"got an example with {', '.join(feature) or 'nothing'}, expected input_ids and labels (-100 where no "
            "prediction is asked for)"
        )
    packed = [name for name in ("seq_lengths", "position_ids") if feature.get(name) is not None]
    if packed:
        raise UserError(
            f"got an example with {' and '.join(packed)}, as of several that are packed already, expected one example "
            "by itself: the collator packs them"
        )
    ids, labels = (_integers(name, feature[name]) for name in ("input_ids", "labels"))
    if ids.ndim != 1 or ids.shape != labels.shape or not len(ids):
        raise UserError(f"got input_ids {ids.shape} and labels {labels.shape}, expected one length of at least 1")
    if feature.get("attention_mask") is not None:
        real = np.asarray(feature["attention_mask"]) != 0
        ids, labels = ids[real], labels[real]
    if not len(ids) or ids.min() < 0:
        raise UserError("got an example with a negative id, or of padding alone, expected token ids")
    return _Example(ids, labels)


def _integers(name: str, given: Any) -> Ids:
    found = np.asarray(given)
    if found.size and not np.issubdtype(found.dtype, np.integer):
        raise UserError(f"got {name} of {found.dtype}, expected integers")
    return found.astype(np.int64)


def _shared(before: _Example, this: _Example, least: int) -> int:
    """How many tokens `this` has in common with the example before it, and can do without labels."""
    n = min(len(before.ids), len(this.ids))
    differs = np.flatnonzero(before.ids[:n] != this.ids[:n])
    equal = int(differs[0]) if len(differs) else n
    asked = this.first_label < len(this.ids)
    # What predicts its first label stands right before that, among its own tokens.
    shared = min(equal, this.first_label - 1) if asked else equal
    return shared if shared >= least else 0


def _laid_out(examples: Sequence[_Example], shared: Ids) -> dict[str, Tensor]:
    own = [slice(start, len(example.ids)) for start, example in zip(shared, examples, strict=True)]
    lengths = np.array([len(example.ids) for example in examples])
    begins = np.concatenate([[0], np.cumsum(lengths - shared)])
    labels = [example.labels[at].copy() for example, at in zip(examples, own, strict=True)]
    for mine in labels:
        mine[:1] = IGNORE_INDEX  # the token before it in the pack is another example's
    row = {
        "input_ids": np.concatenate([example.ids[at] for example, at in zip(examples, own, strict=True)]),
        "labels": np.concatenate(labels),
        "position_ids": np.concatenate([np.arange(at.start, at.stop) for at in own]),
        "visible_until": visible_until_of(lengths, shared, begins),
    }
    return {"example_lengths": torch.from_numpy(lengths), **{k: torch.from_numpy(v)[None] for k, v in row.items()}}


BEGINNING, FIRST, SECOND = slice(0, 4), slice(4, 7), slice(7, 10)
"""The tokens of the pack that a model is tried out with: two examples that share a beginning."""


def check_isolation(model: Any) -> None:
    """Tries out whether a model sees in a pack what it should: changes one part, and looks at another; and looks at
    an example by itself.

    Raises:
        UserError: an example of a pack sees its neighbour, or does not see the beginning that they share, or stands
            elsewhere than by itself, as in a model that counts its positions without `position_ids`.
    """
    # Each token of the neighbour: a convolution reaches a little way, attention any.
    neighbour = max(_influence(model, on) for on in range(FIRST.start, FIRST.stop))
    beginning, itself = (_influence(model, on) for on in (BEGINNING.start, SECOND.start))
    if not (beginning and itself and neighbour <= 1e-3 * beginning):
        seen = "see its neighbour" if neighbour > 1e-3 * beginning else "not see the beginning that it shares"
        raise UserError(
            f"got a {type(model).__name__} that lets an example of a pack {seen}, expected a causal model whose layers "
            f"all read visible_until, as attn_implementation={NAME!r} does"
        )
    if not _is_itself(model):
        raise UserError(
            f"got a {type(model).__name__} that gives an example of a pack other logits than by itself, expected one "
            "whose positions are those of position_ids, as a pack's restart: a collator that pads"
        )


def check_certainty(model: Any) -> None:
    """Tries out whether a model in training answers alike twice: what `check_dropout` does not know by its name.

    Raises:
        UserError: it does not.
    """
    ids, _ = _pack_of(model)
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices), evaluating(model, training=True):
        first, second = (model(input_ids=ids[None], use_cache=False).logits for _ in range(2))
    if not torch.equal(first, second):
        raise UserError(
            f"got a {type(model).__name__} that answers at random in training, expected one without dropout or noise, "
            "as a shared token has one for all that share it: set what makes it random to 0, or "
            "TreeCollator(model, share=False)"
        )


def _influence(model: Any, token: int) -> float:
    """How much the second example's own tokens change with another id in place of one of the pack's."""
    ids, vocab = _pack_of(model)
    changed = ids.clone()
    changed[token] = (ids[token] + vocab // 2) % vocab
    before, after = (_logits_in_pack(model, one) for one in (ids, changed))
    return float((before - after).abs().max())


def _is_itself(model: Any) -> bool:
    """Whether the second example has in a pack the logits that it has by itself, up to rounding."""
    ids, _ = _pack_of(model)
    alone = torch.cat([ids[BEGINNING], ids[SECOND]])[None]
    with evaluating(model):
        expected = model(input_ids=alone, use_cache=False).logits[0, BEGINNING.stop :]
    narrow = expected.element_size() == 2 or torch.is_autocast_enabled(expected.device.type)
    limit = (5e-2 if narrow else 1e-3) * expected.abs().max()
    return bool(((_logits_in_pack(model, ids) - expected).abs() <= limit).all())


def _pack_of(model: Any) -> tuple[Tensor, int]:
    """The ids `[T]` of the pack that a model is tried out with, and how many there are."""
    weight = model.get_input_embeddings().weight
    return torch.arange(1, 1 + SECOND.stop, device=weight.device) % weight.shape[0], weight.shape[0]


def _logits_in_pack(model: Any, ids: Tensor) -> Tensor:
    """Of the second example's own tokens, in a pack of ids `[T]`."""
    rest = {
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]], device=ids.device),
        "visible_until": torch.tensor([[10] * 4 + [7] * 3 + [10] * 3], device=ids.device),
        "use_cache": False,
    }
    with evaluating(model):
        logits: Tensor = model(input_ids=ids[None], **rest).logits[0, SECOND]
    return logits
