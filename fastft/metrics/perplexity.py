"""What a run's model finds likely: the perplexity of reference responses, and the likeliest of several choices."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastft.common.errors import UserError
from fastft.data.chat_template import AnyTemplate
from fastft.data.encode import EncodedSet, EncodingRules, Text, encoded_set, texts_of
from fastft.data.prompts import RESPONSES, Part, Special
from fastft.data.records import Record, Turn, answers_of, category_of, right_choice
from fastft.decoding.sampling import ids_without_text
from fastft.gpu.staging import Staging
from fastft.metrics.statistics import Floats
from fastft.metrics.text_metrics import accuracy
from fastft.model import ops
from fastft.model.gpt2 import GPT2
from fastft.model.precision import NARROW
from fastft.run.folder import Run
from fastft.run.trained import trained_model

_BATCH_SIZE = 16


class Likelihood(NamedTuple):
    """How likely a response is after its prompt: the sum of the logarithms of its tokens' probabilities."""

    total: float
    tokens: int
    """The response's, its end-of-text among them."""

    @property
    def per_token(self) -> float:
        """`total` divided by its tokens, so that a long choice has no handicap."""
        return self.total / self.tokens


def response_perplexities(run: Path, entries: Sequence[Mapping[str, Any]]) -> dict[str | None, float]:
    """exp of the mean loss that the run's model has on the entries' reference responses.

    Every token of a response counts (header, output, end-of-text) and none of its prompt, whatever the run was
    trained on, so that runs with and without a masked prompt compare. Entries that are longer than the context are
    left out.

    Args:
        run: a run's folder with `config.yaml` and `model/`.
        entries: objects with `instruction`, `input`, `output`, and perhaps `category`.

    Returns:
        The perplexity of all entries under None, and of each category of which an entry fits.

    Raises:
        UserError: the folder lacks a file, its tokenizer is not the one that it was trained with, or no entry fits the
            context.
    """
    folder = Run(run)
    records = [_record(row, entry) for row, entry in enumerate(entries)]
    return _perplexities(trained_model(folder), records, folder.template())


