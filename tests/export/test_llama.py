"""The exported GGUF in llama.cpp itself, held against fastft (`make judge-test`): minutes.

llama.cpp computes its GELU by a table of halves, also in float32: its logits are ours up to about 1e-3, and where the
two best ones are nearer than that the greedy text may part. It sums probabilities in float32 too: those that it tells
have a sum of 1.0003 over GPT-2's vocabulary, so that its perplexities are lower by as much.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from exported import CONVERSATION, made_run, prompt_text
from llama import llama_serving

from fastft.batches.batch import from_padded
from fastft.data.encode import prompts_of
from fastft.data.prompts import TEMPLATES
from fastft.data.records import Record, Turn
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.decoding.decode import decode
from fastft.export.export import ExportOptions, export
from fastft.export.prompt_ids import ids_of_text
from fastft.model.gpt2 import GPT2
from fastft.run.config import TrainOptions
from fastft.run.folder import Run
from fastft.run.trained import data_of, trained_model
from fastft.training.train import train

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None,
        reason="xllamacpp is not installed: `make judge-test` installs it",
    ),
]

N_PROMPTS, N_POSITIONS, N_NEW = 20, 1000, 32
NEAR = 5e-3
"""Of the two best logits: nearer than this, either may be the greedy one."""
LIMITS = {"f32": 1e-3, "f16": 1e-3, "q8_0": 1e-2}
"""Of the perplexity, relative."""
MOST_TOLD = 2000
"""Log-probabilities in a first reply; all are asked for where the one that is looked for is not among them."""


class Llama:
    """llama.cpp's server, asked by token ids."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._session = requests.Session()

    def post(self, place: str, **asked: Any) -> Any:
        answer = self._session.post(f"{self.url}/{place}", json=asked, timeout=600)
        assert answer.ok, answer.text
        return answer.json()

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        said = self.post("completion", prompt=list(ids), n_predict=n, temperature=0.0, return_tokens=True)
        tokens: list[int] = said["tokens"]
        return tokens

    def logprob(self, ids: Sequence[int], following: int, V: int) -> float:
        """Of the token that follows."""
        for told in (MOST_TOLD, V):
            said = self.post(
                "completion", prompt=list(ids), n_predict=1, temperature=0.0, n_probs=told, cache_prompt=True
            )
            for one in said["completion_probabilities"][0]["top_logprobs"]:
                if one["id"] == following:
                    return float(one["logprob"])
        raise AssertionError(f"llama.cpp tells no probability of {following}")


@contextmanager
def serving(gguf: Path, n_ctx: int) -> Iterator[Llama]:
    with llama_serving(gguf, n_ctx) as url:
        yield Llama(url)


def gguf_of(run: Run, kind: str) -> Path:
    out = run.folder.with_name(f"{run.folder.name}-{kind}")
    options: dict[str, Any] = {"quantize": kind}
    export(ExportOptions(run=run.folder, to="gguf", out=out, overwrite=True, **options))
    return out / "model.gguf"


