"""The stage RUN/model -> conversations.json: a model has conversations, each turn with its own earlier answers.

All first turns are answered at once, then all second ones, and so on. Each answer is on the disk when it ends, in
`conversations.journal.jsonl`; a conversation stands in `conversations.json` when all of its turns do.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastft.answers.benchmark import Conversation, read_conversations
from fastft.answers.generation import as_a_run, made_of, model_to_answer
from fastft.answers.options import GenerateOptions
from fastft.answers.responses import Line, Responses
from fastft.common.console import Meter, meter, say, warn
from fastft.common.effects import check_effects
from fastft.common.errors import UserError
from fastft.common.lock import writing
from fastft.data.chat_template import AnyTemplate
from fastft.data.encode import prompts_of
from fastft.data.folder_tokenizer import tokenizer_of
from fastft.data.records import Record, Turn
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.decoding.decode import decode
from fastft.model.gpt2 import GPT2
from fastft.run.folder import Run
from fastft.run.trained import check_same_tokenizer


def converse(options: GenerateOptions) -> list[dict[str, Any]]:
    """Has the conversations of `--conversation` with a run's model, and writes `conversations.json` (under a name
    `conversations.NAME.json`); a second call goes on where a killed one stopped.

    Returns:
        Of each conversation `id`, perhaps `category` and `system`, and `turns` with `question`, perhaps `reference`,
        `answer`, and `left_out` where a turn has none, the reason.

    Raises:
        UserError: a conversation cannot be read, the run has no model, or answers are there that were made with other
            settings.
    """
    check_effects(options)
    if options.conversation is None:
        raise ValueError("got no conversations, expected GenerateOptions with conversation")
    conversations = read_conversations(options.conversation)
    options = as_a_run(options)
    run = options.of_run()
    with writing(run.folder):
        return _converse(run, options, conversations)


@dataclass(frozen=True, slots=True)
class _Place:
    """A turn, by the numbers of its conversation and of itself, from 0."""

    conversation: int
    turn: int


class _Talks:
    """The turns of conversations, numbered through: what is asked in each, and what becomes of the answers."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self._conversations = conversations
        self.places = [_Place(c, t) for c, one in enumerate(conversations) for t in range(len(one.turns))]
        sizes = [len(one.turns) for one in conversations]
        self.starts = [0, *itertools.accumulate(sizes)]
        """The number of each conversation's first turn, and of all turns."""
        self.longest = max(sizes)

    def called(self) -> list[int | str]:
        """What turns are called: `7, turn 2`."""
        return [f"{self._conversations[place.conversation].id}, turn {place.turn + 1}" for place in self.places]

    def earlier(self, index: int, responses: Responses) -> list[Line]:
        """The answers to the turns before one, all of which are there."""
        lines = [responses.line(one) for one in range(index - self.places[index].turn, index)]
        return [line for line in lines if line is not None]

    def question(self, index: int, earlier: Sequence[Line]) -> Record:
        """What is asked in a turn, with all that was said before."""
        place = self.places[index]
        conversation = self._conversations[place.conversation]
        asked = conversation.turns[place.turn]
        if not earlier and not conversation.system:
            return Record(instruction=asked, output="")
        turns = [Turn("system", conversation.system)] if conversation.system else []
        for text, line in zip(conversation.turns[: place.turn], earlier, strict=True):
            turns += [Turn("user", text), Turn("assistant", line["response"])]
        return Record(instruction=asked, output="", turns=(*turns, Turn("user", asked), Turn("assistant", "")))

    def entries(self, lines: Mapping[int, Line]) -> list[dict[str, Any]]:
        """The conversations of which all turns are there."""
        found = []
        for number, conversation in enumerate(self._conversations):
            own = [lines.get(index) for index in range(self.starts[number], self.starts[number + 1])]
            there = [line for line in own if line is not None]
            if len(there) == len(own):
                turns = map(_as_turn, conversation.turns, conversation.references, there)
                found.append({**conversation.as_json(), "turns": list(turns)})
        return found


