"""What is asked about a response, and what the journal says that was answered."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastft.judging.journal import Journal, Reply
from fastft.judging.ladder import Reading, read_score
from fastft.judging.questions import Question, fitted, wider
from fastft.judging.server import Known, Server, all_thought, is_cut, question_key

NOT_YET = "not judged yet"


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with its key, and the same with room for a trace, where the context has more."""

    question: Question
    key: str
    wide: Question | None
    wide_key: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A response with its two questions, as soon as it is known who is asked."""

    first: Asked
    second: Asked

    @property
    def key(self) -> str:
        """Equal rows have equal first questions."""
        return self.first.key


def rows_of(
    questions: list[tuple[Question, Question]], needed: int, wide_room: int, server: Server, known: Known
) -> list[Row]:
    """The rows of some responses, with one context for all of their questions.

    Args:
        questions: of each response the first one, and the one that is asked where the first reply held no score.
        needed: a bound of the tokens of the longest prompt.
        wide_room: the most tokens of a reply that is asked for again because it was all thinking.
        server: who is asked.
        known: what is known of it.
    """
    if not questions:
        return []
    first_room = questions[0][0].room

    def asked(question: Question) -> Asked:
        # The second question's context is the first one's: another would have the model loaded anew.
        num_ctx = fitted(replace(question, room=first_room), needed, known.context_length).num_ctx
        question = replace(question, num_ctx=num_ctx)
        key = question_key(server, known, question)
        wide = wider(question, wide_room, needed, known.context_length)
        return Asked(question, key, wide, "" if wide is None else question_key(server, known, wide))

    return [Row(asked(first), asked(second)) for first, second in questions]


class Answers:
    """What was answered to questions, as the journal has it."""

    def __init__(self, server: Server, journal: Journal) -> None:
        self._server = server
        self._journal = journal

    def unanswered(self, asked: Asked) -> tuple[str, Question] | None:
        """The question with its key, or the same with more room where its reply was all thinking; None where it is
        answered."""
        reply = self._journal.reply(asked.key)
        if reply is None:
            return asked.key, asked.question
        if asked.wide is None or all_thought(reply, asked.question) is None:
            return None
        return None if self._journal.reply(asked.wide_key) else (asked.wide_key, asked.wide)

    def last(self, asked: Asked) -> tuple[Reply, Question] | None:
        """The last reply to a question, with more room or without, and what it is the reply to."""
        if asked.wide is not None and (reply := self._journal.reply(asked.wide_key)) is not None:
            return reply, asked.wide
        reply = self.first(asked)
        return None if reply is None else (reply, asked.question)

    def first(self, asked: Asked) -> Reply | None:
        """The reply to a question as it was asked at first."""
        return self._journal.reply(asked.key)

    def read(self, asked: Asked) -> Reading:
        """What the last reply to a question says; no score where there is none yet."""
        answer = self.last(asked)
        if answer is None:
            return Reading(None, reason=NOT_YET)
        reply, question = answer
        if (nothing := all_thought(reply, question)) is not None:
            return Reading(None, reason=nothing)
        return read_score(reply.content, cut=reply.finish == "length")

    def had_more_room(self, asked: Asked) -> bool:
        """Whether a question was answered with more room."""
        return asked.wide is not None and self._journal.reply(asked.wide_key) is not None

    def is_cut(self, asked: Asked) -> bool:
        """Whether the server cut the front of the prompt that was answered last."""
        answer = self.last(asked)
        return answer is not None and is_cut(self._server, answer[1], answer[0])

    def seconds(self, rows: list[Row]) -> float:
        """What the answers have taken, each question once: with several in flight more than has passed."""
        asked = [one for row in rows for one in (row.first, row.second)]
        keys = {key for one in asked for key in (one.key, one.wide_key)}
        replies = [self._journal.reply(key) for key in sorted(keys)]
        return sum(reply.seconds or 0.0 for reply in replies if reply is not None)
