"""The judge: asks a language model for a score from 0 to 100 of each response, as the book's chapter 7 does.

What is different from the book's script, and why: a failed request is tried again and never taken for a short answer;
an answer that was read is never asked for again; a reply without a bare integer is read further (`judging/ladder.py`),
asked about once more with a JSON schema, and otherwise listed, where the book drops it and its mean moves; a reply that
a reasoning model's trace has filled is asked for once more with more room. The book's own figure stands beside ours.

One question is under way at a time, in the file's order: a server's prompt cache makes a score depend on the questions
before it (llama.cpp at temperature 0, 60 scores: 8 differed in another order, one of them by 100).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastft.common.console import Meter, meter
from fastft.data.records import left_out
from fastft.judging.asking import Asking, no_schema
from fastft.judging.journal import Journal, Reply
from fastft.judging.judgement import EMPTY_RESPONSE, Judgement, counts, why_no_score
from fastft.judging.ladder import bare_integer
from fastft.judging.questions import PromptOf, Style, first_question, response_prompt, second_question, token_bound
from fastft.judging.rows import NOT_YET, Answers, Row, rows_of
from fastft.judging.server import Known, Server, all_thought, look_at, who
from fastft.judging.wire import one_line


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
        prompt: what is asked about an entry: `fastft.judging.questions.response_prompt`, or `turn_prompt`.
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
        prompt: PromptOf = response_prompt,
    ) -> None:
        self._server = server
        self._journal = journal
        self._style = style
        self._rubric = rubric
        self._parallel = parallel
        self._wide_room = wide_room
        self._left_out = [left_out(entry) for entry in entries]
        self._empty = [not entry["model_response"].strip() for entry in entries]
        self._questions = [
            (first_question(entry, style, rubric, prompt), second_question(entry, rubric, prompt)) for entry in entries
        ]
        self._rows: list[Row] = []
        self._reachable = False
        self._problem: str | None = None
        self._answers = Answers(server, journal)
        self._asking = Asking(server, journal, self._answers, style=style, parallel=parallel)

    def find(self, before: Callable[[], object] = lambda: None) -> None:
        """Looks at the server, and takes up what was answered before; also where it is away.

        Args:
            before: what is done before that, such as pulling the model; it may raise JudgeUnavailable.
        """
        known, self._problem = look_at(self._server, self._journal, before)
        self._reachable = self._problem is None
        if known is not None:
            self._settle(known)
        if not self._questions or (self._rows and not self._open_rows()):
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
            **counts(judgements),
            "judge": self._who() if self._rows and self._in_use() else None,
            "no_judge": self._problem,
            "judge_book_mean": sum(book) / len(book) if book else None,
            "n_book": len(book),
            "judge_seconds": self._answers.seconds(self._rows) if self.was_heard() else None,
        }

    def _settle(self, known: Known) -> None:
        """One context for all questions, and with it their keys."""
        self._asking.known = known
        if self._style == "reason" and not known.takes_schema:
            version = one_line(known.version or "")
            self._problem = self._problem or no_schema(self._server, f"version {version} is older than 0.5.0")
        asked = zip(self._questions, self._left_out, strict=True)
        needed = token_bound([first.prompt for (first, _), why in asked if why is None])
        self._rows = rows_of(self._questions, needed, self._wide_room, self._server, known)

    def _open_rows(self) -> list[Row]:
        """Those without an answer, each question once; none where nobody is known who could be asked."""
        if not self._rows:
            return []
        found: dict[str, Row] = {}
        for row, empty in zip(self._rows, self._empty, strict=True):
            if not empty and self._asking.next_question(row) is not None:
                found.setdefault(row.key, row)
        return list(found.values())

    def _ask_all(self, todo: Sequence[Row]) -> str | None:
        """Asks about the rows, and shows how far it is; the reason why it ended before the last one, or None."""
        n_same = Counter(row.key for row, empty in zip(self._rows, self._empty, strict=True) if not empty)
        done = len(self._rows) - sum(n_same[row.key] for row in todo)
        with meter("judge", len(self._rows), done=done) as meter_:
            shown = _Shown(meter_, self.judgements(), n_same)
            return self._asking.ask(todo, lambda row: shown.advance(row, self._judgement(row)))

    def _of_no_use(self) -> str | None:
        """Why a judge that was there was of no use: none of its answers, where it gave any, holds a score."""
        rows = [row for row, empty in zip(self._rows, self._empty, strict=True) if not empty]
        if not rows or any(self._judgement(row).score is not None for row in rows):
            return None
        n, name = len(rows), self._server.model
        if not self.was_heard():
            last = list(self._asking.failures.values())[-1] if self._asking.failures else None
            return None if last is None else f"{name} answered none of {n} questions, the last one with: {last}"
        thought = any(all_thought(*answer) for row in rows if (answer := self._answers.last(row.first)) is not None)
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

    def _judgement(self, row: Row) -> Judgement:
        failure = self._asking.failures.get(row.key)
        answer = self._answers.last(row.first)
        if answer is None:
            raw = failure.partial if failure else ""
            return Judgement(score=None, raw=raw, reason=str(failure or self._why_not()), key=row.key)
        first, _ = answer
        reading = self._answers.read(row.first)
        answer_again = self._answers.last(row.second) if reading.score is None else None
        again = None if answer_again is None else self._answers.read(row.second)
        asked = (row.first,) if again is None else (row.first, row.second)
        return Judgement(
            score=reading.score if again is None else again.score,
            raw=first.content,
            reason=why_no_score(reading, again, failure, self._asking.refusal),
            key=row.key,
            answered=self._asking.next_question(row) is None,
            rung=reading.rung if again is None else again.rung and f"asked again: {again.rung}",
            raw_again=None if answer_again is None else answer_again[0].content,
            more_room=any(self._answers.had_more_room(one) for one in asked),
            cut=any(self._answers.is_cut(one) for one in (row.first, row.second)),
            prompt_tokens=first.prompt_tokens,
        )

    def _in_use(self) -> bool:
        """Whether a judge is there, or was. A mean over empty responses alone would else look like a judge's."""
        return self._reachable or self.was_heard()

    def was_heard(self) -> bool:
        """Whether an answer about any response was ever read."""
        return any(self._answers.first(row.first) is not None for row in self._rows)

    def _book_scores(self) -> list[int]:
        """What the book's script would average: bare integers of any size, the rest dropped."""
        if self._style != "book" or self._rubric:
            return []
        replies = [
            Reply("0") if empty else self._answers.first(row.first)
            for row, empty, why in zip(self._rows, self._empty, self._left_out, strict=True)
            if why is None
        ]
        scores = [bare_integer(reply.content) for reply in replies if reply is not None]
        return [score for score in scores if score is not None]

    def _why_not(self) -> str:
        return f"no judge: {self._problem}" if self._problem is not None else NOT_YET

    def _who(self) -> dict[str, Any]:
        asked = who(self._server, self._asking.known, self._rows[0].first.question)
        return {
            **asked,
            "style": self._style,
            "rubric": self._rubric or None,
            "parallel": self._parallel,
            "wide_room": self._wide_room,
        }


class _Shown:
    """The progress, with the mean so far."""

    def __init__(self, shown: Meter, before: Sequence[Judgement], n_same: Mapping[str, int]) -> None:
        scores = [judgement.score for judgement in before if judgement.score is not None]
        self._meter, self._n_same = shown, n_same
        self._sum, self._n = sum(scores), len(scores)

    def advance(self, row: Row, judgement: Judgement) -> None:
        n = self._n_same[row.key]
        if judgement.score is not None:
            self._sum, self._n = self._sum + n * judgement.score, self._n + n
        self._meter.advance(f"mean {self._sum / self._n:.2f}" if self._n else "no score yet", by=n)
