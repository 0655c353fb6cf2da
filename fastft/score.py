"""The stage `responses.json` -> `scores.json`: text metrics of every response, and a judge's score of each.

`scores.json` is written whole after every judgement, and a judgement is kept under the key of its question
(`fastft.judge.judgement_key`): a run that was killed, or whose judge went away, goes on where it stopped, and an
answer that was read once is never asked for again. Identical questions of one run share one answer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastft import metrics
from fastft.console import meter, say, warn
from fastft.errors import FastftError, JudgeUnavailable, UserError
from fastft.files import read_json, write_json
from fastft.judge import (
    DEFAULT_MODEL,
    DEFAULT_URL,
    EMPTY_RESPONSE,
    OPTIONS,
    Judgement,
    OllamaJudge,
    judge_prompt,
    judgement_key,
)
from fastft.records import category_of, choices_of, fault_of_category, fault_of_choices

RESPONSES = "responses.json"
SCORES = "scores.json"

_NOT_YET = "not judged yet"


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What `fastft score` takes."""

    run: Path
    """Folder of the run; its responses.json is scored."""
    judge: Literal["ollama", "none"] = "ollama"
    """Who gives scores from 0 to 100; none leaves it at the text metrics."""
    judge_model: str = DEFAULT_MODEL
    """Name of the judge's model in Ollama."""
    judge_url: str = DEFAULT_URL
    """Address of the Ollama server."""
    require_judge: bool = False
    """Exit with status 3 where no judge can be used, instead of leaving the scores out."""

    def __post_init__(self) -> None:
        if self.require_judge and self.judge == "none":
            raise UserError("--require_judge: got it with --judge none; leave one of the two out")


def score(options: ScoreOptions) -> dict[str, Any]:
    """Scores the responses of a run, writes RUN/scores.json, and returns what it holds.

    `judgements` holds one object for each response, in its order: `score` (0..100 or null), `raw`, `key`, `answered`,
    and `reason` where there is something to explain. `summary` holds the figures, metrics in percent. `earlier` holds
    answers to questions that are not asked now (another judge, another response), so that none is lost.

    Raises:
        UserError: responses.json is missing or malformed, or the judge's address is no address.
        JudgeUnavailable: `require_judge`, and the judge cannot be used; scores.json is written all the same.
    """
    # Made first: a mistyped address is to be heard of at once, not after the metrics.
    judge = OllamaJudge(options.judge_url, options.judge_model) if options.judge == "ollama" else None
    entries = read_responses(options.run)
    if _are_stale(options.run):
        warn("the responses are not those of the run's model as it is now; `fastft generate` answers again")
    sheet = _Sheet(options.run, options.judge_model, entries)
    sheet.add(metrics.summary(entries))
    sheet.write()
    sheet.add(_perplexity(options.run, entries))
    sheet.add({"choices_by_likelihood": _choices_by_likelihood(options.run, entries)})
    problem = _judge_all(judge, sheet)
    sheet.close(problem)
    if problem is not None and options.require_judge:
        raise JudgeUnavailable(problem)
    if problem is not None and judge is not None:
        say(f"no judge, everything else is kept: {problem}")
    return sheet.as_json()


def read_responses(run: Path) -> list[dict[str, Any]]:
    """The entries of RUN/responses.json, each with `instruction`, `input`, `output` and `model_response` as text.

    Raises:
        UserError: the file is missing, empty or malformed; the message names the row, counted from 1.
    """
    path = run / RESPONSES
    remedy = f"make it with `fastft generate --run {run}`"
    if not path.is_file():
        raise UserError(f"no responses to score: {path} does not exist; {remedy}")
    entries = read_json(path, what="the responses file")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: got {_kind(entries)}, expected a list of one or more entries; {remedy}")
    for row, entry in enumerate(entries, start=1):
        _check_entry(entry, f"{path} row {row}", remedy)
    return [{**entry, "input": entry.get("input", "")} for entry in entries]


def _are_stale(run: Path) -> bool:
    """Whether the run's weights have changed since its responses were generated."""
    origin, weights = run / "responses.made-from.json", run / "model" / "model.safetensors"
    if not (origin.is_file() and weights.is_file()):
        return False
    made_from = read_json(origin, what="the responses' origin")
    with weights.open("rb") as file:
        return bool(made_from.get("weights_sha256") != hashlib.file_digest(file, "sha256").hexdigest())