def choice_accuracy(run: Path, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How often the run's model finds the right choice the likeliest response, over the entries with `choices`.

    Entries of which a choice is longer than the context are left out.

    Returns:
        For the plain sum (`total`) and the mean over tokens (`per_token`; Brown et al. 2020, section 2.4) `n`, the
        `accuracy` in percent and its `interval`, and both again for each category under `by_category`; None where no
        entry has choices, or none fits.
    """
    records = [record for row, entry in enumerate(entries) if (record := _record(row, entry)).choices]
    if not records:
        return None
    folder = Run(run)
    found = choice_likelihoods(trained_model(folder), records, folder.template())
    right = [(record, *_is_right(record, likely)) for record, likely in zip(records, found, strict=True) if likely]
    if not right:
        return None

    def of(category: str | None) -> dict[str, Any]:
        own = [one for one in right if category is None or one[0].category == category]
        return {"total": accuracy([one[1] for one in own]), "per_token": accuracy([one[2] for one in own])}

    return {**of(None), "by_category": {name: of(name) for name in _categories([record for record, *_ in right])}}


def choice_likelihoods(model: GPT2, records: Sequence[Record], template: AnyTemplate) -> list[list[Likelihood] | None]:
    """The likelihood of each choice of each record, given its prompt and the template's response header.

    A choice is what the model was taught to say of it: its letter where the record's output is a letter, else its text.

    The choices of a question stand in one batch, which computes their common prompt once.

    Args:
        model: any GPT-2; its device is used.
        records: multiple-choice questions.
        template: gives the prompt and the header.

    Returns:
        For each record a likelihood of each choice, or None where one of them is longer than the context.
    """
    asked = [(index, answer) for index, record in enumerate(records) for answer in answers_of(record)]
    texts = [
        Text(number, _with_answer(template, records[index], answer), template.as_transformers)
        for number, (index, answer) in enumerate(asked)
    ]
    encoded = encoded_set(texts, model.config.tokenizer, _rules(model))
    losses, counts = _example_losses(model, encoded)
    by_number = {
        int(number): Likelihood(-float(loss), int(count))
        for number, loss, count in zip(encoded.rows, losses, counts, strict=True)
    }
    likely: list[list[Likelihood | None]] = [[] for _ in records]
    for number, (index, _) in enumerate(asked):
        likely[index].append(by_number.get(number))
    return [whole if len(whole := [one for one in row if one]) == len(row) else None for row in likely]


def _with_answer(template: AnyTemplate, question: Record, answer: str) -> tuple[Part, ...]:
    """A question and an answer to it, of which the answer and its end are learned: all may begin with the header."""
    parts = list(template.prompt_parts(question))
    if template.response_header:
        last = "" if isinstance(parts[-1][0], Special) else parts.pop()[0]
        parts.append((last + template.response_header, False))
    return (*parts, (answer, True), (Special(template.end), True))


def _perplexities(model: GPT2, records: Sequence[Record], template: AnyTemplate) -> dict[str | None, float]:
    encoded = encoded_set(texts_of(records, template, RESPONSES), model.config.tokenizer, _rules(model))
    if not len(encoded):
        raise UserError(f"no response fits the model's context of {model.config.n_ctx} tokens")
    losses, counts = _example_losses(model, encoded)
    kept = [records[row] for row in encoded.rows]  # rows count from 0 here

    def of(category: str | None) -> float:
        own = np.array([category in (None, record.category) for record in kept])
        return math.exp(losses[own].sum() / counts[own].sum())

    return {None: of(None), **{name: of(name) for name in _categories(kept)}}


@torch.no_grad()
def _example_losses(model: GPT2, encoded: EncodedSet) -> tuple[Floats, Floats]:
    """The sum of each example's supervised losses, and their count, `[n]` each."""
    device = model.wte.weight.device
    impl = ops.resolve("auto", device)
    is_narrow = model.head.dtype in NARROW.values()
    batcher, staging = ops.batcher(impl, device, is_narrow=is_narrow), Staging(device)
    model, places = _among_texts(model)
    batches, row_losses = [], []
    for begin in range(0, len(encoded), _BATCH_SIZE):
        batch = batcher(encoded, np.arange(begin, min(begin + _BATCH_SIZE, len(encoded))))
        if places is not None:
            batch = replace(batch, targets=places[batch.targets])
        batches.append(batch)
        row_losses.append(model(staging.put(batch).batch, impl=impl)[1])
    # Read when all have been asked for: a GPU is not waited for between them.
    losses = [
        batch.example_losses(rows[: batch.rows.numel()].cpu().double())
        for batch, rows in zip(batches, row_losses, strict=True)
    ]
    return np.concatenate([np.zeros(0), *losses]), encoded.supervised.astype(np.float64)


def _among_texts(model: GPT2) -> tuple[GPT2, Tensor | None]:
    """The model with a head of the ids alone that stand for a text, as no answer holds others; the rest is shared.

    Returns:
        The model, and `[V]` int64 on the host, which row of its head each id has. The model itself, and None, where
        every id stands for a text.
    """
    without_text = ids_without_text(model)
    if without_text is None:
        return model, None
    narrow = copy.copy(model)
    narrow._modules = {**model._modules}  # the copy has modules of its own: another head would else be the model's too
    head = model.head.detach()[~without_text]
    narrow.lm_head = nn.Linear(head.shape[1], head.shape[0], bias=False, device="meta")
    narrow.lm_head.weight = nn.Parameter(head, requires_grad=False)
    return narrow, (~without_text).cumsum(0).cpu() - 1


def _is_right(record: Record, likely: Sequence[Likelihood]) -> tuple[bool, bool]:
    """Whether the right choice has the largest sum, and the largest mean."""
    right = right_choice(record.output, record.choices)
    return (
        int(np.argmax([one.total for one in likely])) == right,
        int(np.argmax([one.per_token for one in likely])) == right,
    )


def _rules(model: GPT2) -> EncodingRules:
    return EncodingRules(RESPONSES, max_length=model.config.n_ctx, too_long="drop")


def _categories(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.category for record in records if record.category is not None))


def _record(row: int, entry: Mapping[str, Any]) -> Record:
    extra = {"category": category_of(entry), "choices": entry.get("choices")}
    # What comes before the answer is asked, whoever said it.
    before = tuple(Turn(turn["role"], turn["content"], False) for turn in entry.get("messages") or ())
    answer = Turn("raw" if before and before[-1].role == "raw" else "assistant", entry["output"], True)
    return Record(
        instruction=entry["instruction"],
        input=entry.get("input", ""),
        output=entry["output"],
        row=row,
        extra=extra,
        turns=(*before, answer) if before else (),
    )
