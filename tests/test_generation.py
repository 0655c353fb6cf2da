"""Greedy generation over a cache is the book's loop, token for token; and what `fastft generate` leaves behind."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastft import generation as generate_module
from fastft.config import TrainOptions, to_yaml
from fastft.generation import NO_STOP, GenerateOptions, generate, greedy, greedy_reference
from fastft.model import GPT2, SIZES, GPT2Config
from fastft.run import Run
from fastft.tokenizer import END_OF_TEXT, gpt2_tokenizer
from fastft.trainer import initial_model
from fastft.weights import load, save_hf

VOCAB = 24
SHAPES = {
    "pico": GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=24, vocab_size=VOCAB),
    "wider": GPT2Config(n_layer=2, n_head=3, n_embd=96, n_ctx=40, vocab_size=VOCAB, tie_head=False),
    "long": GPT2Config(n_layer=1, n_head=2, n_embd=16, n_ctx=190, vocab_size=VOCAB, tie_head=False),
}


@functools.cache
def model(shape: str, seed: int = 0) -> GPT2:
    """Weights so large that each token depends on all before it; float64, so that no two logits are too close."""
    torch.manual_seed(seed)
    model = GPT2(SHAPES[shape]).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.0 if name.startswith(("wte", "wpe", "lm_head")) else 0.4)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def expected(model: GPT2, prompts: list[list[int]], *, max_new_tokens: int, stop: int) -> list[list[int]]:
    """One prompt at a time without a cache, up to the context's end."""
    room = [min(max_new_tokens, model.config.n_ctx - len(prompt) + 1) for prompt in prompts]
    return [
        greedy_reference(model, prompt, max_new_tokens=most, stop=stop)
        for prompt, most in zip(prompts, room, strict=True)
    ]


