"""The stage `responses.json` -> `scores.json`: text metrics of every response, and a judge's score of each; with
`conversations.json` also of each turn of the run's conversations.

Each of the judge's answers is kept in `judge-replies.jsonl` as soon as it is read, under the key of its question: a
run that was killed, or whose judge went away, goes on where it stopped, and an answer that was read once is never
asked for again. `scores.json` is made of the answers: at the start, and whenever the asking ends.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from fastft.common.console import say, warn
from fastft.common.errors import FastftError, JudgeUnavailable, UserError
from fastft.common.files import identity, object_or_empty, read_json, write_json
from fastft.common.kinds import kind_of
from fastft.common.lock import writing
from fastft.common.nearest import did_you_mean_path
from fastft.common.options import names_checked
from fastft.common.shell import command
from fastft.data.records import category_of, choices_of, fault_of_category, fault_of_choices, left_out
from fastft.judging.journal import Journal
from fastft.judging.judge import Judge
from fastft.judging.judgement import Judgement
from fastft.judging.ollama import DEFAULT_URL, OllamaServer
from fastft.judging.openai import OpenAIServer
from fastft.judging.options import JudgeOptions, asking, server_of
from fastft.judging.questions import PromptOf, Style, response_prompt, turn_prompt
from fastft.metrics import text_metrics as metrics
from fastft.run.decodings import check_name, decoding_of, made_from
from fastft.run.folder import JUDGE_REPLIES, Run
from fastft.scores.conversations import read_talks, talk_notes, talks_in_words
from fastft.scores.scores_file import read_scores

_RUNGS = {
    "integer": "a bare integer",
    "json": "JSON",
    "marked": "a mark such as [[85]]",
    "overall": "an overall score among others",
    "labelled": "a labelled number",
    "out of 100": "a number out of 100",
    "only number": "the only number of a text",
}
_WANTED_RUNGS = {"book": {"integer"}, "reason": {"json"}}
"""What the question asks for; a score of another rung was read out of a reply that does not obey."""

OTHER_JUDGES = "the two runs were scored by other judges or with other options; score both alike"
_MOST_OF_A_VALUE = 24
_OF_A_JUDGE = {"name": "server", "model": "model", "digest": "digest", "style": "--judge_style", "rubric": "rubric"}


@dataclass(frozen=True, kw_only=True)
class _RunOptions:
    """The run."""

    run: Path
    """Folder of the run; its responses.json is scored."""
    name: str | None = None
    """What the responses are called, where they have a name: --name t1.0 scores responses.t1.0.json and writes
    scores.t1.0.json."""
    data: str | list[str] | None = None
    """The run's data file, wherever it is now: its records must be the same, and the responses those to its test split.
    Of a run with several, the files of its --data in their order, and perhaps those of its --val_data and --test_data
    after them. Without it, responses.json alone is read."""


@names_checked
@dataclass(frozen=True, kw_only=True)
class ScoreOptions(JudgeOptions, _RunOptions):
    """The questions."""

    judge_style: Style = asking("book")
    """What is asked: book, its prompt, for an integer only; reason, for one or two sentences and then the score, by a
    JSON schema, which told good answers from bad ones best with small judges."""
    judge_rubric: Path | None = asking(None)
    """A text file with what is good and what is bad, which is put into the prompt."""
    judge_parallel: int = asking(1, at_least=1)
    """Questions under way at a time. A server's prompt cache makes a score depend on the questions before it, so that
    more than 1, whose order is left to chance, gives scores that differ a little from run to run."""


def score(options: ScoreOptions) -> dict[str, Any]:
    """Scores the responses of a run, writes RUN/scores.json (RUN/scores.NAME.json), and returns what it holds.

    `judgements` holds one object for each response, in its order: `score` (0..100 or null), `raw`, `key`, `answered`,
    and `reason` where there is something to explain (`fastft.judging.judge.Judgement`); `conversations`, where the run
    has had some, the same of each turn. `summary` holds the figures,
    metrics in percent, all of them over the `n` entries that were answered: those that `fastft generate` left out,
    since their prompts fill the context, are listed under `left_out_rows`. A run that has had conversations and has no
    responses is scored by them alone; `n` is then 0.

    Raises:
        UserError: responses.json is missing, malformed or not of `data`, or the judge's address is no address.
        JudgeUnavailable: `require_judge`, and the judge cannot be used; scores.json is written all the same.
    """
    with writing(options.run):
        return _score(options)


def _score(options: ScoreOptions) -> dict[str, Any]:
    check_name(options.name)
    # Made first: a mistyped address is to be heard of at once, not after the metrics.
    asked = _Asking(
        options.server(),
        options.judge_style,
        _rubric(options.judge_rubric),
        options.judge_parallel,
        options.judge_tokens,
    )
    paths = _Paths(options.run, options.name)
    talks = read_talks(options.run, options.name)
    has_only_talked = talks is not None and not paths.responses.is_file()
    entries = [] if has_only_talked else read_responses(options.run, options.name)
    if has_only_talked:
        say(f"there is no {paths.responses}: the conversations alone are scored")
        if options.data is not None:
            raise UserError("got --data, which responses are held against, where there are none; leave it out")
    if options.data is not None:
        _check_data(paths, options.data, entries)
    answered = [] if has_only_talked else _answered(entries, paths.responses)
    for note in answer_notes(options.run, options.name):
        warn(note)
    journal = Journal(options.run / JUDGE_REPLIES)
    judged_by = _judged_by(paths)
    earlier = _of_earlier(paths.scores, journal, asked)
    judge = _judge(options, journal, entries, earlier)
    of_talks = None if talks is None else _judge(options, journal, talks.entries, earlier, turn_prompt)
    sheet = _Sheet(paths, entries, judge)
    if talks is not None and of_talks is not None:
        sheet.add_part("conversations", partial(talks.as_json, of_talks))
    sheet.add(metrics.summary(answered))
    sheet.write()
    sheet.add(_perplexity(options.run, answered))
    sheet.add({"choices_by_likelihood": _choices_by_likelihood(options.run, answered)})
    try:
        problem = judge.ask()
        if problem is None and of_talks is not None:
            problem = of_talks.ask()
    finally:  # also where Ctrl-C or a full disk ends the asking
        sheet.write()
    scores = sheet.as_json()
    if judged_by is not None and scores["summary"]["judge_mean"] is None:
        warn(
            f"{paths.scores} has no longer the scores that {judged_by} gave; its answers are kept: score with its "
            "options again, which asks nothing anew"
        )
    if problem is not None and options.require_judge:
        raise JudgeUnavailable(problem)
    if problem is not None and options.judge != "none":
        say(f"no judge, everything else is kept: {problem}")
    held = scores["summary"]["conversations"]
    for line in [*judge_notes(scores["summary"]), *(talk_notes(held) if held else [])]:
        say(line)
    return scores


class _Paths(NamedTuple):
    """A set of responses in a run's folder."""

    run: Path
    name: str | None

    @property
    def responses(self) -> Path:
        return Run(self.run).responses_of("test", self.name)

    @property
    def scores(self) -> Path:
        return Run(self.run).scores(self.name)


