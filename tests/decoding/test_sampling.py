"""How tokens are chosen, held against transformers' logits processors and against the distribution itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fastft.common.errors import UserError
from fastft.decoding.sampling import GREEDY, NEAR, Choice, Chosen, Sampler, Sampling, Uniforms, choose_there
from fastft.model.gpt2 import GPT2

V = 50


def model_of(head: Tensor) -> GPT2:
    """Of its parts only the head is asked."""
    return cast(GPT2, SimpleNamespace(head=head, logits_of=lambda hidden: hidden @ head.T))


def chosen(logits: Tensor, sampling: Sampling = GREEDY, *, prompts: list[list[int]] | None = None) -> list[Choice]:
    """What is chosen from logits `[n, V]`."""
    n = len(logits)
    sampler = Sampler(sampling, prompts or [[] for _ in range(n)], range(n))
    model = cast(GPT2, SimpleNamespace(head=None, logits_of=lambda hidden: hidden.clone()))
    return sampler.choose(model, logits, range(n), [[] for _ in range(n)])


def some_logits(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).to(dtype)


class TestGreedy:
    @pytest.mark.parametrize("width", [7, 512, 1024, 1200])
    def test_the_best(self, width: int) -> None:
        """Wherever it stands: in a whole block of the search, or behind the last one."""
        logits = torch.randn(200, width, generator=torch.Generator().manual_seed(width))
        logits[0, 0] = logits[1, -1] = logits[2, width // 2] = 9.0
        assert [choice.token for choice in chosen(logits)] == logits.argmax(-1).tolist()

    @pytest.mark.parametrize("width", [V, 1030])
    def test_logits_that_are_no_numbers_are_an_error(self, width: int) -> None:
        logits = torch.randn(3, width)
        logits[1, 5] = float("nan")
        for sampling in (GREEDY, Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=3, top_p=0.5)):
            with pytest.raises(UserError, match="not numbers"):
                chosen(logits, sampling)

    @pytest.mark.parametrize(("gap", "is_near"), [(0.0, True), (NEAR / 2, True), (NEAR * 2, False)])
    def test_a_close_second_is_told(self, gap: float, is_near: bool) -> None:
        logits = torch.full((1, V), -1.0)
        logits[0, 7], logits[0, 3] = 0.5, 0.5 - gap
        (choice,) = chosen(logits)
        assert choice.token == (7 if gap else 3)  # of equals the first, as argmax
        assert (choice.near is not None) == is_near
        if choice.near is not None:
            assert choice.near.other == (3 if gap else 7)
            assert choice.near.gap == pytest.approx(gap, rel=0.01)

    def test_bf16_logits_that_round_to_one_are_told_apart(self) -> None:
        """The best of them lies 1e-3 above 9 others, a tenth of a step of bf16 at 8."""
        hidden = torch.zeros(1, V, dtype=torch.bfloat16)
        hidden[0, 0], hidden[0, 1] = 8.0, 2.0**-10
        head = torch.zeros(V, V, dtype=torch.bfloat16)
        head[5:15, 0] = 1.0
        head[9, 1] = 1.0
        sampler = Sampler(GREEDY, [[]], [0])
        assert (hidden @ head.T).argmax() == 5
        assert sampler.choose(model_of(head), hidden, [0], [[]]) == [Choice(9)]


class TestDrawn:
    def draws(self, sampling: dict[str, Any], logits: Tensor, n: int = 40_000) -> np.ndarray[Any, Any]:
        rows = logits.expand(n, -1)
        return np.array([choice.token for choice in chosen(rows, Sampling(seed=1, **sampling))])

    @pytest.mark.parametrize(
        "sampling",
        [
            {"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 5},
            {"temperature": 1.0, "top_p": 0.7}, {"temperature": 1.5, "top_k": 12, "top_p": 0.8},
        ],
        ids=str,
    )  # fmt: skip
    def test_tokens_come_as_often_as_transformers_warpers_say(self, sampling: dict[str, Any]) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        logits = some_logits(1)
        wanted = TemperatureLogitsWarper(sampling["temperature"])(None, logits)
        if "top_k" in sampling:
            wanted = TopKLogitsWarper(sampling["top_k"])(None, wanted)
        if "top_p" in sampling:
            wanted = TopPLogitsWarper(sampling["top_p"])(None, wanted)
        probabilities = wanted.double().softmax(-1)[0].numpy()
        drawn = self.draws(sampling, logits)
        counts = np.bincount(drawn, minlength=V)
        assert not counts[probabilities == 0].any()
        often = probabilities * len(drawn) >= 5
        merged = [np.append(x[often], x[~often].sum()) for x in (counts, probabilities * len(drawn))]
        merged = [x[merged[1] > 0] for x in merged]
        assert stats.chisquare(*merged).pvalue > 1e-3
        tilted = np.append(merged[1][1:], merged[1][0])  # each token as often as its neighbour should come
        assert stats.chisquare(merged[0], tilted * (merged[0].sum() / tilted.sum())).pvalue < 1e-9

    def test_one_token_is_always_left(self) -> None:
        best = some_logits(30).argmax(-1).tolist()
        for cut in ({"top_k": 1}, {"top_p": 1e-9}):
            assert [c.token for c in chosen(some_logits(30), Sampling(temperature=1.0, **cut))] == best

    def test_a_rounding_changes_no_draw(self) -> None:
        """Though it makes many neighbours by probability change places: drawn by rank, they would be other tokens."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(400, 2000, generator=generator) * 0.01
        noise = 1 + 1e-5 * torch.randn(400, 2000, generator=generator)
        drawn = [[choice.token for choice in chosen(x, Sampling(temperature=1.0))] for x in (logits, logits * noise)]
        ranks = [(-x).argsort(dim=-1, stable=True) for x in (logits, logits * noise)]
        assert (ranks[0] != ranks[1]).float().mean() > 0.002
        assert drawn[0] == drawn[1]


