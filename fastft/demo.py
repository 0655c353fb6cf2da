"""`fastft demo`: the whole way on embedded data, from records to the report, with a nano GPT-2 from scratch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from fastft.answers.generation import GenerateOptions, generate
from fastft.common import files
from fastft.common.console import printable, say
from fastft.common.lock import writing
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.decoding.decode import greedy
from fastft.metrics.text_metrics import exact_match
from fastft.model.gpt2 import GPT2
from fastft.model.precision import choose_device
from fastft.reports.report import ReportOptions, report
from fastft.run.config import TrainOptions
from fastft.run.data import load_data
from fastft.run.folder import DEMO
from fastft.scores.score import ScoreOptions, score
from fastft.training.models import initial_model
from fastft.training.train import Outcome, train

MAX_NEW_TOKENS = 32
ANSWERS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Where, and whether it is judged."""

    out: Path = Path("out/demo")
    """The folder of the run; a demo that is there already is replaced."""
    judge: bool = True
    """Also ask a local Ollama for scores, where one answers."""


def demo_run(out: Path) -> TrainOptions:
    """How the demo trains: 8 epochs of nano on the sample data."""
    return TrainOptions(
        data="sample",
        model="nano",
        out=out,
        overwrite=True,
        batch_size=16,
        epochs=8,
        lr=1e-3,
        schedule="cosine",
        warmup=40,
        eval_every=200,
        keep_best=False,
        save_every=1_000_000,
    )


def demo(options: DemoOptions) -> Outcome:
    """Trains, answers the test questions, scores and reports; prints answers of the tuned model last."""
    began = time.perf_counter()
    train_options = demo_run(options.out)
    before = _exact_match_of(initial_model(train_options), train_options)
    say(f"exact match on the test questions before training: {before:.1f}%")
    outcome = train(train_options)
    if outcome.interrupted_by is not None:
        return outcome
    with writing(options.out):
        files.write_json(options.out / DEMO, {"exact_match_before": before})
    entries = generate(GenerateOptions(run=options.out, max_new_tokens=MAX_NEW_TOKENS, batch_size=64))
    scores = score(ScoreOptions(run=options.out, judge="ollama" if options.judge else "none"))
    page = report(ReportOptions(run=options.out))
    after = scores["summary"]["exact_match"]
    print(f"report: {page}")
    print(f"exact match on {len(entries)} test questions: {before:.1f}% before training, {after:.1f}% after")
    print(f"took {time.perf_counter() - began:.0f} s; answers of the tuned model:")
    for entry in entries[:: max(1, len(entries) // ANSWERS_SHOWN)][:ANSWERS_SHOWN]:
        question = " ".join(f"{entry['instruction']} {entry['input']}".split())
        print(printable(f"  {question} -> {entry['model_response']}"))

    return outcome


def _exact_match_of(model: GPT2, options: TrainOptions) -> float:
    """Percent of the test questions that a model answers exactly."""
    data = load_data(options)
    records = data.part("test")
    tokenizer = gpt2_tokenizer()
    prompts = [data.template.prompt_of(record) for record in records]
    model = model.to(choose_device(options.device))
    answers = greedy(model, tokenizer.encode_many(prompts), max_new_tokens=MAX_NEW_TOKENS, graphs=True)
    responses = [data.template.extract(tokenizer.decode(ids)) for ids in answers]
    return exact_match(responses, [record.output for record in records])