class _Asking(NamedTuple):
    """Who is asked, and how."""

    server: OllamaServer | OpenAIServer
    style: Style
    rubric: str
    parallel: int
    wide_room: int


def _judge(
    options: ScoreOptions,
    journal: Journal,
    entries: Sequence[Mapping[str, Any]],
    earlier: Sequence[_Asking],
    prompt: PromptOf = response_prompt,
) -> Judge:
    """The judge of the options, with what was answered before; with `--judge none` an earlier one that was heard."""
    judges = []
    for asked in earlier if options.judge == "none" else earlier[-1:]:
        judge = Judge(
            asked.server,
            journal,
            entries,
            style=asked.style,
            rubric=asked.rubric,
            parallel=asked.parallel,
            wide_room=asked.wide_room,
            prompt=prompt,
        )
        judge.find(partial(options.before, asked.server))
        judges.append(judge)
    return next((judge for judge in judges if judge.was_heard()), judges[-1])


def _of_earlier(scores: Path, journal: Journal, asked: _Asking) -> list[_Asking]:
    """Who may have judged the run before: as scores.json says, then whom the journal knows, then `asked`."""
    found = []
    summary = object_or_empty(scores).get("summary")
    recorded = summary.get("judge") if isinstance(summary, dict) else None
    if isinstance(recorded, dict) and (server := server_of(recorded)) is not None:
        style: Style = "reason" if recorded.get("style") == "reason" else "book"
        parallel, wide_room = recorded.get("parallel"), recorded.get("wide_room")
        if isinstance(parallel, int) and isinstance(wide_room, int):
            found.append(_Asking(server, style, str(recorded.get("rubric") or ""), parallel, wide_room))
    for name in reversed(journal.judges()):
        if (server := server_of(_record_of(name))) is not None:
            found += [asked._replace(server=server, style=one) for one in get_args(Style)]
    return [*found, asked]


