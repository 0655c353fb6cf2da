"""The stage RUN/model -> responses.json: answers to a split's prompts; the same of a model that is no run's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch

from fastft.answers.responses import Line, Responses
from fastft.common.console import meter, say, warn
from fastft.common.effects import check_effects
from fastft.common.errors import UserError
from fastft.common.lock import writing
from fastft.common.options import Condition, check_values, option
from fastft.data.chat_template import AnyTemplate, template_named
from fastft.data.encode import prompts_of
from fastft.data.folder_tokenizer import tokenizer_of, with_special_tokens
from fastft.data.records import Record
from fastft.data.sources import Places
from fastft.data.tokenizer import Tokenizer, gpt2_tokenizer
from fastft.decoding.decode import decode
from fastft.decoding.inference import prepared
from fastft.decoding.sampling import Sampling
from fastft.model.gpt2 import GPT2
from fastft.model.names import Device
from fastft.model.precision import choose_device
from fastft.model.vocabulary import with_tokenizer
from fastft.model.weights import base_of_adapter, config_of, is_same_source, load
from fastft.run.config import TrainOptions, changed_settings
from fastft.run.data import Data
from fastft.run.decodings import check_name
from fastft.run.folder import Run
from fastft.run.given import template_for, template_name_for
from fastft.run.trained import check_same_tokenizer, data_of, trained_model

_SEVERAL = Condition(
    lambda o, _: o.top_k != 1, "more than the one most likely token to draw from: another --top_k than 1"
)
_A_MODEL = Condition(lambda o, _: o.model is not None, "a --model: a run has its own")
_OF_A_SPLIT = Condition(
    lambda o, _: o.of_a_split, "the answers of a split: no --prompt, no --prompts, no --conversation"
)
_OF_DATA = Condition(
    lambda o, _: o.of_a_split or (o.conversation is not None and o.model is not None),
    "the answers of a split, or a --model that becomes a run: no --prompt, no --prompts",
)
_OF_A_RUN = Condition(
    lambda o, _: o.of_a_run,
    "answers that are a run's, which lie in its folder: no --prompt, no --prompts",
)
_MORE_THAN_ONE = Condition(lambda o, _: o.prompt is None, "several questions: no --prompt")
_SOMEWHERE = Condition(
    lambda o, _: o.prompts is not None or (o.model is not None and o.prompt is None),
    "--prompts, or a --model with --data",
)
_DRAWING = Condition(lambda o, _: o.temperature > 0, "a --temperature above 0: else the most likely token is taken")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How a run's model answers."""

    run: Path | None = None
    """The folder of a trained run."""
    model: str | None = None
    """Another model in its place: a run, its `model` or one of its `checkpoints`, a Hugging Face folder or id, or a
    .pth."""
    adapter: str | None = option(None, needs=_A_MODEL)
    """A folder or id of an adapter in PEFT's layout, of which --model is the base. Where it names its base itself,
    --model ADAPTER is enough."""
    template: str | None = option(None, needs=_A_MODEL)
    """The template that a --model is asked by; not given: its run's, or the chat template beside it or its
    --adapter, or alpaca."""
    max_new_tokens: int = option(256, at_least=1)
    """The most tokens of a response."""
    temperature: float = option(0.0, needs=_SEVERAL)
    """The logits' divisor; 0 takes the most likely token."""
    top_k: int = option(0, needs=_DRAWING)
    """Draw from so many most likely tokens; 0: from all."""
    top_p: float = option(1.0, needs=_DRAWING)
    """Draw from the fewest most likely tokens that are so probable together; 1: from all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that are there already; 1 changes nothing."""
    seed: int = option(123, needs=_DRAWING)
    """Of the random numbers, where the temperature is not 0; each answer has its own."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic: fp32 gives the text of the book's loop; bf16 is faster where the processor has it."""
    device: Device = "auto"
    """Where to generate."""

    def __post_init__(self) -> None:
        if (self.run is None) == (self.model is None):
            both = "both" if self.run is not None else "neither"
            raise UserError(f"got {both} of --run and --model, expected one: a run's folder, or another model")
        check_values(self)
        _ = self.sampling  # refuses values that mean nothing

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )

    def asked_by(self) -> AnyTemplate:
        """The template of the prompts."""
        return self.of_run().template() if self.tuned is None else template_for(self.tuned, self.template)

    @property
    def tuned(self) -> str | None:
        """What was trained last of a --model, with its template and its run beside it: its adapter, or itself."""
        return self.adapter or self.model

    def of_run(self) -> Run:
        """The run, which is there and has a model.

        Raises:
            UserError: it is not, or has none.
        """
        run = Run(cast(Path, self.run))
        run.options()  # that there is a run is said first
        _check_model(run)
        return run

    def answering(self, template: AnyTemplate, *, rows: int) -> GPT2:
        """The model, ready to answer so many prompts of the template at a time.

        Raises:
            UserError: the run has none, or the model cannot be loaded.
        """
        if self.model is not None:
            model = load(self.model, adapter=self.adapter)
            tokenizer = model.config.tokenizer
            if not tokenizer.special_tokens() >= set(template.special_tokens):
                raise UserError(
                    f"got --model {self.model} and template {template.name}, whose tokens it has not "
                    f"({', '.join(template.special_tokens)}); expected one that was trained with them, or another "
                    "--template"
                )
            model = with_tokenizer(model, with_special_tokens(tokenizer, template.special_tokens, template.end))
        else:
            model = trained_model(self.of_run())
        model = model.to(choose_device(self.device)).eval()
        return prepared(model, torch.bfloat16 if self.dtype == "bf16" else torch.float32, rows=rows)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(AnswerOptions):
    """What is answered."""

    prompt: str | None = None
    """An instruction of your own: its answer is printed, and nothing is written."""
    prompts: str | None = None
    """A file of questions, in any format that --data reads, answers need not be there; or -, for JSON lines or plain
    lines on standard input. The answers are printed as JSON lines, or written to --out."""
    conversation: str | None = None
    """Conversations to have, each turn with the model's own earlier answers: a file whose rows have `turns`, the user's
    texts, and perhaps `reference` and `category`, or sample, 20 embedded ones of two turns. Writes conversations.json,
    which score judges turn by turn."""
    out: Path | None = option(None, needs=_SOMEWHERE)
    """Of --prompts: the file for the answers. Of a --model with --data: the folder of the run that is made of it, which
    `score`, `compare` and `report` take, as the baseline."""
    split: Literal["test", "val", "train"] = option("test", needs=_OF_A_SPLIT)
    """Which records to answer."""
    name: str | None = option(None, needs=_OF_A_RUN)
    """What the answers are called, so that several ways of decoding stand beside each other: --name t1.0 writes
    responses.t1.0.json, which score, compare and report take by the same name."""
    overwrite: bool = option(False, needs=_OF_A_RUN)
    """Replace answers that were made with other settings. Without it, or a --name of their own, the call stops."""
    limit: int | None = option(None, at_least=1, needs=_MORE_THAN_ONE)
    """Answer only so many records."""
    data: str | list[str] | None = option(None, needs=_OF_DATA)
    """Of a --model: the data whose split is answered. Of a run: where its data file is now, if it has been moved or
    renamed: its records must be the same; of a run with several, the files of its --data in their order, and perhaps
    those of its --val_data and --test_data after them."""
    batch_size: int = option(64, at_least=1)
    """The most prompts answered at a time: one that ends makes room for the next."""
    too_long: Literal["leave_out", "raise"] = "leave_out"
    """What happens where a prompt fills the context: its entry is kept with an empty response and the reason, or the
    call stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name)
        given = [f"--{one}" for one in ("prompt", "prompts", "conversation") if getattr(self, one) is not None]
        if len(given) > 1:
            raise UserError(f"got {' and '.join(given)}, expected one of them")
        if self.model is not None and self.of_a_run and (self.data is None or self.out is None):
            raise UserError(
                "got --model without --prompt, --prompts, or --data and --out; expected a question, or data whose test "
                "split is answered and a folder for the answers"
            )

    @property
    def of_a_split(self) -> bool:
        """Whether a split's records are answered."""
        return self.of_a_run and self.conversation is None

    @property
    def of_a_run(self) -> bool:
        """Whether the answers are a run's, and lie in its folder."""
        return self.prompt is None and self.prompts is None

    def folder(self) -> Run:
        """The run whose split is answered."""
        return Run(cast(Path, self.run if self.model is None else self.out))

    def path(self) -> Path:
        """The file of a split's answers, or of the conversations."""
        if self.conversation is not None:
            return self.folder().conversations(self.name)
        return self.folder().responses_of(self.split, self.name)


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
        model = options.answering(data.template, rows=options.batch_size)
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


def _check_model(run: Run) -> None:
    if not (run.weights).is_file():
        raise UserError(
            f"no model in {run.folder}: expected {run.weights}; "
            f"finish the run with `fastft train --resume --out {run.folder}`"
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
