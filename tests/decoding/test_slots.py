"""Decoding in a fixed number of rows gives the text of decoding in ragged ones, and never waits for a token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from talkers import SHAPES, VOCAB, expected, in_order, model, prompts_of, with_beginning
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastft.batches.batch import from_padded
from fastft.common.errors import UserError
from fastft.decoding import slots
from fastft.decoding.answers import Request
from fastft.decoding.decode import NO_STOP, Answer, Decoder, decode, greedy
from fastft.decoding.inference import prepared
from fastft.decoding.sampling import GREEDY, NEAR, Sampling, Uniforms
from fastft.model import ops
from fastft.model.gpt2 import GPT2

SAMPLINGS = [
    GREEDY,
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=1.0, seed=4),
    Sampling(temperature=0.7, top_p=0.8),
    Sampling(temperature=1.5, top_k=9, top_p=0.9, repetition_penalty=1.2, seed=4),
]
prompt_lists = st.one_of(
    st.builds(prompts_of, st.lists(st.integers(1, 39), min_size=1, max_size=9), st.integers(0, 10_000)),
    st.builds(
        with_beginning,
        st.integers(1, 8),
        st.lists(st.integers(0, 12), min_size=1, max_size=9),
        st.integers(0, 10_000),
    ),
)
stops = st.one_of(st.just(NO_STOP), st.integers(0, VOCAB - 1))


def narrow(shape: str, dtype: torch.dtype) -> GPT2:
    """The model of these tests in another dtype, ready to answer."""
    made = GPT2(SHAPES[shape])
    made.load_state_dict(model(shape).state_dict())
    return prepared(made, dtype, rows=4)


def answered(subject: GPT2, prompts: list[list[int]], decoder: Decoder, **rest: Any) -> list[Answer]:
    return sorted(decode(subject, prompts, decoder=decoder, **rest), key=lambda answer: answer.index)


class TestSameText:
    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(
        prompts=prompt_lists,
        sampling=st.sampled_from(SAMPLINGS),
        batch_size=st.integers(1, 8),
        max_new_tokens=st.integers(1, 40),
        stop=stops,
        look_every=st.sampled_from([1, 3, 8]),
    )
    def test_it_is_that_of_ragged_rows(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        batch_size: int,
        max_new_tokens: int,
        stop: int,
        look_every: int,
    ) -> None:
        rest: dict[str, Any] = {
            "sampling": sampling, "batch_size": batch_size, "max_new_tokens": max_new_tokens, "stop": stop,
        }  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slots, "LOOK_EVERY", look_every)
            got = answered(model("wider"), prompts, "slots", **rest)
        assert got == answered(model("wider"), prompts, "ragged", **rest)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(prompts=prompt_lists, batch_size=st.integers(1, 8), max_new_tokens=st.integers(1, 40), stop=stops)
    def test_it_is_the_books_loop(
        self, prompts: list[list[int]], batch_size: int, max_new_tokens: int, stop: int
    ) -> None:
        rest: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop}
        got = decode(model("wider"), prompts, batch_size=batch_size, decoder="slots", **rest)
        assert in_order(got) == expected(model("wider"), prompts, **rest)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=["greedy", "penalty"])
    def test_narrow_models_say_the_same_but_for_close_calls(self, dtype: torch.dtype, sampling: Sampling) -> None:
        """Two ways to sum may round otherwise, and where two tokens are about as likely choose otherwise."""
        subject, prompts = narrow("wider", dtype), with_beginning(3, [9, 2, 7, 12, 5, 1, 20], seed=2)
        rest: dict[str, Any] = {"max_new_tokens": 16, "stop": NO_STOP, "sampling": sampling, "batch_size": 4}
        both = [in_order(decode(subject, prompts, decoder=decoder, **rest)) for decoder in ("slots", "ragged")]
        penalty = sampling.repetition_penalty
        for prompt, one, other in zip(prompts, *both, strict=True):
            assert not is_close_call(subject, prompt, one[0], (one[0] + 1) % VOCAB, penalty)
            differs = next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
            if differs is not None:
                assert is_close_call(subject, prompt + one[:differs], one[differs], other[differs], penalty)

    def test_a_long_answer_outgrows_the_cache(self) -> None:
        prompts = prompts_of([2, 40, 17])
        got = greedy(model("long"), prompts, max_new_tokens=180, stop=NO_STOP, decoder="slots")
        assert [len(ids) for ids in got] == [180, 151, 174]
        assert got == expected(model("long"), prompts, max_new_tokens=180, stop=NO_STOP)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_close_choices_are_listed_alike(self, dtype: torch.dtype) -> None:
        """Token 1 has the logit of token 0 but for so much that float32 tells them apart; of bf16, the same."""
        subject = GPT2(SHAPES["wider"])
        subject.load_state_dict(model("wider").state_dict())
        with torch.no_grad():
            subject.lm_head.weight[1] = subject.lm_head.weight[0] * (1 - 1e-6)
        subject, prompts = prepared(subject, dtype, rows=4), prompts_of([3, 8, 5, 13, 2, 17] * 4)
        got, wanted = (
            answered(subject, prompts, decoder, max_new_tokens=20, stop=NO_STOP, batch_size=8)
            for decoder in ("slots", "ragged")
        )
        ties = [[(tie.position, tie.chosen, tie.other) for tie in answer.near_ties] for answer in got]
        assert sum(map(len, ties)) > 3
        assert ties == [[(tie.position, tie.chosen, tie.other) for tie in answer.near_ties] for answer in wanted]
        assert all(0 <= tie.gap < NEAR for answer in got for tie in answer.near_ties)

    def test_no_prompt_no_answer(self) -> None:
        assert list(decode(model("wider"), [], max_new_tokens=3, decoder="slots")) == []


def is_close_call(subject: GPT2, ids: list[int], one: int, other: int, penalty: float = 1.0) -> bool:
    """Whether two tokens behind the ids are so nearly as likely that 16 bits may not tell them apart: by their logits,
    those of tokens that are there already made smaller by the repetition penalty."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = subject.logits(from_padded(tokens, torch.full_like(tokens, -100)))[-1].float()
    spread, seen = float(logits.std()), logits[ids]
    logits[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
    return abs(float(logits[one] - logits[other])) < 0.02 * spread


class TestComingAndGoing:
    def test_answers_come_as_they_end(self) -> None:
        prompts = prompts_of([20, 12, 5, 9], seed=5)
        whole = greedy(model("wider"), prompts, max_new_tokens=15, stop=NO_STOP)
        stop = whole[1][2]
        rest: dict[str, Any] = {"max_new_tokens": 15, "stop": stop, "decoder": "slots"}
        got = [answer.index for answer in decode(model("wider"), prompts, **rest)]
        ends = [ids.index(stop) if stop in ids else 15 for ids in whole]
        assert [ends[index] for index in got] == sorted(ends) != ends

    def test_each_token_is_heard_in_its_turn(self) -> None:
        def heard_by(decoder: Decoder) -> dict[int, list[list[int]]]:
            heard: dict[int, list[list[int]]] = {}

            def note(answer: Answer) -> None:
                heard.setdefault(answer.index, []).append(list(answer.ids))

            prompts = with_beginning(4, [3, 8, 5, 13, 2, 17], seed=3)
            for answer in decode(
                model("wider"), prompts, max_new_tokens=19, stop=7, batch_size=4, heard=note, decoder=decoder
            ):
                assert heard[answer.index][-1] == answer.ids
            return heard

        assert heard_by("slots") == heard_by("ragged")

    def test_no_step_is_asked_for_that_no_answer_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a stop it is known when answers end; ranks that answer together count on the same steps."""
        steps = calls(monkeypatch, slots._Decoder, "_step")
        got = greedy(model("wider"), prompts_of([4, 9, 2]), max_new_tokens=12, stop=NO_STOP, decoder="slots")
        assert [len(ids) for ids in got] == [12, 12, 12]
        assert len(steps) == 11  # the first token is chosen behind the prompt

    def test_rows_that_became_free_are_used_while_others_go_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Six answers in two rows, one of them long: the others go through the second row meanwhile."""
        prompts = [[1] * 5, *([token] * 34 for token in range(2, 7))]  # up to the context's end: 36 tokens, and 7 each
        steps = calls(monkeypatch, slots._Decoder, "_step")
        got = in_order(decode(model("wider"), prompts, max_new_tokens=100, stop=NO_STOP, batch_size=2, decoder="slots"))
        assert [len(ids) for ids in got] == [36, 7, 7, 7, 7, 7]
        assert len(steps) < 36 + 30 - 10

    def test_prompts_are_computed_for_several_rows_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of 16 rows two must be free, but for the last prompts of all."""
        prompts = prompts_of([1 + n % 35 for n in range(37)], seed=1)
        begun = calls(monkeypatch, slots._Decoder, "_begin")
        rest: dict[str, Any] = {"max_new_tokens": 30, "stop": 7, "batch_size": 16}
        assert answered(model("wider"), prompts, "slots", **rest) == answered(model("wider"), prompts, "ragged", **rest)
        sizes = [len(indices) for _, indices in begun]
        assert sizes[0] == 16
        assert min(sizes[1:-1]) >= 2
        assert sum(sizes) == 37

    def test_a_row_that_is_over_fills_no_more_places(self) -> None:
        """It sees nothing either, until the host looks: its keys and values would be read for nothing."""
        (whole,) = greedy(model("wider"), prompts_of([7]), max_new_tokens=20, stop=NO_STOP)
        at = max(whole.index(token) for token in whole)
        request = Request(
            model=model("wider"), prompts=prompts_of([7]), max_new_tokens=30, stop=whole[at], batch_size=1,
            sampling=GREEDY, streams=[0], heard=lambda _: None, impl="cpu", graphs=False,
            without_text=None,
        )  # fmt: skip
        decoder = slots._Decoder(request)
        with torch.no_grad():
            assert [answer.ids for answer in decoder.answers()] == [whole[:at]]
        assert decoder._state.lengths.tolist() == [7 + at]
        assert not decoder._state.goes_on.any()

    def test_a_model_that_gives_no_numbers_is_an_error(self) -> None:
        broken = copy.deepcopy(model("wider"))
        with torch.no_grad():
            broken.h[0].mlp.c_proj.bias[3] = float("nan")
        for sampling in SAMPLINGS:
            with pytest.raises(UserError, match="not numbers"):
                list(decode(broken, prompts_of([3, 4]), max_new_tokens=4, sampling=sampling, decoder="slots"))

    def test_numbers_of_rows_that_are_over_do_not_matter(self) -> None:
        """Position 30 gives no numbers; an answer that ends before it idles beside one that begins anew."""
        broken = copy.deepcopy(model("wider"))
        with torch.no_grad():
            broken.wpe.weight[30:] = float("nan")
        prompts = prompts_of([3, 25, 5, 12])
        rest: dict[str, Any] = {"max_new_tokens": 6, "stop": NO_STOP, "batch_size": 2}
        got = answered(broken, prompts, "slots", **rest)
        assert [answer.ids for answer in got] == expected(model("wider"), prompts, max_new_tokens=6, stop=NO_STOP)


def calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of each call of a function from now on."""
    made: list[tuple[Any, ...]] = []
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **rest: (made.append(args), real(*args, **rest))[1])
    return made