class TestPenalty:
    @pytest.mark.parametrize("penalty", [2.0, 0.8])
    def test_it_is_transformers(self, penalty: float) -> None:
        from transformers import RepetitionPenaltyLogitsProcessor

        logits = some_logits(20)
        prompts = [np.random.default_rng(row).integers(0, V, 12).tolist() for row in range(20)]
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(prompts), logits.clone())
        got = chosen(logits, Sampling(repetition_penalty=penalty), prompts=prompts)
        assert [choice.token for choice in got] == wanted.argmax(-1).tolist()
        assert [choice.token for choice in got] != logits.argmax(-1).tolist()

    def test_tokens_of_the_answer_count(self) -> None:
        logits = torch.zeros(1, V)
        logits[0, 4], logits[0, 6] = 2.0, 1.9
        sampler = Sampler(Sampling(repetition_penalty=1.2), [[1]], [0])
        assert [c.token for c in sampler.choose(model_of(torch.eye(V)), logits, [0], [[]])] == [4]
        assert [c.token for c in sampler.choose(model_of(torch.eye(V)), logits, [0], [[4]])] == [6]

    def test_in_bf16_the_sums_in_float32_are_penalised(self) -> None:
        """Token 4 is the best by 1e-3 before the penalty and after it, and rounding to bf16 hides that."""
        hidden = torch.zeros(1, V, dtype=torch.bfloat16)
        hidden[0, :2] = 1
        head = torch.zeros(V, V, dtype=torch.bfloat16)
        head[3:6, 0], head[4, 1], head[7, 0] = 4.0, 1e-3, 9.0
        sampler = Sampler(Sampling(repetition_penalty=2.0), [[7]], [0])
        (choice,) = sampler.choose(model_of(head), hidden, [0], [[]])  # 7 is there already: 4.5
        assert choice == Choice(7)
        sampler = Sampler(Sampling(repetition_penalty=3.0), [[7]], [0])
        assert sampler.choose(model_of(head), hidden, [0], [[]]) == [Choice(4)]
        sampler = Sampler(Sampling(repetition_penalty=1.0001), [[4]], [0])
        (choice,) = sampler.choose(model_of(head[:7]), hidden, [0], [[]])
        assert choice == Choice(4)  # 4.001 / 1.0001 is still the best
        sampler = Sampler(Sampling(repetition_penalty=1.001), [[4]], [0])
        (choice,) = sampler.choose(model_of(head[:7]), hidden, [0], [[]])
        assert choice.token == 3


