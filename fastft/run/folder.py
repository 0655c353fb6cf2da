"""A run is a folder: where each of its files lies, and the append-only metrics."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastft.common import files
from fastft.common.console import warn
from fastft.common.errors import UserError
from fastft.common.keywords import hidden_path
from fastft.data.audit import Findings, audit
from fastft.data.encode import EncodedSet, EncodingRules, encode, name_rows
from fastft.data.folder_tokenizer import NAMES as TOKENIZER_FILES
from fastft.data.folder_tokenizer import tokenizer_of
from fastft.data.json_rows import BadRecord
from fastft.data.prompts import TEMPLATES, Template
from fastft.data.records import (
    ReadingRules,
    Record,
    Split,
    check_usable,
    data_path,
    describe_bad,
    digest_of,
    load_records,
    split,
)
from fastft.data.token_cache import RecordFile, cache_for, pick
from fastft.data.tokenizer import Tokenizer, gpt2_tokenizer
from fastft.model.gpt2 import GPT2Config
from fastft.run.config import TrainOptions, from_yaml

_RESULTS = (
    *("responses.json", "responses.val.json", "responses.train.json", "scores.json", "judge-replies.jsonl"),
    *("report.html", "report.json", "ab.html", "ab.json", "compare-*.json"),
)
_CHECKPOINTS = ("step", "best", "shards")
_IN_CHECKPOINTS = ("*.safetensors", "state.json", "DONE", "zero/*.pt", "zero_to_fp32.py", ".*.tmp")
_IN_FOLDERS = {
    "checkpoints": tuple(
        f"{folder}/{file}"
        for kind in _CHECKPOINTS
        for folder in (f"{kind}-*", f".{kind}-*.tmp")
        for file in _IN_CHECKPOINTS
    ),
    "hangs": ("rank-*.txt",),
    "model": ("model.safetensors", "config.json", "generation_config.json", *TOKENIZER_FILES, ".*.tmp"),
    "tokenizer": (*TOKENIZER_FILES, ".*.tmp"),
    "tensorboard": ("events.out.tfevents.*",),
}
"""What fastft writes into the folders of a run's folder."""


@dataclass(frozen=True, slots=True)
class Run:
    """The paths of a run's folder."""

    folder: Path

    @property
    def config(self) -> Path:
        """The options that it was trained with."""
        return self.folder / "config.yaml"

    @property
    def data(self) -> Path:
        """What the training data was, and the rows that something happened to."""
        return self.folder / "data.json"

    @property
    def metrics(self) -> Path:
        """One JSON line a step."""
        return self.folder / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """One JSON line a step with the loss of each of its examples."""
        return self.folder / "ledger.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def hangs(self) -> Path:
        """Where each rank of a run that hung was, by its own words."""
        return self.folder / "hangs"

    @property
    def tokenizer(self) -> Path:
        """The files of the tokenizer that the run trains with, where it is not GPT-2's own."""
        return self.folder / "tokenizer"

    @property
    def model(self) -> Path:
        """The Hugging Face folder of the result."""
        return self.folder / "model"

    @property
    def responses(self) -> Path:
        """The test entries with `model_response`."""
        return self.responses_of("test")

    def responses_of(self, part: str) -> Path:
        """The entries of `train`, `val` or `test` with `model_response`; what is scored is the test's."""
        return self.folder / ("responses.json" if part == "test" else f"responses.{part}.json")

    def written(self) -> list[Path]:
        """The files that fastft has written into the folder, what tells that it holds a run last. What is a link stands
        for itself: nothing behind it is named."""
        names = ["demo.json", *_RESULTS, "responses*.made-from.json", "responses*.journal.jsonl", "ledger.jsonl"]
        found = [path for name in names for path in sorted(self.folder.glob(name))]
        for name, patterns in _IN_FOLDERS.items():
            if (folder := self.folder / name).is_symlink():
                found.append(folder)
            else:
                found += [path for pattern in patterns for path in sorted(_within(folder, pattern))]
        found += [self.metrics, self.data, self.config]
        return [path for path in found if path.is_symlink() or path.exists()]

    def clear(self) -> None:
        """Removes what fastft has written into the folder, and nothing else; folders that are then empty too.

        Raises:
            UserError: something of it cannot be removed; then nothing has been.
        """
        paths = self.written()
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                raise UserError(f"--overwrite: {path} is a folder, expected a file of fastft's; move it away")
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise UserError(f"--overwrite: {path} cannot be removed; check the permissions of {path.parent}")
        for path in paths:
            path.unlink(missing_ok=True)
        parents = {parent for path in paths for parent in path.parents if self.folder in parent.parents}
        for folder in sorted(parents, key=lambda parent: -len(parent.parts)):
            with contextlib.suppress(OSError):  # somebody else's files are in it
                folder.rmdir()

    def holds_something(self) -> bool:
        """Whether a run has left something in the folder that another one would replace."""
        left = (
            self.config,
            self.metrics,
            self.model / "model.safetensors",
            self.responses,
            *self.checkpoints.glob("*-*/DONE"),
        )
        return any(path.exists() for path in left)

    def remove_leftovers(self) -> None:
        """Removes what a killed training had half written: hidden files and folders beside their places."""
        names = [".config.yaml.*.tmp", ".data.json.*.tmp", ".metrics.jsonl.*.tmp", ".ledger.jsonl.*.tmp"]
        for pattern in (
            *names,
            *(f"checkpoints/.{kind}-*.tmp" for kind in _CHECKPOINTS),
            "model/.*.tmp",
            "tokenizer/.*.tmp",
        ):
            for path in list(self.folder.glob(pattern)):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def own_tokenizer(self) -> Tokenizer:
        """The tokenizer that the run trains with: its own, or GPT-2's where it keeps none."""
        return tokenizer_of(self.tokenizer) or gpt2_tokenizer()

    def options(self) -> TrainOptions:
        """The options that the run was trained with."""
        if not self.folder.is_dir():
            raise UserError(f"run folder not found: {self.folder}; --run takes the folder that train wrote")
        return from_yaml(self.config)


