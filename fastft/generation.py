"""Greedy generation: many prompts at once over a key-value cache, and the book's loop that it is held against."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft import files
from fastft.batch import from_padded
from fastft.config import Device
from fastft.console import meter, say
from fastft.errors import UserError
from fastft.model import GPT2
from fastft.options import check_choices
from fastft.precision import choose_device
from fastft.records import Record
from fastft.run import Run, data_of
from fastft.tokenizer import END_OF_TEXT, gpt2_tokenizer
from fastft.weights import load

NO_STOP = -1


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options of `fastft generate`."""

    run: Path
    """The folder of a trained run."""
    split: Literal["test", "val", "train"] = "test"
    """Which records to answer."""
    max_new_tokens: int = 256
    """The most tokens of a response."""
    limit: int | None = None
    """Answer only so many records."""
    batch_size: int = 16
    """Prompts answered at once."""
    device: Device = "auto"
    """Where to generate."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", Path(self.run))
        check_choices(self)
        for name in ("max_new_tokens", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"got --{name} {value}, expected at least 1")


def generate(options: GenerateOptions) -> list[dict[str, Any]]:
    """Answers the prompts of a run's split with its model and writes `responses.json` (`responses.val.json`, ...).

    The file is written after each batch; a second call goes on where a killed one stopped.

    Raises:
        UserError: the run has no model, or a prompt leaves no room in the context (the rows are named).
    """
    run = Run(options.run)
    run.options()  # that there is a run is said first
    if not (run.model / "model.safetensors").is_file():
        raise UserError(
            f"no model in {run.folder}: expected {run.model / 'model.safetensors'}; "
            f"finish the run with `fastft train --resume --out {run.folder}`"
        )
    data = data_of(run)
    whole_split = data.part(options.split)
    if not whole_split:
        raise UserError(f"the {options.split} split holds no record; its data is too small")
    all_prompts = [data.template.prompt(record.instruction, record.input) for record in whole_split]
    records, prompts = whole_split[: options.limit], all_prompts[: options.limit]
    entries = [record.as_entry() for record in records]

    answers = _Answers.of(run, options, whole_split, all_prompts)
    done = answers.read()[: len(entries)]
    if done:
        say(f"{len(done)} of {len(entries)} responses are there already")
    if len(done) == len(entries):
        return done
    model = load(run.model).to(choose_device(options.device)).eval()
    tokenizer = gpt2_tokenizer()
    prompt_ids = tokenizer.encode_many(prompts)
    _check_room(prompt_ids, model.config.n_ctx, [record.row for record in records])

    if not done:
        answers.begin()
    with meter("responses", len(entries), done=len(done)) as progress:
        for begin in range(len(done), len(entries), options.batch_size):
            end = begin + options.batch_size
            outputs = greedy(model, prompt_ids[begin:end], max_new_tokens=options.max_new_tokens)
            for entry, ids in zip(entries[begin:end], outputs, strict=True):
                done.append({**entry, "model_response": data.template.extract(tokenizer.decode(ids))})
            answers.write(done)
            progress.advance(by=len(outputs))
    return done


@torch.no_grad()
def greedy(
    model: GPT2, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: int = END_OF_TEXT
) -> list[list[int]]:
    """The most likely continuation of each prompt, all at once over a key-value cache.

    Args:
        model: any GPT-2; its device is used.
        prompts: token ids, each at least one and shorter than the context.
        max_new_tokens: the most ids that each may get; the context's end stops a sequence too.
        stop: the id that ends a sequence; it is not returned. `NO_STOP` for none.

    Returns:
        The new ids of each prompt, in the order of the prompts.
    """
    device = model.wte.weight.device
    outputs: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    cache, logits = _prefill(model, prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    for _ in range(max_new_tokens):
        new = logits.argmax(dim=-1)
        for index, token in zip(alive, new.tolist(), strict=True):
            outputs[index].append(token)
        going = (new != stop) & (lengths < model.config.n_ctx)
        if not going.all():
            alive = [index for index, goes in zip(alive, going.tolist(), strict=True) if goes]
            if not alive:
                break
            kept = going.nonzero().squeeze(1)
            cache.keep(kept)
            new, lengths = new[kept], lengths[kept]
        logits = _decode(model, cache, new, lengths)
        lengths = lengths + 1
    return [ids[:-1] if ids and ids[-1] == stop else ids for ids in outputs]


@torch.no_grad()
def greedy_reference(model: GPT2, prompt: Sequence[int], *, max_new_tokens: int, stop: int = END_OF_TEXT) -> list[int]:
    """The book's `generate`: one prompt, no cache, the whole text computed again for each new token."""
    device = model.wte.weight.device
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        context = torch.tensor([ids[-model.config.n_ctx :]], device=device)
        batch = from_padded(context, torch.full_like(context, -100))
        token = int(model.logits(batch)[-1].argmax())
        if token == stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


