"""What the files of a run say in numbers: the content of `report.json`, which `report.html` shows.

Every file may be missing, and what it would have said is then None. Numbers that no JSON can say are None as well.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from fastft.common.errors import UserError
from fastft.common.files import object_or_empty
from fastft.common.nearest import did_you_mean_path
from fastft.common.shell import command
from fastft.metrics.statistics import bootstrap_mean, sign_flip, wilson
from fastft.reports.answers import MOST_ANSWERS, Answer, answers_of, are_short, by_question
from fastft.reports.numbers import finite, sum_of, values_of
from fastft.reports.talks import Talk, talks_of
from fastft.run.decodings import all_said, decoding_of, made_from, page_called
from fastft.run.folder import AB_NUMBERS, CONFIG, CONVERSATIONS, DEMO, METRICS, RESPONSES, SCORES, Run
from fastft.run.ledger import read_ledger
from fastft.run.metrics_file import read_metrics
from fastft.scores.compare import raise_for_all
from fastft.scores.compare_conversations import compare_conversations, rows_of
from fastft.scores.conversations import Talks, read_talks
from fastft.scores.score import answer_notes, judge_identity, other_judges, read_responses, responses_sha256
from fastft.scores.scores_file import read_scores

TOKEN_KINDS = ("padded", "real", "computed", "supervised")
CURVES = ("loss", "val_loss", "lr", "grad_norm")

_BINS = 10
_NONE = type(None)
_NAMED_FILES = (CONFIG, METRICS, RESPONSES, SCORES, CONVERSATIONS)
_SHARE = {"n": int, "share": (int, float), "interval": list}
_OF_PEOPLE: dict[str, Any] = {
    "names": {"first": str, "second": str}, "raters": list, "n_items": int, "n_rated": int, "responses_sha256": list,
    "verdicts": dict.fromkeys(("first", "second", "tie", "both_bad"), _SHARE),
    "win_rate": {"rate": (int, float, _NONE)}, "scale": (dict, _NONE),
    "agreement": {"raters": (dict, _NONE), "judge": dict},
}  # fmt: skip
"""Of ab.json what the page shows, by kinds."""
_TESTED = ("judge", "exact_match", "rouge_l")
"""Rows of a difference between two runs, each with a p of its own."""
_OF_THE_PLACE = {"out", "overwrite", "resume", "config"}  # settings that two runs of one kind may differ in


@dataclass(frozen=True, slots=True)
class Seen:
    """What had been trained on after each step, `[N]` each."""

    steps: list[float]
    epochs: list[float]
    """Passes over the data, with their parts; empty where no file says how many steps a pass has."""
    tokens: list[float]
    """Real tokens in all; empty where a step does not say."""

    def epochs_at(self, steps: Sequence[float]) -> list[float]:
        """The epochs after some of the steps; 0 before the first."""
        return [self.epochs[at - 1] if (at := bisect_right(self.steps, step)) else 0.0 for step in steps]


@dataclass(frozen=True, slots=True)
class Headline:
    """A figure that is set large."""

    label: str
    value: float | int | None
    interval: Sequence[float] | None = None
    note: str = ""
    of_100: bool = True
    """Whether it goes from 0 to 100, higher being better."""


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
    seen: Seen
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
    talks: Sequence[Talk] = ()
    """The conversations themselves, with what the judge said of them where these are the ones."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @cached_property
    def answer_notes(self) -> list[str]:
        """What a reader has to know of responses and conversations: that they are of other weights, or not whole. The
        weights are read for it, whole."""
        return answer_notes(self.folder, self.responses_name)

    @property
    def judge(self) -> Any:
        """Who gave the judge's scores, so that only those of one judge are compared; None where there are none."""
        judged = self.summary is not None and any(answer.judge is not None for answer in self.answers)
        return judge_identity((self.summary or {}).get("judge")) if judged else None

    @property
    def judge_of_talks(self) -> Any:
        """Who gave the scores of the conversations' turns; None where there are none."""
        held = self.conversations
        return None if held is None or held.get("judge_mean") is None else judge_identity(held.get("judge"))

    @property
    def was_judged(self) -> bool:
        """Whether a judge was there, and so whether an answer without a score lacks one."""
        return bool((self.summary or {}).get("judge")) or self.main_score == "judge"

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
            "epochs_seen": self.seen.epochs or None,
            "tokens_seen": self.seen.tokens or None,
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
            "talks": [talk.as_json() for talk in self.talks],
            "answer_notes": self.answer_notes,
        }


