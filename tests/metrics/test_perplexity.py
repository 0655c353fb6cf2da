from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastft.batches.batch import from_padded
from fastft.common.errors import UserError
from fastft.data.encode import EncodedSet, prompts_of
from fastft.data.prompts import ALPACA
from fastft.data.records import Record, Turn
from fastft.data.tokenizer import END_OF_TEXT, gpt2_tokenizer
from fastft.metrics import perplexity
from fastft.metrics.perplexity import choice_accuracy, choice_likelihoods, response_perplexities
from fastft.model import ops
from fastft.model.gpt2 import GPT2, config_for
from fastft.model.weights import save_hf
from fastft.run.config import TrainOptions, to_yaml

CHOICES = ["owl", "a rather long choice of many words", "tool"]
ENTRIES: list[dict[str, Any]] = [
    {"instruction": "What is it?", "input": "owl", "output": "owl", "category": "x", "choices": CHOICES},
    {"instruction": "Which tool?", "input": "", "output": "C", "category": "y", "choices": CHOICES},
    {"instruction": "Say it.", "input": "", "output": "one two three", "category": "x"},
    {"instruction": "word " * 300, "input": "", "output": "owl", "choices": CHOICES},
]


@pytest.fixture(scope="module")
def model() -> GPT2:
    torch.manual_seed(0)
    made = GPT2(config_for("pico")).eval()
    with torch.no_grad():
        made.wte.weight.mul_(8)  # so that likelihoods differ by more than rounding
    return made


@pytest.fixture
def run(model: GPT2, tmp_path: Path) -> Path:
    save_hf(model, tmp_path / "model")
    (tmp_path / "config.yaml").write_text(to_yaml(TrainOptions(model="pico")))
    return tmp_path


def log_probabilities(model: GPT2, before: str, asked: str) -> list[float]:
    """Of each token of `asked` and its end-of-text behind `before`, one text at a time from the logits."""
    tokenizer = gpt2_tokenizer()
    first, ids = tokenizer.encode(before), [*tokenizer.encode(before + asked), END_OF_TEXT]
    inputs = torch.tensor([ids[:-1]])
    with torch.no_grad():
        logits = model.logits(from_padded(inputs, torch.full_like(inputs, -100)), impl="reference")
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return [float(one) for one in chosen[len(first) - 1 :]]


def record(entry: dict[str, Any]) -> Record:
    return Record(
        instruction=entry["instruction"],
        input=entry["input"],
        output=entry["output"],
        extra={"choices": entry.get("choices")},
    )


def test_likelihoods_of_choices_are_those_of_one_text_at_a_time(model: GPT2) -> None:
    records = [record(ENTRIES[0]), record(ENTRIES[3]), record(ENTRIES[1])]
    found = choice_likelihoods(model, records, ALPACA)
    assert found[1] is None  # longer than the context
    for one, likely in ((records[0], found[0]), (records[2], found[2])):
        assert likely is not None
        before = ALPACA.prompt(one.instruction, one.input, CHOICES) + ALPACA.response("")
        # What the model is taught to say: the choices' texts, or their letters where the output is a letter.
        for answer, likelihood in zip("ABC" if one.output == "C" else CHOICES, likely, strict=True):
            expected = log_probabilities(model, before, answer)
            assert likelihood.tokens == len(expected)
            assert likelihood.total == pytest.approx(sum(expected), rel=1e-5)
            assert likelihood.per_token == pytest.approx(np.mean(expected), rel=1e-5)


