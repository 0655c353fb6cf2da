"""The conversations of runs beside each other: what was asked, what each answered, and what the judge said of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastft.data.records import category_of, left_out
from fastft.reports.numbers import finite
from fastft.scores.conversations import Talks


@dataclass(frozen=True, slots=True)
class TurnSaid:
    """One answer in a conversation with what is said of it."""

    answer: str
    score: float | None
    """The judge's, 0 to 100."""
    reason: str | None
    """What the judge gives as its reason, or why there is no score."""
    left_out: str | None
    """Why `generate` gave no answer; None where there is one."""


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation that a run has had.

    Attributes:
        id: as its file has it.
        category: where it has one.
        system: the system's text, where there is one.
        asked: the question of each turn, and the reference where there is one.
        turns: the answers.
    """

    id: Any
    category: str | None
    system: str | None
    asked: tuple[tuple[str, str | None], ...]
    turns: tuple[TurnSaid, ...]

    @property
    def question(self) -> tuple[str | None, tuple[tuple[str, str | None], ...]]:
        """All that was asked: by this, conversations of several runs stand side by side."""
        return self.system, self.asked

    def as_json(self) -> dict[str, Any]:
        """The numbers without the texts."""
        return {"id": self.id, "category": self.category, "scores": [turn.score for turn in self.turns]}


def talks_of(talks: Talks | None, judged: Any) -> list[Talk]:
    """A run's conversations with the judgements that scores.json has for them, as far as it has any.

    Args:
        talks: what the run has had; None for nothing.
        judged: `conversations` of a scores.json that is of these; anything else says nothing.
    """
    if talks is None:
        return []
    held = judged if isinstance(judged, list) else []
    return [_talk(one, held[at] if at < len(held) else None) for at, one in enumerate(talks.conversations)]


def _talk(one: Mapping[str, Any], judged: Any) -> Talk:
    said = judged.get("turns") if isinstance(judged, dict) else None
    held = said if isinstance(said, list) else []
    system = one.get("system")
    return Talk(
        id=one["id"],
        category=category_of(one),
        system=system if isinstance(system, str) else None,
        asked=tuple((turn["question"], turn.get("reference")) for turn in one["turns"]),
        turns=tuple(_turn(turn, held[at] if at < len(held) else None) for at, turn in enumerate(one["turns"])),
    )


def _turn(turn: Mapping[str, Any], judged: Any) -> TurnSaid:
    held = judged if isinstance(judged, dict) else {}
    reason = held.get("reason") or _reason_in(held.get("raw"))
    return TurnSaid(turn["answer"], finite(held.get("score")), str(reason) if reason else None, left_out(turn))


def _reason_in(reply: Any) -> Any:
    """What a judge's reply gives as its reason, of `--judge_style reason`; None of others."""
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(reply) if isinstance(reply, str) else None
        return said.get("reason") if isinstance(said, dict) else None
    return None


def side_by_side(runs: Sequence[Sequence[Talk]]) -> list[dict[str, Any]]:
    """One row for each conversation that any run has had, in the first one's order: `id`, `category`, `system`, and
    `turns` with `question`, `reference` and the `answers` of every run (None where it has not had this one).

    A conversation that was had more than once stands beside the others' in their order.
    """
    places: dict[tuple[Any, int], list[Talk | None]] = {}
    for run, talks in enumerate(runs):
        times: dict[Any, int] = {}
        for talk in talks:
            time = times[talk.question] = times.get(talk.question, 0) + 1
            places.setdefault((talk.question, time), [None] * len(runs))[run] = talk
    return [_row(held) for held in places.values()]


def _row(held: Sequence[Talk | None]) -> dict[str, Any]:
    first = next(talk for talk in held if talk is not None)
    turns = [
        {
            "question": question,
            "reference": reference,
            "answers": [None if talk is None else talk.turns[at] for talk in held],
        }
        for at, (question, reference) in enumerate(first.asked)
    ]
    return {"id": first.id, "category": first.category, "system": first.system, "turns": turns}
