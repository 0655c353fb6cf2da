"""Decoding with a fixed number of rows, which never waits for the token that it has just asked for.

A step of all rows does the same work at the same addresses whatever they hold, so that a GPU is asked for it by one
call (`fastft.gpu.cuda_graphs`). The last tokens, the lengths, and which rows go on are kept on the device, where each
token is chosen as well. The host looks at the tokens every few steps, and then at those of the steps before the ones
that it has asked for last: while it reads what is there, the device is busy with what follows. A row whose sequence
ends idles until the host has seen that, and gets the next prompt then; what was computed for it in between is thrown
away.

Letters: N rows, n of them that get new prompts, P tokens of the common beginning, S places of a row, W own tokens of
the longest new prompt, T own tokens of all new prompts, laid end to end, H heads, D head dim, C width, V vocab.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastft.decoding.answers import Answer, Request, next_prompts
from fastft.decoding.kv_cache import FixedCache
from fastft.decoding.prefix import Prefix, common_beginning, padded
from fastft.decoding.sampling import Chosen, Uniforms, choose_there
from fastft.gpu.cuda_graphs import Graphs
from fastft.gpu.transfers import Reading, pinned
from fastft.model import ops

LOOK_EVERY = 8
"""Steps from one look at the tokens to the next. When a sequence ends its row idles for 1.5 times as many, on average;
with fewer, the host has less time for what it has read while the device is busy."""

_REFILLS = 8
"""New prompts are computed for so large a part of the rows at once: nothing of that is captured, so that a GPU is asked
for it by hundreds of calls, as long as for several looks."""

Ints = npt.NDArray[np.int64]


def answers(request: Request) -> Iterator[Answer]:
    """Answers the prompts, yielding each answer as it ends."""
    return _Decoder(request).answers() if request.prompts else iter(())


def _sent(device: torch.device, *arrays: Sequence[int] | Ints) -> tuple[Tensor, ...]:
    """Each of the arrays on the device, int64: all in one copy, which is not waited for."""
    parts = [np.asarray(array, dtype=np.int64) for array in arrays]
    whole = pinned(torch.from_numpy(np.concatenate(parts)), device).to(device, non_blocking=True)
    views: tuple[Tensor, ...] = whole.split([len(part) for part in parts])
    return views


@dataclass(slots=True)
class _Sequence:
    """What the host knows of a row's sequence, ahead of what it has read.

    Attributes:
        filled: places of the cache that are filled when all that was asked for is done; at most so many.
        left: steps that it may still be given.
    """

    answer: Answer
    filled: int
    left: int


@dataclass(frozen=True, slots=True)
class _Look:
    """Tokens that were asked for: `steps` for each of `answers`; None for a row that has no prompt."""

    reading: Reading
    steps: int
    answers: list[Answer | None]


@dataclass(frozen=True, slots=True)
class _Prompts:
    """New prompts on the device, int64.

    Attributes:
        W: own tokens of the longest.
        rows: `[n]` which row each of them gets.
        lengths, ends: `[n]` the row's length behind it, and where its sequence ends at the latest.
        tokens, number, place: `[T]` their own tokens, which prompt each is of, and where in its own part.
        last: `[n]` of `[T]`, the prompts' last tokens.
        seen_rows, seen: `[E]` each different token of each prompt, and its row; none where that changes nothing.
    """

    W: int
    rows: Tensor
    lengths: Tensor
    ends: Tensor
    tokens: Tensor
    number: Tensor
    place: Tensor
    last: Tensor
    seen_rows: Tensor
    seen: Tensor


class _State:
    """What a step reads and writes on the device, at addresses that stay.

    Attributes:
        tokens: `[N]` the last token of each row, which the model has not seen.
        lengths: `[N]` filled places.
        ends: `[N]` the length at which the row's sequence ends at the latest.
        goes_on: `[N]` bool; a row that does not keeps its length, and sees nothing.
        seen: `[N, V]` bool, tokens that are there already; None where that changes nothing.
        uniform: `[LOOK_EVERY, N]` float64, the next steps' random numbers; None where nothing is drawn.
        chosen: `[LOOK_EVERY, N, 3]` what the steps since the last look chose.
        step: `[1]` how many steps that are.

    All are int64 where nothing else is said.
    """

    def __init__(self, request: Request, rows: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens, self.lengths, self.ends = zeros(rows), zeros(rows), zeros(rows)
        self.goes_on = zeros(rows, dtype=torch.bool)
        self.chosen, self.step = zeros(LOOK_EVERY, rows, 3), zeros(1)
        V, sampling = request.model.config.vocab_size, request.sampling
        self.seen = zeros(rows, V, dtype=torch.bool) if sampling.repetition_penalty != 1 else None
        self.uniform = zeros(LOOK_EVERY, rows, dtype=torch.float64) if sampling.temperature else None
        self._stop = request.stop

    def begin(self, new: _Prompts) -> None:
        """Gives rows to new sequences, of which the prompts' tokens are there already."""
        self.lengths.index_copy_(0, new.rows, new.lengths)
        self.ends.index_copy_(0, new.rows, new.ends)
        if self.seen is not None:
            self.seen.index_fill_(0, new.rows, False)
            self.seen.index_put_((new.seen_rows, new.seen), self.seen.new_ones(len(new.seen)))

    def take_first(self, rows: Tensor, chosen: Tensor) -> None:
        """What `[n, 3]` was chosen behind the prompts of the rows `[n]`."""
        tokens = chosen[:, 0].clamp_min(0)
        self.tokens.index_copy_(0, rows, tokens)
        goes_on = (tokens != self._stop) & (self.lengths[rows] < self.ends[rows])
        self.goes_on.index_copy_(0, rows, goes_on)
        if self.seen is not None:
            self.seen.index_put_((rows, tokens), torch.ones_like(goes_on))

    def take(self, chosen: Tensor) -> None:
        """What `[N, 3]` a step chose, which filled one more place of each row that goes on."""
        self.chosen.index_copy_(0, self.step, chosen[None])
        self.step += 1
        self.tokens.copy_(chosen[:, 0].clamp_min(0))  # no number, no token: the host ends it all when it sees that
        self.lengths += self.goes_on
        self.goes_on &= (self.tokens != self._stop) & (self.lengths < self.ends)
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens[:, None], True)


