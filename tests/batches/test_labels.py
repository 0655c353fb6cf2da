"""`pack` of token ids and labels as others have them: what is asked is what their own loss asks, or it is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.batches.batch import from_padded, pack
from fastft.common.errors import UserError
from fastft.model.gpt2 import GPT2, GPT2Config

CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_ctx=32, vocab_size=50257)
SHARED = [5, 6, 7, 8, 9, 10, 11, 12, 13]
ROWS = [[*SHARED, 20, 21], [*SHARED, 22], [3, 4, 5, 6], [*SHARED, 20, 23]]
SUPERVISED_FROM = [4, 9, 1, 10]
LOSS, GRADIENT = 1e-12, 1e-12


@pytest.fixture(scope="module")
def model() -> GPT2:
    torch.manual_seed(0)
    model = GPT2(CONFIG).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def hugging_face(side: str = "right") -> dict[str, Tensor]:
    """What a tokenizer and a collator of transformers give: padded, labels not shifted."""
    W = max(map(len, ROWS))
    made: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row, first in zip(ROWS, SUPERVISED_FROM, strict=True):
        more = W - len(row)
        labels = [-100] * first + row[first:]
        for name, values, padding in (
            ("input_ids", row, 0), ("labels", labels, -100), ("attention_mask", [1] * len(row), 0)
        ):  # fmt: skip
            made[name].append(values + [padding] * more if side == "right" else [padding] * more + values)
    return {name: torch.tensor(rows) for name, rows in made.items()}


def plain(model: GPT2) -> tuple[Tensor, Tensor]:
    """Each row by itself, its logits by the reference, `F.cross_entropy` as transformers calls it."""
    losses = []
    for row, first in zip(ROWS, SUPERVISED_FROM, strict=True):
        ids = torch.tensor([row])
        logits = model.logits(from_padded(ids, torch.full_like(ids, -100)), impl="reference")
        losses.append(F.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="sum"))
    return with_gradient(model, sum(losses) / sum(len(r) - f for r, f in zip(ROWS, SUPERVISED_FROM, strict=True)))


def packed(model: GPT2, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    batch = pack(*args, **kwargs)
    return with_gradient(model, model(batch, row_weights=batch.weights.double() / batch.count)[0])


def with_gradient(model: GPT2, loss: Tensor) -> tuple[Tensor, Tensor]:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def differ(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    gradient = ((a[1] - b[1]).abs().max() / b[1].abs().max()).item()
    return abs((a[0] - b[0]).item()) > LOSS or gradient > GRADIENT


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_of_hugging_faces(model: GPT2, side: str) -> None:
    given = hugging_face(side)
    found = packed(model, given["input_ids"], labels=given["labels"], attention_mask=given["attention_mask"])
    assert not differ(found, plain(model))


def test_a_batch_whose_padding_was_not_told_differs(model: GPT2) -> None:
    """Which the tolerance rejects; with padding at the right nothing sees it."""
    given = hugging_face("left")
    assert differ(packed(model, given["input_ids"], labels=given["labels"]), plain(model))


def test_shifted_targets_of_unpadded_rows(model: GPT2) -> None:
    inputs = [row[:-1] for row in ROWS]
    targets = [
        [-100] * (first - 1) + row[first:] for row, first in zip(ROWS, SUPERVISED_FROM, strict=True)
    ]  # fmt: skip
    assert not differ(packed(model, inputs, labels=targets, shifted=True), plain(model))
    arrays = [np.array(row) for row in inputs]
    assert not differ(packed(model, arrays, labels=[torch.tensor(t) for t in targets], shifted=True), plain(model))


def test_beginnings_are_there_once() -> None:
    given = hugging_face()
    mask = given["attention_mask"]
    assert len(pack(given["input_ids"], labels=given["labels"], attention_mask=mask).tokens) < mask.sum()


def test_as_transformers_computes_it() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).double()
    ours = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_ctx=32)).double()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            stored = theirs.get_parameter(f"transformer.{name}")
            parameter.copy_(stored.t() if ".c_" in name and name.endswith("weight") else stored)
    for side in ("right", "left"):
        given = hugging_face(side)
        positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        expected = theirs(**given, position_ids=positions).loss
        batch = pack(given["input_ids"], labels=given["labels"], attention_mask=given["attention_mask"])
        loss, _ = ours(batch.divided(batch.count))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # theirs is summed in float32
        assert loss.item() != pytest.approx(theirs(**given).loss.item(), rel=1e-6) or side == "right"


def test_nothing_asked_is_no_loss(model: GPT2) -> None:
    batch = pack([[1, 2, 3]], labels=[[-100, -100, -100]])
    loss, _ = model(batch)
    assert (batch.count, loss.item()) == (0, 0.0)


GOOD: dict[str, Any] = {"examples": [[1, 2, 3], [4, 5, 6]], "labels": [[-100, 2, 3], [-100, -100, 6]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [[-100, 7, 3], [-100, 6, -100]]}, r"label 7 at place 1 of row 0.* make labels of the ids"),
        ({"labels": [[2, 3, 9], [5, 6, 9]]}, r"expected the token at its place, 1 .*give shifted=True"),
        ({"shifted": True}, r"label 2 at place 1 of row 0, expected the token after it, 3 .*give shifted=False"),
        ({"labels": [[-100, 2, 3], [-100, -100]]}, "labels of other lengths"),
        ({"labels": [[-100, 2, 3]]}, "labels of other lengths"),
        ({"attention_mask": [[1, 1, 1], [1, 0, 1]]}, r"attention_mask\[1\] that is not one run"),
        ({"attention_mask": [[1, 1, 1], [1, 2, 1]]}, r"attention_mask\[1\] that is not one run"),
        ({"attention_mask": [[1, 1, 1], [1, 1, 0]]}, "row 1 with labels on padding"),
        ({"attention_mask": [[1, 1, 1], [0, 0, 0]], "labels": [[1, 2, 3], [-100] * 3]}, "row 1 with no token"),
        ({"attention_mask": [[[1, 1, 1]] * 3] * 2}, r"attention_mask\[0\] of shape \[3, 3\]"),
        ({"labels": [[-1, 2, 3], [-100, -100, 6]]}, "negative id in row 0"),
        ({"labels": [[-100, 2.0, 3], [-100, -100, 6]]}, r"labels\[0\] of shape \[3\] \(float64\)"),
        ({"labels": None}, "both or none"),
        ({"first_target": [1, 1]}, "both or none"),
        ({"labels": None, "first_target": [1, 1], "shifted": True}, "belong to labels"),
        ({"labels": None, "first_target": [[1, 2], [1, 2]]}, r"shape \[2, 2\].*labels=\.\.\."),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    pack(**GOOD)
    with pytest.raises(UserError, match=message):
        pack(**{**GOOD, **change})
