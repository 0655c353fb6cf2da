"""What the files of a run say in numbers: the content of `report.json`, which `report.html` shows.

Every file may be missing, and what it would have said is then None. Numbers that no JSON can say are None as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from fastft.common.errors import UserError
from fastft.common.files import object_or_empty, read_json
from fastft.common.nearest import did_you_mean_path
from fastft.data.records import left_out
from fastft.metrics.statistics import bootstrap_mean, sign_flip, wilson
from fastft.metrics.text_metrics import is_exact, rouge_scores
from fastft.run.decodings import decoding_of, made_from
from fastft.run.folder import AB_NUMBERS, CONFIG, DEMO, METRICS, RESPONSES, SCORES, Run
from fastft.run.ledger import read_ledger
from fastft.run.metrics_file import read_metrics
from fastft.scores.conversations import read_talks
from fastft.scores.score import judge_identity, other_judges, read_responses, responses_sha256

MOST_ANSWERS = 5
TOKEN_KINDS = ("padded", "real", "computed", "supervised")
CURVES = ("loss", "val_loss", "lr", "grad_norm")

_BINS = 10
_NAMED_FILES = (CONFIG, METRICS, RESPONSES, SCORES)
_OF_PEOPLE = {"names", "raters", "n_items", "n_rated", "responses_sha256", "verdicts", "win_rate", "scale", "agreement"}
_OF_THE_PLACE = {"out", "overwrite", "resume", "config"}  # settings that two runs of one kind may differ in


@dataclass(frozen=True, slots=True)
class Answer:
    """One response with what is said of it."""

    row: int
    """From 1, in responses.json."""
    entry: Mapping[str, Any]
    exact: bool | None
    """Whether it is the reference's text; None of an entry that `generate` left out, of which nothing is said."""
    rouge_l: float | None
    """ROUGE-L F1 against the reference, in percent; None where the reference leaves it undefined."""
    judgement: Mapping[str, Any] | None
    """None where the run has none for this response."""

    @property
    def judge(self) -> float | None:
        """The judge's score, 0 to 100."""
        return None if self.judgement is None else _finite(self.judgement.get("score"))

    @property
    def left_out(self) -> str | None:
        """Why `generate` left the entry without a response; None where there is one."""
        return left_out(self.entry)

    @property
    def question(self) -> tuple[str, str, str]:
        """What was asked, and the answer that was expected: by this, answers of several runs stand side by side."""
        return self.entry["instruction"], self.entry["input"], self.entry["output"]

    def score(self, of: str) -> float | None:
        """The figure named `judge` or `rouge_l`."""
        return self.judge if of == "judge" else self.rouge_l

    def as_json(self) -> dict[str, Any]:
        """The numbers without the texts."""
        why = {} if self.left_out is None else {"left_out": self.left_out}
        return {"row": self.row, "exact": self.exact, "judge": self.judge, "rouge_l": self.rouge_l, **why}