def _as_turn(question: str, reference: str | None, line: Line) -> dict[str, Any]:
    known = {} if reference is None else {"reference": reference}
    why = {"left_out": line["left_out"]} if "left_out" in line else {}
    return {"question": question, **known, "answer": line["response"], **why}


def _converse(run: Run, options: GenerateOptions, conversations: Sequence[Conversation]) -> list[dict[str, Any]]:
    template = run.template()
    tokenizer = tokenizer_of(run.model) or gpt2_tokenizer()
    check_same_tokenizer(run, tokenizer)
    talks = _Talks(conversations)
    made = made_of(run, tokenizer, options, _asked(conversations, template))
    path = run.conversations(options.name)
    responses = Responses(path, talks.entries, made, talks.called(), overwrite=options.overwrite)
    asked = talks.starts[min(len(conversations), options.limit or len(conversations))]
    missing = responses.missing(asked)
    if len(missing) < asked:
        say(f"{asked - len(missing)} of {asked} turns are answered already")
    if missing:
        model = model_to_answer(options, template, rows=options.batch_size)
        responses.begin()
        with meter("turns", asked, done=asked - len(missing)) as progress:
            for turn in range(talks.longest):
                at_once = [index for index in missing if talks.places[index].turn == turn]
                _answer(model, options, template, talks, at_once, responses, progress)
    return responses.write()[: options.limit]


def _answer(
    model: GPT2, options: GenerateOptions, template: AnyTemplate, talks: _Talks, indices: Sequence[int],
    responses: Responses, progress: Meter,
) -> None:  # fmt: skip
    """Answers some turns, none of which waits for another one; the longest first, as in `generate`."""
    earlier = {index: talks.earlier(index, responses) for index in indices}
    cut_off = [index for index in indices if any("left_out" in line for line in earlier[index])]
    for index in cut_off:
        responses.leave_out(index, "a turn before it has no answer")
    going_on = [index for index in indices if index not in cut_off]
    questions = [talks.question(index, earlier[index]) for index in going_on]
    prompts = dict(zip(going_on, prompts_of(questions, template, model.config.tokenizer), strict=True))
    full = [index for index in going_on if len(prompts[index]) >= model.config.n_ctx]
    if full:
        _leave_out(full, talks, responses, model.config.n_ctx, options)
    todo = sorted((index for index in going_on if index not in full), key=lambda index: -len(prompts[index]))
    if cut_off or full:
        progress.advance(by=len(cut_off) + len(full))
    if not todo:
        return
    ended = decode(
        model, [prompts[index] for index in todo], max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size, sampling=options.sampling, streams=todo, graphs=True,
    )  # fmt: skip
    for answer in ended:
        text = template.extract(model.config.tokenizer.decode(answer.ids))
        responses.add(todo[answer.index], answer, text)
        progress.advance()


def _leave_out(full: Sequence[int], talks: _Talks, responses: Responses, n_ctx: int, options: GenerateOptions) -> None:
    """Leaves turns without an answer, whose prompts fill the context.

    Raises:
        UserError: `--too_long raise`.
    """
    called = talks.called()
    named = "; ".join(str(called[index]) for index in full[:10])
    found = f"{len(full)} turns fill the model's context of {n_ctx} tokens with what was said before: {named}"
    if options.too_long == "raise":
        raise UserError(f"{found}; --too_long leave_out goes on with the others")
    warn(f"{found}; they are left without an answer")
    for index in full:
        responses.leave_out(index, f"its prompt fills the context of {n_ctx} tokens")


def _asked(conversations: Sequence[Conversation], template: AnyTemplate) -> str:
    """SHA-256 (hex) of all that is asked, and of how."""
    described = {key: value for key, value in template.description().items() if key != "name"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for one in conversations:
        digest.update(json.dumps([one.as_json(), one.turns, one.references], sort_keys=True).encode())
    return digest.hexdigest()
