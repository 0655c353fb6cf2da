"""Questions of one's own: a prompt, a file of them, or standard input -> answers, printed or written as JSON lines."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastft.answers.generation import model_to_answer
from fastft.answers.options import GenerateOptions
from fastft.common import files
from fastft.common.console import warn
from fastft.common.effects import check_effects
from fastft.common.errors import UserError
from fastft.data.chat_template import AnyTemplate
from fastft.data.containers import rows_of
from fastft.data.encode import prompts_of
from fastft.data.formats import checked, parse_fields
from fastft.data.json_rows import BadRecord
from fastft.data.records import ReadingRules, Record
from fastft.data.texts import from_text
from fastft.decoding.decode import decode
from fastft.model.gpt2 import GPT2
from fastft.run.folder import Run
from fastft.run.given import run_of

STANDARD_INPUT = "-"
_EXPECTED = f"--prompts takes a file, or {STANDARD_INPUT} for standard input"
_IN_PYTHON = "prompts"
"""Stands for a file where questions are given as objects."""
_ANSWERS = {"instruction": ("output", "response"), "prompt": ("completion",)}
"""By the key of a question, those of its answer, which a question need not have."""
_TURNS = {"messages": ("role", "content", "assistant"), "conversations": ("from", "value", "gpt")}


def ask(options: GenerateOptions) -> Iterator[dict[str, Any]]:
    """Answers `--prompt`, or `--prompts`: the entries in the order of the questions, each as soon as all before it are
    there.

    Raises:
        UserError: a question cannot be read, asks nothing, or fills the context.
    """
    check_effects(options)
    if options.out is not None:
        _check_out(options.out, options)
    yield from _answers(options, _questions(options)[: options.limit])


def answer(
    model: str | Path, prompts: Sequence[str | dict[str, Any]], *, template: str | None = None, **options: Any
) -> list[str]:
    """The answers of a model to questions, in their order.

    Args:
        model: a run, its `model` or one of its `checkpoints`, a Hugging Face folder or id, or a .pth.
        prompts: instructions, or rows of any format that data have, answers need not be there.
        template: that the model is asked by; its run's where it is not given.
        options: of `GenerateOptions`, such as `max_new_tokens`.

    Raises:
        UserError: a question cannot be read, asks nothing, or fills the context; the model cannot be loaded.
    """
    if isinstance(prompts, str | Mapping):
        raise UserError(f"got {prompts!r} as prompts, expected a list of them: [{prompts!r}]")
    if "out" in options:
        raise UserError("got out, which has no effect here: the answers are given back; leave it out")
    given = GenerateOptions(**{"model": str(model), "template": template, "prompts": _IN_PYTHON, "too_long": "raise",
                               **options})  # fmt: skip
    check_effects(given)
    rows = ({"instruction": one} if isinstance(one, str) else one for one in prompts)
    questions = _read("prompts", enumerate(rows, start=1), given)[: given.limit]
    return [entry["model_response"] for entry in _answers(given, questions)]


def _check_out(out: Path, options: GenerateOptions) -> None:
    """Refuses before anything is answered to write over a folder, the questions, or what is a run's.

    Raises:
        UserError: `--out` is one of them.
    """
    if out.is_dir() or (out.exists() and not out.is_file()):
        raise UserError(
            f"got --out {out}, {'a folder' if out.is_dir() else 'no file'}; expected a file for the answers"
        )
    place = out.resolve()
    if options.prompts not in (None, STANDARD_INPUT) and place == Path(str(options.prompts)).resolve():
        raise UserError(f"got --out {out}, the file of the questions; expected another one for the answers")
    run = _run_of(options)
    of_a_run = [] if run is None else [*run.written(), *(Path(file) for file in run.options().files)]
    if any(place == file.resolve() for file in of_a_run):
        raise UserError(f"got --out {out}, a file of {options.run or options.model}; expected another one")


def _run_of(options: GenerateOptions) -> Run | None:
    """The run that is asked, where it is one's model."""
    return run_of(options.tuned) if options.tuned is not None else options.of_run()


def _answers(options: GenerateOptions, questions: Sequence[Record]) -> Iterator[dict[str, Any]]:
    template = options.asked_by()
    model = model_to_answer(options, template, rows=min(options.batch_size, len(questions)))
    prompts = prompts_of(questions, template, model.config.tokenizer)
    left_out = _without_room(prompts, questions, model.config.n_ctx, options)
    yield from _answered(model, template, options, questions, prompts, left_out)


