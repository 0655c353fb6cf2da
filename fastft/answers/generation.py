"""The stage RUN/model -> responses.json: answers to a split's prompts; the same of a model that is no run's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from fastft.answers.options import AnswerOptions, GenerateOptions
from fastft.answers.responses import Line, Responses
from fastft.common.console import meter, say, warn
from fastft.common.effects import check_effects
from fastft.common.errors import UserError
from fastft.common.lock import writing
from fastft.data.chat_template import AnyTemplate, template_named
from fastft.data.encode import prompts_of
from fastft.data.folder_tokenizer import tokenizer_of, with_special_tokens
from fastft.data.records import Record
from fastft.data.sources import Places
from fastft.data.tokenizer import Tokenizer, gpt2_tokenizer
from fastft.decoding.decode import decode
from fastft.decoding.inference import prepared
from fastft.model.gpt2 import GPT2
from fastft.model.precision import choose_device
from fastft.model.vocabulary import with_tokenizer
from fastft.model.weights import base_of_adapter, config_of, is_same_source, load
from fastft.run.config import TrainOptions, changed_settings
from fastft.run.data import Data
from fastft.run.folder import Run
from fastft.run.given import template_for, template_name_for
from fastft.run.trained import check_same_tokenizer, data_of, trained_model


def generate(options: GenerateOptions) -> list[dict[str, Any]]:
    """Answers the prompts of a run's split with its model and writes `responses.json` (`responses.val.json`, ...; under
    a name `responses.NAME.json`).

    Each answer is written down as it ends; a second call goes on where a killed one stopped.

    Raises:
        UserError: the run has no model, a prompt leaves no room in the context (the rows are named), an option can have
            no effect, or answers are there that were made with other settings.
    """
    check_effects(options)
    if not options.of_a_split:
        raise ValueError("got prompts of one's own, expected a split: fastft.answers.asking.ask answers those")
    options = as_a_run(options)
    run = options.of_run()
    with writing(run.folder):
        return _generate(run, options)


def model_to_answer(options: AnswerOptions, template: AnyTemplate, *, rows: int) -> GPT2:
    """The model, ready to answer so many prompts of the template at a time.

    Raises:
        UserError: the run has none, or the model cannot be loaded.
    """
    if options.model is not None:
        model = load(options.model, adapter=options.adapter)
        tokenizer = model.config.tokenizer
        if not tokenizer.special_tokens() >= set(template.special_tokens):
            raise UserError(
                f"got --model {options.model} and template {template.name}, whose tokens it has not "
                f"({', '.join(template.special_tokens)}); expected one that was trained with them, or another "
                "--template"
            )
        model = with_tokenizer(model, with_special_tokens(tokenizer, template.special_tokens, template.end))
    else:
        model = trained_model(options.of_run())
    model = model.to(choose_device(options.device)).eval()
    return prepared(model, torch.bfloat16 if options.dtype == "bf16" else torch.float32, rows=rows)


def as_a_run(options: GenerateOptions) -> GenerateOptions:
    """The options of answering by a run; a `--model` becomes one.

    Raises:
        UserError: see `become_a_run`.
    """
    if options.model is None:
        return options
    become_a_run(options)
    return replace(options, model=None, adapter=None, template=None, run=options.out, out=None, data=None)


def become_a_run(options: GenerateOptions) -> None:
    """Makes a run of a `--model` that nobody has trained on the data: its weights as they are, after no step.

    Raises:
        UserError: `--out` holds something else, or the data cannot be read.
    """
    from fastft.training.train import train  # it needs what a training does

    model, out = _in_one(options), cast(Path, options.out)
    wanted = TrainOptions(
        data=cast(str, options.data), weights=model, template=template_name_for(model, options.template), out=out,
        steps=0, eval_every=0, samples=0, keep_best=False, dtype="fp32", device=options.device,
        tie_head=config_of(model).tie_head,
    )  # fmt: skip
    if _described(template_for(model, options.template)) != _described(template_named(wanted.template)):
        raise UserError(f"{wanted.template} is not as it was when {model} was trained; name its template by --template")
    run = Run(out)
    if run.config.is_file() and run.weights.is_file():
        if not (changed := changed_settings(run.options(), wanted)):
            _check_same_model(run, options)
            return
        raise UserError(f"{out} holds another run ({'; '.join(changed)}); choose another --out")
    if run.config.is_file():
        raise UserError(
            f"{out} holds a run without a model, as a stopped call leaves it; remove it or choose another --out"
        )
    train(wanted)


def _in_one(options: AnswerOptions) -> str:
    """A `--model` with its `--adapter` as one source of weights.

    Raises:
        UserError: the adapter names another base.
    """
    model = cast(str, options.model)
    if options.adapter is None:
        return model
    if (base := base_of_adapter(options.adapter)) is None or not is_same_source(base, model):
        raise UserError(
            f"got --model {model}, --adapter {options.adapter} and a split, whose answers become a run, which starts "
            f"from one source: expected an adapter that names {model} as its base, and it names {base}; correct "
            f"base_model_name_or_path in its adapter_config.json"
        )
    return options.adapter


def _described(template: AnyTemplate) -> dict[str, Any]:
    """What a template writes, wherever its file lies."""
    return {key: value for key, value in template.description().items() if key != "name"}


def _check_same_model(run: Run, options: GenerateOptions) -> None:
    """Refuses to go on with a baseline whose model or template has been changed since, in its place.

    Raises:
        UserError: it has.
    """
    model = _in_one(options)
    if _described(template_for(model, options.template)) != _described(run.template()):
        raise UserError(f"the template of {model} is not the one that {run.folder} was made by; choose another --out")
    held = dict(trained_model(run).named_parameters())
    for name, weight in load(model).named_parameters():
        # A template's own tokens have rows in the run's embedding alone, below all others.
        if name not in held or not torch.equal(held[name][: len(weight)], weight):
            raise UserError(f"the weights of {model} are not those that {run.folder} was made of; choose another --out")


def _generate(run: Run, options: GenerateOptions) -> list[dict[str, Any]]:
    data = data_of(run, options.data)
    records = data.part(options.split)
    if not records:
        raise UserError(f"the {options.split} split holds no record; its data is too small")
    tokenizer = tokenizer_of(run.model) or gpt2_tokenizer()
    check_same_tokenizer(run, tokenizer)
    rows = data.places_of(options.split, records)
    _check_questions(records, options.split, data.places, rows)
    prompts = [data.template.prompt_of(record) for record in records]
    made_from = made_of(run, tokenizer, options, _asked(records, prompts))
    responses = Responses(
        options.path(), partial(_entries, records), made_from, [*map(data.places.called, rows)],
        overwrite=options.overwrite,
    )  # fmt: skip
    asked = min(len(records), options.limit or len(records))
    missing = responses.missing(asked)
    if len(missing) < asked:
        say(f"{asked - len(missing)} of {asked} responses are there already")
    if missing:
        model = model_to_answer(options, data.template, rows=options.batch_size)
        ids = prompts_of(records[:asked], data.template, model.config.tokenizer)
        without_room = _without_room(ids, model.config.n_ctx, data.places, rows, options)
        missing = [index for index in missing if index not in without_room]
        responses.begin()
        for index in without_room:
            responses.leave_out(index, f"its prompt fills the context of {model.config.n_ctx} tokens")
        _answer(model, options, data, ids, missing, responses)
    return responses.write()[:asked]


def _entries(records: Sequence[Record], lines: Mapping[int, Line]) -> list[dict[str, Any]]:
    """The records that are answered, with `model_response`."""

    def entry(index: int, line: Line) -> dict[str, Any]:
        why = {"left_out": line["left_out"]} if "left_out" in line else {}
        return {**records[index].as_entry(), "model_response": line["response"], **why}

    return [entry(index, lines[index]) for index in sorted(lines)]


def _answer(
    model: GPT2,
    options: GenerateOptions,
    data: Data,
    prompts: list[list[int]],
    missing: list[int],
    responses: Responses,
) -> None:
    """Answers the missing prompts, the longest first: the short ones then fill the places that become free."""
    tokenizer = model.config.tokenizer
    missing = sorted(missing, key=lambda index: -len(prompts[index]))
    ended = decode(
        model,
        [prompts[index] for index in missing],
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        sampling=options.sampling,
        streams=missing,
        graphs=True,
    )
    with meter("responses", len(prompts), done=len(prompts) - len(missing)) as progress:
        for answer in ended:
            responses.add(missing[answer.index], answer, data.template.extract(tokenizer.decode(answer.ids)))
            progress.advance()


def _asked(records: Sequence[Record], prompts: Sequence[str]) -> str:
    """SHA-256 (hex) of all that is asked."""
    asked = hashlib.sha256()
    for record, prompt in zip(records, prompts, strict=True):
        asked.update(json.dumps([prompt, record.as_entry()], sort_keys=True).encode())
    return asked.hexdigest()


def made_of(run: Run, tokenizer: Tokenizer, options: GenerateOptions, asked: str) -> dict[str, Any]:
    """Answers are taken up again only where weights, tokenizer, what is asked (by its SHA-256) and options are the
    same."""
    with (run.weights).open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    return {
        "weights_sha256": digest,
        "tokenizer_sha256": tokenizer.fingerprint(),
        "asked_sha256": asked,
        "max_new_tokens": options.max_new_tokens,
        "dtype": options.dtype,
        **options.sampling.in_effect(),
    }


def _check_questions(records: Sequence[Record], split: str, places: Places, rows: Sequence[int]) -> None:
    """Refuses records that ask for nothing: documents, and token ids.

    Raises:
        UserError: there are some.
    """
    mute = [row for row, record in zip(rows, records, strict=True) if not record.asks]
    if mute:
        raise UserError(
            f"{len(mute)} records of the {split} split ask for no answer, as documents and token ids do: "
            f"{places.said(mute)}; give questions with --test_data when you train"
        )


def _without_room(
    prompts: list[list[int]], n_ctx: int, places: Places, rows: Sequence[int], options: GenerateOptions
) -> list[int]:
    """Which prompts leave no room for a response, from 0; they are named, or refused where `--too_long` is `raise`."""
    too_long = [index for index, ids in enumerate(prompts) if len(ids) >= n_ctx]
    if too_long:
        named = places.said([rows[index] for index in too_long])
        found = f"the prompts of {len(too_long)} records fill the model's context of {n_ctx} tokens"
        if options.too_long == "raise":
            raise UserError(
                f"{found} and leave no room for a response: {named}; --too_long leave_out answers the others"
            )
        warn(f"{found} and are left without a response: {named}")
    return too_long
