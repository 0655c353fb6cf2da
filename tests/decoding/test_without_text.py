"""Ids that stand for no text, as those that pad a vocabulary do, are never chosen, and have no likelihood."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from talkers import SHAPES, VOCAB, expected, in_order, model, prompts_of
from test_slots import SAMPLINGS

from fastft.batches.batch import from_padded
from fastft.data.prompts import ALPACA
from fastft.data.records import Record
from fastft.data.tokenizer import END_OF_TEXT, GPT2Tokenizer, Tokenizer, gpt2_tokenizer
from fastft.decoding.decode import NO_STOP, Decoder, decode, greedy
from fastft.decoding.inference import prepared
from fastft.decoding.sampling import Sampling
from fastft.metrics.perplexity import choice_likelihoods
from fastft.model.gpt2 import GPT2, config_for

BANNED = (0, 7, VOCAB - 1)  # at both ends, and within
DECODERS: list[Decoder] = ["ragged", "slots"]


class FewTexts(GPT2Tokenizer):
    """Some of its ids have no text."""

    def __init__(self, banned: Sequence[int] = BANNED) -> None:
        self.banned = banned

    def without_text(self, vocab_size: int) -> npt.NDArray[np.bool_] | None:
        return np.isin(np.arange(vocab_size), self.banned)


def of(tokenizer: Tokenizer, shape: str = "wider") -> GPT2:
    made = GPT2(replace(SHAPES[shape], tokenizer=tokenizer)).double()
    made.load_state_dict(model(shape).state_dict())
    return made


@pytest.mark.parametrize("decoder", DECODERS)
def test_greedy_is_the_books_loop_over_the_ids_with_a_text(decoder: Decoder) -> None:
    prompts = prompts_of([7, 12, 3, 9], seed=2)
    free = greedy(model("wider"), prompts, max_new_tokens=25, stop=NO_STOP)
    said = max((token for ids in free for token in ids), key=lambda token: sum(ids.count(token) for ids in free))
    subject = of(FewTexts([said, *BANNED]))
    got = greedy(subject, prompts, max_new_tokens=25, stop=NO_STOP, decoder=decoder)
    assert any(said in ids for ids in free)
    assert not any({said, *BANNED} & {*ids} for ids in got)
    assert got == expected(subject, prompts, max_new_tokens=25, stop=NO_STOP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_way_of_choosing_takes_one_though_it_is_the_likeliest(sampling: Sampling, dtype: torch.dtype) -> None:
    """Their rows of the head are those of other ids, three times as long: without a mask they are often chosen."""
    subject, free = of(FewTexts()), of(gpt2_tokenizer())
    with torch.no_grad():
        for one in (subject, free):
            one.head[[*BANNED]] = 3 * one.head[[11, 12, 13]]
    prompts = prompts_of([7, 12, 3, 9], seed=3)
    rest: dict[str, Any] = {"max_new_tokens": 20, "stop": NO_STOP, "sampling": sampling}
    without = in_order(decode(prepared(free, dtype), prompts, **rest))
    assert any({*BANNED} & {*ids} for ids in without)
    ready = prepared(subject, dtype)
    ragged, slots = (in_order(decode(ready, prompts, decoder=decoder, **rest)) for decoder in DECODERS)
    assert not any({*BANNED} & {*ids} for ids in ragged)
    if dtype == torch.float32:
        assert ragged == slots
    assert not any({*BANNED} & {*ids} for ids in slots)


def test_top_k_counts_ids_with_a_text_alone() -> None:
    """With one id to draw from, drawing is greedy: the mask comes before the cut."""
    subject = of(FewTexts())
    with torch.no_grad():
        subject.head[[*BANNED]] = 3 * subject.head[[11, 12, 13]]
    prompts = prompts_of([7, 12, 3])
    one_of_one = Sampling(temperature=1.0, top_k=1)
    for decoder in DECODERS:
        drawn = in_order(decode(subject, prompts, max_new_tokens=9, stop=NO_STOP, sampling=one_of_one, decoder=decoder))
        assert drawn == greedy(subject, prompts, max_new_tokens=9, stop=NO_STOP)


def padded(vocab_size: int, seed: int = 0) -> GPT2:
    """Pico with rows behind GPT-2's vocabulary that are likelier than all others."""
    torch.manual_seed(seed)
    made = GPT2(replace(config_for("pico"), vocab_size=vocab_size)).eval()
    with torch.no_grad():
        made.wte.weight.mul_(8)
        made.wte.weight[50257:] = 3 * made.wte.weight[made.wte.weight.norm(dim=1).topk(vocab_size - 50257).indices]
    return made


@pytest.mark.parametrize("vocab_size", [50258, 50304])
def test_a_padded_gpt2_says_text_alone(vocab_size: int) -> None:
    subject = padded(vocab_size)
    prompts = [gpt2_tokenizer().encode(text) for text in ("Once upon a time", "The chef cooks", "Say it.")]
    for sampling in (Sampling(), Sampling(temperature=5.0)):
        for ids in in_order(decode(subject, prompts, max_new_tokens=40, stop=NO_STOP, sampling=sampling)):
            assert max(ids) <= END_OF_TEXT


QUESTION = Record(instruction="Which?", input="", output="owl", extra={"choices": ["owl", "tool"]})


@pytest.mark.parametrize("banned", [None, (5, 400, 50256 - 1)])
@pytest.mark.parametrize("tied", [True, False])
def test_likelihoods_are_among_the_ids_with_a_text(banned: tuple[int, ...] | None, tied: bool) -> None:
    config = replace(config_for("pico"), tie_head=tied, vocab_size=50304 if banned is None else 50257)
    torch.manual_seed(0)
    subject = GPT2(config if banned is None else replace(config, tokenizer=FewTexts(banned)))
    with torch.no_grad():
        for parameter in subject.parameters():
            parameter.mul_(6)
        prompt = gpt2_tokenizer().encode(ALPACA.prompt_of(QUESTION))
        likeliest = greedy(subject, [prompt], max_new_tokens=3, stop=NO_STOP)
        subject.head[[50257, 50290] if banned is None else [*banned]] = 1.5 * subject.head[likeliest[0][-1]]
    before = copy.deepcopy(subject.state_dict())
    found = choice_likelihoods(subject, [QUESTION], ALPACA)[0]
    assert found is not None
    tokenizer = gpt2_tokenizer()
    prompt = ALPACA.prompt_of(QUESTION) + ALPACA.response("")
    for choice, likelihood in zip(("owl", "tool"), found, strict=True):
        first, ids = tokenizer.encode(prompt), [*tokenizer.encode(prompt + choice), END_OF_TEXT]
        inputs = torch.tensor([ids[:-1]])
        with torch.no_grad():
            logits = subject.logits(from_padded(inputs, torch.full_like(inputs, -100)), impl="reference")
        kept = logits.clone()
        kept[:, 50257:] = -torch.inf
        kept[:, [*(banned or [])]] = -torch.inf
        right, wrong = (
            float(one.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[len(first) - 1 :].sum())
            for one in (kept, logits)
        )
        assert likelihood.total == pytest.approx(right, rel=1e-5)
        assert likelihood.total != pytest.approx(wrong, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in subject.state_dict().items())
    assert (subject.lm_head is None) == tied


def test_gpt2_itself_has_no_mask() -> None:
    assert gpt2_tokenizer().without_text(50257) is None
    mask = gpt2_tokenizer().without_text(50260)
    assert mask is not None
    assert mask.nonzero()[0].tolist() == [50257, 50258, 50259]