def read_run(folder: Path, name: str | None = None) -> RunFigures:
    """The figures of a run.

    Args:
        folder: the run's.
        name: of the responses, where they have one.

    Raises:
        UserError: the folder does not exist, holds no file of a run, nothing of that name, or a file that cannot be
            read.
    """
    if not folder.is_dir():
        near = did_you_mean_path(folder)
        raise UserError(f"no such run: {folder} is not a folder{near}; make one with `{command('train', out=folder)}`")
    run = Run(folder)
    if name is None and not any((folder / file).is_file() for file in _NAMED_FILES):
        raise UserError(
            f"nothing to report: {folder} holds none of {', '.join(_NAMED_FILES)}; "
            f"make them with `{command('train', out=folder)}`"
        )
    if name is not None and not any(
        path.is_file() for path in (run.responses_of("test", name), run.scores(name), run.conversations(name))
    ):
        raise UserError(
            f"{folder} has neither responses nor conversations of the name {name}; make them with "
            f"`{command('generate', run=folder, name=name)}`, or leave --name out"
        )
    steps, validation = _read_metrics(run.metrics)
    # Before the scores, which are held against the file: should it be replaced now, they are not these answers'.
    entries = read_responses(folder, name) if run.responses_of("test", name).is_file() else []
    scores, problem = _read_scores(run, name)
    answers = answers_of(entries, [] if scores is None or problem else _judgements(scores))
    settings, made_with = _read_config(run.config)
    tokens = _tokens(steps)
    ledger = read_ledger(read_metrics(run.ledger))
    talks = read_talks(folder, name)
    of_talks = _conversations(talks, scores)
    return RunFigures(
        folder=folder,
        settings=settings,
        made_with=made_with,
        training=_training(steps, validation),
        curves=_curves(steps, validation),
        seen=_seen(steps, _steps_of_a_pass(steps, object_or_empty(run.data), settings or {})),
        tokens=tokens,
        savings=_savings(tokens, (settings or {}).get("impl")),
        time=_time(run, made_from(run.responses_of("test", name)), steps, validation, scores),
        summary=None if scores is None else scores["summary"],
        scores_problem=problem,
        intervals=_intervals(answers),
        answers=answers,
        before=finite(object_or_empty(folder / DEMO).get("exact_match_before")),
        ledger=None if ledger is None else asdict(ledger),
        people=_people(folder, name),
        responses_name=name,
        decoding=decoding_of(run.responses_of("test", name)),
        conversations=of_talks,
        talks=talks_of(talks, None if of_talks is None else (scores or {}).get("conversations")),
    )


def side_by_side(run: RunFigures, others: Sequence[RunFigures]) -> list[dict[str, Any]]:
    """Each other run less this one, over the questions that both answer, with paired intervals and tests, and the same
    of their conversations. Each row's `p_of_all` is its `p` raised for the number of rows of all the runs (Holm)."""
    found = [_difference(run, other) for other in others]
    raise_for_all([row for one in found for row in (*(one[name] for name in _TESTED), *rows_of(one["conversations"]))])
    return found


def differing_settings(runs: Sequence[RunFigures]) -> dict[str, list[str | None]]:
    """The settings of the training that are not the same in all runs, with each run's value."""
    return _differing([run.settings or {} for run in runs])


def differing_decoding(runs: Sequence[RunFigures]) -> dict[str, list[str | None]]:
    """The settings by which the responses were drawn that are not the same in all runs which have responses."""
    return _differing([{} if run.decoding is None else dict(_flat(all_said(run.decoding))) for run in runs])


