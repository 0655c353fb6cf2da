"""The judge: asks a language model for a score from 0 to 100 of each response, as the book's chapter 7 does.

What is different from the book's script, and why: a failed request is tried again and never taken for a short answer;
an answer that was read is never asked for again; a reply without a bare integer is read further (`judging/ladder.py`),
asked about once more with a JSON schema, and otherwise listed, where the book drops it and its mean moves; a reply that
a reasoning model's trace has filled is asked for once more with more room. The book's own figure stands beside ours.

One question is under way at a time, in the file's order: a server's prompt cache makes a score depend on the questions
before it (llama.cpp at temperature 0, 60 scores: 8 differed in another order, one of them by 100).
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastft.common.console import Meter, meter, say, warn
from fastft.common.errors import JudgeUnavailable
from fastft.data.records import left_out
from fastft.judging.journal import Journal, Reply
from fastft.judging.ladder import Reading, bare_integer, read_score
from fastft.judging.questions import Question, Style, first_question, fitted, second_question, token_bound, wider
from fastft.judging.server import (
    Health,
    Known,
    Server,
    all_thought,
    is_cut,
    keep_refusals,
    look_at,
    question_key,
    who,
)
from fastft.judging.wire import NoAnswerError, one_line

EMPTY_RESPONSE = "empty response"

_NOT_YET = "not judged yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What came of judging one response."""

    score: int | None
    """0 to 100, or None where there is no score."""
    raw: str = ""
    """The judge's reply as it was read, also where it was read in part."""
    reason: str | None = None
    """One line: why there is no score, or why there is one without a call."""
    key: str | None = None
    """SHA-256 (hex) of the judge and the question; None where no judge was ever seen."""
    answered: bool = False
    """Whether asking again would be of no use: whole answers were read, or none was needed."""
    rung: str | None = None
    """How the score was found in the reply (`fastft.judging.ladder`)."""
    raw_again: str | None = None
    """The reply to the same question with a JSON schema, where the first one held no score."""
    more_room: bool = False
    """Whether a reply was all thinking, and was asked for again with more room."""
    cut: bool = False
    """Whether the server cut the front of the prompt: the score is of something else."""
    left_out: bool = False
    """Whether there is no response that could be judged: `fastft generate` left the entry out."""
    prompt_tokens: int | None = None
    """As the server counts them."""

    def as_json(self) -> dict[str, Any]:
        """The fields as a JSON object, without those that have nothing to say."""
        always = ("score", "raw", "key", "answered")
        return {name: value for name, value in asdict(self).items() if name in always or value not in (None, False)}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question with its key, and the same with room for a trace, where the context has more."""

    question: Question
    key: str
    wide: Question | None
    wide_key: str = ""


@dataclass(frozen=True, slots=True)
class _Row:
    """A response with its two questions, as soon as it is known who is asked."""

    first: _Asked
    second: _Asked

    @property
    def key(self) -> str:
        """Equal rows have equal first questions."""
        return self.first.key


_Results = queue.SimpleQueue[_Row | BaseException | None]
"""What the threads say: a row that is done with, what broke it off, None at a thread's end."""


