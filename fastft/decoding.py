"""Decoding: many prompts answered at once over one cache of keys and values.

The prompts' common beginning is computed once and lies in the cache once. Every sequence has a row of the cache for its
own tokens as long as it goes on. When it ends, the last row moves into its place, and the next prompt gets the row that
became free. Products run over the tokens that are there, without padding.

Letters: N sequences that go on, n of them that are new, P tokens of the common beginning, S places of a row, W own
tokens of the longest new prompt, T own tokens of all new prompts, laid end to end, H heads, D head dim, C width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft import ops
from fastft.batch import from_padded
from fastft.kv_cache import KVCache
from fastft.model import GPT2
from fastft.sampling import GREEDY, Choice, Sampler, Sampling
from fastft.tokenizer import END_OF_TEXT

NO_STOP = -1
"""For `stop`: no id ends a sequence."""

_PROMPT_TOKENS = 2048
"""The most own tokens of prompts that are computed at once, which bounds what that takes in memory."""


@dataclass(frozen=True, slots=True)
class NearTie:
    """A place where the two best logits lay close together: another order of summing might choose the other token."""

    position: int
    """In the answer, from 0."""
    chosen: int
    other: int
    gap: float


@dataclass(slots=True)
class Answer:
    """The answer to a prompt.

    Attributes:
        index: the prompt's.
        ids: the new tokens, without the one that ended them.
        near_ties: where a greedy choice was a close one.
    """

    index: int
    ids: list[int] = field(default_factory=list)
    near_ties: list[NearTie] = field(default_factory=list)


def greedy(
    model: GPT2, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: int = END_OF_TEXT
) -> list[list[int]]:
    """The most likely continuation of each prompt, in the order of the prompts: `decode` of all at once."""
    answers = decode(model, prompts, max_new_tokens=max_new_tokens, stop=stop, batch_size=max(1, len(prompts)))
    return [answer.ids for answer in sorted(answers, key=lambda answer: answer.index)]


@torch.no_grad()
def greedy_reference(model: GPT2, prompt: Sequence[int], *, max_new_tokens: int, stop: int = END_OF_TEXT) -> list[int]:
    """The book's `generate`, which `greedy` is held against: one prompt, no cache, the whole text computed again for
    each new token."""
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


@torch.no_grad()
def decode(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: int = END_OF_TEXT,
    batch_size: int = 64,
    sampling: Sampling = GREEDY,
    streams: Sequence[int] | None = None,
    heard: Callable[[Answer], object] = lambda _: None,
    impl: str = "auto",
) -> Iterator[Answer]:
    """Answers prompts, yielding each answer as it ends.

    Args:
        model: any GPT-2, on its device; as it was trained, or `fastft.inference.prepared`.
        prompts: token ids, each at least one and shorter than the context.
        max_new_tokens: the most ids that each may get; the context's end stops a sequence too.
        stop: the id that ends a sequence; `NO_STOP` for none.
        batch_size: the most sequences that go on at a time.
        sampling: how the next token is chosen.
        streams: which stream of random numbers each prompt has; its index where not given.
        heard: called with each answer that has got a token, while it goes on.
        impl: see `fastft.ops`.
    """
    sampler = Sampler(sampling, prompts, streams or range(len(prompts)))
    decoder = _Decoder(model, prompts, ops.resolve(impl, model.wte.weight.device))
    ends = _Ends(max_new_tokens, stop, model.config.n_ctx, [len(prompt) for prompt in prompts])
    waiting = deque(range(len(prompts)))
    while waiting or decoder.answers:
        some = _next_ones(waiting, decoder, batch_size - len(decoder.answers))
        first = len(decoder.answers) if some else 0
        hidden = decoder.begin(some) if some else decoder.step()
        asked = decoder.answers[first:]
        choices = sampler.choose(model, hidden, [one.index for one in asked], [one.ids for one in asked])
        over = [n for n, choice in enumerate(choices, first) if ends.take(decoder.answers[n], choice)]
        for answer in asked:
            heard(answer)
        decoder.note([choice.token for choice in choices], first)
        yield from decoder.drop(over)


def _next_ones(waiting: deque[int], decoder: _Decoder, most: int) -> list[int]:
    """The next prompts whose own tokens are computed together."""
    some: list[int] = []
    tokens = 0
    while waiting and len(some) < most:
        tokens += decoder.own_length(waiting[0])
        if some and tokens > _PROMPT_TOKENS:
            break
        some.append(waiting.popleft())
    return some


@dataclass(frozen=True, slots=True)
class _Ends:
    """Gives answers their tokens, and says when they end."""

    max_new_tokens: int
    stop: int
    n_ctx: int
    prompt_lengths: list[int]

    def take(self, answer: Answer, choice: Choice) -> bool:
        """Takes a chosen token up; whether the answer is over."""
        if choice.near is not None:
            tie = NearTie(len(answer.ids), choice.token, choice.near.other, choice.near.gap)
            answer.near_ties.append(tie)
        if choice.token == self.stop:
            return True
        answer.ids.append(choice.token)
        whole = self.prompt_lengths[answer.index] + len(answer.ids)
        return len(answer.ids) >= self.max_new_tokens or whole > self.n_ctx


class _Decoder:
    """The model, its cache, and the answers that go on: number n has row n of the cache."""

    def __init__(self, model: GPT2, prompts: Sequence[Sequence[int]], impl: str) -> None:
        config, weight = model.config, model.head  # the cache is of the matrices' dtype
        self._model, self._prompts, self._impl = model, prompts, impl
        self._device = weight.device
        self.answers: list[Answer] = []
        self._last = torch.zeros(0, dtype=torch.int64, device=self._device)  # [N] tokens that the model has not seen
        self._cache = KVCache(config.n_layer, config.n_head, weight, config.n_embd // config.n_head)
        self._prefix_length = common_beginning(prompts)
        self._prefix: list[tuple[Tensor, Tensor]] = []  # of each layer two [P, H, D]
        if self._prefix_length:
            self._compute_prefix()

    def own_length(self, index: int) -> int:
        """Tokens of a prompt behind the common beginning."""
        return len(self._prompts[index]) - self._prefix_length

    def begin(self, indices: Sequence[int]) -> Tensor:
        """Computes new prompts, which get the last rows: the final hidden states behind them, `[n, C]`."""
        P, n, first = self._prefix_length, len(indices), len(self.answers)
        lengths = torch.tensor([self.own_length(index) for index in indices], device=self._device)
        self.answers += [Answer(index) for index in indices]
        self._cache.add(lengths)
        tokens = torch.tensor([t for index in indices for t in self._prompts[index][P:]], device=self._device)  # [T]
        row = torch.arange(n, device=self._device).repeat_interleave(lengths)  # [T]
        last = lengths.cumsum(0) - 1  # [n] of [T]
        place = torch.arange(len(tokens), device=self._device) - (last + 1 - lengths)[row]  # [T]
        visible = self._visible(int(lengths.max()))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._cache.write(layer, row + first, place, k, v)
            if layer == self._model.config.n_layer - 1:  # only the last tokens of the prompts are asked
                return self._decode_attention(layer, q, first)
            return self._prompt_attention(layer, q, row, place, first, visible)

        return self._model.hidden(tokens, place + P, attend, rows=last, impl=self._impl)

    def step(self) -> Tensor:
        """Computes the last token of each answer: the final hidden states, `[N, C]`."""
        place = self._cache.extend()
        rows = torch.arange(len(place), device=self._device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._cache.write(layer, rows, place, k, v)
            return self._decode_attention(layer, q, 0)

        return self._model.hidden(self._last, place + self._prefix_length, attend, impl=self._impl)

    def note(self, tokens: list[int], first: int) -> None:
        """The answers from number `first` on have been given these tokens."""
        self._last = torch.cat([self._last[:first], torch.tensor(tokens, device=self._device)])

    def drop(self, numbers: list[int]) -> list[Answer]:
        """Gives up the rows of answers that are over; returns them."""
        if not numbers:
            return []
        ended = [self.answers[number] for number in numbers]
        order = self._cache.drop(set(numbers))
        self.answers = [self.answers[number] for number in order]
        self._last = self._last[torch.tensor(order, dtype=torch.int64, device=self._device)]
        return ended

    def _compute_prefix(self) -> None:
        tokens = torch.tensor(self._prompts[0][: self._prefix_length], device=self._device)

        def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._prefix.append((k.contiguous(), v.contiguous()))
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)

        self._model.hidden(tokens, torch.arange(len(tokens), device=self._device), attend, impl=self._impl)

    def _visible(self, W: int) -> Tensor:
        """`[W, P + W]`: an own token sees the common beginning, and its own row up to itself."""
        own = torch.ones(W, W, dtype=torch.bool, device=self._device).tril()
        return torch.cat([own.new_ones(W, self._prefix_length), own], dim=1)

    def _prompt_attention(
        self, layer: int, q: Tensor, row: Tensor, place: Tensor, first: int, visible: Tensor
    ) -> Tensor:
        """Attention of new prompts' own tokens, `[T, H, D]`, over the common beginning and their rows."""
        W = len(visible)
        keys, values = (x[:, :, :W] for x in self._cache.read(layer, first))
        n, H, _, D = keys.shape
        padded = q.new_zeros(n, W, H, D)
        padded[row, place] = q
        if self._prefix:
            of_prefix = [x.transpose(0, 1).expand(n, H, self._prefix_length, D) for x in self._prefix[layer]]
            keys, values = torch.cat([of_prefix[0], keys], dim=2), torch.cat([of_prefix[1], values], dim=2)
        out = F.scaled_dot_product_attention(padded.transpose(1, 2), keys, values, attn_mask=visible)
        return out.transpose(1, 2)[row, place]

    def _decode_attention(self, layer: int, q: Tensor, first: int) -> Tensor:
        """Attention of one token of each answer from number `first` on, `[n, H, D]`, over all that it sees."""
        keys, values = (x.transpose(1, 2) for x in self._cache.read(layer, first))
        prefix = self._prefix[layer] if self._prefix else None
        return ops.attention_decode(q, keys, values, self._cache.lengths[first:], prefix, self._impl)


def common_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; at least one of each is left to be its own."""
    if len(prompts) < 2:
        return 0
    first, last = min(map(list, prompts)), max(map(list, prompts))  # in lexical order all others lie between them
    least = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(least) if first[i] != last[i]), least)
