"""How the next token is chosen from the logits: the most likely one, or drawn, with penalties and cuts.

A sequence draws from random numbers of its own, so that its answer does not depend on what else is answered with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.common.errors import UserError
from fastft.model import ops
from fastft.model.gpt2 import GPT2

NEAR = 1e-4
"""Two best logits so close may change places by the order of a sum."""

_BF16_STEP = 2.0**-7
"""Between a bf16 number and the next, relative to it, at most: logits that round to the best one lie within it."""

_BLOCK = 512

_LEAST_TEMPERATURE = 1e-6
"""A logit divided by much less is no number any more."""

NO_NUMBER = -1
"""In place of a token: the row's logits are not numbers."""

NO_OTHER = -1
"""In place of the second best token: it does not come close."""

_NO_NUMBERS = "the model's logits are not numbers: its weights are damaged, or its training went astray"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: the logits' divisor; 0 takes the most likely token.
        top_k: draw from so many most likely tokens; 0 from all.
        top_p: draw from the fewest most likely tokens whose probability is at least this (Holtzman et al. 2020, "The
            Curious Case of Neural Text Degeneration", arXiv:1904.09751).
        repetition_penalty: divides the positive logits of tokens that are there already, in prompt or answer, and
            multiplies the negative ones (Keskar et al. 2019, "CTRL", arXiv:1909.05858); 1 changes nothing.
        seed: of the random numbers; each sequence has its own stream.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 123

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise UserError(
                f"got --temperature {self.temperature}, expected 0 (most likely token), or {_LEAST_TEMPERATURE} or more"
            )
        if self.top_k < 0:
            raise UserError(f"got --top_k {self.top_k}, expected a whole number from 0 (all tokens) on")
        if not 0 < self.top_p <= 1:
            raise UserError(f"got --top_p {self.top_p}, expected more than 0 and at most 1 (all tokens)")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(
                f"got --repetition_penalty {self.repetition_penalty}, expected more than 0; 1 changes nothing"
            )
        if self.seed < 0:
            raise UserError(f"got --seed {self.seed}, expected at least 0")

    def in_effect(self) -> dict[str, float | int]:
        """The values that answers depend on: without a temperature nothing is drawn."""
        values = asdict(self)
        return values if self.temperature else {name: values[name] for name in ("temperature", "repetition_penalty")}


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Near:
    """The second best token, and how far its logit lies below the best one's."""

    other: int
    gap: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token; `near` where a greedy choice was a close one."""

    token: int
    near: Near | None = None


class Uniforms:
    """Uniform random numbers in [0, 1): each prompt has a stream of its own, and takes one for each of its tokens."""

    def __init__(self, seed: int, streams: Sequence[int]) -> None:
        self._streams = [np.random.default_rng([seed, stream]) for stream in streams]

    def draw(self, prompt: int, count: int) -> npt.NDArray[np.float64]:
        """The next `count` numbers of a prompt's stream."""
        return self._streams[prompt].random(count)


def ids_without_text(model: GPT2) -> Tensor | None:
    """`[V]` bool on the model's device, the ids that stand for no text: they are never chosen. None without any."""
    mask = model.config.tokenizer.without_text(model.config.vocab_size)
    return None if mask is None else torch.from_numpy(mask).to(model.head.device)


def _of_texts(logits: Tensor, without_text: Tensor | None) -> Tensor:
    """The logits `[n, V]`, of ids without a text minus infinity."""
    return logits if without_text is None else logits.masked_fill(without_text, -torch.inf)


class Sampler:
    """Chooses the next tokens of sequences, each by its prompt's number, and tells the host."""

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        streams: Sequence[int],
        without_text: Tensor | None = None,
    ) -> None:
        """Args: how to choose; the prompts; which stream of random numbers each of them has; and `[V]` bool, the ids
        that are never chosen (`ids_without_text`)."""
        self._sampling = sampling
        self._prompts = prompts
        self._without_text = without_text
        self._uniforms = Uniforms(sampling.seed, streams)

    def choose(
        self, model: GPT2, hidden: Tensor, prompts: Sequence[int], answers: Sequence[Sequence[int]]
    ) -> list[Choice]:
        """The next token of each sequence.

        Args:
            model: has the head.
            hidden: `[n, C]`, the final hidden states.
            prompts: `[n]`, the number of each sequence's prompt.
            answers: `[n]`, the ids of each answer so far.
        """
        logits = _of_texts(model.logits_of(hidden), self._without_text)  # [n, V]
        exact = _is_exact(logits)
        penalty = self._sampling.repetition_penalty
        seen = None
        if penalty != 1:
            seen, logits = self._seen(prompts, answers, logits.device), logits.float()
            logits[seen] = _penalised(logits[seen], penalty)
        if self._sampling.temperature:
            return [Choice(token) for token in self._drawn(logits, prompts)]
        rows, tokens = _near_best(logits, exact=exact)
        if exact:
            scores = logits[rows, tokens]
        else:  # rounded: the products of all that may be the best are summed again
            scores = (hidden[rows].float() * model.head[tokens].float()).sum(dim=-1)
            if seen is not None:
                is_seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
                is_seen[seen] = True
                scores = torch.where(is_seen[rows, tokens], _penalised(scores, penalty), scores)
        n, of_rows = len(logits), rows.tolist()
        if of_rows == [*range(n)]:  # as most of the time: none comes close to any best one
            return [Choice(token) for token in tokens.tolist()]
        return _best(n, zip(of_rows, tokens.tolist(), scores.tolist(), strict=True))

    def _seen(
        self, prompts: Sequence[int], answers: Sequence[Sequence[int]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Rows and tokens that are there already, in prompt or answer, each once."""
        ids = [{*self._prompts[prompt], *answer} for prompt, answer in zip(prompts, answers, strict=True)]
        places = [(row, token) for row, of_row in enumerate(ids) for token in of_row]
        rows, tokens = torch.tensor(places, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
        return rows, tokens

    def _drawn(self, logits: Tensor, prompts: Sequence[int]) -> list[int]:
        """One token of each row, by one uniform number of its sequence."""
        uniform = torch.from_numpy(np.stack([self._uniforms.draw(prompt, 1) for prompt in prompts]))  # [n, 1]
        tokens, are_numbers = _drawn(logits, uniform.to(logits.device), self._sampling)
        if not are_numbers.all():
            raise UserError(_NO_NUMBERS)
        chosen: list[int] = tokens.tolist()
        return chosen


def choose_there(
    model: GPT2,
    hidden: Tensor,
    sampling: Sampling,
    *,
    seen: Tensor | None,
    uniform: Tensor | None,
    without_text: Tensor | None = None,
) -> Tensor:
    """The next token of each row, chosen as by `Sampler`, and left on the device: nothing here waits for it.

    Where logits are rounded to 16 bits, `Sampler` sums the products of those that may be the best again in float32.
    Which ones those are is not known here, so all are summed in float32 to begin with.

    Args:
        model: has the head.
        hidden: `[n, C]`, the final hidden states.
        sampling: how to choose.
        seen: `[n, V]` bool, which tokens are there already; where there is a penalty for that.
        uniform: `[n, 1]` float64 random numbers; where tokens are drawn.
        without_text: `[V]` bool, the ids that are never chosen (`ids_without_text`).

    Returns:
        `[n, 3]` int64, for `Chosen`: the token, or `NO_NUMBER`; the second best where it comes close, or `NO_OTHER`;
        and the bits of the float64 gap between them.
    """
    is_drawn = sampling.temperature != 0
    logits = model.logits_of(hidden) if is_drawn or _is_exact(hidden) else _wide_logits(hidden, model.head)  # [n, V]
    logits = _of_texts(logits, without_text)
    if seen is not None:
        logits = logits.float()
        logits = torch.where(seen, _penalised(logits, sampling.repetition_penalty), logits)
    if uniform is not None:
        tokens, are_numbers = _drawn(logits, uniform, sampling)
        others, gaps = torch.full_like(tokens, NO_OTHER), torch.zeros_like(uniform[:, 0])
    else:
        tokens, others, gaps, are_numbers = _two_best(logits)
    tokens = torch.where(are_numbers, tokens, NO_NUMBER)
    return torch.stack([tokens, others, gaps.view(torch.int64)], dim=1)


class Chosen:
    """What `choose_there` has chosen in several steps, on the host."""

    def __init__(self, table: Tensor) -> None:
        """Args: `[steps, n, 3]` of `choose_there`, in host memory."""
        self._tokens, self._others = table[..., 0].tolist(), table[..., 1].tolist()
        self._gaps = table[..., 2].view(torch.float64).tolist()

    def at(self, step: int, row: int) -> tuple[int, Near | None]:
        """The token, and the second best where a greedy choice was a close one.

        Raises:
            UserError: the logits that it was chosen from are not numbers.
        """
        token, other = self._tokens[step][row], self._others[step][row]
        if token == NO_NUMBER:
            raise UserError(_NO_NUMBERS)
        return token, None if other == NO_OTHER else Near(other, self._gaps[step][row])


def _is_exact(x: Tensor) -> bool:
    """Whether numbers of its dtype are told apart as closely as `NEAR` asks."""
    return x.dtype not in (torch.bfloat16, torch.float16)


def _wide_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """`[n, C]` and `[V, C]` of 16 bits -> `[n, V]` float32: the sums, not rounded again."""
    if hidden.device.type == "cuda" and torch.version.hip is None:
        return torch.mm(hidden, head.t(), out_dtype=torch.float32)
    return F.linear(hidden.float(), head.float())


def _penalised(values: Tensor, factor: float) -> Tensor:
    return torch.where(values > 0, values / factor, values * factor)


def _two_best(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row `[V]` the best token, of equals the first; the second best where it comes close, else `NO_OTHER`; the
    gap between them, float64; and whether the best logit is a number. The logits are overwritten."""
    best, tokens = logits.max(dim=1)
    second, others = logits.scatter_(1, tokens[:, None], -torch.inf).max(dim=1)
    gaps = best.double() - second.double()
    near = (gaps < NEAR) & (second >= best - NEAR)
    return tokens, torch.where(near, others, NO_OTHER), gaps, best.isfinite()


def _drawn(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token of each row `[n, V]`, by a uniform number `[n, 1]`; and whether the row's logits are numbers.

    The number is looked up in the sums of the probabilities in the order of the ids. In the order of the
    probabilities, a rounding that makes two of them change places would often change the token.
    """
    wide = logits.double() / sampling.temperature  # [n, V]
    upto = wide.masked_fill(wide < _least(wide, sampling), -torch.inf).softmax(dim=-1).cumsum(dim=-1)
    # A uniform number is at most 1 - 2^-53, whose product with a sum of about 1 is rounded to less than that sum.
    at = torch.searchsorted(upto, uniform * upto[:, -1:], right=True)
    return at.squeeze(1), upto[:, -1].isfinite()


def _least(wide: Tensor, sampling: Sampling) -> Tensor:
    """The least logit of each row, `[n, 1]`, that top-k and top-p leave to be drawn."""
    V = wide.shape[1]
    k = min(sampling.top_k or V, V)
    if k == V and sampling.top_p == 1:
        return wide.new_full((len(wide), 1), -torch.inf)
    values = wide.topk(k, dim=-1).values
    if sampling.top_p == 1:
        return values[:, -1:]
    before = values.softmax(dim=-1).cumsum(dim=-1) < sampling.top_p  # the next one is still needed
    return values.gather(1, before.sum(dim=-1, keepdim=True).clamp(max=k - 1))


def _best(n: int, scored: Iterable[tuple[int, int, float]]) -> list[Choice]:
    """The most likely token of each of n rows, of equal ones the first; and the second where it comes close.

    Args:
        n: how many rows there are.
        scored: rows, tokens and logits of all that may be the best.

    Raises:
        UserError: a row has none, as where its logits are not numbers.
    """
    candidates: list[list[tuple[float, int]]] = [[] for _ in range(n)]
    for row, token, value in scored:
        candidates[row].append((-value, token))
    if not all(candidates):
        raise UserError(_NO_NUMBERS)
    return [_first_of(sorted(of_row)) for of_row in candidates]


def _first_of(candidates: Sequence[tuple[float, int]]) -> Choice:
    """The choice among `(-logit, token)`, the best first."""
    (best, token), *others = candidates
    if not others or others[0][0] - best >= NEAR:
        return Choice(token)
    return Choice(token, Near(other=others[0][1], gap=others[0][0] - best))


def _near_best(logits: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Rows and tokens of the few logits `[n, V]` that may be the best of their row.

    Where they were rounded to 16 bits (not `exact`), several equal ones are the best more often than not. Without
    compiled code they are found by the maxima of blocks, and then in the few blocks that hold some: a fifth of the time
    of comparing all.
    """
    below, relative = (NEAR, 0.0) if exact else (0.0, 2 * _BF16_STEP)
    if (found := ops.near_best(logits, below=below, relative=relative)) is not None:
        return found
    whole = logits.shape[1] // _BLOCK * _BLOCK
    blocks, rest = logits[:, :whole].unflatten(1, (-1, _BLOCK)), logits[:, whole:]
    maxima = blocks.amax(dim=-1)
    best = torch.cat([maxima, rest], dim=1).amax(dim=-1, keepdim=True)
    least = best - (below if exact else relative * best.abs())
    row, block = (maxima >= least).nonzero(as_tuple=True)
    found, place = (blocks[row, block] >= least[row]).nonzero(as_tuple=True)
    rest_row, rest_place = (rest >= least).nonzero(as_tuple=True)
    return torch.cat([row[found], rest_row]), torch.cat([block[found] * _BLOCK + place, whole + rest_place])