class Judge:
    """Judges the responses of a run.

    Args:
        server: who is asked.
        journal: the answers that were read before, and those to come.
        entries: objects with `instruction`, `input`, `output`, `model_response`; what was left out of the answering
            (`fastft.data.records.left_out`) is not asked about and has no score.
        style: the book's question, or one with a reason first.
        rubric: a sentence for both questions, what is good and what is bad.
        parallel: how many questions are under way at a time.
        wide_room: the most tokens of a reply that is asked for again because it was all thinking.
    """

    def __init__(
        self,
        server: Server,
        journal: Journal,
        entries: Sequence[Mapping[str, Any]],
        *,
        style: Style = "book",
        rubric: str = "",
        parallel: int = 1,
        wide_room: int = 4096,
    ) -> None:
        self._server = server
        self._journal = journal
        self._style = style
        self._rubric = rubric
        self._parallel = parallel
        self._wide_room = wide_room
        self._left_out = [left_out(entry) for entry in entries]
        self._empty = [not entry["model_response"].strip() for entry in entries]
        self._questions = [(first_question(entry, style, rubric), second_question(entry, rubric)) for entry in entries]
        self._known: Known | None = None
        self._rows: list[_Row] = []
        self._reachable = False
        self._problem: str | None = None
        self._failures: dict[str, NoAnswerError] = {}
        self._health = Health(server)
        self._refusal: str | None = None

    def find(self, before: Callable[[], object] = lambda: None) -> None:
        """Looks at the server, and takes up what was answered before; also where it is away.

        Args:
            before: what is done before that, such as pulling the model; it may raise JudgeUnavailable.
        """
        known, self._problem = look_at(self._server, self._journal, before)
        self._reachable = self._problem is None
        if known is not None:
            self._settle(known)
        if self._rows and not self._open_rows():
            self._problem = None  # every answer is there already: no server is needed

    def ask(self) -> str | None:
        """Asks about every response without an answer, in order; each answer is kept as soon as it is read.

        Returns:
            Why there is no (further) judge, in one line that ends with the remedy, or None.
        """
        todo = self._open_rows()
        if self._problem is None and todo:
            self._problem = self._ask_all(todo)
        if self._problem is None:
            self._problem = self._of_no_use()
        return self._problem

    def judgements(self) -> list[Judgement]:
        """One for each response, in order."""
        return [
            self._unasked(index) or (self._judgement(self._rows[index]) if self._rows else self._unknown())
            for index in range(len(self._empty))
        ]

    def summary(self, judgements: Sequence[Judgement]) -> dict[str, Any]:
        """Counts and lists (rows count from 1) over `judgements`, and who was asked with what."""
        book = self._book_scores() if self.was_heard() else []
        return {
            **_counts(judgements),
            "judge": self._who() if self._rows and self._in_use() else None,
            "no_judge": self._problem,
            "judge_book_mean": sum(book) / len(book) if book else None,
            "n_book": len(book),
            "judge_seconds": self._seconds() if self.was_heard() else None,
        }

    def _seconds(self) -> float:
        """What the answers have taken, each question once: with several in flight more than has passed."""
        asked = [one for row in self._rows for one in (row.first, row.second)]
        keys = {key for one in asked for key in (one.key, one.wide_key)}
        replies = [self._journal.reply(key) for key in sorted(keys)]
        return sum(reply.seconds or 0.0 for reply in replies if reply is not None)

    def _settle(self, known: Known) -> None:
        """One context for all questions, and with it their keys."""
        self._known = known
        if self._style == "reason" and not known.takes_schema:
            version = one_line(known.version or "")
            self._problem = self._problem or self._no_schema(f"version {version} is older than 0.5.0")
        asked = zip(self._questions, self._left_out, strict=True)
        needed = token_bound([first.prompt for (first, _), why in asked if why is None])
        first_room = self._questions[0][0].room
        for pair in self._questions:
            first, second = (self._asked(question, needed, first_room, known) for question in pair)
            self._rows.append(_Row(first, second))

    def _asked(self, question: Question, needed: int, first_room: int, known: Known) -> _Asked:
        # The second question's context is the first one's: another would have the model loaded anew.
        num_ctx = fitted(replace(question, room=first_room), needed, known.context_length).num_ctx
        question = replace(question, num_ctx=num_ctx)
        key = question_key(self._server, known, question)
        wide = wider(question, self._wide_room, needed, known.context_length)
        return _Asked(question, key, wide, "" if wide is None else question_key(self._server, known, wide))

    def _open_rows(self) -> list[_Row]:
        """Those without an answer, each question once; none where nobody is known who could be asked."""
        if not self._rows:
            return []
        found: dict[str, _Row] = {}
        for row, empty in zip(self._rows, self._empty, strict=True):
            if not empty and self._next_question(row) is not None:
                found.setdefault(row.key, row)
        return list(found.values())

    def _next_question(self, row: _Row) -> tuple[str, Question] | None:
        """What is still to be asked about a response, with its key."""
        if (unanswered := self._unanswered(row.first)) is not None:
            return unanswered
        if self._read(row.first).score is not None or not self._can_ask_again():
            return None
        return self._unanswered(row.second)

    def _unanswered(self, asked: _Asked) -> tuple[str, Question] | None:
        """The question, or the same with more room where its reply was all thinking; None where it is answered."""
        reply = self._journal.reply(asked.key)
        if reply is None:
            return asked.key, asked.question
        if asked.wide is None or all_thought(reply, asked.question) is None:
            return None
        return None if self._journal.reply(asked.wide_key) else (asked.wide_key, asked.wide)

    def _answer(self, asked: _Asked) -> tuple[Reply, Question] | None:
        """The last reply to a question, with more room or without, and what it is the reply to."""
        if asked.wide is not None and (reply := self._journal.reply(asked.wide_key)) is not None:
            return reply, asked.wide
        reply = self._journal.reply(asked.key)
        return None if reply is None else (reply, asked.question)

    def _read(self, asked: _Asked) -> Reading:
        """What the last reply to a question says; no score where there is none yet."""
        answer = self._answer(asked)
        if answer is None:
            return Reading(None, reason=_NOT_YET)
        reply, question = answer
        if (nothing := all_thought(reply, question)) is not None:
            return Reading(None, reason=nothing)
        return read_score(reply.content, cut=reply.finish == "length")

    def _can_ask_again(self) -> bool:
        return self._refusal is None and self._known is not None and self._known.takes_schema

    def _ask_all(self, todo: Sequence[_Row]) -> str | None:
        """Asks about the rows; the reason why it ended before the last one, or None.

        What is asked again with more room comes at the end: its context is a larger one, for which a server loads the
        model anew.
        """
        n_same = Counter(row.key for row, empty in zip(self._rows, self._empty, strict=True) if not empty)
        done = len(self._rows) - sum(n_same[row.key] for row in todo)
        with meter("judge", len(self._rows), done=done) as meter_:
            shown = _Shown(meter_, self.judgements(), n_same)
            problem = self._ask_with_one_context([row for row in todo if not self._needs_room(row)], shown, wide=False)
            all_thinking = [row for row in todo if self._needs_room(row)]
            if problem is not None or not all_thinking:
                return problem
            say(f"{len(all_thinking)} replies were all thinking: they are asked for again with more room")
            return self._ask_with_one_context(all_thinking, shown, wide=True)

    def _needs_room(self, row: _Row) -> bool:
        """Whether the next question about a response has room for a trace."""
        open_question = self._next_question(row)
        return open_question is not None and open_question[1].wide and row.key not in self._failures

    def _ask_with_one_context(self, todo: Sequence[_Row], shown: _Shown, *, wide: bool) -> str | None:
        if not todo:
            return None
        first = todo[0].first
        question = first.wide if wide and first.wide is not None else first.question
        try:
            self._health.load(question.num_ctx)
        except JudgeUnavailable as error:
            return str(error)
        return self._ask_in_threads(todo, shown, wide=wide)

    def _ask_in_threads(self, todo: Sequence[_Row], shown: _Shown, *, wide: bool) -> str | None:
        """Asks on threads of their own, which are left behind where a full disk or Ctrl-C breaks it off."""
        results: _Results = queue.SimpleQueue()
        rows = _Shared(todo)
        for _ in range(self._parallel):
            threading.Thread(target=self._ask_one_by_one, args=(rows, results, wide), daemon=True).start()
        problem: str | None = None
        working = self._parallel
        try:
            while working:
                result = results.get()
                if result is None:
                    working -= 1
                elif isinstance(result, _Row):
                    if not self._needs_room(result):
                        shown.advance(result, self._judgement(result))
                elif isinstance(result, JudgeUnavailable):
                    problem = problem or str(result)
                    rows.close()  # the others' questions are under way: their answers are worth waiting for
                else:
                    raise result
        finally:
            rows.close()
        return problem

    def _ask_one_by_one(self, rows: _Shared, results: _Results, wide: bool) -> None:
        try:
            while (row := rows.next()) is not None:
                self._ask_about(row, wide=wide)
                results.put(row)
        except BaseException as error:  # raised again where it is waited for
            results.put(error)
        finally:
            results.put(None)

    def _ask_about(self, row: _Row, *, wide: bool) -> None:
        """Asks what is open about one response, up to what needs a trace's room unless `wide`.

        Raises:
            JudgeUnavailable: the server has gone away, takes no schema where the style needs one, or fails too often.
        """
        self._failures.pop(row.key, None)
        while (open_question := self._next_question(row)) is not None:
            key, question = open_question
            if question.wide and not wide:
                return
            began = time.perf_counter()
            try:
                reply = self._server.ask(question)
                self._journal.keep(key, replace(reply, seconds=time.perf_counter() - began))
            except NoAnswerError as failure:
                if question.schema is not None and self._server.refuses_schema(failure):
                    self._refuse(failure)
                    continue
                self._failures[row.key] = failure
                self._health.failed(failure)
                return
            self._health.answered()
            if self._known is not None:
                self._known = keep_refusals(self._server, self._journal, self._known)

    def _refuse(self, failure: NoAnswerError) -> None:
        """The server takes no JSON schema: the book's question goes on without its re-ask, the other style cannot."""
        self._refusal = str(failure)
        if self._style == "reason":
            raise JudgeUnavailable(self._no_schema(str(failure)))
        warn(f"the judge takes no JSON schema ({failure}): replies without a score are not asked about again")

    def _no_schema(self, why: str) -> str:
        return (
            f"{self._server.where} takes no JSON schema for {self._server.model} ({why}), which --judge_style reason "
            "needs: update the server, or use --judge_style book"
        )

    def _of_no_use(self) -> str | None:
        """Why a judge that was there was of no use: none of its answers, where it gave any, holds a score."""
        rows = [row for row, empty in zip(self._rows, self._empty, strict=True) if not empty]
        if not rows or any(self._judgement(row).score is not None for row in rows):
            return None
        n, name = len(rows), self._server.model
        if not self.was_heard():
            last = list(self._failures.values())[-1] if self._failures else None
            return None if last is None else f"{name} answered none of {n} questions, the last one with: {last}"
        thought = any(all_thought(*answer) for row in rows if (answer := self._answer(row.first)) is not None)
        remedy = "give it more room with --judge_tokens, or " if thought else ""
        return (
            f"{name} gave no score for any of {n} responses, for the last one: {self._judgement(rows[-1]).reason}; "
            f"{remedy}ask another model with --judge_model"
        )

    def _unasked(self, index: int) -> Judgement | None:
        """The judgement of a response that nobody is asked about; None of the others."""
        if (why := self._left_out[index]) is not None:
            return Judgement(score=None, reason=f"left out by generate: {why}", answered=True, left_out=True)
        if self._empty[index] and self._rows and self._in_use():
            return Judgement(score=0, reason=EMPTY_RESPONSE, key=self._rows[index].key, answered=True)
        return None

    def _unknown(self) -> Judgement:
        return Judgement(score=None, reason=self._why_not())

    def _judgement(self, row: _Row) -> Judgement:
        failure = self._failures.get(row.key)
        answer = self._answer(row.first)
        if answer is None:
            raw = failure.partial if failure else ""
            return Judgement(score=None, raw=raw, reason=str(failure or self._why_not()), key=row.key)
        first, _ = answer
        reading = self._read(row.first)
        answer_again = self._answer(row.second) if reading.score is None else None
        again = None if answer_again is None else self._read(row.second)
        asked = (row.first,) if again is None else (row.first, row.second)
        return Judgement(
            score=reading.score if again is None else again.score,
            raw=first.content,
            reason=_reason(reading, again, failure, self._refusal),
            key=row.key,
            answered=self._next_question(row) is None,
            rung=reading.rung if again is None else again.rung and f"asked again: {again.rung}",
            raw_again=None if answer_again is None else answer_again[0].content,
            more_room=any(one.wide is not None and self._journal.reply(one.wide_key) is not None for one in asked),
            cut=any(self._is_cut(one) for one in (row.first, row.second)),
            prompt_tokens=first.prompt_tokens,
        )

    def _is_cut(self, asked: _Asked) -> bool:
        answer = self._answer(asked)
        return answer is not None and is_cut(self._server, answer[1], answer[0])

    def _in_use(self) -> bool:
        """Whether a judge is there, or was. A mean over empty responses alone would else look like a judge's."""
        return self._reachable or self.was_heard()

    def was_heard(self) -> bool:
        """Whether an answer about any response was ever read."""
        return any(self._journal.reply(row.key) is not None for row in self._rows)

    def _book_scores(self) -> list[int]:
        """What the book's script would average: bare integers of any size, the rest dropped."""
        if self._style != "book" or self._rubric:
            return []
        replies = [
            Reply("0") if empty else self._journal.reply(row.key)
            for row, empty, why in zip(self._rows, self._empty, self._left_out, strict=True)
            if why is None
        ]
        scores = [bare_integer(reply.content) for reply in replies if reply is not None]
        return [score for score in scores if score is not None]

    def _why_not(self) -> str:
        return f"no judge: {self._problem}" if self._problem is not None else _NOT_YET

    def _who(self) -> dict[str, Any]:
        asked = who(self._server, self._known, self._rows[0].first.question)
        return {
            **asked,
            "style": self._style,
            "rubric": self._rubric or None,
            "parallel": self._parallel,
            "wide_room": self._wide_room,
        }