def _differing(held: Sequence[Mapping[str, str]]) -> dict[str, list[str | None]]:
    names = dict.fromkeys(name for settings in held for name in settings if name not in _OF_THE_PLACE)
    values = {name: [settings.get(name) for settings in held] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def _difference(run: RunFigures, other: RunFigures) -> dict[str, Any]:
    both = [(one, two) for one, two in by_question(run.answers, [other.answers]) if one is not None and two is not None]
    pairs = [(one, two) for one, two in both if one.exact is not None and two.exact is not None]
    judged = [(a, b) for one, two in pairs if (a := one.judge) is not None and (b := two.judge) is not None]
    rouge = [(a, b) for one, two in pairs if (a := one.rouge_l) is not None and (b := two.rouge_l) is not None]
    same_judge = run.judge == other.judge
    talks, no_talks = compare_conversations([(one.folder, one.responses_name) for one in (other, run)])
    return {
        "run": other.name,
        "n": len(pairs),
        "n_left_out": len(both) - len(pairs),
        "exact_match": _paired([(100.0 * bool(one.exact), 100.0 * bool(two.exact)) for one, two in pairs]),
        "rouge_l": _paired(rouge),
        "judge": _paired(judged) if same_judge else None,
        "no_judge": other_judges(run.judge, other.judge) if judged and not same_judge else None,
        "conversations": talks,
        "no_conversations": no_talks,
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


def headlines(run: RunFigures) -> list[Headline]:
    """The figures to look at first. A figure that says nothing about such references is not among them: of answers of
    one word, neither BLEU nor chrF nor ROUGE says more than how many are right."""
    summary = run.summary
    if summary is None or not summary.get("n"):
        return []
    bounds = {} if run.scores_problem else {**(summary.get("intervals") or {}), **run.intervals}
    before = "" if run.before is None else f"before training {run.before:.2f}"
    chosen, likeliest = summary.get("multiple_choice") or {}, summary.get("choices_by_likelihood") or {}
    found = [
        Headline("Judge’s mean", summary.get("judge_mean"), bounds.get("judge_mean")),
        Headline("Exact match, %", summary.get("exact_match"), bounds.get("exact_match"), before),
        Headline("Multiple choice, %", chosen.get("accuracy"), chosen.get("interval")),
        *(
            Headline(label, (likeliest.get(name) or {}).get("accuracy"), (likeliest.get(name) or {}).get("interval"))
            for label, name in (("… by likelihood, %", "total"), ("… by likelihood a token, %", "per_token"))
        ),
    ]
    if not are_short(run.answers):
        n_out = (summary.get("left_out") or {}).get("rouge_l")
        found += [
            Headline(
                "ROUGE-L F1, %", summary.get("rouge_l"), bounds.get("rouge_l"), f"{n_out:,} left out" if n_out else ""
            ),
            Headline("BLEU, %", summary.get("bleu"), bounds.get("bleu")),
            Headline("chrF, %", summary.get("chrf"), bounds.get("chrf")),
        ]
    n_empty = summary.get("empty_responses")
    found += [
        Headline("Reference perplexity", summary.get("perplexity"), of_100=False),
        Headline("Responses", summary.get("n"), note=f"{n_empty:,} empty" if n_empty else "", of_100=False),
    ]
    return [one for one in found if one.value is not None]


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
    scores = read_scores(path)
    scored = scores["summary"].get("responses_sha256")
    if not responses.is_file() and scored is None:
        return scores, None  # conversations alone were scored
    if not responses.is_file():
        return scores, f"{responses.name}, which was scored, is gone"
    if scored != responses_sha256(run.folder, name):
        again = command("score", run=run.folder, name=name)
        return scores, f"{responses.name} has changed since it was scored: run {again} again"
    return scores, None


def _judgements(scores: Mapping[str, Any]) -> list[Any]:
    """What a judge said of each response; nothing where none was there, which is no answer's fault."""
    held: list[Any] = scores["judgements"]
    scored = any(isinstance(one, dict) and finite(one.get("score")) is not None for one in held)
    return held if scored or scores["summary"].get("judge") else []


def _conversations(talks: Talks | None, scores: Mapping[str, Any] | None) -> dict[str, Any] | None:
    held = (scores or {}).get("summary", {}).get("conversations")
    return held if held and talks and held.get("conversations_sha256") == talks.sha256 else None


def _people(run: Path, name: str | None) -> dict[str, Any] | None:
    """What people said of the responses of a name, beside another run's of the same name."""
    path = run / page_called(AB_NUMBERS, (name, name))
    people = object_or_empty(path)
    if not people:
        return None
    if not _is_of(people, _OF_PEOPLE):
        raise UserError(f"{path} is not a file that fastft ab wrote; move it away and import the ratings again")
    return {**people, "stale": people["responses_sha256"][0] != responses_sha256(run, name)}


def _is_of(value: Any, form: Any) -> bool:
    """Whether a value is of a kind, or an object of values that are."""
    if not isinstance(form, dict):
        return isinstance(value, form) and not isinstance(value, bool)
    return isinstance(value, dict) and all(name in value and _is_of(value[name], one) for name, one in form.items())


# --- The figures ---


def _training(steps: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not steps and not validation:
        return None
    losses = values_of(steps, "loss")
    val_losses = values_of(validation, "val_loss")
    seconds = sum_of(steps, "seconds")
    peak = max(values_of(steps, "memory_bytes"), default=None)
    epoch = steps[-1].get("epoch") if steps else None
    return {
        "steps": len(steps),
        "epochs": epoch if isinstance(epoch, int) else None,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "last_val_loss": val_losses[-1] if val_losses else None,
        "best_val_loss": min(val_losses, default=None),
        "skipped": sum(bool(step.get("skipped") and not step.get("rescaled")) for step in steps),
        "peak_memory_bytes": peak,
        "peak_memory_mib": None if peak is None else peak / 2**20,
        "real_tokens_per_second": sum_of(steps, "tokens_real") / seconds if seconds else None,
    }


def _curves(
    steps: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[list[float], list[float]]]:
    found = {}
    for name in CURVES:
        lines = validation if name == "val_loss" else steps
        points = [(float(line["step"]), value) for line in lines if (value := finite(line.get(name))) is not None]
        if points:
            found[name] = ([step for step, _ in points], [value for _, value in points])
    return found


def _steps_of_a_pass(
    steps: Sequence[Mapping[str, Any]], data: Mapping[str, Any], settings: Mapping[str, str]
) -> int | None:
    """How many steps one pass over the data has: counted where one has ended, else by the examples and the batch."""
    passes = [step.get("epoch") for step in steps]
    if not passes or not all(isinstance(one, int) for one in passes):
        return None
    if passes[-1] != passes[0]:
        return passes.count(passes[0])
    files, train = data.get("files"), data.get("train")
    dropped = train.get("dropped") if isinstance(train, dict) else None
    batch = settings.get("batch_size", "")
    if not isinstance(files, list) or not isinstance(dropped, list) or not batch.isdecimal() or settings.get("mix"):
        return None
    n = sum(int(file.get("train") or 0) for file in files if isinstance(file, dict)) - len(dropped)
    whole = n // int(batch) if settings.get("drop_last") == "True" else -(-n // int(batch))
    return whole if whole >= len(passes) else None


def _seen(steps: Sequence[Mapping[str, Any]], steps_of_a_pass: int | None) -> Seen:
    total, tokens = 0.0, []
    for step in steps:
        total += finite(step.get("tokens_real")) or 0.0
        tokens.append(total)
    epochs = [] if not steps_of_a_pass else [step["step"] / steps_of_a_pass for step in steps]
    every = bool(steps) and all(finite(step.get("tokens_real")) is not None for step in steps)
    return Seen([float(step["step"]) for step in steps], epochs, tokens if every else [])


def _tokens(steps: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """The sums over all steps; None for a kind that no step has."""
    return {
        kind: int(sum_of(steps, f"tokens_{kind}")) if any(f"tokens_{kind}" in step for step in steps) else None
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
        "data": finite(object_or_empty(run.data).get("seconds")),
        "train": sum_of(steps, "seconds") or None,
        "eval": sum_of(validation, "eval_seconds") or None,
        "generate": finite(object_or_empty(origin).get("seconds")),
        "judge": finite((scores or {}).get("summary", {}).get("judge_seconds")),
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