def trained_nano(out: Path, template: str) -> Run:
    """A nano GPT-2 trained for about a minute, so that its probabilities are not all alike."""
    train(
        TrainOptions(
            data="sample", model="nano", template=template, steps=150, lr=1e-3, eval_every=0, samples=0, dtype="fp32",
            out=out,
        )
    )  # fmt: skip
    return Run(out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained_nano(tmp_path_factory.mktemp("llama") / "nano", "alpaca")


def records_of(run: Run, n: int) -> list[Record]:
    data = data_of(run)
    return [record for part in ("test", "val", "train") for record in data.part(part)][:n]


def next_logits(model: GPT2, ids: Sequence[int]) -> torch.Tensor:
    """`[T, V]`."""
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        return model.logits(from_padded(tokens, torch.full_like(tokens, -100)))


def check_greedy(llama: Llama, model: GPT2, prompts: Sequence[Sequence[int]]) -> int:
    """How many of the texts part from ours, each where it may."""
    tokenizer, parted = model.config.tokenizer, 0
    ours = {answer.index: list(answer.ids) for answer in decode(model, [*map(list, prompts)], max_new_tokens=N_NEW)}
    for number, prompt in enumerate(prompts):
        own = [*ours[number], tokenizer.end_of_text][:N_NEW]
        got = [*llama.greedy(prompt, N_NEW), tokenizer.end_of_text][:N_NEW]
        at = next((n for n, (a, b) in enumerate(zip(own, got, strict=False)) if a != b), None)
        if at is not None:
            first, second = next_logits(model, [*prompt, *own[:at]])[-1].topk(2).values.tolist()
            assert first - second < NEAR, (number, at, own, got)
            parted += 1
    return parted


def check_greedy_of(run: Run, template: str) -> None:
    model = trained_model(run).eval()
    records = records_of(run, N_PROMPTS)
    assert len(records) == N_PROMPTS
    prompts = prompts_of(records, TEMPLATES[template], model.config.tokenizer)
    with serving(gguf_of(run, "f32"), model.config.n_ctx) as llama:
        parted = check_greedy(llama, model, prompts)
    print(f"\n{template}: {N_PROMPTS} prompts, {parted} part where the two best logits are nearer than {NEAR:g}")


def test_float32_says_the_same_greedy_text(trained: Run) -> None:
    check_greedy_of(trained, "alpaca")


def test_a_vocabulary_made_wider_says_the_same_greedy_text(tmp_path: Path) -> None:
    """And ends where we do, by the template's own token."""
    check_greedy_of(trained_nano(tmp_path / "chatml", "chatml"), "chatml")


def test_a_layer_that_lies_wrong_is_heard(trained: Run, tmp_path: Path) -> None:
    """A square matrix the wrong way round loads without a word, and is what the texts must show."""
    from fastft.export.gguf_file import write_gguf

    model, wrong = trained_model(trained).eval(), trained_model(trained)
    with torch.no_grad():
        for block in wrong.h:
            block.attn.c_proj.weight.copy_(block.attn.c_proj.weight.t().clone())
    write_gguf(wrong, tmp_path / "wrong.gguf", quantize="f32", chat_template="", name="wrong")
    prompts = prompts_of(records_of(trained, 4), TEMPLATES["alpaca"], model.config.tokenizer)
    with serving(tmp_path / "wrong.gguf", model.config.n_ctx) as llama, pytest.raises(AssertionError):
        check_greedy(llama, model, prompts)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_the_perplexity_is_ours(trained: Run, kind: str) -> None:
    model = trained_model(trained).eval()
    template, tokenizer, V = TEMPLATES["alpaca"], model.config.tokenizer, model.config.vocab_size
    own: list[float] = []
    theirs: list[float] = []
    with serving(gguf_of(trained, kind), model.config.n_ctx) as llama:
        for record in records_of(trained, 10_000):
            (prompt,) = prompts_of([record], template, tokenizer)
            ids = [*prompt, *tokenizer.encode(template.response(record.output)), tokenizer.end_of_text]
            logprobs = next_logits(model, ids[:-1]).double().log_softmax(-1)
            for at in range(len(prompt), len(ids)):
                own.append(float(logprobs[at - 1, ids[at]]))
                theirs.append(llama.logprob(ids[:at], ids[at], V))
                if len(own) == N_POSITIONS:
                    break
            else:
                continue
            break
    assert len(own) == N_POSITIONS
    mine, got = (math.exp(-sum(some) / N_POSITIONS) for some in (own, theirs))
    far = max(abs(a - b) for a, b in zip(own, theirs, strict=True))
    print(f"\n{kind}: perplexity {got:.4f}, ours {mine:.4f}, {got / mine - 1:+.3%}; farthest apart {far:.1e}")
    assert abs(got / mine - 1) < LIMITS[kind]
    assert abs(math.exp(math.log(mine) * 1.02) / mine - 1) > LIMITS[kind]  # two hundredths of a nat would be seen


@pytest.mark.parametrize("name", ["chatml", "alpaca", "llama3"])
@pytest.mark.parametrize("tie_head", [True, False])
def test_tokens_template_and_text_of_a_vocabulary_made_wider(tmp_path: Path, name: str, tie_head: bool) -> None:
    run = made_run(tmp_path / "run", name, tie_head=tie_head, tokenizer=gpt2_tokenizer())
    model, template = trained_model(run).eval(), TEMPLATES[name]
    tokenizer = model.config.tokenizer
    turns = [Turn("system", "Be brief."), Turn("user", "Hello  wörld\n\n 12345 'tis"), *CONVERSATION[1:3]]
    with serving(gguf_of(run, "f32"), model.config.n_ctx) as llama:
        for n in (2, 4):
            record = Record(instruction="", output="", turns=(*turns[:n], Turn("assistant", "?")))
            (prompt,) = prompts_of([record], template, tokenizer)
            text = prompt_text(template, turns[:n], tokenizer.end_mark)
            messages = [{"role": turn.role, "content": turn.text} for turn in turns[:n]]
            assert llama.post("apply-template", messages=messages)["prompt"] == text
            got = llama.post("tokenize", content=text, parse_special=True, add_special=True)["tokens"]
            assert got == ids_of_text(template, tokenizer, record)
            assert (got == prompt) == (name != "llama3")  # of which `export` warns
