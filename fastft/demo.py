"""`fastft demo`: the whole way on embedded data, from records to the report, with a nano GPT-2 from scratch."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastft.answers.generation import generate
from fastft.answers.options import GenerateOptions
from fastft.common import files
from fastft.common.console import printable, say
from fastft.common.errors import UserError
from fastft.common.lock import writing
from fastft.common.options import check_values, names_checked, option
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.decoding.decode import greedy
from fastft.metrics.text_metrics import exact_match
from fastft.model.gpt2 import GPT2
from fastft.model.names import DType
from fastft.model.precision import choose_device
from fastft.reports.report import ReportOptions, report
from fastft.run.config import TrainOptions, changed_settings
from fastft.run.data import load_data
from fastft.run.folder import DEMO, Run
from fastft.scores.score import ScoreOptions, score
from fastft.training.callbacks import Callbacks
from fastft.training.models import initial_model
from fastft.training.preparing import settled
from fastft.training.train import Outcome, train

MAX_NEW_TOKENS = 32
ANSWERS_SHOWN = 5


@names_checked
@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Where, from which seed, and whether it is judged."""

    out: Path = Path("out/demo")
    """The folder of the run; a demo that is there already is replaced, and nothing else."""
    judge: bool = True
    """Also ask a local Ollama for scores, where one answers."""
    seed: int = option(TrainOptions.seed, at_least=0)
    """Random weights and the order of examples."""
    dtype: DType = "auto"
    """Arithmetic of the training; auto: what the hardware does fast."""
    steps: int | None = option(None, at_least=1)
    """Stop training after so many steps, for a look at what happens; not given: all of its epochs."""

    def __post_init__(self) -> None:
        check_values(self)


def demo_run(options: DemoOptions) -> TrainOptions:
    """How the demo trains: nano from random weights on the sample data, always to the same length.

    Chosen by validation loss alone, on other seeds than those that docs/demo.md measures it with (tools/demo_seeds.py).
    """
    whole: dict[str, Any] = {"epochs": 14, "warmup": 40}
    cut = {"steps": options.steps, "warmup": min(40, (options.steps or 1) - 1)}
    return TrainOptions(
        data="sample",
        model="nano",
        out=options.out,
        overwrite=True,
        batch_size=32,
        lr=1.4e-3,
        schedule="cosine",
        eval_every=200,
        keep_best=False,
        save_every=1_000_000,
        seed=options.seed,
        dtype=options.dtype,
        **(whole if options.steps is None else cut),
    )


def demo(options: DemoOptions) -> Outcome:
    """Trains, answers the test questions, scores and reports; prints answers of the tuned model last.

    Raises:
        UserError: in `out` is what is not a demo; it is as it was.
    """
    began = time.perf_counter()
    train_options = demo_run(options)
    refuse_what_is_no_demo(train_options)
    before = _exact_match_of(initial_model(train_options), train_options)
    say(f"exact match on the test questions before training: {before:.1f}%")
    refuse_what_is_no_demo(train_options)  # again: another process may have been here in the meantime
    mark = {"exact_match_before": before}
    # As soon as the folder is the demo's: one that is killed is a demo too.
    callbacks = Callbacks(on_evaluate=lambda _: files.write_json(options.out / DEMO, mark))
    outcome = train(train_options, callbacks=callbacks)
    if outcome.interrupted_by is not None:
        return outcome
    with writing(options.out):
        files.write_json(options.out / DEMO, mark)
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


def refuse_what_is_no_demo(options: TrainOptions) -> None:
    """Looks for what the demo would replace: only a demo, whole or killed, may be that.

    Raises:
        UserError: something else is there.
    """
    run = Run(options.out)
    settled(options, run)  # refuses what is no folder, and files that no run of fastft has written
    if run.holds_something() and not _is_demo(run, options):
        raise UserError(
            f"{run.folder} holds a run that is no demo (it has no {DEMO}), which the demo would replace; take another "
            "--out, or move it away"
        )


def _is_demo(run: Run, options: TrainOptions) -> bool:
    """Whether a demo has been here: by its mark, or, where it was killed before that, by how it trains."""
    if (run.folder / DEMO).is_file():
        return "exact_match_before" in files.object_or_empty(run.folder / DEMO)
    if not run.config.is_file():
        return False
    saved = run.options()
    given = ("seed", "dtype", "steps", "epochs", "warmup")
    return not changed_settings(saved, replace(options, **{name: getattr(saved, name) for name in given}))


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