class _Shared:
    """Rows that several threads take, until they are all taken or it is closed."""

    def __init__(self, rows: Iterable[_Row]) -> None:
        self._rows = iter(rows)
        self._lock = threading.Lock()

    def next(self) -> _Row | None:
        with self._lock:
            return next(self._rows, None)

    def close(self) -> None:
        with self._lock:
            self._rows = iter(())


class _Shown:
    """The progress, with the mean so far."""

    def __init__(self, shown: Meter, before: Sequence[Judgement], n_same: Mapping[str, int]) -> None:
        scores = [judgement.score for judgement in before if judgement.score is not None]
        self._meter, self._n_same = shown, n_same
        self._sum, self._n = sum(scores), len(scores)

    def advance(self, row: _Row, judgement: Judgement) -> None:
        n = self._n_same[row.key]
        if judgement.score is not None:
            self._sum, self._n = self._sum + n * judgement.score, self._n + n
        self._meter.advance(f"mean {self._sum / self._n:.2f}" if self._n else "no score yet", by=n)


def _counts(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """How the scores came about, and the responses (counted from 1) that something is the matter with."""
    return {
        "n_empty_scored_0": sum(judgement.reason == EMPTY_RESPONSE for judgement in judgements),
        "n_more_room": sum(judgement.more_room for judgement in judgements),
        "n_asked_again": sum(judgement.raw_again is not None for judgement in judgements),
        "judge_rungs": dict(Counter(judgement.rung for judgement in judgements if judgement.rung)),
        "unparsed_rows": _rows(
            judgement.answered and judgement.score is None and not judgement.left_out for judgement in judgements
        ),
        "unanswered_rows": _rows(not judgement.answered for judgement in judgements),
        "cut_rows": _rows(judgement.cut for judgement in judgements),
    }


def _reason(first: Reading, again: Reading | None, failure: NoAnswerError | None, refusal: str | None) -> str | None:
    """Why there is no score, of one that was asked about twice both times."""
    if first.score is not None or (again is not None and again.score is not None):
        return None
    if again is not None:
        return f"{first.reason}; asked again: {again.reason}"
    missing = str(failure) if failure is not None else refusal
    return f"{first.reason}; asked again: {missing}" if missing else first.reason


def _rows(chosen: Iterable[bool]) -> list[int]:
    return [row for row, yes in enumerate(chosen, start=1) if yes]