class _Cache:
    """Keys and values of `B` sequences: for each layer two `[B, H, S, D]`, of which `lengths` positions are used."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def keep(self, sequences: Tensor) -> None:
        """Drops every sequence but the given ones."""
        self.keys = [keys[sequences] for keys in self.keys]
        self.values = [values[sequences] for values in self.values]

    def grow(self, positions: int) -> None:
        """Makes room for `positions` more tokens."""
        self.keys = [F.pad(keys, (0, 0, 0, positions)) for keys in self.keys]
        self.values = [F.pad(values, (0, 0, 0, positions)) for values in self.values]


_GROW_BY = 64


def _prefill(model: GPT2, prompts: Sequence[Sequence[int]]) -> tuple[_Cache, Tensor]:
    """Runs all prompts, padded at their ends; the cache, and the logits `[B, V]` behind each prompt."""
    device = model.wte.weight.device
    B, W = len(prompts), max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[*prompt, *[0] * (W - len(prompt))] for prompt in prompts], device=device)
    last = torch.tensor([row * W + len(prompt) - 1 for row, prompt in enumerate(prompts)], device=device)
    cache = _Cache()

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(B, W, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # [B, H, W, D]
        cache.keys.append(k)
        cache.values.append(v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)

    hidden = model.hidden(tokens.flatten(), torch.arange(W, device=device).repeat(B), attend)
    return cache, F.linear(hidden[last], model.head)


def _decode(model: GPT2, cache: _Cache, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Runs one new token of each sequence at position `lengths` `[B]`: the logits `[B, V]` behind it."""
    B = len(tokens)
    if int(lengths.max()) >= cache.keys[0].shape[2]:
        cache.grow(_GROW_BY)
    each = torch.arange(B, device=tokens.device)
    # Behind its own token a sequence's cache holds padding of the prefill: not visible, and overwritten in time.
    visible = torch.arange(cache.keys[0].shape[2], device=tokens.device) <= lengths[:, None]  # [B, S]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        keys[each, :, lengths] = k
        values[each, :, lengths] = v
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=visible[:, None, None])
        return out[:, :, 0]

    return F.linear(model.hidden(tokens, lengths, attend), model.head)


def _check_room(prompt_ids: list[list[int]], n_ctx: int, rows: list[int]) -> None:
    too_long = [row for row, ids in zip(rows, prompt_ids, strict=True) if len(ids) >= n_ctx]
    if too_long:
        raise UserError(
            f"the prompts of {len(too_long)} records fill the model's context of {n_ctx} tokens and leave no room for "
            f"a response (first: row {too_long[0]}); shorten them"
        )


@dataclass(frozen=True, slots=True)
class _Answers:
    """The responses of a split on the disk, and beside them what they were made from."""

    path: Path
    made_from: dict[str, Any]

    @classmethod
    def of(cls, run: Run, options: GenerateOptions, records: Sequence[Record], prompts: Sequence[str]) -> _Answers:
        """Answers are taken up again only where weights, prompts, records and options are the same."""
        asked = hashlib.sha256()
        for record, prompt in zip(records, prompts, strict=True):
            asked.update(json.dumps([prompt, record.as_entry()], sort_keys=True).encode())
        with (run.model / "model.safetensors").open("rb") as weights:
            digest = hashlib.file_digest(weights, "sha256").hexdigest()
        made_from = {
            "weights_sha256": digest,
            "asked_sha256": asked.hexdigest(),
            "max_new_tokens": options.max_new_tokens,
        }
        return cls(run.responses_of(options.split), made_from)

    def begin(self) -> None:
        """Forgets what earlier responses were made from: they are of other prompts, weights or options."""
        self._origin.unlink(missing_ok=True)

    def write(self, entries: list[dict[str, Any]]) -> None:
        """Writes the entries answered so far, and with the first ones what they are made from."""
        files.write_json(self.path, entries)
        if not self._origin.is_file():
            files.write_json(self._origin, self.made_from)

    def read(self) -> list[dict[str, Any]]:
        """The entries that an earlier call has answered in the same way."""
        if not (self.path.is_file() and self._origin.is_file()):
            return []
        if files.read_json(self._origin, what="the responses' origin") != self.made_from:
            return []
        answered = files.read_json(self.path, what="responses")
        if not isinstance(answered, list) or not all(isinstance(entry, dict) for entry in answered):
            raise UserError(f"{self.path} is not a list of responses; move it away to answer again")
        return answered

    @property
    def _origin(self) -> Path:
        return self.path.with_suffix(".made-from.json")