class TestChosenThere:
    """What is chosen without being told to the host is what `Sampler` chooses."""

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        penalty=st.sampled_from([1.0, 1.3, 0.8]),
        drawn=st.sampled_from([{}, {"temperature": 0.7}, {"temperature": 1.5, "top_k": 7, "top_p": 0.8}]),
        width=st.sampled_from([1, 2, V, 1030]),
        copies=st.booleans(),
        seed=st.integers(0, 10_000),
    )
    def test_tokens_and_close_seconds(
        self, dtype: torch.dtype, penalty: float, drawn: dict[str, Any], width: int, copies: bool, seed: int
    ) -> None:
        generator, C = torch.Generator().manual_seed(seed), 16
        hidden = torch.randn(9, C, generator=generator).to(dtype)
        head = torch.randn(width, C, generator=generator).to(dtype)
        if copies:  # every second token has the logit of the one before it
            head[1::2] = head[: width - width % 2 : 2]
        model = cast(GPT2, SimpleNamespace(head=head, logits_of=lambda hidden: hidden @ head.T))
        sampling = Sampling(repetition_penalty=penalty, **drawn)
        prompts = np.random.default_rng(seed).integers(0, width, (9, 12)).tolist()
        wanted = Sampler(sampling, prompts, range(9)).choose(model, hidden, range(9), [[] for _ in range(9)])
        seen, uniforms = torch.zeros(9, width, dtype=torch.bool), Uniforms(sampling.seed, range(9))
        for row, prompt in enumerate(prompts):
            seen[row, prompt] = True
        uniform = torch.tensor(np.stack([uniforms.draw(row, 1) for row in range(9)]))
        table = choose_there(
            model, hidden, sampling, seen=None if penalty == 1 else seen, uniform=uniform if drawn else None
        )
        got = [Chosen(table[None]).at(0, row) for row in range(9)]
        assert [token for token, _ in got] == [choice.token for choice in wanted]
        for (_, near), choice in zip(got, wanted, strict=True):
            assert (near is None) == (choice.near is None)
            if near is not None and choice.near is not None:
                assert near.other == choice.near.other
                assert near.gap == pytest.approx(choice.near.gap, abs=1e-5)
        if copies and width > 2 and not drawn and penalty == 1:
            assert sum(near is not None for _, near in got) >= 8  # that of an odd width has one token without a twin

    def test_numbers_are_drawn_ahead(self) -> None:
        """A stream gives the same numbers one by one and several at a time; others change nothing."""
        one, several = Uniforms(7, [4, 9]), Uniforms(7, [4, 9])
        several.draw(1, 3)
        ahead = [*several.draw(0, 5), *several.draw(0, 2)]
        assert [float(one.draw(0, 1)[0]) for _ in range(7)] == ahead
        assert len({*ahead, *one.draw(1, 7)}) == 14

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
    @pytest.mark.parametrize(
        "drawn", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}], ids=str
    )
    def test_logits_that_are_no_numbers_are_told_when_they_are_read(self, wrong: float, drawn: dict[str, Any]) -> None:
        logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
        logits[1, 5] = wrong
        model = cast(GPT2, SimpleNamespace(head=None, logits_of=lambda hidden: hidden.clone()))
        uniform = torch.full((3, 1), 0.5, dtype=torch.float64) if drawn else None
        table = Chosen(choose_there(model, logits, Sampling(**drawn), seen=None, uniform=uniform)[None])
        if not drawn:
            assert [table.at(0, row)[0] for row in (0, 2)] == logits[[0, 2]].argmax(-1).tolist()
        with pytest.raises(UserError, match="not numbers"):
            table.at(0, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -1}, {"top_p": 0},
        {"top_p": 1.1}, {"repetition_penalty": 0}, {"repetition_penalty": float("nan")}, {"seed": -1},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_mean_nothing(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UserError, match=f"got --{name} .*expected"):
        Sampling(**wrong)


def test_what_is_in_effect() -> None:
    assert Sampling(top_k=5, seed=7).in_effect() == {"temperature": 0.0, "repetition_penalty": 1.0}
    assert Sampling(temperature=1.0, top_k=5, seed=7).in_effect() == {
        "temperature": 1.0, "top_k": 5, "top_p": 1.0, "repetition_penalty": 1.0, "seed": 7,
    }  # fmt: skip