def test_accuracy_is_of_the_likeliest_choice(run: Path, model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    likely = choice_likelihoods(model, [record(entry) for entry in ENTRIES[:2]], ALPACA)
    assert likely[0] is not None
    assert likely[1] is not None
    right = [
        int(np.argmax([one.total for one in row or []])) == index for row, index in zip(likely, (0, 2), strict=True)
    ]
    found = choice_accuracy(run, ENTRIES)
    assert found is not None
    assert (found["total"]["n"], found["total"]["accuracy"]) == (2, 50.0 * sum(right))
    assert list(found["by_category"]) == ["x", "y"]
    assert found["by_category"]["y"]["total"]["accuracy"] == 100.0 * right[1]
    # The long choice has the lowest sum and, made so, the highest mean.
    made = [perplexity.Likelihood(-5, 2), perplexity.Likelihood(-10, 10), perplexity.Likelihood(-6, 2)]
    monkeypatch.setattr(perplexity, "choice_likelihoods", lambda *_: [made])
    entry = {**ENTRIES[0], "output": "B"}
    found = choice_accuracy(run, [entry])
    assert found is not None
    assert (found["total"]["accuracy"], found["per_token"]["accuracy"]) == (0, 100)


def test_no_choices_that_fit_are_no_figure(run: Path) -> None:
    assert choice_accuracy(run, ENTRIES[2:3]) is None
    assert choice_accuracy(run, ENTRIES[3:]) is None


def test_perplexity_is_exp_of_the_mean_loss_of_all_response_tokens(run: Path, model: GPT2) -> None:
    losses = []
    for entry in ENTRIES[:3]:
        prompt = ALPACA.prompt(entry["instruction"], entry["input"], entry.get("choices", ()))
        losses.append([-x for x in log_probabilities(model, prompt, ALPACA.response(entry["output"]))])
    found = response_perplexities(run, ENTRIES)
    assert set(found) == {None, "x", "y"}
    assert found[None] == pytest.approx(math.exp(np.mean(losses[0] + losses[1] + losses[2])), rel=1e-4)
    assert found["x"] == pytest.approx(math.exp(np.mean(losses[0] + losses[2])), rel=1e-4)
    assert found["y"] == pytest.approx(math.exp(np.mean(losses[1])), rel=1e-4)
    with pytest.raises(UserError, match="context of 256"):
        response_perplexities(run, ENTRIES[3:])


def test_perplexity_is_of_the_last_answer_alone(run: Path, model: GPT2) -> None:
    """What was said before is asked: of a conversation, and of segments, which no template writes around."""
    chat = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
    raw = (Turn("raw", "So", True), Turn("raw", " it", False), Turn("raw", " goes", True))
    for turns, header in ((chat, "\n\n### Response:\n"), (raw, "")):
        record = Record(instruction=turns[-2].text, output=turns[-1].text, turns=turns)
        begin = "" if header == "" else ALPACA.prompt("a") + header + "b"
        tokenizer = gpt2_tokenizer()
        before = prompts_of([record], ALPACA, tokenizer)[0]
        ids = [*before, *tokenizer.encode(header + record.output), END_OF_TEXT]
        assert tokenizer.decode(before).startswith(begin)
        inputs = torch.tensor([ids[:-1]])
        with torch.no_grad():
            logits = model.logits(from_padded(inputs, torch.full_like(inputs, -100)), impl="reference")
        losses = -logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[len(before) - 1 :, 0]
        found = response_perplexities(run, [record.as_entry()])
        assert found[None] == pytest.approx(math.exp(losses.mean()), rel=1e-4)


@pytest.mark.parametrize("outputs", ["letters", "texts"])
def test_a_model_that_is_right_on_all_is_at_100_however_it_was_taught_to_say_so(
    outputs: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was at chance where outputs are letters: the choices' texts are nothing that it was taught to say."""
    entries = [
        {
            "instruction": f"Which is number {i}?", "input": "", "choices": [f"one {i}", f"two {i}", f"three {i}"],
            "output": "ABC"[i % 3] if outputs == "letters" else f"{('one', 'two', 'three')[i % 3]} {i}",
        }
        for i in range(9)
    ]  # fmt: skip

    def losses(_: GPT2, encoded: EncodedSet) -> tuple[np.ndarray, np.ndarray]:
        """Those of a model that has learned the outputs by heart."""
        texts = [gpt2_tokenizer().decode(encoded[i][:-1].tolist()) for i in range(len(encoded))]
        asked = [int(text.split("number ")[1].split("?")[0]) for text in texts]
        said = [text.split("### Response:\n")[1] for text in texts]
        wrong = np.array([text != entries[i]["output"] for i, text in zip(asked, said, strict=True)], dtype=float)
        return 1 + wrong, np.ones(len(texts))

    monkeypatch.setattr(perplexity, "_example_losses", losses)
    found = choice_accuracy(run, entries)
    assert found is not None
    assert (found["total"]["n"], found["total"]["accuracy"], found["per_token"]["accuracy"]) == (9, 100, 100)


def test_no_batch_waits_for_the_one_before_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made from what the host has, and losses are read when the last batch has been asked for."""
    happened: list[str] = []

    def noted(name: str, real: Any) -> Any:
        return lambda *args, **rest: (happened.append(name), real(*args, **rest))[1]

    monkeypatch.setattr(perplexity, "_BATCH_SIZE", 1)
    monkeypatch.setattr(ops, "planner", noted("planner", ops.planner))
    monkeypatch.setattr(GPT2, "forward", noted("asked", GPT2.forward))
    monkeypatch.setattr(torch.Tensor, "cpu", noted("read", torch.Tensor.cpu))
    response_perplexities(run, ENTRIES)
    assert happened == ["planner", "asked", "asked", "asked", "read", "read", "read"]