class TestGreedy:
    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(
        shape=st.sampled_from(["pico", "wider"]),
        lengths=st.lists(st.integers(1, 23), min_size=1, max_size=6),
        seed=st.integers(0, 10_000),
        max_new_tokens=st.integers(1, 30),
        stop=st.one_of(st.just(NO_STOP), st.integers(0, VOCAB - 1)),
    )
    def test_it_is_the_books_loop(
        self, shape: str, lengths: list[int], seed: int, max_new_tokens: int, stop: int
    ) -> None:
        prompts = prompts_of(lengths, seed)
        got = greedy(model(shape), prompts, max_new_tokens=max_new_tokens, stop=stop)
        assert got == expected(model(shape), prompts, max_new_tokens=max_new_tokens, stop=stop)

    def test_the_models_of_these_tests_say_many_things(self) -> None:
        """A model that repeats one token would hide mistakes."""
        for shape in SHAPES:
            outputs = greedy(model(shape), prompts_of([3, 9, 6, 12]), max_new_tokens=12, stop=NO_STOP)
            assert len({tuple(ids) for ids in outputs}) == 4
            assert len({token for ids in outputs for token in ids}) > 6

    def test_a_long_answer_outgrows_the_cache_several_times(self) -> None:
        prompts = prompts_of([2, 40, 17])
        got = greedy(model("long"), prompts, max_new_tokens=180, stop=NO_STOP)
        assert [len(ids) for ids in got] == [180, 151, 174]
        assert got == expected(model("long"), prompts, max_new_tokens=180, stop=NO_STOP)

    def test_a_sequence_that_stops_early_disturbs_no_other(self) -> None:
        prompts = prompts_of([12, 5, 9, 20], seed=5)
        whole = greedy(model("wider"), prompts, max_new_tokens=15, stop=NO_STOP)
        stop = whole[0][2]
        cut = [ids[: ids.index(stop)] if stop in ids else ids for ids in whole]
        assert len({len(ids) for ids in cut}) >= 3
        assert greedy(model("wider"), prompts, max_new_tokens=15, stop=stop) == cut

    def test_the_stop_id_is_not_returned_even_first_or_last(self) -> None:
        prompt = prompts_of([7])
        (ids,) = greedy(model("wider"), prompt, max_new_tokens=15, stop=NO_STOP)
        assert greedy(model("wider"), prompt, max_new_tokens=15, stop=ids[0]) == [[]]
        cut = max(ids.index(token) for token in ids)  # the last place where a token appears for the first time
        assert cut > 0
        assert greedy(model("wider"), prompt, max_new_tokens=cut + 1, stop=ids[cut]) == [ids[:cut]]

    def test_the_contexts_end_stops_a_sequence(self) -> None:
        n_ctx = SHAPES["pico"].n_ctx
        prompts = prompts_of([n_ctx - 1, n_ctx - 5, 1])
        got = greedy(model("pico"), prompts, max_new_tokens=100, stop=NO_STOP)
        assert [len(ids) for ids in got] == [2, 6, n_ctx]  # the token after a full context is the last one
        assert got == expected(model("pico"), prompts, max_new_tokens=100, stop=NO_STOP)

    def test_float32_at_gpt2s_vocabulary(self) -> None:
        torch.manual_seed(3)
        pico = GPT2(SIZES["pico"])
        prompts = [gpt2_tokenizer().encode(text) for text in ("Once upon a time", "Hello", "The end of the story is")]
        got = greedy(pico, prompts, max_new_tokens=6)
        assert got == expected(pico, prompts, max_new_tokens=6, stop=END_OF_TEXT)

    @pytest.mark.parametrize("training", [True, False])
    def test_it_leaves_the_model_as_it_was(self, training: bool) -> None:
        subject = GPT2(SHAPES["wider"], checkpoint_activations=True).double().train(training)
        subject.load_state_dict(model("wider").state_dict())
        for parameter in subject.parameters():
            parameter.grad = torch.ones_like(parameter)
        prompts = prompts_of([4, 11])
        assert greedy(subject, prompts, max_new_tokens=8) == greedy(model("wider"), prompts, max_new_tokens=8)
        assert subject.training == training
        assert torch.is_grad_enabled()
        for name, parameter in subject.named_parameters():
            assert parameter.requires_grad
            assert parameter.grad is not None
            assert (parameter.grad == 1).all()
            assert torch.equal(parameter, model("wider").state_dict()[name])

    @pytest.mark.parametrize("mistake", ["sees what lies behind", "does not see itself", "position", "rows mixed up"])
    def test_a_mistake_is_noticed(self, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
        prompts = prompts_of([4, 11, 7])
        answers = expected(model("wider"), prompts, max_new_tokens=10, stop=NO_STOP)
        assert greedy(model("wider"), prompts, max_new_tokens=10, stop=NO_STOP) == answers
        real_hidden = GPT2.hidden

        def attention(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
            if attn_mask is not None and mistake == "sees what lies behind":
                attn_mask = attn_mask | attn_mask.roll(1, -1)
            if attn_mask is not None and mistake == "does not see itself":
                attn_mask = attn_mask & attn_mask.roll(-1, -1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **rest)

        def hidden(self: GPT2, tokens: Tensor, positions: Tensor, attend: Any) -> Tensor:
            if len(tokens) == len(prompts):  # one new token each
                positions = positions + 1 if mistake == "position" else positions
                tokens = tokens.roll(1) if mistake == "rows mixed up" else tokens
            return real_hidden(self, tokens, positions, attend)

        functions = SimpleNamespace(linear=F.linear, pad=F.pad, scaled_dot_product_attention=attention)
        monkeypatch.setattr(generate_module, "F", functions)
        monkeypatch.setattr(GPT2, "hidden", hidden)
        assert greedy(model("wider"), prompts, max_new_tokens=10, stop=NO_STOP) != answers


Greedy = Callable[..., list[list[int]]]


class Asked:
    """Stands in for `greedy`: counts the prompts, and is killed at its `die_at`th call."""

    def __init__(self, answer: Greedy = greedy, *, die_at: int | None = None) -> None:
        self.answer = answer
        self.die_at = die_at
        self.batches: list[int] = []

    def __call__(self, model: GPT2, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        self.batches.append(len(prompts))
        if len(self.batches) == self.die_at:
            raise KeyboardInterrupt
        return self.answer(model, prompts, **options)


class TestStage:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Run:
        """A run of 100 records, 10 of them in the test split, with a random model."""
        records = [
            {
                "instruction": f"Double {i}.",
                "input": f"as a number, {i}" if i % 2 else "",
                "output": f"{2 * i}",
                "id": i,
            }
            for i in range(100)
        ]
        (tmp_path / "records.json").write_text(json.dumps(records))
        run = Run(tmp_path / "run")
        options = TrainOptions(data=str(tmp_path / "records.json"), model="pico", out=run.folder)
        run.folder.mkdir()
        run.config.write_text(to_yaml(options))
        save_hf(initial_model(options), run.model)
        return run

    @pytest.fixture
    def ask(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
        def ask(asked: Asked, **options: Any) -> list[dict[str, Any]]:
            monkeypatch.setattr(generate_module, "greedy", asked)
            values = {"max_new_tokens": 5, "batch_size": 4, "device": "cpu", **options}
            return generate(GenerateOptions(run=run.folder, **values))

        return ask

    def test_responses_are_the_books(self, run: Run, ask: Callable[..., list[dict[str, Any]]]) -> None:
        responses = ask(Asked())
        assert json.loads(run.responses.read_text()) == responses
        records = json.loads((run.folder.parent / "records.json").read_text())[85:95]
        tokenizer, gpt2 = gpt2_tokenizer(), load(run.model)
        for response, record in zip(responses, records, strict=True):
            prompt = (
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                f"request.\n\n### Instruction:\n{record['instruction']}"
            ) + (f"\n\n### Input:\n{record['input']}" if record["input"] else "")
            ids = tokenizer.encode(prompt)
            ids += greedy_reference(gpt2, ids, max_new_tokens=5)
            book = tokenizer.decode(ids)[len(prompt) :].replace("### Response:", "").strip()
            assert book
            assert response == {**record, "model_response": book}
            assert list(response) == ["instruction", "input", "output", "id", "model_response"]

    def test_every_response_header_is_taken_out(self, ask: Callable[..., list[dict[str, Any]]]) -> None:
        ids = gpt2_tokenizer().encode("\n\n### Response:\nTwo ### Response: words \n")
        said = Asked(lambda _model, prompts, **_options: [ids for _ in prompts])
        assert {response["model_response"] for response in ask(said)} == {"Two  words"}

    def test_a_killed_call_is_taken_up_where_it_stopped(
        self, run: Run, ask: Callable[..., list[dict[str, Any]]]
    ) -> None:
        whole = ask(Asked())
        run.responses.unlink()
        with pytest.raises(KeyboardInterrupt):
            ask(Asked(die_at=2))
        assert json.loads(run.responses.read_text()) == whole[:4]
        rest = Asked()
        assert ask(rest, batch_size=3) == whole
        assert rest.batches == [3, 3]
        assert json.loads(run.responses.read_text()) == whole
        assert ask(Asked(die_at=1)) == whole  # nothing is asked

    def test_another_model_answers_everything_afresh(self, run: Run, ask: Callable[..., list[dict[str, Any]]]) -> None:
        old = ask(Asked())
        torch.manual_seed(7)
        save_hf(GPT2(SIZES["pico"]), run.model)
        with pytest.raises(KeyboardInterrupt):  # before its first answers: the old model's are not taken for its own
            ask(Asked(die_at=1))
        asked = Asked()
        new = ask(asked)
        assert asked.batches == [4, 4, 2]
        assert all(a["model_response"] != b["model_response"] for a, b in zip(old, new, strict=True))

    @pytest.mark.parametrize("options", [{"max_new_tokens": 4}, {"split": "val"}])
    def test_other_options_answer_everything_afresh(
        self, ask: Callable[..., list[dict[str, Any]]], options: dict[str, Any]
    ) -> None:
        ask(Asked())
        again = Asked()
        responses = ask(again, **options)
        assert sum(again.batches) == len(responses)
        assert len(responses) == (5 if "split" in options else 10)

    def test_a_limit_answers_the_first_and_no_limit_the_rest(
        self, run: Run, ask: Callable[..., list[dict[str, Any]]]
    ) -> None:
        first, rest = Asked(), Asked()
        three = ask(first, limit=3)
        assert first.batches == [3]
        assert json.loads(run.responses.read_text()) == three
        ten = ask(rest)
        assert rest.batches == [4, 3]
        assert ten[:3] == three
        assert [response["id"] for response in ten] == list(range(85, 95))
        assert ask(Asked(die_at=1), limit=2) == ten[:2]