def _record_of(name: str) -> dict[str, str]:
    """What the journal's name of a judge says: `ollama MODEL`, `openai URL MODEL`."""
    kind, _, rest = name.partition(" ")
    url, _, model = rest.partition(" ") if kind == "openai" else (DEFAULT_URL, "", rest)
    return {"name": kind, "url": url, "model": model}


def _rubric(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        text = " ".join(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"--judge_rubric: cannot read {path}: {problem}; expected a text file") from error
    if not text:
        raise UserError(f"--judge_rubric: {path} is empty, expected what is good and what is bad in a response")
    return text


def judge_notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the judge's mean has to know, one line each."""
    if summary["judge"] is None:
        return []
    book, n = summary["judge_book_mean"], summary["n"]
    notes = [
        (summary["n_empty_scored_0"], "{} empty responses score 0, as in the book, without a question"),
        (summary["n_more_room"], "{} replies were all thinking and were asked for again with more room"),
        (summary["n_asked_again"], "{} replies without a score were asked about again with a JSON schema"),
        (len(summary["unparsed_rows"]), "{} replies hold no score: {unparsed_rows}"),
        (len(summary["unanswered_rows"]), "{} responses have no answer: {unanswered_rows}"),
        (len(summary["cut_rows"]), "{} prompts were longer than the judge's context and lost their front: {cut_rows}"),
    ]
    rows = {name: _row_list(summary[name]) for name in ("unparsed_rows", "unanswered_rows", "cut_rows")}
    lines = [f"judge: {text.format(count, **rows)}" for count, text in notes if count]
    if any(rung not in _WANTED_RUNGS[summary["judge"].get("style") or "book"] for rung in summary["judge_rungs"]):
        lines.append(f"judge: scores were read from {rungs_in_words(summary['judge_rungs'])}")
    if book is not None and (summary["n_book"], book) != (summary["n_scored"], summary["judge_mean"]):
        lines.append(f"judge: the book's mean, over bare integers alone: {book:.2f} over {summary['n_book']} of {n}")
    return lines


def rungs_in_words(counts: Mapping[str, int]) -> str:
    """`an integer 30, JSON when asked again 2, a labelled number 1`, the most frequent first."""
    said = []
    for rung, count in sorted(counts.items(), key=lambda pair: -pair[1]):
        again, name = ("asked again: " in rung), rung.removeprefix("asked again: ")
        said.append(f"{_RUNGS.get(name, name)}{' when asked again' if again else ''} {count}")
    return ", ".join(said)


def _row_list(rows: Sequence[int], most: int = 10) -> str:
    named = ", ".join(map(str, rows[:most]))
    return f"{'row' if len(rows) == 1 else 'rows'} {named}" + (
        f" and {len(rows) - most} more" if len(rows) > most else ""
    )


def read_responses(run: Path, name: str | None = None) -> list[dict[str, Any]]:
    """The entries of RUN/responses.json, each with `instruction`, `input`, `output` and `model_response` as text.

    Args:
        run: its folder.
        name: of the responses, where they have one: those of RUN/responses.NAME.json.

    Raises:
        UserError: the file is missing, empty or malformed; the message names the row, counted from 1.
    """
    paths = _Paths(run, name)
    path = paths.responses
    remedy = f"make it with `{command('generate', run=run, name=name)}`"
    if not path.is_file():
        near = "" if run.is_dir() else did_you_mean_path(run)
        raise UserError(f"no responses to score: {path} does not exist{near}; {remedy}")
    entries = read_json(path, what="the responses file")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: got {kind_of(entries)}, expected a list of one or more entries; {remedy}")
    for row, entry in enumerate(entries, start=1):
        _check_entry(entry, f"{path} row {row}", remedy)
    return [{**entry, "input": entry.get("input", "")} for entry in entries]


def _answered(entries: Sequence[dict[str, Any]], responses: Path) -> list[dict[str, Any]]:
    """The entries that have been answered, which all figures are over; the others are said.

    Raises:
        UserError: there is none.
    """
    rows = left_out_rows(entries)
    if len(rows) == len(entries):
        raise UserError(
            f"no responses to score: fastft generate left out all {len(entries)} entries of {responses}, the "
            f"first one since {left_out(entries[0])}"
        )
    if rows:
        warn(f"{len(rows)} of {len(entries)} entries were left out by generate and are in no figure: {_row_list(rows)}")
    return [entry for entry in entries if left_out(entry) is None]


def _check_data(paths: _Paths, files: str | Sequence[str], entries: Sequence[Mapping[str, Any]]) -> None:
    """Holds the entries against the test split of the run's data.

    Raises:
        UserError: the data is not what the run was trained on, or an entry is no test record of it.
    """
    from fastft.run.trained import data_of  # torch, which a score without a model does not wait for

    records = Counter(map(_asked, (record.as_entry() for record in data_of(Run(paths.run), files).part("test"))))
    source = files if isinstance(files, str) else " ".join(files)
    for row, entry in enumerate(entries, start=1):
        records[_asked(entry)] -= 1
        if records[_asked(entry)] < 0:
            raise UserError(
                f"{paths.responses} row {row}: it answers no record of the test split of {source}; answer again with "
                f"`{command('generate', run=paths.run, name=paths.name, data=files)}`"
            )


def _asked(entry: Mapping[str, Any]) -> tuple[str, str, str, tuple[str, ...]]:
    return entry["instruction"], entry["input"], entry["output"], tuple(choices_of(entry))


def left_out_rows(entries: Sequence[Mapping[str, Any]]) -> list[int]:
    """The entries, counted from 1, that `fastft generate` left without a response."""
    return [row for row, entry in enumerate(entries, start=1) if left_out(entry) is not None]


def answer_notes(run: Path, name: str | None = None) -> list[str]:
    """What a reader of figures over a run's answers has to know, one line each: that the run's weights have changed
    since, as they do where a training goes on; or that some of what was asked has no answer yet."""
    held = {"responses": Run(run).responses_of("test", name), "conversations": Run(run).conversations(name)}
    made = {called: object_or_empty(made_from(path)) for called, path in held.items() if _say_how_made(path)}
    weights = Run(run).weights
    now = identity(weights)["sha256"] if made and weights.is_file() else None
    notes = []
    for called, one in made.items():
        if now is not None and one.get("weights_sha256") != now:
            notes.append(f"the {called} are not those of the run's model as it is now; `fastft generate` answers again")
        n, of = one.get("n_answered"), one.get("n_asked")
        if isinstance(n, int) and isinstance(of, int) and n < of:
            found = f"the {called} are not whole: {n} of {of} answers are there"
            notes.append(f"{found}; `fastft generate` gives the others")
    return notes


def _say_how_made(answers: Path) -> bool:
    """Whether answers are there, and a file that says what they were made from."""
    return answers.is_file() and made_from(answers).is_file()


def _check_entry(entry: Any, where: str, remedy: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: got {kind_of(entry)}, expected an object with model_response; {remedy}")
    for name in ("instruction", "output", "model_response"):
        if name not in entry:
            raise UserError(f"{where}: {name} is missing; {remedy}")
    for name in ("instruction", "input", "output", "model_response"):
        if not isinstance(entry.get(name, ""), str):
            raise UserError(f"{where}: {name} is {kind_of(entry[name])}, expected text; {remedy}")
    fault = fault_of_category(entry.get("category")) or fault_of_choices(entry.get("choices"), entry["output"])
    if fault is not None:
        raise UserError(f"{where}: {fault}")


def responses_of(run: Path, name: str | None = None) -> Path:
    """The file of a run's responses, or of those of a name."""
    return _Paths(run, name).responses


def responses_sha256(run: Path, name: str | None = None) -> str | None:
    """SHA-256 (hex) of RUN/responses.json, or of the responses of a name, by which scores.json says what it scored;
    None where there are none."""
    path = responses_of(run, name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def judge_identity(judge: Any) -> Any:
    """What scores depend on, of a summary's `judge`: neither its address nor how long its context was."""
    if not isinstance(judge, dict):
        return judge
    options = {name: value for name, value in dict(judge.get("options") or {}).items() if name != "num_ctx"}
    return {name: judge.get(name) for name in ("name", "model", "digest", "style", "rubric")} | {"options": options}


def judges_differ(one: Any, other: Any) -> dict[str, list[Any]]:
    """What is not the same in two judges, by `judge_identity`, as what a person would change, with both values."""
    a, b = (judge_identity(judge) or {} for judge in (one, other))
    found = {said: [a.get(name), b.get(name)] for name, said in _OF_A_JUDGE.items()}
    options = [{} if not judge else judge["options"] for judge in (a, b)]
    found |= {name: [held.get(name) for held in options] for name in dict.fromkeys([*options[0], *options[1]])}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def other_judges(one: Any, other: Any) -> str:
    """Why the scores of two judges do not compare: what of them differs, in a line that ends with the remedy."""
    found = ", ".join(f"{name} {_of_judge(a)} and {_of_judge(b)}" for name, (a, b) in judges_differ(one, other).items())
    reason, _, remedy = OTHER_JUDGES.partition("; ")
    return f"{reason} ({found}); {remedy}" if found else OTHER_JUDGES


def _of_judge(value: Any) -> str:
    said = "none" if value is None else " ".join(str(value).split())
    return said if len(said) <= _MOST_OF_A_VALUE else f"{said[:_MOST_OF_A_VALUE]}..."


def summary_line(summary: Mapping[str, Any]) -> str:
    """The figures of a summary in one line: a dash for an undefined text metric, nothing for what was not computed."""
    held = summary.get("conversations")
    if not summary["n"] and held is not None:
        return f"{'' if summary.get('name') is None else summary['name'] + ', '}{talks_in_words(held)}"
    figures = [
        ("multiple choice", (summary.get("multiple_choice") or {}).get("accuracy"), "%"),
        ("perplexity of the references", summary["perplexity"], ""),
        (
            "judge's mean",
            summary["judge_mean"],
            f"{_shown(summary.get('judge_interval'))} over {summary['n_scored']} of {summary['n']} responses",
        ),
    ]
    metrics_of_texts = (("exact match", "exact_match"), ("BLEU", "bleu"), ("ROUGE-L", "rouge_l"))
    said = [f"{title} {_percent(summary[name])}" for title, name in metrics_of_texts]
    said += [f"{name} {value:.2f}{unit}" for name, value, unit in figures if value is not None]
    n_left_out = len(summary["left_out_rows"])
    without = f" ({n_left_out} more entries were left out by generate)" if n_left_out else ""
    named = "" if (name := summary.get("name")) is None else f"{name}, "
    talks = "" if held is None else f"; {talks_in_words(held)}"
    return f"{named}{summary['n']} responses{without}: {', '.join(said)}{talks}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}%"


def _shown(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"


class _Sheet:
    """scores.json: the figures, and what has come of judging each response so far."""

    def __init__(self, paths: _Paths, entries: Sequence[Mapping[str, Any]], judge: Judge) -> None:
        self.entries = entries
        self._judge = judge
        self._path = paths.scores
        self._parts: dict[str, Callable[[], dict[str, Any]]] = {}
        self._summary: dict[str, Any] = {
            "name": paths.name,
            "decoding": decoding_of(paths.responses),
            "responses_sha256": responses_sha256(paths.run, paths.name),
            "left_out_rows": left_out_rows(entries),
        }

    def add(self, figures: Mapping[str, Any]) -> None:
        self._summary.update(figures)

    def add_part(self, name: str, made: Callable[[], dict[str, Any]]) -> None:
        """A part beside the responses: what `made` has under `summary` goes into the summary, under the part's name,
        and what it has under that name beside the judgements."""
        self._parts[name] = made

    def as_json(self) -> dict[str, Any]:
        judgements = self._judge.judgements()
        own = {**self._judge_summary(judgements), **self._summary, **self._category_summary(judgements)}
        parts = {name: made() for name, made in self._parts.items()}
        return {
            "summary": {**own, "conversations": None, **{name: part["summary"] for name, part in parts.items()}},
            "judgements": [judgement.as_json() for judgement in judgements],
            **{name: part[name] for name, part in parts.items()},
        }

    def write(self) -> None:
        write_json(self._path, self.as_json())

    def _judge_summary(self, judgements: Sequence[Judgement]) -> dict[str, Any]:
        scored = _scores(judgements)
        return {
            **self._judge.summary(judgements),
            "n_scored": len(scored),
            "n_unscored": sum(judgement.score is None and not judgement.left_out for judgement in judgements),
            "judge_mean": _mean(scored),
            "judge_interval": metrics.mean_interval(scored),
        }

    def _category_summary(self, judgements: Sequence[Judgement]) -> dict[str, Any]:
        rows = {}
        for name, figures in self._summary.get("by_category", {}).items():
            own = [j for j, entry in zip(judgements, self.entries, strict=True) if category_of(entry) == name]
            scored = _scores(own)
            interval = metrics.mean_interval(scored)
            rows[name] = {**figures, "judge_mean": _mean(scored), "judge_interval": interval}
        return {"by_category": rows}


def _judged_by(paths: _Paths) -> str | None:
    """The model whose scores of these very responses are in scores.json; None where there are none.

    Raises:
        UserError: it is a file of something else, which is not written over.
    """
    if not paths.scores.is_file():
        return None
    summary = read_scores(paths.scores)["summary"]
    if summary.get("judge_mean") is None or summary.get("responses_sha256") != responses_sha256(paths.run, paths.name):
        return None
    return str((summary.get("judge") or {}).get("model"))


def _scores(judgements: Sequence[Judgement]) -> list[int]:
    return [judgement.score for judgement in judgements if judgement.score is not None]


def _mean(scores: Sequence[int]) -> float | None:
    """The book's plain mean over the responses that have a score, or None where none has."""
    return sum(scores) / len(scores) if scores else None


def _perplexity(run: Path, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Perplexity of RUN/model on the reference outputs, or null and a line that says why it is left out."""
    nothing: dict[str, Any] = {"perplexity": None, "perplexity_by_category": {}}
    if not entries:
        return nothing
    if not (run / "model").is_dir():
        say(f"perplexity is left out: there is no {run / 'model'}")
        return nothing
    try:
        from fastft.metrics.perplexity import (
            response_perplexities,  # torch, which a score without a model does not wait for
        )

        values = response_perplexities(run, entries)
    except (FastftError, ImportError, OSError, RuntimeError, ValueError, OverflowError) as error:
        say(f"perplexity is left out: {' '.join(str(error).split())}")
        return nothing
    if not all(map(math.isfinite, values.values())):
        say(f"perplexity is left out: it is {values[None]}")
        return nothing
    return {"perplexity": values.pop(None), "perplexity_by_category": values}


def _choices_by_likelihood(run: Path, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How often RUN/model finds the right choice the likeliest, or None; a line says why where entries have choices."""
    if not any(choices_of(entry) for entry in entries) or not (run / "model").is_dir():
        return None
    try:
        from fastft.metrics.perplexity import choice_accuracy  # torch, as above

        return choice_accuracy(run, entries)
    except (FastftError, ImportError, OSError, RuntimeError, ValueError) as error:
        say(f"multiple choice by likelihood is left out: {' '.join(str(error).split())}")
        return None
