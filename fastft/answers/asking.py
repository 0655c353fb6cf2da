"""Questions of one's own: a prompt, a file of them, or standard input -> answers, printed or written as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastft.answers.generation import GenerateOptions
from fastft.common import files
from fastft.common.console import warn
from fastft.common.effects import check_effects
from fastft.common.errors import UserError
from fastft.data.chat_template import AnyTemplate
from fastft.data.containers import rows_of
from fastft.data.encode import prompts_of
from fastft.data.formats import checked
from fastft.data.json_rows import BadRecord
from fastft.data.records import ReadingRules, Record
from fastft.decoding.decode import decode
from fastft.model.gpt2 import GPT2

STANDARD_INPUT = "-"
_IN_PYTHON = "prompts"
"""Stands for a file where questions are given as objects."""
_ANSWERS = {"instruction": "output", "prompt": "completion"}
"""By the key of a question, that of its answer, which a question need not have."""
_TURNS = {"messages": ("role", "content", "assistant"), "conversations": ("from", "value", "gpt")}


def ask(options: GenerateOptions) -> Iterator[dict[str, Any]]:
    """Answers `--prompt`, or `--prompts`: the entries in the order of the questions, each as soon as all before it are
    there.

    Raises:
        UserError: a question cannot be read, asks nothing, or fills the context.
    """
    check_effects(options)
    if options.out is not None:
        _check_out(options.out, options.prompts)
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
    given = GenerateOptions(model=str(model), template=template, prompts=_IN_PYTHON, **options)
    check_effects(given)
    rows = ({"instruction": one} if isinstance(one, str) else one for one in prompts)
    questions = _read("prompts", enumerate(rows, start=1))
    return [entry["model_response"] for entry in _answers(given, questions)]


def _check_out(out: Path, prompts: str | None) -> None:
    """Refuses before anything is answered to write over a folder, or over the questions.

    Raises:
        UserError: `--out` is one of them.
    """
    if out.is_dir():
        raise UserError(f"got --out {out}, a folder; expected a file for the answers")
    if prompts is not None and prompts != STANDARD_INPUT and out.resolve() == Path(prompts).resolve():
        raise UserError(f"got --out {out}, the file of the questions; expected another one for the answers")


def _answers(options: GenerateOptions, questions: Sequence[Record]) -> Iterator[dict[str, Any]]:
    template = options.asked_by()
    model = options.answering(template, rows=min(options.batch_size, len(questions)))
    prompts = prompts_of(questions, template, model.config.tokenizer)
    _check_room(prompts, questions, model.config.n_ctx)
    yield from _answered(model, template, options, questions, prompts)


def _answered(
    model: GPT2, template: AnyTemplate, options: GenerateOptions, questions: Sequence[Record],
    prompts: Sequence[Sequence[int]],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    decode_ids = model.config.tokenizer.decode
    ended = decode(
        model, prompts, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size,
        sampling=options.sampling, streams=range(len(prompts)), graphs=True,
    )  # fmt: skip
    waiting: dict[int, str] = {}
    following = 0
    for answer in ended:
        waiting[answer.index] = template.extract(decode_ids(answer.ids))
        while following in waiting:
            yield {**_asked(questions[following]), "model_response": waiting.pop(following)}
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
    rows = _lines_of(sys.stdin) if given == STANDARD_INPUT else rows_of(Path(given))
    return _read("standard input" if given == STANDARD_INPUT else given, rows)


def _read(name: str, rows: Iterable[tuple[int, Any]]) -> list[Record]:
    """The questions in rows of a source.

    Raises:
        UserError: some cannot be read, or ask nothing.
    """
    rules = ReadingRules(end_of_text_in_data="keep", allow_empty_output=True)
    found = list(checked(_completed(rows), rules))
    bad = [str(one) for one in found if isinstance(one, BadRecord)]
    mute = [f"row {one.row}: it asks nothing" for one in found if isinstance(one, Record) and not one.asks]
    if bad or mute:
        raise UserError(f"{name}: {'; '.join((*bad, *mute)[:5])}; mend or remove these rows")
    if not found:
        raise UserError(f"{name} holds no question; expected rows with `instruction`, `prompt` or `messages`")
    return [one for one in found if isinstance(one, Record)]


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


def _completed(rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Rows with an empty answer where they have none: so each format is read as it is for training."""
    for row, value in rows:
        yield row, _with_answer(value) if isinstance(value, dict) else value


def _with_answer(row: dict[str, Any]) -> dict[str, Any]:
    for question, answer in _ANSWERS.items():
        if question in row and row.get(answer) is None:
            nothing = [{"role": "assistant", "content": ""}] if isinstance(row[question], list) else ""
            return {**row, answer: nothing}
    for key, (who, what, assistant) in _TURNS.items():
        turns = row.get(key)
        last = turns[-1] if isinstance(turns, list) and turns else None
        if isinstance(turns, list) and isinstance(last, dict) and last.get(who) in ("user", "human"):
            return {**row, key: [*turns, {who: assistant, what: ""}]}
    return row


def _check_room(prompts: Sequence[Sequence[int]], questions: Sequence[Record], n_ctx: int) -> None:
    too_long = [str(questions[at].row) for at, ids in enumerate(prompts) if len(ids) >= n_ctx]
    if too_long:
        raise UserError(
            f"{len(too_long)} questions fill the model's context of {n_ctx} tokens and leave no room for an answer: "
            f"rows {', '.join(too_long[:10])}; shorten them"
        )


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