class _Decoder:
    """The model, its cache, and the sequences that go on."""

    def __init__(self, request: Request) -> None:
        model, prompts = request.model, request.prompts
        config, weight = model.config, model.head  # the cache is of the matrices' dtype
        N = min(request.batch_size, len(prompts))
        self._request, self._device = request, weight.device
        self._waiting = deque(range(len(prompts)))
        self._rows: list[_Sequence | None] = [None] * N
        self._row_of: dict[int, int] = {}  # by the prompt, of answers that go on
        self._looks: deque[_Look] = deque()
        self._uniforms = Uniforms(request.sampling.seed, request.streams)
        self._state = _State(request, N, self._device)
        self._every_row = torch.arange(N, device=self._device)
        (beginning,) = _sent(self._device, prompts[0][: common_beginning(prompts)])
        self._prefix = Prefix(model, beginning, request.impl)
        most = max(self._end_of(index) for index in range(len(prompts))) + 1  # a row at its end still writes one
        head_dim = config.n_embd // config.n_head
        self._cache = FixedCache(config.n_layer, config.n_head, weight, head_dim, rows=N, most=most)
        self._graphs = Graphs(self._device, "decoding", enabled=request.graphs)

    def answers(self) -> Iterator[Answer]:
        """Yields each answer as it ends."""
        while self._waiting or self._row_of:
            self._refill()
            is_busy = self._ask_for_steps()
            while len(self._looks) > is_busy:  # the last one is looked at when the next steps have been asked for
                yield from self._take(self._looks.popleft())

    def _own_length(self, index: int) -> int:
        """Tokens of a prompt behind the common beginning."""
        return len(self._request.prompts[index]) - self._prefix.length

    def _end_of(self, index: int) -> int:
        """The places that a prompt and its answer fill at the most: its last token is not put in."""
        return self._own_length(index) + self._request.limit(index) - 1

    def _refill(self) -> None:
        """Gives the rows that are free to prompts that wait, once it is worth what computing prompts costs."""
        free = self._rows.count(None)
        if free >= min(len(self._waiting), max(1, len(self._rows) // _REFILLS)):
            while some := next_prompts(self._waiting, self._own_length, self._rows.count(None)):
                self._begin(some)

    def _begin(self, indices: Sequence[int]) -> None:
        """Gives free rows to prompts: computes them, and chooses the first token of each answer."""
        free = [row for row, sequence in enumerate(self._rows) if sequence is None][: len(indices)]
        answers = [Answer(index) for index in indices]
        for row, answer in zip(free, answers, strict=True):
            filled = self._own_length(answer.index)
            self._rows[row] = _Sequence(answer, filled, left=self._end_of(answer.index) - filled)
            self._row_of[answer.index] = row
        self._make_room()
        chosen = self._compute_prompts(indices, free)
        self._looks.append(_Look(Reading(chosen[None]), 1, [*answers]))

    def _compute_prompts(self, indices: Sequence[int], free: Sequence[int]) -> Tensor:
        """Puts prompts into the rows `free`, `[n]` both: what was chosen behind them, `[n, 3]` of `choose_there`."""
        request, state, n = self._request, self._state, len(indices)
        new = self._sent_prompts(indices, free)
        state.begin(new)
        row = new.rows[new.number]
        visible = self._prefix.visible(new.W, self._device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._cache.write(layer, row, new.place, k, v)
            keys, values = (padded(x, new.number, new.place, n, new.W) for x in (k, v))
            if layer == request.model.config.n_layer - 1:  # only the last tokens of the prompts are asked
                return ops.attention_decode(q, keys, values, new.lengths, self._prefix.of(layer), request.impl)
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            return self._prefix.prompt_attention(layer, q, keys, values, new.number, new.place, visible)

        positions = new.place + self._prefix.length
        hidden = request.model.hidden(new.tokens, positions, attend, rows=new.last, impl=request.impl)
        seen = None if state.seen is None else state.seen.index_select(0, new.rows)
        uniform = None
        if state.uniform is not None:
            uniform = self._drawn(indices, 1).to(self._device, non_blocking=True).T
        chosen = self._choose(hidden, seen, uniform)
        state.take_first(new.rows, chosen)
        return chosen

    def _sent_prompts(self, indices: Sequence[int], free: Sequence[int]) -> _Prompts:
        prompts = [self._request.prompts[index] for index in indices]
        P = self._prefix.length
        own = np.array([len(prompt) - P for prompt in prompts])
        number, behind = np.repeat(np.arange(len(own)), own), own.cumsum()
        ids = [sorted(set(prompt)) if self._state.seen is not None else [] for prompt in prompts]
        return _Prompts(
            int(own.max()),
            *_sent(
                self._device,
                free,
                own,
                [self._end_of(index) for index in indices],
                [token for prompt in prompts for token in prompt[P:]],
                number,
                np.arange(len(number)) - (behind - own)[number],
                behind - 1,
                np.repeat(free, [len(of_prompt) for of_prompt in ids]),
                [token for of_prompt in ids for token in of_prompt],
            ),
        )

    def _ask_for_steps(self) -> bool:
        """Asks for the steps up to the next look, as far as a sequence may need them; whether there are any."""
        busy = [sequence for sequence in self._rows if sequence is not None]
        steps = min(LOOK_EVERY, max((sequence.left for sequence in busy), default=0))
        if steps <= 0:
            return False
        for sequence in busy:
            more = min(steps, sequence.left)
            sequence.filled, sequence.left = sequence.filled + more, sequence.left - more
        self._make_room()
        answers = [None if sequence is None else sequence.answer for sequence in self._rows]
        if self._state.uniform is not None:
            prompts = [None if answer is None else answer.index for answer in answers]
            self._state.uniform.copy_(self._drawn(prompts, LOOK_EVERY), non_blocking=True)
        self._state.step.zero_()
        for _ in range(steps):
            self._graphs.run(self._cache.places, self._step)
        self._looks.append(_Look(Reading(self._state.chosen), steps, answers))
        return True

    def _make_room(self) -> None:
        """Places for all that was asked for, and one behind it, which a row at its end writes again and again."""
        self._cache.make_room(max(sequence.filled for sequence in self._rows if sequence is not None) + 1)

    def _step(self) -> None:
        """The next token of each row: the same work at the same addresses, whatever they hold."""
        request, state, cache = self._request, self._state, self._cache
        visible = (state.lengths + 1) * state.goes_on

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer, self._every_row, state.lengths, k, v)
            keys, values = cache.keys[layer].transpose(1, 2), cache.values[layer].transpose(1, 2)
            return ops.attention_decode(q, keys, values, visible, self._prefix.of(layer), request.impl)

        # A row at the context's end has no position left, and needs none.
        positions = (state.lengths + self._prefix.length).clamp_max(request.model.config.n_ctx - 1)
        hidden = request.model.hidden(state.tokens, positions, attend, impl=request.impl)
        uniform = None if state.uniform is None else state.uniform.index_select(0, state.step).T
        state.take(self._choose(hidden, state.seen, uniform))

    def _choose(self, hidden: Tensor, seen: Tensor | None, uniform: Tensor | None) -> Tensor:
        request = self._request
        return choose_there(
            request.model, hidden, request.sampling, seen=seen, uniform=uniform, without_text=request.without_text
        )

    def _drawn(self, prompts: Sequence[int | None], steps: int) -> Tensor:
        """The random numbers of the next steps, `[steps, n]` float64 on the host; where there is no prompt, zeros."""
        numbers = np.zeros((steps, len(prompts)))
        for column, prompt in enumerate(prompts):
            if prompt is not None:
                numbers[:, column] = self._uniforms.draw(prompt, steps)
        return pinned(torch.from_numpy(numbers), self._device)

    def _take(self, look: _Look) -> Iterator[Answer]:
        """Gives the answers their tokens; yields those that end."""
        chosen = Chosen(look.reading.get())
        on = [
            (n, answer) for n, answer in enumerate(look.answers) if answer is not None and answer.index in self._row_of
        ]
        for step in range(look.steps):
            over = [answer for n, answer in on if self._request.take(answer, *chosen.at(step, n))]
            for _, answer in on:
                self._request.heard(answer)
            for answer in over:
                self._rows[self._row_of.pop(answer.index)] = None
                yield answer
            on = [(n, answer) for n, answer in on if answer.index in self._row_of]