@dataclass(frozen=True)
class RunFigures:
    """A run in numbers."""

    folder: Path
    settings: dict[str, str] | None
    """config.yaml as dotted name -> value; text that is not YAML stands under an empty name."""
    made_with: str
    """The versions that it ran with, by config.yaml's first line."""
    training: dict[str, Any] | None
    curves: dict[str, tuple[list[float], list[float]]]
    """Steps and values by the names of `CURVES`; those without a point are left out."""
    tokens: dict[str, int | None]
    savings: dict[str, int | None]
    time: dict[str, float | None]
    """Seconds of each stage; None where no file holds them."""
    summary: dict[str, Any] | None
    """scores.json's."""
    scores_problem: str | None
    """Why the judgements are not those of these responses."""
    intervals: dict[str, Any]
    answers: list[Answer]
    before: float | None
    """Exact match in percent before training, which only `fastft demo` measures."""
    ledger: dict[str, Any] | None
    people: dict[str, Any] | None
    """ab.json, and under `stale` whether the run has answered again since."""
    responses_name: str | None = None
    """What the responses are called, where they have a name."""
    decoding: dict[str, Any] | None = None
    """What they were decoded with; None where nothing says it."""
    conversations: dict[str, Any] | None = None
    """The figures of the run's conversations in scores.json; None where they are not of those that are there."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def judge(self) -> Any:
        """Who gave the judge's scores, so that only those of one judge are compared; None where there are none."""
        judged = self.summary is not None and any(answer.judge is not None for answer in self.answers)
        return judge_identity((self.summary or {}).get("judge")) if judged else None

    @property
    def main_score(self) -> str:
        """What answers are ordered by: the judge's score where there are any, else ROUGE-L."""
        return "judge" if any(answer.judge is not None for answer in self.answers) else "rouge_l"

    def histogram(self, of: str) -> list[int]:
        """How many answers have a score in [0, 10), [10, 20) ... [90, 100]."""
        counts = [0] * _BINS
        for answer in self.answers:
            if (score := answer.score(of)) is not None:
                counts[min(_BINS - 1, max(0, int(score * _BINS / 100)))] += 1
        return counts

    def best(self) -> list[Answer]:
        """The answers with the highest main score."""
        return self._ranked(-1)

    def worst(self) -> list[Answer]:
        """The answers with the lowest main score."""
        return self._ranked(1)

    def _ranked(self, sign: int) -> list[Answer]:
        scored = [(score, answer) for answer in self.answers if (score := answer.score(self.main_score)) is not None]
        scored.sort(key=lambda pair: (sign * pair[0], sign * (pair[1].rouge_l or 0.0), pair[1].row))
        return [answer for _, answer in scored[: min(MOST_ANSWERS, len(scored) // 2)]]  # none is both best and worst

    def disputed(self) -> list[Answer]:
        """The answers on which judge and ROUGE-L are farthest apart, both on 0 to 100; none where they agree."""
        apart = [
            (abs(answer.judge - answer.rouge_l), answer)
            for answer in self.answers
            if answer.judge is not None and answer.rouge_l is not None
        ]
        apart.sort(key=lambda pair: (-pair[0], pair[1].row))
        return [answer for gap, answer in apart[:MOST_ANSWERS] if gap > 0]

    def as_json(self) -> dict[str, Any]:
        """Everything that is a number, and the settings."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "made_with": self.made_with,
            "settings": self.settings,
            "training": self.training,
            "curves": {name: {"steps": x, "values": y} for name, (x, y) in self.curves.items()},
            "tokens": self.tokens,
            "savings": self.savings,
            "seconds": self.time,
            "scores": self.summary,
            "scores_problem": self.scores_problem,
            "intervals": self.intervals,
            "exact_match_before": self.before,
            "histograms": {of: self.histogram(of) for of in ("judge", "rouge_l")} if self.answers else None,
            "best": [answer.row for answer in self.best()],
            "worst": [answer.row for answer in self.worst()],
            "disputed": [answer.row for answer in self.disputed()],
            "answers": [answer.as_json() for answer in self.answers],
            "ledger": self.ledger,
            "people": self.people,
            "responses_name": self.responses_name,
            "decoding": self.decoding,
            "conversations": self.conversations,
        }


def read_run(folder: Path, name: str | None = None) -> RunFigures:
    """The figures of a run.

    Args:
        folder: the run's.
        name: of the responses, where they have one.

    Raises:
        UserError: the folder does not exist, holds no file of a run, or holds one that cannot be read.
    """
    if not folder.is_dir():
        near = did_you_mean_path(folder)
        raise UserError(f"no such run: {folder} is not a folder{near}; make one with `fastft train --out {folder}`")
    if not any((folder / name).is_file() for name in _NAMED_FILES):
        raise UserError(
            f"nothing to report: {folder} holds none of {', '.join(_NAMED_FILES)}; "
            f"make them with `fastft train --out {folder}`"
        )
    run = Run(folder)
    steps, validation = _read_metrics(run.metrics)
    scores, problem = _read_scores(run, name)
    answers = _answers(run, name, [] if scores is None or problem else scores["judgements"])
    settings, made_with = _read_config(run.config)
    tokens = _tokens(steps)
    ledger = read_ledger(read_metrics(run.ledger))
    return RunFigures(
        folder=folder,
        settings=settings,
        made_with=made_with,
        training=_training(steps, validation),
        curves=_curves(steps, validation),
        tokens=tokens,
        savings=_savings(tokens, (settings or {}).get("impl")),
        time=_time(run, made_from(run.responses_of("test", name)), steps, validation, scores),
        summary=None if scores is None else scores["summary"],
        scores_problem=problem,
        intervals=_intervals(answers),
        answers=answers,
        before=_finite(object_or_empty(folder / DEMO).get("exact_match_before")),
        ledger=None if ledger is None else asdict(ledger),
        people=_people(folder) if name is None else None,  # what people rated are the responses without a name
        responses_name=name,
        decoding=decoding_of(run.responses_of("test", name)),
        conversations=_conversations(run, name, scores),
    )


def side_by_side(run: RunFigures, others: Sequence[RunFigures]) -> list[dict[str, Any]]:
    """Each other run less this one, over the questions that both answer, with paired intervals and tests."""
    return [_difference(run, other) for other in others]


def differing_settings(runs: Sequence[RunFigures]) -> dict[str, list[str | None]]:
    """The settings that are not the same in all runs, with each run's value."""
    held = [{**(run.settings or {}), **dict(_flat(run.decoding or {}, "decoding"))} for run in runs]
    names = dict.fromkeys(name for settings in held for name in settings if name not in _OF_THE_PLACE)
    values = {name: [settings.get(name) for settings in held] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def by_question(run: RunFigures, others: Sequence[RunFigures]) -> list[list[Answer | None]]:
    """One row for each answer of the run: it, and each other run's answer to the same question (None: it has none)."""
    found = [_by_question(other.answers) for other in others]
    return [[answer, *(answers.get(key) for answers in found)] for key, answer in _by_question(run.answers).items()]


def farthest_apart(rows: Sequence[Sequence[Answer | None]], of: str) -> list[Sequence[Answer | None]]:
    """The questions on which the runs' scores lie farthest apart, widest first; none on which they agree."""
    apart = []
    for row in rows:
        scores = [score for answer in row if answer is not None and (score := answer.score(of)) is not None]
        if len(scores) > 1 and max(scores) > min(scores):
            apart.append((max(scores) - min(scores), row))
    apart.sort(key=lambda pair: -pair[0])
    return [row for _, row in apart[:MOST_ANSWERS]]


def _by_question(answers: Sequence[Answer]) -> dict[tuple[Any, ...], Answer]:
    """By what was asked, and which time that is: a question may be asked twice."""
    found: dict[tuple[Any, ...], Answer] = {}
    times: dict[tuple[str, str, str], int] = {}
    for answer in answers:
        times[answer.question] = times.get(answer.question, 0) + 1
        found[(*answer.question, times[answer.question])] = answer
    return found


def _difference(run: RunFigures, other: RunFigures) -> dict[str, Any]:
    both = [(one, two) for one, two in by_question(run, [other]) if one is not None and two is not None]
    pairs = [(one, two) for one, two in both if one.exact is not None and two.exact is not None]
    judged = [(a, b) for one, two in pairs if (a := one.judge) is not None and (b := two.judge) is not None]
    rouge = [(a, b) for one, two in pairs if (a := one.rouge_l) is not None and (b := two.rouge_l) is not None]
    same_judge = run.judge == other.judge
    return {
        "run": other.name,
        "n": len(pairs),
        "n_left_out": len(both) - len(pairs),
        "exact_match": _paired([(100.0 * bool(one.exact), 100.0 * bool(two.exact)) for one, two in pairs]),
        "rouge_l": _paired(rouge),
        "judge": _paired(judged) if same_judge else None,
        "no_judge": other_judges(run.judge, other.judge) if judged and not same_judge else None,
    }


def _paired(pairs: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    differences = [two - one for one, two in pairs]
    if not differences:
        return None
    return {
        "n": len(differences),
        "mean": fmean(differences),
        "interval": bootstrap_mean(differences),
        "p": sign_flip(differences).p,
    }


# --- The files ---


def _read_config(path: Path) -> tuple[dict[str, str] | None, str]:
    if not path.is_file():
        return None, ""
    text = path.read_bytes().decode(errors="replace")
    first = text.partition("\n")[0]
    made_with = first.lstrip("# ") if first.startswith("#") else ""
    try:
        return dict(_flat(yaml.safe_load(text))), made_with
    except yaml.YAMLError:
        return {"": text}, made_with


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, "" if value is None else str(value)


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of optimizer steps and those of validation, both by step; lines of other kinds are passed over.

    The last line of a step counts, should there be two.
    """
    steps: dict[int, dict[str, Any]] = {}
    validation: dict[int, dict[str, Any]] = {}
    for line in read_metrics(path):
        step = line.get("step")
        if isinstance(step, int) and ("val_loss" in line or "loss" in line):
            (validation if "val_loss" in line else steps)[step] = line
    return [steps[step] for step in sorted(steps)], [validation[step] for step in sorted(validation)]


def _read_scores(run: Run, name: str | None) -> tuple[dict[str, Any] | None, str | None]:
    """scores.json, and why its judgements cannot stand beside the responses (None: they can)."""
    path, responses = run.scores(name), run.responses_of("test", name)
    if not path.is_file():
        return None, None
    scores = read_json(path, what="the scores")
    parts = (scores.get("summary"), scores.get("judgements")) if isinstance(scores, dict) else (None, None)
    if not isinstance(parts[0], dict) or not isinstance(parts[1], list):
        raise UserError(f"{path} is not a file that fastft score wrote; move it away and score again")
    if not responses.is_file():
        return scores, f"{responses.name}, which was scored, is gone"
    if parts[0].get("responses_sha256") != responses_sha256(run.folder, name):
        again = f"fastft score --run {run.folder}{'' if name is None else f' --name {name}'}"
        return scores, f"{responses.name} has changed since it was scored: run {again} again"
    return scores, None


def _conversations(run: Run, name: str | None, scores: Mapping[str, Any] | None) -> dict[str, Any] | None:
    held, talks = (scores or {}).get("summary", {}).get("conversations"), read_talks(run.folder, name)
    return held if held and talks and held.get("conversations_sha256") == talks.sha256 else None


def _people(run: Path) -> dict[str, Any] | None:
    people = object_or_empty(run / AB_NUMBERS)
    if not people:
        return None
    if not people.keys() >= _OF_PEOPLE:
        raise UserError(
            f"{run / AB_NUMBERS} is not a file that fastft ab wrote; move it away and import the ratings again"
        )
    rated = people["responses_sha256"][0]
    return {**people, "stale": not (run / RESPONSES).is_file() or rated != responses_sha256(run)}


def _answers(run: Run, name: str | None, judgements: Sequence[Any]) -> list[Answer]:
    entries = read_responses(run.folder, name) if run.responses_of("test", name).is_file() else []
    held = [item if isinstance(item, dict) else None for item in judgements]
    held += [None] * (len(entries) - len(held))
    if not entries:
        return []
    texts = [(entry["model_response"], entry["output"]) for entry in entries]
    scores = rouge_scores([text for text, _ in texts], [reference for _, reference in texts])
    return [
        Answer(row, entry, is_exact(*text), score["rouge_l"], judgement)
        if left_out(entry) is None
        else Answer(row, entry, None, None, None)
        for row, (entry, text, score, judgement) in enumerate(zip(entries, texts, scores, held, strict=False), start=1)
    ]


# --- The figures ---


def _training(steps: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not steps and not validation:
        return None
    losses = _values(steps, "loss")
    val_losses = _values(validation, "val_loss")
    seconds = _sum(steps, "seconds")
    return {
        "steps": len(steps),
        "epochs": steps[-1].get("epoch") if steps else None,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "last_val_loss": val_losses[-1] if val_losses else None,
        "best_val_loss": min(val_losses, default=None),
        "skipped": sum(bool(step.get("skipped") and not step.get("rescaled")) for step in steps),
        "peak_memory_bytes": max(_values(steps, "memory_bytes"), default=None),
        "real_tokens_per_second": _sum(steps, "tokens_real") / seconds if seconds else None,
    }


def _curves(
    steps: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[list[float], list[float]]]:
    found = {}
    for name in CURVES:
        lines = validation if name == "val_loss" else steps
        points = [(float(line["step"]), value) for line in lines if (value := _finite(line.get(name))) is not None]
        if points:
            found[name] = ([step for step, _ in points], [value for _, value in points])
    return found


def _tokens(steps: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """The sums over all steps; None for a kind that no step has."""
    return {
        kind: int(_sum(steps, f"tokens_{kind}")) if any(f"tokens_{kind}" in step for step in steps) else None
        for kind in TOKEN_KINDS
    }


def _savings(tokens: Mapping[str, int | None], impl: str | None) -> dict[str, int | None]:
    """Tokens that were not computed because of each saving.

    `head` counts positions that the head and the last block left out, at least: equal targets share a row.
    """
    padded, real, computed, supervised = (tokens[kind] for kind in TOKEN_KINDS)
    if padded is None or real is None or computed is None:
        return {"padding": None, "sharing": None, "head": None}
    head = None if supervised is None else max(0, computed - supervised) * (impl != "reference")
    return {"padding": padded - max(real, computed), "sharing": max(0, real - computed), "head": head}


def _time(
    run: Run,
    origin: Path,
    steps: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Any] | None,
) -> dict[str, float | None]:
    return {
        "data": _finite(object_or_empty(run.data).get("seconds")),
        "train": _sum(steps, "seconds") or None,
        "eval": _sum(validation, "eval_seconds") or None,
        "generate": _finite(object_or_empty(origin).get("seconds")),
        "judge": _finite((scores or {}).get("summary", {}).get("judge_seconds")),
    }


def _intervals(answers: Sequence[Answer]) -> dict[str, Any]:
    """The 95% intervals of the means over the answers, in the means' units."""
    judged = [score for answer in answers if (score := answer.judge) is not None]
    said = [answer.exact for answer in answers if answer.exact is not None]
    exact = wilson(sum(said), len(said)) if said else None
    return {
        "exact_match": None if exact is None else [100 * bound for bound in exact],
        "rouge_l": bootstrap_mean([answer.rouge_l for answer in answers if answer.rouge_l is not None]),
        "judge_mean": bootstrap_mean(judged),
    }


def _values(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [value for line in lines if (value := _finite(line.get(key))) is not None]


def _sum(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    return math.fsum(_values(lines, key))


def _finite(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None