def _within(folder: Path, pattern: str) -> Iterator[Path]:
    """The paths of a pattern such as `step-*/DONE`; where a link comes on the way, the link."""
    first, _, rest = pattern.partition("/")
    for path in folder.glob(first):
        if not rest or path.is_symlink():
            yield path
        else:
            yield from _within(path, rest)


def names_of(folders: Sequence[Path]) -> list[str]:
    """What runs are called beside each other: their folders' own names, or the whole paths where two have one name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


@dataclass(frozen=True, slots=True)
class Data:
    """The records of a run, split, with the template that makes their text."""

    source: str
    records: list[Record] | RecordFile
    """In memory, or in a large file that is read anew for each use."""
    bad: list[BadRecord]
    """The malformed records that were left out."""
    parts: Split
    template: Template
    taken_for: str | None = None
    """How the file was read, where its name says something else."""
    seconds: float = 0.0
    """That reading has taken."""
    end_marks: tuple[str, ...] = ReadingRules().end_marks
    """The texts of end-of-texts that were looked for."""

    def describe_bad(self) -> str:
        """The malformed records in one line."""
        return describe_bad(self.source, len(self.records), self.bad)

    def audit(self) -> Findings:
        """What was read otherwise than it is written, what is not read, and what makes scores lie."""
        if isinstance(self.records, RecordFile):
            return self.records.audit(self.parts, self.template)
        return audit(self.records, self.parts, self.template, self.end_marks)

    def fingerprint(self) -> str:
        """SHA-256 over all records and their split: another order would put training rows into the test split."""
        records = self.records
        digest = hashlib.sha256((records.digest if isinstance(records, RecordFile) else digest_of(records)).encode())
        for indices in (self.parts.train, self.parts.test, self.parts.val):
            digest.update(b"split" + indices.tobytes())
        return digest.hexdigest()

    def part(self, name: str, most: int | None = None) -> list[Record]:
        """The records of `train`, `test` or `val`, or the first `most` of them."""
        indices = getattr(self.parts, name)[:most]
        return self.records.pick(indices) if isinstance(self.records, RecordFile) else pick(self.records, indices)

    def encode(self, name: str, options: TrainOptions, config: GPT2Config) -> EncodedSet:
        """A part's examples as token ids of a model; those of a large file are memory-mapped."""
        n_ctx = config.n_ctx
        limit = options.max_length or n_ctx
        if limit > n_ctx:
            raise UserError(f"got --max_length {limit}, expected at most the model's context of {n_ctx}")
        rules = EncodingRules(options.mask_prompt, limit, options.too_long)
        return self._encoded(name, rules, config.tokenizer)

    def longer_than(self, config: GPT2Config, options: TrainOptions) -> list[int]:
        """The test rows that do not fit a model's context with their responses. Training does not read them, but what
        comes after it does: so they are looked at before.

        Raises:
            UserError: there are some, and `--too_long` is `raise`.
        """
        n_ctx = config.n_ctx
        # `--max_length` bounds what is trained on; a test row may be as long as the context.
        rows = self._encoded("test", EncodingRules(True, n_ctx, "drop"), config.tokenizer).report.dropped
        if rows and options.too_long == "raise":
            raise UserError(
                f"{len(rows)} test examples are longer than the model's context of {n_ctx} tokens: {name_rows(rows)}; "
                "shorten them, or go on with --too_long drop: what the context has no room for is left out later"
            )
        return rows

    def _encoded(self, name: str, rules: EncodingRules, tokenizer: Tokenizer) -> EncodedSet:
        if isinstance(self.records, RecordFile):
            indices = getattr(self.parts, name)
            return self.records.encode(indices, self.template, tokenizer, rules, name=f"{name} examples")
        return encode(self.part(name), self.template, tokenizer, **asdict(rules))