def _answered(
    model: GPT2, template: AnyTemplate, options: GenerateOptions, questions: Sequence[Record],
    prompts: Sequence[Sequence[int]], left_out: Mapping[int, str],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    decode_ids = model.config.tokenizer.decode
    asked = [index for index in range(len(prompts)) if index not in left_out]
    ended = decode(
        model, [prompts[index] for index in asked], max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size, sampling=options.sampling, streams=asked, graphs=True,
    )  # fmt: skip
    waiting = {index: {"model_response": "", "left_out": why} for index, why in left_out.items()}
    following = 0
    for answer in ended:
        waiting[asked[answer.index]] = {"model_response": template.extract(decode_ids(answer.ids))}
        while following in waiting:
            yield {**_asked(questions[following]), **waiting.pop(following)}
            following += 1


def _asked(question: Record) -> dict[str, Any]:
    """The entry of a question, without an answer that nobody has given."""
    entry = question.as_entry()
    return entry if question.output else {name: value for name, value in entry.items() if name != "output"}


def _questions(options: GenerateOptions) -> list[Record]:
    if options.prompt is not None:
        if not options.prompt.strip():
            raise UserError("got an empty --prompt, expected a question")
        return [Record(instruction=options.prompt, output="", row=1)]
    given = options.prompts or ""
    rows = _standard_input() if given == STANDARD_INPUT else rows_of(Path(given), expected=_EXPECTED)
    return _read("standard input" if given == STANDARD_INPUT else given, rows, options)


def _read(name: str, rows: Iterable[tuple[int, Any]], options: GenerateOptions) -> list[Record]:
    """The questions in rows of a source; of a run that reads its data's keys by other names, by these names too.

    Raises:
        UserError: some cannot be read, or ask nothing.
    """
    run = _run_of(options)
    fields = () if run is None else parse_fields(run.options().fields)
    rules = ReadingRules(end_of_text_in_data="keep", allow_empty_output=True, fields=fields)
    completed: set[int] = set()
    found = list(checked(_completed(rows, dict(fields), completed), rules))
    bad = [str(one) for one in found if isinstance(one, BadRecord)]
    mute = [f"row {one.row}: it asks nothing" for one in found if isinstance(one, Record) and not one.asks]
    if bad or mute:
        remedy = "generate takes a run's --fields, and else own names" if "--fields" in "".join(bad) else "mend them"
        raise UserError(f"{name}: {'; '.join((*bad, *mute)[:5])}; {remedy}, or remove these rows")
    if not found:
        raise UserError(f"{name} holds no question; expected rows with `instruction`, `prompt` or `messages`")
    return [_unanswered(one) if one.row in completed else one for one in found if isinstance(one, Record)]


def _unanswered(question: Record) -> Record:
    """The record without the answer that it was given to be read."""
    turns = (*question.turns[:-1], question.turns[-1]._replace(text="")) if question.turns else ()
    return replace(question, output="", turns=turns)


def _standard_input() -> Iterator[tuple[int, Any]]:
    """The rows of standard input: a JSON array, lines of JSON, or lines of plain text, each a question.

    Raises:
        UserError: there is none, or it is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise UserError("got --prompts -, and standard input is closed; expected questions on it")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # as files are read, wherever this runs
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 ({error}); expected lines of text or JSON") from error
    if re.match(r"\s*\[\s*(\{|\])", text):
        with contextlib.suppress(ValueError):
            yield from enumerate(json.loads(text), start=1)
            return
        raise UserError("standard input begins as a JSON array and is none; expected a whole one, or an object a line")
    yield from _lines_of(io.StringIO(text))


def _lines_of(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Lines of JSON, or of plain text, each a question."""
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line) if line.lstrip().startswith("{") else {"instruction": line.strip()}
        except ValueError as error:
            value = BadRecord(row, f"not JSON ({error}), expected one object a line, or plain text")
        yield row, value


def _completed(
    rows: Iterable[tuple[int, Any]], names: Mapping[str, str], completed: set[int]
) -> Iterator[tuple[int, Any]]:
    """Rows with some answer where they have none, so that each format is read as it is for training.

    Args:
        rows: of a source.
        names: what keys are called there, by their own names.
        completed: takes which rows had none.
    """
    for row, value in rows:
        whole = _with_answer(value, names) if isinstance(value, dict) else value
        if whole is not value:
            completed.add(row)
        yield row, whole


def _with_answer(row: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    def called(key: str) -> str:
        return names.get(key, key)

    blank = "A" if row.get(called("choices")) else ""  # an answer to options is one of them
    for question, answers in _ANSWERS.items():
        if called(question) in row and all(row.get(key) is None for key in (*answers, *map(called, answers))):
            is_turns = isinstance(row[called(question)], list)
            turn = {called("role"): "assistant", called("content"): blank}
            return {**row, called(answers[0]): [turn] if is_turns else blank}
    for key, (who, what, assistant) in _TURNS.items():
        turns = from_text(row.get(called(key)))
        last = turns[-1] if isinstance(turns, list) and turns else None
        for role, text in {(called(who), called(what)), (called("role"), called("content"))}:
            if isinstance(last, dict) and last.get(role) in ("user", "human"):
                answer = assistant if role == called(who) else "assistant"
                return {**row, called(key): [*turns, {role: answer, text: blank}]}
    return row


def _without_room(
    prompts: Sequence[Sequence[int]], questions: Sequence[Record], n_ctx: int, options: GenerateOptions
) -> dict[int, str]:
    """Which questions leave no room for an answer, and why; they are named, or refused where `--too_long` is `raise`,
    or where no other is there.

    Raises:
        UserError: they are refused.
    """
    too_long = [at for at, ids in enumerate(prompts) if len(ids) >= n_ctx]
    if not too_long:
        return {}
    rows = ", ".join(str(questions[at].row) for at in too_long[:10])
    found = f"{len(too_long)} questions fill the model's context of {n_ctx} tokens"
    if options.too_long == "raise" or len(too_long) == len(prompts):
        raise UserError(f"{found} and leave no room for an answer: rows {rows}; shorten them")
    warn(f"{found} and are left without an answer: rows {rows}")
    return dict.fromkeys(too_long, f"its prompt fills the context of {n_ctx} tokens")


def write_answers(path: Path, entries: Iterable[dict[str, Any]]) -> int:
    """Writes entries as JSON lines; how many. What is there is replaced when all are written.

    Raises:
        UserError: the file cannot be written.
    """
    files.make_folder(path.parent)
    count = 0
    with files.replacing(path) as file:
        for entry in entries:
            count += 1
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
    if not count:
        warn(f"{path}: no answer was written")
    return count
