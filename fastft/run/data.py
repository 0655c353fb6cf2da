"""The data of a run: its records, split, with the template that makes their text."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from fastft.common.console import warn
from fastft.common.errors import UserError
from fastft.common.keywords import hidden_path
from fastft.data.audit import Findings, audit
from fastft.data.chat_template import AnyTemplate, template_named
from fastft.data.encode import EncodedSet, EncodingRules, encoded_set, name_rows, texts_of
from fastft.data.json_rows import BadRecord
from fastft.data.prompts import RESPONSES
from fastft.data.reading import check_usable, data_path, describe_bad, load_records
from fastft.data.records import ReadingRules, Record, Split, digest_of, split
from fastft.data.token_cache import RecordFile, cache_for, pick
from fastft.data.tokenizer import Tokenizer, gpt2_tokenizer
from fastft.model.gpt2 import GPT2Config
from fastft.run.config import TrainOptions


@dataclass(frozen=True, slots=True)
class Data:
    """The records of a run, split, with the template that makes their text."""

    source: str
    records: list[Record] | RecordFile
    """In memory, or in a large file that is read anew for each use."""
    bad: list[BadRecord]
    """The malformed records that were left out."""
    parts: Split
    template: AnyTemplate
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
        rules = EncodingRules(options.learn(), limit, options.too_long)
        return self._encoded(name, rules, config.tokenizer)

    def longer_than(self, config: GPT2Config, options: TrainOptions) -> list[int]:
        """The test rows that do not fit a model's context with their responses. Training does not read them, but what
        comes after it does: so they are looked at before.

        Raises:
            UserError: there are some, and `--too_long` is `raise`.
        """
        n_ctx = config.n_ctx
        # `--max_length` bounds what is trained on; a test row may be as long as the context.
        rows = self._encoded("test", EncodingRules(RESPONSES, n_ctx, "drop"), config.tokenizer).report.dropped
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
        return encoded_set(texts_of(self.part(name), self.template, rules.learn), tokenizer, rules)


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
    parts, template = split(len(records), options.split_seed), template_named(options.template)
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
