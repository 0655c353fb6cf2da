"""Decoding with as many rows as there are sequences: what a CPU computes is what is asked for, and nothing else.

Every sequence has a row of the cache for its own tokens as long as it goes on. When it ends, the last row moves into
its place, and the next prompt gets the row that became free. Products run over the tokens that are there, without
padding. Each token is looked at before the next one is computed, which a GPU would wait for: `fastft.decoding.slots`.

Letters: N sequences that go on, n of them that are new, S places of a row, W own tokens of the longest new prompt, T
own tokens of all new prompts, laid end to end, H heads, D head dim, C width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.decoding.answers import Answer, Request, next_prompts
from fastft.decoding.kv_cache import BlockCache, KVCache
from fastft.decoding.prefix import Prefix, common_beginning, padded
from fastft.decoding.sampling import Sampler
from fastft.model import ops
from fastft.model.gpt2 import Attend


def answers(request: Request) -> Iterator[Answer]:
    """Answers the prompts, yielding each answer as it ends."""
    sampler = Sampler(request.sampling, request.prompts, request.streams, request.without_text)
    decoder = _Decoder(request)
    waiting = deque(range(len(request.prompts)))
    while waiting or decoder.answers:
        some = next_prompts(waiting, decoder.own_length, request.batch_size - len(decoder.answers))
        first = len(decoder.answers) if some else 0
        hidden = decoder.begin(some) if some else decoder.step()
        asked = decoder.answers[first:]
        choices = sampler.choose(request.model, hidden, [one.index for one in asked], [one.ids for one in asked])
        over = [n for n, one in enumerate(choices, first) if request.take(decoder.answers[n], one.token, one.near)]
        for answer in asked:
            request.heard(answer)
        decoder.note([choice.token for choice in choices], first)
        yield from decoder.drop(over)


class _Decoder:
    """The model, its cache, and the answers that go on: number n has row n of the cache."""

    def __init__(self, request: Request) -> None:
        model = request.model
        config, weight = model.config, model.head  # the cache is of the matrices' dtype
        self._model, self._prompts, self._impl = model, request.prompts, request.impl
        self._device = weight.device
        self.answers: list[Answer] = []
        self._last = torch.zeros(0, dtype=torch.int64, device=self._device)  # [N] tokens that the model has not seen
        head_dim = config.n_embd // config.n_head
        self._is_compiled = ops.has_blocks(request.impl, weight, head_dim)
        self._cache = (BlockCache if self._is_compiled else KVCache)(config.n_layer, config.n_head, weight, head_dim)
        is_cpu = self._device.type == "cpu"  # elsewhere, and in float32, a new size costs nothing
        self._rounding = ops.rounding(self._device, is_narrow=weight.dtype.itemsize == 2) if is_cpu else None
        P = common_beginning(request.prompts)
        beginning = torch.tensor(request.prompts[0][:P] if P else [], dtype=torch.int64, device=self._device)
        self._prefix = Prefix(model, beginning, request.impl)

    def own_length(self, index: int) -> int:
        """Tokens of a prompt behind the common beginning."""
        return len(self._prompts[index]) - self._prefix.length

    def begin(self, indices: Sequence[int]) -> Tensor:
        """Computes new prompts, which get the last rows: the final hidden states behind them, `[n, C]`."""
        P, n, first = self._prefix.length, len(indices), len(self.answers)
        lengths = torch.tensor([self.own_length(index) for index in indices], device=self._device)
        self.answers += [Answer(index) for index in indices]
        self._cache.add(lengths)
        tokens = torch.tensor([t for index in indices for t in self._prompts[index][P:]], device=self._device)  # [T]
        row = torch.arange(n, device=self._device).repeat_interleave(lengths)  # [T]
        last = lengths.cumsum(0) - 1  # [n] of [T]
        place = torch.arange(len(tokens), device=self._device) - (last + 1 - lengths)[row]  # [T]
        attention = self._of_packed(last, row) if self._is_compiled else self._of_padded(lengths, row, place)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = k[: len(tokens)], v[: len(tokens)]
            self._cache.write(layer, row + first, place, k, v)
            if layer == self._model.config.n_layer - 1:  # only the last tokens of the prompts are asked
                out = self._cache.attention(layer, q[:n], self._prefix.of(layer), self._impl, first=first)
            else:
                out = attention(layer, q[: len(tokens)], k, v)
            return F.pad(out, (0, 0, 0, 0, 0, len(q) - len(out)))

        return self._hidden(tokens, place + P, attend, last)

    def step(self) -> Tensor:
        """Computes the last token of each answer: the final hidden states, `[N, C]`."""
        place = self._cache.extend()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._cache.step_attention(layer, q, k, v, self._prefix.of(layer), self._impl)

        return self._hidden(self._last, place + self._prefix.length, attend)

    def _of_packed(self, last: Tensor, row: Tensor) -> Attend:
        """Attention of new prompts' own tokens, as they lie."""
        P, T = self._prefix.length, len(row)
        until = torch.cat([torch.full((P,), P + T), P + 1 + last[row]]).to(torch.int32)
        return lambda layer, q, k, v: self._prefix.packed_attention(layer, q, k, v, until)

    def _of_padded(self, lengths: Tensor, row: Tensor, place: Tensor) -> Attend:
        """The same, in rows of equal length."""
        visible = self._prefix.visible(int(lengths.max()), self._device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = (padded(x, row, place, len(lengths), len(visible)).transpose(1, 2) for x in (k, v))
            return self._prefix.prompt_attention(layer, q, keys, values, row, place, visible)

        return attend

    def _hidden(self, tokens: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """The final hidden states of all tokens `[T]`, or of `rows` `[n]` alone, in products of few sizes: attention is
        given further tokens and rows behind them, which it is not to look at."""
        T, n = len(tokens), len(tokens if rows is None else rows)
        more = self._more(T)
        asked = None if rows is None else F.pad(rows, (0, self._more(n)))
        if more:
            tokens, positions = F.pad(tokens, (0, more)), F.pad(positions, (0, more))
        return self._model.hidden(tokens, positions, attend, rows=asked, impl=self._impl)[:n]

    def _more(self, n: int) -> int:
        """Padding of n rows; one alone has none."""
        return 0 if self._rounding is None or n == 1 else self._rounding(n) - n

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
