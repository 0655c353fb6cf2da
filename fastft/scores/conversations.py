"""`conversations.json` -> what a judge says of each turn, and the figures of that.

A turn is judged with the conversation so far (`fastft.judging.questions.turn_prompt`); the figures are the means of the
first turns, of the second ones, and of all, as MT-Bench has them, on 0 to 100 as all other scores are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastft.common.errors import UserError
from fastft.common.files import read_json
from fastft.common.kinds import kind_of
from fastft.data.records import category_of, left_out
from fastft.judging.judge import Judge
from fastft.judging.judgement import Judgement
from fastft.metrics.statistics import Floats, bootstrap
from fastft.metrics.text_metrics import accuracy, bounds, mean_interval, names_it
from fastft.run.decodings import decoding_of
from fastft.run.folder import Run

_MOST_WORDS = 5
"""Of a reference that an answer may be expected to say word for word."""
_OF_THE_JUDGE = ("judge", "no_judge", "judge_seconds", "judge_rungs", "n_empty_scored_0", "n_asked_again")


@dataclass(frozen=True)
class Talks:
    """Conversations that a run has had.

    Attributes:
        path: their file.
        conversations: what it holds.
        entries: one for each turn, all conversations' after each other, as a judge takes them.
    """

    path: Path
    conversations: list[dict[str, Any]]
    entries: list[dict[str, Any]]

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the file, by which scores.json says what it scored."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def by_conversation(self, of_turns: Sequence[Any]) -> list[list[Any]]:
        """What there is of each turn, put together by conversation."""
        rest = iter(of_turns)
        return [[next(rest) for _ in one["turns"]] for one in self.conversations]

    def as_json(self, judge: Judge) -> dict[str, Any]:
        """The figures under `summary`, and under `conversations` the judgements of each turn."""
        judgements = judge.judgements()
        held = self.by_conversation([judgement.as_json() for judgement in judgements])
        names = [{name: one[name] for name in ("id", "category") if name in one} for one in self.conversations]
        return {
            "summary": self._summary(judge, judgements),
            "conversations": [{**name, "turns": turns} for name, turns in zip(names, held, strict=True)],
        }

    def _summary(self, judge: Judge, judgements: Sequence[Judgement]) -> dict[str, Any]:
        by_judge = judge.summary(judgements)
        categories = [category_of(one) for one in self.conversations]
        named = dict.fromkeys(name for name in categories if name is not None)
        rows = list(zip(self.by_conversation(judgements), categories, strict=True))
        return {
            "conversations_sha256": self.sha256,
            "decoding": decoding_of(self.path),
            "n": len(self.conversations),
            **_figures([turns for turns, _ in rows]),
            "named": self._named(),
            "by_category": {name: _figures([turns for turns, one in rows if one == name]) for name in named},
            "unscored_turns": self._called(one.score is None and not one.left_out for one in judgements),
            "left_out_turns": self._called(one.left_out for one in judgements),
            "cut_turns": self._called(one.cut for one in judgements),
            **{name: by_judge[name] for name in _OF_THE_JUDGE},
        }

    def _named(self) -> dict[str, Any] | None:
        """How many answers say their reference, of those that have a short one: a figure that needs no judge."""
        short = [
            entry for entry in self.entries if 0 < len(entry["output"].split()) <= _MOST_WORDS and not left_out(entry)
        ]
        return accuracy([names_it(entry["model_response"], entry["output"]) for entry in short]) if short else None

    def _called(self, chosen: Any) -> list[str]:
        """The turns for which something holds: `7, turn 2`."""
        places = [(one["id"], turn) for one in self.conversations for turn, _ in enumerate(one["turns"], start=1)]
        return [f"{name}, turn {turn}" for (name, turn), yes in zip(places, chosen, strict=True) if yes]


def read_talks(run: Path, name: str | None = None) -> Talks | None:
    """The conversations of RUN/conversations.json, or of those of a name; None where there are none.

    Raises:
        UserError: the file is malformed.
    """
    path = Run(run).conversations(name)
    if not path.is_file():
        return None
    held = read_json(path, what="the conversations")
    if not isinstance(held, list):
        raise UserError(f"{path} is {kind_of(held)}, expected a list of conversations; move it away")
    if not held:  # a killed call's, of which none is whole yet
        return None
    for row, one in enumerate(held, start=1):
        _check(one, f"{path}, conversation {row}")
    return Talks(path, held, [entry for one in held for entry in _entries(one)])


def _check(one: Any, where: str) -> None:
    turns = one.get("turns") if isinstance(one, dict) else None
    if not isinstance(turns, list) or not turns or "id" not in one:
        raise UserError(f"{where}: expected an object with `id` and `turns`; fastft generate --conversation makes it")
    for number, turn in enumerate(turns, start=1):
        texts = [turn.get(name) for name in ("question", "answer")] if isinstance(turn, dict) else [None]
        if not all(isinstance(text, str) for text in (*texts, (turn or {}).get("reference", ""))):
            raise UserError(f"{where}: turn {number}: expected an object with the texts `question` and `answer`")


def _entries(one: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a conversation as a judge takes them: each with those before it."""
    turns = [
        {"instruction": turn["question"], "output": turn.get("reference", ""), "model_response": turn["answer"]}
        | ({"left_out": turn["left_out"]} if "left_out" in turn else {})
        for turn in one["turns"]
    ]
    return [{**turn, "system": one.get("system"), "before": turns[:number]} for number, turn in enumerate(turns)]