class ReadByNobody(TorchDispatchMode):
    """Refuses what would wait for a GPU: operations whose result the host reads, or whose size depends on values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(self.REFUSED) or (name.startswith("index") and has_mask(args)):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def has_mask(args: Sequence[Any]) -> bool:
    """Whether one of the indices of an indexing operation is a mask."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


class Repeated:
    """In place of `fastft.gpu.cuda_graphs.Graphs`, what a replay does: the same operations on the same memory, whatever
    the host's variables say by now. What it does first is recorded, as it is captured there."""

    def __init__(self) -> None:
        self.recorded: dict[Any, Recording] = {}
        self.repetitions = 0

    def run(self, key: Any, work: Callable[[], object]) -> None:
        if key in self.recorded:
            self.recorded[key].repeat()
            self.repetitions += 1
        else:
            with Recording() as recording:
                work()
            self.recorded[key] = recording


class Recording(TorchDispatchMode):
    """Notes each operation, with what it was given and what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        new = [x for x in made if x.untyped_storage().data_ptr() not in old]  # others are views, or changed in place
        self.done.append((func, args, kwargs or {}, new))
        return out

    def repeat(self) -> None:
        for func, args, kwargs, new in self.done:
            out = func(*args, **kwargs)
            for place, value in zip(new, tree_leaves(out) if new else (), strict=True):
                place.copy_(value)


class TestNothingWaits:
    @pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "penalty", "drawn", "top p", "all"])
    def test_neither_steps_nor_prompts_are_read(self, monkeypatch: pytest.MonkeyPatch, sampling: Sampling) -> None:
        for name in ("_step", "_compute_prompts"):
            real = getattr(slots._Decoder, name)

            def watched(*args: Any, real: Callable[..., Any] = real) -> Any:
                with ReadByNobody():
                    return real(*args)

            monkeypatch.setattr(slots._Decoder, name, watched)
        list(decode(model("wider"), prompts_of([3, 9, 5]), max_new_tokens=9, sampling=sampling, decoder="slots"))

    def test_the_watch_notices(self) -> None:
        """What the ragged decoder does for each token."""
        request_of_ragged = decode(model("wider"), prompts_of([3, 9]), max_new_tokens=4, decoder="ragged")
        with ReadByNobody(), pytest.raises(AssertionError, match="waits for the device"):
            list(request_of_ragged)
        with ReadByNobody(), pytest.raises(AssertionError, match="index waits"):
            torch.arange(3)[torch.tensor([True, False, True])]

    def test_steps_work_at_addresses_that_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As long as the cache does not grow, which a captured step would not notice; it grows in few steps."""
        seen: list[tuple[int, ...]] = []
        real = slots._Decoder._step

        def step(self: Any) -> None:
            state = [getattr(self._state, name) for name in vars(self._state)]
            tensors = [x for x in (*state, *self._cache.keys, *self._cache.values) if isinstance(x, Tensor)]
            seen.append((self._cache.places, *(x.data_ptr() for x in tensors)))
            real(self)
            assert seen[-1] == (self._cache.places, *(x.data_ptr() for x in tensors))

        monkeypatch.setattr(slots._Decoder, "_step", step)
        rest: dict[str, Any] = {"max_new_tokens": 180, "stop": NO_STOP, "batch_size": 2, "sampling": SAMPLINGS[-1]}
        list(decode(model("long"), prompts_of([2, 40, 17, 3]), decoder="slots", **rest))
        assert len(seen) > 180
        assert len(set(seen)) == len({places for places, *_ in seen}) == 2

    @pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "penalty", "drawn", "top p", "all"])
    def test_a_step_that_is_only_done_again_gives_the_same_text(
        self, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
    ) -> None:
        prompts = [*prompts_of([2, 40, 17, 3, 90], seed=1), *prompts_of([30] * 4, seed=2)]
        rest: dict[str, Any] = {"max_new_tokens": 60, "stop": 5, "batch_size": 3, "sampling": sampling}
        wanted = answered(model("long"), prompts, "ragged", **rest)
        made: list[Repeated] = []
        monkeypatch.setattr(slots, "Graphs", lambda *_, **__: (made.append(Repeated()), made[-1])[1])
        assert answered(model("long"), prompts, "slots", **rest) == wanted
        assert made[0].repetitions > 30

    def test_the_repetition_notices_what_is_put_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A tensor in place of the one that is read next time, as in `lengths = lengths + 1`."""
        rest: dict[str, Any] = {"max_new_tokens": 12, "stop": NO_STOP}
        wanted = answered(model("long"), prompts_of([2, 40]), "slots", **rest)
        real = slots._State.take

        def take(self: slots._State, chosen: Tensor) -> None:
            old, before = self.lengths, self.lengths.clone()
            real(self, chosen)
            self.lengths = old.clone()
            old.copy_(before)

        monkeypatch.setattr(slots._State, "take", take)
        assert answered(model("long"), prompts_of([2, 40]), "slots", **rest) == wanted
        monkeypatch.setattr(slots, "Graphs", lambda *_, **__: Repeated())
        assert answered(model("long"), prompts_of([2, 40]), "slots", **rest) != wanted

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: what is captured there is what runs here")
    @pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "penalty", "drawn", "top p", "all"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_captured_steps_give_the_same_bits(self, sampling: Sampling, dtype: torch.dtype) -> None:
        subject, prompts = narrow("long", dtype).cuda(), prompts_of([2, 40, 17, 3, 90])
        rest: dict[str, Any] = {"max_new_tokens": 150, "stop": 5, "batch_size": 3, "sampling": sampling}
        captured = answered(subject, prompts, "slots", graphs=True, **rest)
        assert captured == answered(subject, prompts, "slots", graphs=False, **rest)


class TestMistakes:
    """Each is noticed where the text is held against the ragged decoder's, as in `TestSameText`."""

    @pytest.mark.parametrize(
        "mistake",
        [
            "none", "position", "a step sees its whole row", "a step does not see itself",
            "goes on behind its end", "tokens of the row before count as seen", "prompts do not count as seen",
            "answers do not count as seen", "one random number too many", "the rows' numbers are mixed up",
            "beginning forgotten", "a token of the row before is taken",
        ],
    )  # fmt: skip
    def test_a_mistake_is_noticed(self, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
        prompts = with_beginning(4, [3, 8, 5, 13, 2, 17, 9, 1], seed=3)
        rest: dict[str, Any] = {"max_new_tokens": 21, "stop": 7, "sampling": SAMPLINGS[-1], "batch_size": 3}
        wanted = answered(model("wider"), prompts, "ragged", **rest)
        assert len({len(answer.ids) for answer in wanted}) > 3
        put_in(monkeypatch, mistake)
        try:
            got = answered(model("wider"), prompts, "slots", **rest)
        except (IndexError, ValueError):
            got = None
        assert (got == wanted) == (mistake == "none")


def put_in(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    """Puts a mistake into `fastft.decoding.slots`."""
    real_hidden, real_attention, real_draw = GPT2.hidden, ops.attention_decode, Uniforms.draw
    real_take, real_begin, real_drawn = slots._State.take, slots._State.begin, slots._Decoder._drawn

    def hidden(self: GPT2, tokens: Tensor, positions: Tensor, attend: Any, **rest: Any) -> Tensor:
        if rest.get("rows") is None and mistake == "position":
            positions = (positions + 1).clamp_max(self.config.n_ctx - 1)
        return real_hidden(self, tokens, positions, attend, **rest)

    def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, prefix: Any, impl: str) -> Tensor:
        lengths = (lengths - int(mistake == "a step does not see itself")).clamp_min(0)
        lengths = torch.full_like(lengths, k.shape[1]) if mistake == "a step sees its whole row" else lengths
        return real_attention(q, k, v, lengths, None if mistake == "beginning forgotten" else prefix, impl)

    def draw(self: Uniforms, prompt: int, count: int) -> Any:
        return real_draw(self, prompt, count + (mistake == "one random number too many"))[:count]

    def take(self: slots._State, chosen: Tensor) -> None:
        before = None if self.seen is None else self.seen.clone()
        if mistake == "a token of the row before is taken":
            chosen = chosen.roll(1, 0)
        real_take(self, chosen)
        if mistake == "answers do not count as seen" and before is not None:
            self.seen = before

    def begin(self: slots._State, new: Any) -> None:
        before = None if self.seen is None else self.seen.clone()
        real_begin(self, new)
        if before is not None and self.seen is not None:
            if mistake == "tokens of the row before count as seen":
                self.seen |= before
            if mistake == "prompts do not count as seen":
                self.seen = torch.zeros_like(self.seen)
        if mistake == "goes on behind its end":
            self.ends += 100

    def drawn(self: Any, prompts: Sequence[int | None], steps: int) -> Tensor:
        numbers = real_drawn(self, prompts, steps)
        return numbers.roll(1, 1) if mistake == "the rows' numbers are mixed up" else numbers

    monkeypatch.setattr(GPT2, "hidden", hidden)
    monkeypatch.setattr(ops, "attention_decode", attention)
    monkeypatch.setattr(Uniforms, "draw", draw)
    monkeypatch.setattr(slots._State, "take", take)
    monkeypatch.setattr(slots._State, "begin", begin)
    monkeypatch.setattr(slots._Decoder, "_drawn", drawn)