def _check_entry(entry: Any, where: str, remedy: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: got {_kind(entry)}, expected an object with model_response; {remedy}")
    for name in ("instruction", "output", "model_response"):
        if name not in entry:
            raise UserError(f"{where}: {name} is missing; {remedy}")
    for name in ("instruction", "input", "output", "model_response"):
        if not isinstance(entry.get(name, ""), str):
            raise UserError(f"{where}: {name} is {_kind(entry[name])}, expected text; {remedy}")
    fault = fault_of_category(entry.get("category")) or fault_of_choices(entry.get("choices"), entry["output"])
    if fault is not None:
        raise UserError(f"{where}: {fault}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return "an empty list" if value == [] else names.get(type(value), "a number")


def responses_sha256(run: Path) -> str:
    """SHA-256 (hex) of RUN/responses.json, by which scores.json says what it scored."""
    return hashlib.sha256((run / RESPONSES).read_bytes()).hexdigest()


def summary_line(summary: Mapping[str, Any]) -> str:
    """The figures of a summary in one line; what was not or cannot be computed is left out."""
    figures = [
        ("exact match", summary["exact_match"], "%"),
        ("multiple choice", (summary.get("multiple_choice") or {}).get("accuracy"), "%"),
        ("BLEU", summary["bleu"], "%"),
        ("ROUGE-L", summary["rouge_l"], "%"),
        ("perplexity of the references", summary["perplexity"], ""),
        (
            "judge's mean",
            summary["judge_mean"],
            f"{_shown(summary.get('judge_interval'))} over {summary['n_scored']} of {summary['n']} responses",
        ),
    ]
    said = [f"{name} {value:.2f}{unit}" for name, value, unit in figures if value is not None]
    return f"{summary['n']} responses: {', '.join(said)}"


def _shown(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"


class _Sheet:
    """scores.json while it is being filled. Starts with the judgements of an earlier call that still hold."""

    def __init__(self, run: Path, model: str, entries: Sequence[Mapping[str, Any]]) -> None:
        self.entries = entries
        self._path = run / SCORES
        self._model = model
        self._summary: dict[str, Any] = {"responses_sha256": responses_sha256(run)}
        self._no_judge: str | None = None
        self._closed = False
        self._answers = _earlier_answers(self._path)
        self._keys = [judgement_key(model, judge_prompt(entry)) for entry in entries]
        self._judgements = [Judgement(score=None, reason=_NOT_YET, key=key, answered=False) for key in self._keys]

    def add(self, figures: Mapping[str, Any]) -> None:
        self._summary.update(figures)

    def open_rows(self) -> Iterator[int]:
        """The rows without an answer, tested as they are reached: one answer may serve several."""
        return (row for row, key in enumerate(self._keys) if key not in self._answers)

    def n_open(self) -> int:
        """How many different questions have no answer yet."""
        return len({self._keys[row] for row in self.open_rows()})

    def put(self, row: int, judgement: Judgement) -> None:
        """Takes a judgement and writes the file, so that a kill at any moment loses nothing that was answered."""
        self._judgements[row] = judgement
        if judgement.answered:
            self._answers[judgement.key] = judgement
        self.write()

    def close(self, no_judge: str | None) -> None:
        """Writes the file for the last time; `no_judge` is why rows that are still open stay without a score."""
        self._no_judge = no_judge
        self._closed = True
        if no_judge is not None:
            self._judgements = [
                Judgement(score=None, reason=f"no judge: {no_judge}", key=old.key, answered=False)
                if old.reason == _NOT_YET
                else old
                for old in self._judgements
            ]
        self.write()

    def judgements(self) -> list[Judgement]:
        """One for each response, in its order."""
        return [self._answers.get(key, open_one) for key, open_one in zip(self._keys, self._judgements, strict=True)]

    def as_json(self) -> dict[str, Any]:
        judgements = self.judgements()
        current = set(self._keys)
        return {
            "summary": {**self._judge_summary(judgements), **self._summary, **self._category_summary(judgements)},
            "judgements": [judgement.as_json() for judgement in judgements],
            "earlier": [answer.as_json() for key, answer in self._answers.items() if key not in current],
        }

    def write(self) -> None:
        write_json(self._path, self.as_json())

    def _judge_summary(self, judgements: Sequence[Judgement]) -> dict[str, Any]:
        scored = _scores(judgements)
        judge = {"name": "ollama", "model": self._model, "options": dict(OPTIONS)}
        return {
            "judge": judge if any(judgement.answered for judgement in judgements) else None,
            "no_judge": self._no_judge,
            "n_scored": len(scored),
            "n_unscored": len(judgements) - len(scored),
            "judge_mean": _mean(scored),
            "judge_interval": self._interval(scored),
        }

    def _category_summary(self, judgements: Sequence[Judgement]) -> dict[str, Any]:
        rows = {}
        for name, figures in self._summary.get("by_category", {}).items():
            own = [j for j, entry in zip(judgements, self.entries, strict=True) if category_of(entry) == name]
            scored = _scores(own)
            rows[name] = {**figures, "judge_mean": _mean(scored), "judge_interval": self._interval(scored)}
        return {"by_category": rows}

    def _interval(self, scored: Sequence[int]) -> list[float] | None:
        """Of the judge's mean, once no judgement is missing any more: it is not worth its time after each of them."""
        return metrics.mean_interval(scored) if self._closed else None


def _earlier_answers(path: Path) -> dict[str, Judgement]:
    """The answers that an earlier call left in scores.json, by key; what it could not get is asked again."""
    if not path.is_file():
        return {}
    scores = read_json(path, what="the scores of an earlier call")
    try:
        kept = [Judgement(**{"reason": None, **item}) for item in scores["judgements"] + scores.get("earlier", [])]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file that fastft score wrote ({error!r}); move it away") from error
    return {judgement.key: judgement for judgement in kept if judgement.answered}


def _scores(judgements: Sequence[Judgement]) -> list[int]:
    return [judgement.score for judgement in judgements if judgement.score is not None]


def _mean(scores: Sequence[int]) -> float | None:
    """The book's plain mean over the responses that have a score, or None where none has."""
    return sum(scores) / len(scores) if scores else None


def _perplexity(run: Path, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Perplexity of RUN/model on the reference outputs, or null and a line that says why it is left out."""
    nothing: dict[str, Any] = {"perplexity": None, "perplexity_by_category": {}}
    if not (run / "model").is_dir():
        say(f"perplexity is left out: there is no {run / 'model'}")
        return nothing
    try:
        from fastft.perplexity import response_perplexities  # torch, which a score without a model does not wait for

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
        from fastft.perplexity import choice_accuracy  # torch, as above

        return choice_accuracy(run, entries)
    except (FastftError, ImportError, OSError, RuntimeError, ValueError) as error:
        say(f"multiple choice by likelihood is left out: {' '.join(str(error).split())}")
        return None


def _judge_all(judge: OllamaJudge | None, sheet: _Sheet) -> str | None:
    """Asks the judge about every open row, in file order. Returns None, or why there is no (further) judge."""
    if not sheet.n_open():
        return None  # nothing to ask: a second call needs no server
    if judge is None:
        return "--judge none"
    try:
        judge.check()
        with meter("judge", len(sheet.entries), done=len(sheet.entries) - sheet.n_open()) as shown:
            for row in sheet.open_rows():
                judgement = judge.score(sheet.entries[row])
                sheet.put(row, judgement)
                shown.advance(_mean_text(sheet))
                if not judgement.answered:
                    judge.check()  # one failed request is bad luck, a server that went away ends the asking
    except JudgeUnavailable as error:
        return str(error)
    return _useless(judge, sheet.judgements())


def _useless(judge: OllamaJudge, judgements: Sequence[Judgement]) -> str | None:
    """Why a judge that was there was of no use: every request to it failed."""
    asked = [judgement for judgement in judgements if judgement.reason != EMPTY_RESPONSE]
    if not asked or any(judgement.answered for judgement in asked):
        return None
    return f"{judge.model} answered none of {len(asked)} requests, the last one with: {asked[-1].reason}"


def _mean_text(sheet: _Sheet) -> str:
    mean = _mean(_scores(sheet.judgements()))
    return "no score yet" if mean is None else f"mean {mean:.2f}"