def _figures(conversations: Sequence[Sequence[Judgement]]) -> dict[str, Any]:
    """The judge's means over turns, all of them and the first, second, ... apart.

    The interval of all is over conversations: what is said in one depends on what was said in it before.
    """
    scores = [[one.score for one in turns if one.score is not None] for turns in conversations]
    judged = [held for held in scores if held]
    whole = [score for held in judged for score in held]
    sums = np.array([(sum(held), len(held)) for held in judged], dtype=np.float64).reshape(-1, 2)

    def mean(weights: Floats) -> Floats:
        total = weights @ sums
        return np.asarray(total[:, 0] / total[:, 1])

    return {
        "n_turns": sum(map(len, conversations)),
        "n_scored": len(whole),
        "judge_mean": _mean(whole),
        "judge_interval": bounds(bootstrap(mean, len(judged))),
        "turns": [_of_turn(number, conversations) for number in range(max(map(len, conversations), default=0))],
    }


def _of_turn(number: int, conversations: Sequence[Sequence[Judgement]]) -> dict[str, Any]:
    """The figures of all first turns, or second ones, ...; `number` from 0."""
    own = [turns[number] for turns in conversations if len(turns) > number]
    scores = [one.score for one in own if one.score is not None]
    return {
        "turn": number + 1,
        "n": len(own),
        "n_scored": len(scores),
        "judge_mean": _mean(scores),
        "judge_interval": mean_interval(scores),
    }


def _mean(scores: Sequence[int]) -> float | None:
    return sum(scores) / len(scores) if scores else None


def talks_in_words(summary: Mapping[str, Any]) -> str:
    """`20 conversations: judge's mean 61.20 [52.10, 70.30], turn 1 70.00, turn 2 52.40; 9 of 31 answers say ...`."""
    found = []
    if summary["judge_mean"] is not None:
        low_high = summary["judge_interval"]
        shown = "" if low_high is None else f" [{low_high[0]:.2f}, {low_high[1]:.2f}]"
        turns = [f"turn {one['turn']} {_shown(one['judge_mean'])}" for one in summary["turns"]]
        of = f" over {summary['n_scored']} of {summary['n_turns']} turns"
        found.append(f"judge's mean {summary['judge_mean']:.2f}{shown}{of}, {', '.join(turns)}")
    if (named := summary["named"]) is not None:
        found.append(f"{named['accuracy']:.2f}% of {named['n']} answers say the short right one")
    return f"{summary['n']} conversations: {'; '.join(found) or 'no judge, and no short right answers'}"


def talk_notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures of conversations has to know, one line each."""
    notes = {
        "left_out_turns": "turns without an answer, in no figure",
        "cut_turns": "prompts that were longer than the judge's context and lost their front",
    }
    notes |= {} if summary["judge"] is None else {"unscored_turns": "turns without a score"}
    return [f"conversations: {text}: {_named_turns(summary[name])}" for name, text in notes.items() if summary[name]]


def _named_turns(turns: Sequence[str], most: int = 10) -> str:
    return "; ".join(turns[:most]) + (f" and {len(turns) - most} more" if len(turns) > most else "")


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