def load_data(options: TrainOptions, tokenizer: Tokenizer | None = None) -> Data:
    """Reads and splits the data of a run; a large file's records stay in the file (see `fastft.data.token_cache`).

    Args:
        options: of the run.
        tokenizer: the model's, whose end-of-text is looked for in the records; GPT-2's where it is not given.
    """
    began = time.perf_counter()
    rules = options.reading_rules().with_end((tokenizer or gpt2_tokenizer()).end_mark)
    path = data_path(options.data)
    cache = cache_for(path, options.token_cache) if path is not None else None
    found = (
        load_records(options.data, skip_bad_records=options.skip_bad_records, rules=rules)
        if path is None or cache is None
        else RecordFile.open(path, cache, rules)
    )
    records, source = (found, str(path)) if isinstance(found, RecordFile) else (found.good, found.source)
    check_usable(source, len(records), found.bad, skip_bad_records=options.skip_bad_records)
    parts, template = split(len(records), options.split_seed), TEMPLATES[options.template]
    seconds = time.perf_counter() - began
    return Data(source, records, found.bad, parts, template, found.taken_for, seconds, rules.end_marks)


def warn_of_data(options: TrainOptions, data: Data) -> Findings:
    """Warns of what is to be known of a run's data before it is trained on: one line for each thing; returns them."""
    findings = data.audit()
    for line in filter(None, (hidden_path("data", options.data), data.taken_for)):
        warn(line)
    for line in findings.lines():
        warn(f"data: {line}")
    return findings


def data_of(run: Run, moved_to: str | None = None) -> Data:
    """The data that a run was trained on, from the file that it was read from, or that this one is now.

    Raises:
        UserError: it has changed since, or nothing tells whether it has.
    """
    options = run.options()
    data = load_data(options if moved_to is None else replace(options, data=moved_to), run.own_tokenizer())
    if not check_same_data(run, data):
        raise UserError(
            f"{run.data} does not say what {run.folder} was trained on, so that its test split may hold training "
            f"records; write it again with `fastft train --resume --out {run.folder}`"
        )
    return data


def check_same_tokenizer(run: Run, tokenizer: Tokenizer) -> None:
    """Holds a tokenizer against what the run was trained with, as far as the run's folder says it.

    Raises:
        UserError: it is another one: its ids would mean other texts.
    """
    known = files.object_or_empty(run.data).get("tokenizer_sha256")
    if known not in (None, tokenizer.fingerprint()):
        raise UserError(
            f"the tokenizer is not the one that {run.folder} was trained with: its files, or the end-of-text that they "
            f"name, have changed in {run.tokenizer} or {run.model}, or beside the weights; put them back, or train "
            "again with --overwrite"
        )


def check_same_data(run: Run, data: Data) -> bool:
    """Holds data against what the run was trained on; False where the run's folder does not say.

    Raises:
        UserError: it has changed: its split would no longer keep test records out of training.
    """
    known = files.object_or_empty(run.data).get("split_sha256")
    if known is None or known == data.fingerprint():
        return known is not None
    raise UserError(
        f"{data.source} is not what {run.folder} was trained on: its records or their order have changed, so that its "
        "test split may hold training records; put the file back, or train again with --overwrite"
    )


def _of_an_update(line: dict[str, Any]) -> bool:
    return "lr" in line or "losses" in line


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a torn line (its process was killed while writing it) is passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def strict_json(line: dict[str, Any]) -> dict[str, Any]:
    """The line with null in place of numbers that JSON cannot say, infinities and not-a-number, also in its lists."""
    return {
        name: [_finite_or_none(item) for item in value] if isinstance(value, list) else _finite_or_none(value)
        for name, value in line.items()
    }


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """Appends lines to `metrics.jsonl`, each flushed, so that a killed run keeps all but the line being written."""

    def __init__(self, path: Path, *, resume_at: int, evaluated: bool = True) -> None:
        """Keeps the lines up to step `resume_at`, and where it is not `evaluated` of this step the line of its update
        alone: what is behind will be computed again."""

        def is_kept(line: dict[str, Any]) -> bool:
            step = line.get("step", 0)
            return bool(step < resume_at or (step == resume_at and (evaluated or _of_an_update(line))))

        kept = [line for line in read_metrics(path) if is_kept(line)] if resume_at else []
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._path = path
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; check its permissions") from error

    def append(self, line: dict[str, Any]) -> None:
        """Writes one line.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        try:
            self._file.write(json.dumps(strict_json(line)) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; free space and go on with --resume"
            ) from error

    def close(self) -> None:
        """Closes the file. What could not be written has been reported by `append`."""
        with contextlib.suppress(OSError):
            self._file.close()
