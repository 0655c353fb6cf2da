"""Decoding: many prompts answered at once over one cache of keys and values.

The prompts' common beginning is computed once and lies in the cache once. A prompt whose answer ends makes room for the
next one. There are two decoders behind one function, which give the same text: `fastft.decoding.ragged` computes
exactly the rows that go on, as is best on a CPU; `fastft.decoding.slots` a fixed number of them, without waiting for
the device, so that a GPU is asked for a step by one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from fastft.batches.batch import from_padded
from fastft.decoding import ragged, slots
from fastft.decoding.answers import Answer, NearTie, Request
from fastft.decoding.prefix import common_beginning
from fastft.decoding.sampling import GREEDY, Sampling, ids_without_text
from fastft.model import ops
from fastft.model.gpt2 import GPT2

__all__ = ["NO_STOP", "Answer", "Decoder", "NearTie", "common_beginning", "decode", "greedy", "greedy_reference"]

NO_STOP = -1
"""For `stop`: no id ends a sequence."""

Decoder = Literal["auto", "ragged", "slots"]
"""`auto`: `slots` on a GPU, `ragged` elsewhere. Both run on every device."""


def greedy(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: int | None = None,
    decoder: Decoder = "auto",
    graphs: bool = False,
) -> list[list[int]]:
    """The most likely continuation of each prompt, in the order of the prompts: `decode` of all at once."""
    answers = decode(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop=stop,
        batch_size=max(1, len(prompts)),
        decoder=decoder,
        graphs=graphs,
    )
    return [answer.ids for answer in sorted(answers, key=lambda answer: answer.index)]


@torch.no_grad()
def greedy_reference(model: GPT2, prompt: Sequence[int], *, max_new_tokens: int, stop: int | None = None) -> list[int]:
    """The book's `generate`, which `greedy` is held against: one prompt, no cache, the whole text computed again for
    each new token."""
    device = model.wte.weight.device
    stop = model.config.tokenizer.end_of_text if stop is None else stop
    without_text = ids_without_text(model)
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        context = torch.tensor([ids[-model.config.n_ctx :]], device=device)
        batch = from_padded(context, torch.full_like(context, -100))
        logits = model.logits(batch)[-1]
        token = int((logits if without_text is None else logits.masked_fill(without_text, -torch.inf)).argmax())
        if token == stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


@torch.no_grad()
def decode(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: int | None = None,
    batch_size: int = 64,
    sampling: Sampling = GREEDY,
    streams: Sequence[int] | None = None,
    heard: Callable[[Answer], object] = lambda _: None,
    impl: str = "auto",
    decoder: Decoder = "auto",
    graphs: bool = False,
) -> Iterator[Answer]:
    """Answers prompts, yielding each answer as it ends.

    Args:
        model: any GPT-2, on its device; as it was trained, or `fastft.decoding.inference.prepared`.
        prompts: token ids, each at least one, and none longer than the context.
        max_new_tokens: the most ids that each may get, at least 1; the context's end stops a sequence too.
        stop: the id that ends a sequence, or `NO_STOP`; the end-of-text of the model's tokenizer where not given.
        batch_size: the most sequences that go on at a time.
        sampling: how the next token is chosen.
        streams: which stream of random numbers each prompt has; its index where not given.
        heard: called with each answer that has got a token, while it goes on.
        impl: see `fastft.model.ops`.
        decoder: see `Decoder`.
        graphs: a step of `slots` may be captured as a CUDA graph. Only for a model whose weights lie where they lie
            until the last answer: not for one that gathers them for each use, as the third stage of ZeRO does.

    Raises:
        ValueError: a prompt without a token or longer than the context, or nothing that may be answered.
    """
    _check(model, prompts, max_new_tokens, batch_size)
    device = model.wte.weight.device
    chosen = ("slots" if device.type == "cuda" else "ragged") if decoder == "auto" else decoder
    request = Request(
        model=model,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        stop=model.config.tokenizer.end_of_text if stop is None else stop,
        batch_size=batch_size,
        sampling=sampling,
        streams=streams or range(len(prompts)),
        heard=heard,
        impl=ops.resolve(impl, device),
        graphs=graphs,
        without_text=ids_without_text(model),
    )
    yield from (slots.answers if chosen == "slots" else ragged.answers)(request)


def _check(model: GPT2, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"got {name} = {value}, expected at least 1")
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= model.config.n_ctx:
            raise ValueError(f"got prompt {index} of {len(prompt)} tokens, expected 1 to {model.config.n_ctx}")
