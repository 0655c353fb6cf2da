"""What decoders are asked for, and what they give: prompts and limits, answers and where they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fastft.decoding.sampling import Near, Sampling
from fastft.model.gpt2 import GPT2

PROMPT_TOKENS = 2048
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Prompts that are to be answered: see `fastft.decoding.decode.decode` for what each argument means.

    Attributes:
        streams: one of random numbers for each prompt.
        impl: resolved for the model's device.
        without_text: `[V]` bool on the model's device, the ids that are never chosen; None without any.
    """

    model: GPT2
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    stop: int
    batch_size: int
    sampling: Sampling
    streams: Sequence[int]
    heard: Callable[[Answer], object]
    impl: str
    graphs: bool
    without_text: Tensor | None

    def limit(self, index: int) -> int:
        """The most ids that a prompt's answer gets. The one behind a full context is the last: no more follows it."""
        return min(self.max_new_tokens, self.model.config.n_ctx + 1 - len(self.prompts[index]))

    def take(self, answer: Answer, token: int, near: Near | None) -> bool:
        """Gives an answer a chosen token; whether that ends it."""
        if near is not None:
            answer.near_ties.append(NearTie(len(answer.ids), token, near.other, near.gap))
        if token == self.stop:
            return True
        answer.ids.append(token)
        return len(answer.ids) >= self.limit(answer.index)


def next_prompts(waiting: deque[int], own_length: Callable[[int], int], most: int) -> list[int]:
    """Takes the next prompts off `waiting`, at most so many, whose own tokens are computed together."""
    some: list[int] = []
    tokens = 0
    while waiting and len(some) < most:
        tokens += own_length(waiting[0])
        if some and tokens > PROMPT_TOKENS:
            break
        some.append(waiting.popleft())
    return some
